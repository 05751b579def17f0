//! What a person at a terminal sees while a long prompt is read, and how it is broken off.
#![cfg(unix)]

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    process::{Child as Process, Command, Stdio},
};

use sharpi::quant::TensorType;
use vt100::Screen;

use crate::{
    Dir,
    common::gguf_writer::{Format, RandomModel},
    model,
    terminal::{CTRL_C, Terminal},
};

/// A file of a billion weights, all zero, which take no place on a disk: a thread reads a chunk of a prompt in seconds.
fn write_slow_model(dir: &Dir) {
    let small = RandomModel {
        layers: 16,
        ..RandomModel::new("llama", TensorType::IQ1_S)
    };
    let mut file = small.file();
    for (key, value) in [
        ("embedding_length", 2048u32),
        ("feed_forward_length", 8192),
        ("attention.head_count", 32),
        ("context_length", 2048),
    ] {
        file.set(&format!("llama.{key}"), value);
    }
    let mut end = 0;
    for tensor in &mut file.tensors {
        for len in &mut tensor.shape {
            *len = match *len {
                256 => 2048,
                512 => 8192,
                other => other,
            };
        }
        let values: u64 = tensor.shape.iter().product();
        let format = match tensor.shape.len() {
            1 => Format::of(TensorType::F32),
            _ => Format::of(TensorType::IQ1_S),
        };
        tensor.offset = Some(end);
        tensor.data.clear();
        end += (values / format.block_len as u64 * format.block_bytes as u64).next_multiple_of(32);
    }
    let header = file.header();
    let path = dir.file("slow.gguf", &header);
    let file = File::options().write(true).open(path).expect("it is there");
    let end = end + header.len().next_multiple_of(32) as u64;
    file.set_len(end).expect("a file with holes");
}

/// Three chunks.
const PROMPT_LEN: usize = 300;

/// Starts to read a prompt of [`PROMPT_LEN`] tokens, on one thread.
fn read_slowly(dir: &Dir, columns: u16, variables: &[(&str, &str)]) -> Terminal {
    write_slow_model(dir);
    let prompt = "a".repeat(PROMPT_LEN);
    let run = ["run", "-m", "slow.gguf", "--raw", "-p", &prompt, "-n", "1"];
    let machine = ["--device", "cpu", "-t", "1"];
    Terminal::start(dir, &[&run[..], &machine].concat(), columns, variables)
}

/// The line of progress, which is all there is on the screen.
fn line(screen: &Screen) -> Option<String> {
    let text = screen.contents();
    let text = text
        .trim_end()
        .strip_prefix("^C")
        .unwrap_or(text.trim_end());
    let is_alone = !text.is_empty() && !text.contains('\n') && !screen.row_wrapped(0);
    is_alone.then(|| text.to_owned())
}

/// The number before `unit`.
fn number_before(text: &str, unit: &str) -> Option<usize> {
    let (before, _) = text.split_once(unit)?;
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// The tokens of a bar that are read.
fn tokens(screen: &Screen) -> Option<usize> {
    let line = line(screen)?;
    line.starts_with("reading the prompt ").then_some(())?;
    number_before(&line, "/300 tokens")
}

#[test]
fn a_bar_moves_within_a_chunk_and_ctrl_c_ends_it_there() {
    let dir = Dir::new();
    let mut terminal = read_slowly(&dir, 120, &[]);
    let first = terminal.wait(|screen| tokens(screen).filter(|&tokens| tokens > 0));
    let second = terminal.wait(|screen| tokens(screen).filter(|&tokens| tokens > first));
    // Chunks have 128 tokens.
    assert!(first < 128 && second < 128, "{first}, {second}");
    terminal.wait(|screen| line(screen)?.contains("s left").then_some(()));
    terminal.wait(|screen| line(screen)?.contains(" tokens/s, ").then_some(()));
    terminal.press(CTRL_C);
    let (code, screen, _) = terminal.end();
    assert_eq!(code, 130, "{screen}");
    assert!(!screen.contains("reading the prompt"), "{screen}");
    // Those of whole chunks.
    let read = number_before(&screen, " of 300 tokens");
    assert!(matches!(read, Some(0 | 128)), "{screen}");
    assert!(screen.contains("interrupted"), "{screen}");
}

#[test]
fn a_narrow_window_has_a_short_line_and_nothing_is_left_of_it() {
    let dir = Dir::new();
    let mut terminal = read_slowly(&dir, 20, &[]);
    let percent = |screen: &Screen| number_before(&line(screen)?, "%");
    let first = terminal.wait(|screen| percent(screen).filter(|&percent| percent > 0));
    terminal.wait(|screen| percent(screen).filter(|&percent| percent > first));
    terminal.press(CTRL_C);
    let (code, screen, _) = terminal.end();
    assert_eq!(code, 130, "{screen}");
    assert!(!screen.contains('%'), "{screen}");
    let lines: Vec<_> = screen.trim_start().lines().map(str::trim).collect();
    let first = lines[0].strip_prefix("^C").unwrap_or(lines[0]);
    // On a slow machine, another Ctrl-C is offered first.
    assert!(
        ["prompt: ", "stopping;"]
            .iter()
            .any(|said| first.starts_with(said)),
        "{screen}"
    );
}

#[test]
fn another_size_of_the_window_leaves_one_line() {
    let dir = Dir::new();
    let mut terminal = read_slowly(&dir, 120, &[]);
    terminal.wait(tokens);
    for columns in [40, 15, 100] {
        terminal.resize(columns);
        let wide = columns == 100;
        terminal.wait(|screen| {
            let line = line(screen)?;
            let fits = line.chars().count() < columns.into();
            (fits && line.contains('█') == wide).then_some(())
        });
    }
    terminal.press(CTRL_C);
    let (code, screen, _) = terminal.end();
    assert_eq!(code, 130, "{screen}");
    assert!(!screen.contains("reading the prompt"), "{screen}");
}

/// Whether there is a sequence that sets colours, or boldness.
fn has_colors(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let mut sequences = text.split("\x1b[").skip(1);
    sequences.any(|rest| {
        rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';')
            .starts_with('m')
    })
}

#[test]
fn without_colors_there_is_progress_and_on_a_dumb_terminal_none() {
    let dir = Dir::new();
    let mut terminal = read_slowly(&dir, 120, &[("NO_COLOR", "1")]);
    terminal.wait(tokens);
    terminal.press(CTRL_C);
    let (code, screen, bytes) = terminal.end();
    assert_eq!(code, 130, "{screen}");
    assert!(!has_colors(&bytes), "{screen}");

    let mut args = vec!["run", "-m", "slow.gguf", "--raw", "-p", "a", "-n", "1"];
    args.extend(["--device", "cpu", "-t", "1"]);
    let (code, _, bytes) = Terminal::start(&dir, &args, 120, &[("TERM", "dumb")]).end();
    assert_eq!(code, 0);
    assert!(!bytes.contains(&0x1b));
}

#[test]
fn errors_and_warnings_have_colors_on_a_terminal_that_wants_some() {
    let dir = Dir::new();
    let shown = |args: &[&str], variables: &[(&str, &str)]| {
        let (_, _, bytes) = Terminal::start(&dir, args, 120, variables).end();
        String::from_utf8(bytes).expect("UTF-8")
    };
    let clap = shown(&["run", "--bogus"], &[]);
    let (mark, _) = clap.split_once("error:").expect("an error");
    assert!(has_colors(mark.as_bytes()), "{clap}");
    for args in [
        &["run", "-p", "x", "-m", "missing.gguf"][..],
        &["tokenize", "--no-think", "-p", "x"],
    ] {
        for variables in [&[][..], &[("NO_COLOR", "")]] {
            let ours = shown(args, variables);
            assert!(ours.starts_with(&format!("{mark}error:")), "{ours}");
        }
        let plain = shown(args, &[("NO_COLOR", "1")]);
        assert!(
            plain.starts_with("error: ") && !has_colors(plain.as_bytes()),
            "{plain}"
        );
    }
    let far = ["run", "-p", "x", "-n", "1", "-c", "4096"];
    let warned = shown(&far, &[]);
    let warning = warned.lines().find(|line| line.contains("warning:"));
    assert!(
        has_colors(warning.expect("a warning").as_bytes()),
        "{warned}"
    );
    assert!(!has_colors(shown(&far, &[("NO_COLOR", "1")]).as_bytes()));
}

/// A run whose standard output takes nothing, and that is about to write the first token.
#[cfg(target_os = "linux")]
fn stuck(dir: &Dir, verbosity: &str) -> (Process, BufReader<std::process::ChildStderr>) {
    dir.file("m.gguf", model::endless(1000));
    let (_reader, mut writer) = std::io::pipe().expect("a pipe");
    // All that a pipe holds, but for the first token.
    writer.write_all(&[0; (1 << 16) - 1]).expect("filling it");
    let run = [
        "run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0", verbosity,
    ];
    let mut child = dir
        .command(&run)
        .stdout(writer)
        .spawn()
        .expect("starting sharpi");
    let stderr = child.stderr.take().expect("standard error is piped");
    // The pipe is as full for as long as somebody could read it.
    std::mem::forget(_reader);
    (child, BufReader::new(stderr))
}

#[cfg(target_os = "linux")]
fn interrupt(child: &Process) {
    let pid = child.id().to_string();
    let sent = Command::new("kill")
        .args(["-s", "INT", &pid])
        .stdin(Stdio::null())
        .status();
    assert!(sent.expect("starting kill").success());
}

#[test]
#[cfg(target_os = "linux")]
fn where_ctrl_c_takes_long_a_second_one_ends_at_once_as_is_said() {
    let dir = Dir::new();
    let (mut child, stderr) = stuck(&dir, "-v");
    let mut lines = stderr.lines().map(|line| line.expect("UTF-8"));
    lines
        .find(|line| line.contains("chooses the tokens"))
        .expect("it comes behind the first token");
    interrupt(&child);
    let said = lines.next().expect("it says something");
    assert_eq!(said, "stopping; press Ctrl-C again to quit at once");
    assert!(
        child.try_wait().expect("asking").is_none(),
        "it is still stopping"
    );
    interrupt(&child);
    assert_eq!(child.wait().expect("its end").code(), Some(130));
    assert_eq!(lines.next(), None);
}

//! Readers that go away, outputs that are full or closed, files that are cut short, Ctrl-C and other signals.
#![cfg(unix)]

use std::{
    fs::OpenOptions,
    io::Read,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use crate::{Dir, Ran, json::Lines, model};

/// Starts a run that goes on for as long as a test cares to wait, and waits for its first `bytes` of output.
fn endless(dir: &Dir, args: &[&str], bytes: usize) -> (Child, Vec<u8>) {
    dir.file("m.gguf", model::endless(200_000));
    let fixed = ["run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0"];
    let mut child = dir
        .command(&[&fixed[..], args].concat())
        .spawn()
        .expect("starting sharpi");
    let mut first = vec![0; bytes];
    let stdout = child.stdout.as_mut().expect("standard output is piped");
    stdout
        .read_exact(&mut first)
        .expect("sharpi writes as it goes");
    (child, first)
}

pub fn send(signal: &str, child: &Child) {
    let pid = child.id().to_string();
    let sent = Command::new("kill")
        .args(["-s", signal, &pid])
        .status()
        .expect("starting kill");
    assert!(sent.success());
}

/// Interrupts the run and returns all that it wrote.
fn interrupt((child, first): (Child, Vec<u8>)) -> Ran {
    send("INT", &child);
    rest((child, first))
}

/// Waits for the end of the run and returns all that it wrote.
fn rest((mut child, first): (Child, Vec<u8>)) -> Ran {
    let mut stdout = first;
    child
        .stdout
        .take()
        .expect("still there")
        .read_to_end(&mut stdout)
        .expect("reading the rest");
    let mut output = child.wait_with_output().expect("waiting for sharpi");
    output.stdout = stdout;
    Ran::from(output)
}

#[test]
fn text_is_flushed_as_it_comes() {
    // Reading the first byte returns only if it was flushed while the run went on.
    let dir = Dir::new();
    let (mut child, first) = endless(&dir, &[], 1);
    assert_eq!(first, b"b");
    assert_eq!(child.try_wait().expect("asking for its state"), None);
    child.kill().expect("ending the run");
    child.wait().expect("waiting for sharpi");
}

#[test]
fn a_closed_pipe_ends_quietly_with_0() {
    for args in [&[][..], &["--json"]] {
        let (mut child, _) = endless(&Dir::new(), args, 1);
        drop(child.stdout.take());
        let ran = Ran::from(child.wait_with_output().expect("waiting for sharpi"));
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn ctrl_c_ends_the_text_cleanly_with_statistics_and_130() {
    let ran = interrupt(endless(&Dir::new(), &[], 4));
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    let text = ran
        .stdout
        .strip_suffix('\n')
        .expect("the text ends with a newline");
    assert!(text.starts_with("bcbc"));
    assert!(
        text.bytes().all(|byte| matches!(byte, b'b' | b'c')),
        "no second newline"
    );
    assert!(
        ran.stderr
            .lines()
            .last()
            .is_some_and(|line| line.starts_with("prompt: 1 tokens")),
        "{}",
        ran.stderr
    );
}

#[test]
fn ctrl_c_ends_json_with_a_done_event() {
    let mut ran = interrupt(endless(&Dir::new(), &["--json"], 4));
    assert_eq!(ran.code.take(), Some(130), "{}", ran.stderr);
    let lines = Lines::parse(&ran.stdout);
    assert_eq!(lines.done["finish_reason"], "interrupted");
    assert_eq!(lines.done["generated_tokens"], lines.tokens.len());
    assert_eq!(lines.done["text"], lines.token_text());
}

#[test]
fn ctrl_c_before_the_answer_matches_says_that_it_does_not() {
    let ran = interrupt(endless(&Dir::new(), &["--regex", "[bc]*d"], 4));
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    let last = ran.stderr.lines().last().expect("a message");
    assert!(last.contains("only the beginning of"), "{last}");
    let ran = interrupt(endless(&Dir::new(), &["--regex", "[bc]*"], 4));
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    assert!(!ran.stderr.contains("beginning"), "{}", ran.stderr);
}

/// Every command that writes, with the files of [`dir`] beside it.
const WRITERS: &[&[&str]] = &[
    &["run", "-p", "x", "-n", "3"],
    &["run", "-p", "x", "-n", "3", "--json"],
    &["batch", "-i", "prompts", "-n", "3"],
    &["tokenize", "-p", "x"],
    &["tokenize", "-p", "x", "--json"],
    &["info"],
    &["info", "--json"],
    &["bench", "-p", "1", "-n", "0", "-r", "1", "--device", "cpu"],
    &[
        "bench", "-p", "1", "-n", "0", "-r", "1", "--device", "cpu", "--json",
    ],
    &["perplexity", "-f", "text", "-c", "4", "--device", "cpu"],
    &["devices"],
    &["--version"],
    &["help"],
];

#[cfg(target_os = "linux")]
fn dir() -> Dir {
    let dir = Dir::new();
    dir.file("text", "Once upon a time");
    dir.file("prompts", "{\"prompt\":\"x\"}");
    dir
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_a_failure_with_a_message() {
    let dir = dir();
    for args in WRITERS {
        let full = OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .expect("Linux has /dev/full");
        let output = dir
            .command(args)
            .stdout(full)
            .output()
            .expect("starting sharpi");
        let ran = Ran::from(output);
        let message = ran.error(1);
        assert!(
            message.contains("standard output") && message.contains("No space left"),
            "{args:?}: {message}"
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_standard_error_that_cannot_be_written_to_is_no_panic() {
    let dir = Dir::new();
    let full = || {
        Stdio::from(
            OpenOptions::new()
                .write(true)
                .open("/dev/full")
                .expect("Linux has /dev/full"),
        )
    };
    let run = |args: &[&str]| {
        dir.command(args)
            .stderr(full())
            .output()
            .expect("starting sharpi")
    };
    let good = run(&["run", "-p", "x", "-n", "3", "-v"]);
    assert_eq!(good.status.code(), Some(0));
    assert!(!good.stdout.is_empty());
    assert_eq!(
        run(&["run", "-p", "x", "-m", "missing.gguf"]).status.code(),
        Some(1)
    );
    assert_eq!(run(&["run"]).status.code(), Some(2));
}

/// `sharpi` with these arguments, started by a shell after `setup`, with `redirection`.
fn under_shell(dir: &Dir, setup: &str, args: &[&str], redirection: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{setup} exec \"$0\" \"$@\" {redirection}")])
        .arg(env!("CARGO_BIN_EXE_sharpi"))
        .args(args)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
#[cfg(target_os = "linux")]
fn a_closed_standard_output_is_a_failure_and_the_null_device_is_not() {
    let dir = dir();
    let run = |args: &[&str], redirection: &str| {
        let output = under_shell(&dir, "", args, redirection).output();
        Ran::from(output.expect("starting sh"))
    };
    for args in WRITERS {
        for unwritable in [">&-", "1< /dev/null"] {
            let ran = run(args, unwritable);
            let message = ran.error(1);
            assert!(
                message.contains("standard output is closed, or not open for writing"),
                "{args:?} {unwritable}: {message}"
            );
        }
        run(args, "> /dev/null").stdout();
    }
    // As Rust opens it in place of what was closed, and daemons for themselves.
    run(&["devices"], "1<> /dev/null").stdout();
    // What goes to standard error needs no standard output.
    assert!(run(&["run"], ">&-").error(2).contains("no prompt"));
    assert!(run(&["--bogus"], ">&-").error(2).contains("--bogus"));
}

#[test]
fn signals_that_the_parent_ignores_stay_ignored() {
    for signal in ["INT", "HUP", "TERM"] {
        let dir = Dir::new();
        dir.file("m.gguf", model::endless(200_000));
        let run = [
            "run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0", "-n", "60",
        ];
        let mut child = under_shell(&dir, &format!("trap '' {signal};"), &run, "")
            .spawn()
            .expect("starting sh");
        let mut first = vec![0];
        let stdout = child.stdout.as_mut().expect("standard output is piped");
        stdout
            .read_exact(&mut first)
            .expect("sharpi writes as it goes");
        send(signal, &child);
        let ran = rest((child, first));
        assert_eq!(ran.stdout().len(), 61, "{signal}");
    }
}

#[test]
fn signals_that_nobody_ignores_end_the_process_as_ever() {
    for (signal, number) in [("HUP", 1), ("TERM", 15)] {
        let dir = Dir::new();
        let (child, _) = endless(&dir, &[], 1);
        send(signal, &child);
        let output = child.wait_with_output().expect("waiting for sharpi");
        assert_eq!(output.status.signal(), Some(number));
    }
}

#[test]
fn ctrl_c_ends_perplexity_with_130() {
    let dir = Dir::new();
    dir.file("m.gguf", model::endless(64));
    dir.file("text", "x".repeat(4 << 20));
    let child = dir
        .command(&[
            "perplexity",
            "-m",
            "m.gguf",
            "-f",
            "text",
            "-c",
            "64",
            "--device",
            "cpu",
        ])
        .spawn()
        .expect("starting sharpi");
    // Wherever it is by then, there are windows left.
    thread::sleep(Duration::from_millis(700));
    let ran = interrupt((child, Vec::new()));
    assert_eq!(ran.code, Some(130), "{ran:?}");
    assert!(
        ran.stdout.is_empty() || ran.stdout.starts_with("perplexity "),
        "{ran:?}"
    );
}

/// Weights are read from the mapped file for every token.
#[test]
#[cfg(target_os = "linux")]
fn a_model_file_that_is_cut_short_meanwhile_is_a_failure_with_a_message() {
    for args in [
        &["--device", "cpu"][..],
        &["--device", "cpu", "--json", "-t", "1"],
    ] {
        let dir = Dir::new();
        let run = endless(&dir, args, 1);
        let file = OpenOptions::new()
            .write(true)
            .open(dir.path().join("m.gguf"));
        file.expect("it is there")
            .set_len(4096)
            .expect("cutting it short");
        let ran = rest(run);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let errors: Vec<_> = ran.stderr.lines().collect();
        assert_eq!(errors.len(), 1, "{}", ran.stderr);
        assert!(
            errors[0].starts_with("error: \"m.gguf\"") && errors[0].contains("cut short"),
            "{}",
            ran.stderr
        );
    }
}

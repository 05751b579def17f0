//! Readers that go away, disks that are full, and Ctrl-C.
#![cfg(unix)]

use std::{
    fs::OpenOptions,
    io::Read,
    process::{Child, Command, Stdio},
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

/// Interrupts the run and returns all that it wrote.
fn interrupt((mut child, first): (Child, Vec<u8>)) -> Ran {
    let pid = child.id().to_string();
    let sent = Command::new("kill")
        .args(["-INT", &pid])
        .status()
        .expect("starting kill");
    assert!(sent.success());
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
#[cfg(target_os = "linux")]
fn a_full_disk_is_a_failure_with_a_message() {
    let dir = Dir::new();
    let commands: &[&[&str]] = &[
        &["run", "-p", "x", "-n", "3"],
        &["run", "-p", "x", "-n", "3", "--json"],
        &["tokenize", "-p", "x"],
        &["tokenize", "-p", "x", "--json"],
        &["info"],
        &["info", "--json"],
        &["devices"],
        &["--version"],
        &["help"],
    ];
    for args in commands {
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

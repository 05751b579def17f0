//! `--prompt-cache`: it changes how long a text takes, not the text, and never costs a file that it did not write itself.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Dir, Ran,
    common::gguf_writer::{RandomModel, byte_vocabulary},
    json::Lines,
    model,
};
use sharpi::quant::TensorType;

/// A token for each byte, but for a few merges.
const PROMPT: &str = " the fox in the woods.";

fn random_model(seed: u64) -> Vec<u8> {
    let random = RandomModel {
        vocabulary: byte_vocabulary(),
        context_length: 2048,
        seed,
        ..RandomModel::new("qwen3", TensorType::Q8_0)
    };
    random.file().to_bytes()
}

/// A directory with a model `m.gguf` and what is run there.
struct Runs {
    dir: Dir,
    flags: Vec<&'static str>,
}

impl Runs {
    fn new(flags: &[&'static str]) -> Self {
        let dir = Dir::new();
        dir.file("m.gguf", random_model(1));
        Self {
            dir,
            flags: flags.to_vec(),
        }
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.cache()).expect("the cache is there")
    }

    fn args<'a>(&'a self, prompt: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let fixed = ["run", "-m", "m.gguf", "--device", "cpu", "-c", "1500"];
        let text = ["-n", "6", "--ignore-eos", "--temp", "0", "--json", "--raw"];
        let prompt = ["-p", prompt];
        [&fixed[..], &text, &self.flags, &prompt, more].concat()
    }

    fn run(&self, prompt: &str, more: &[&str]) -> Ran {
        self.dir.run(&self.args(prompt, more))
    }

    /// The ids that follow `prompt`, and how many of its tokens came from the cache.
    #[track_caller]
    fn cached(&self, prompt: &str, more: &[&str]) -> (Vec<u64>, u64) {
        let ran = self.run(prompt, &[&["--prompt-cache", "cache"], more].concat());
        assert!(!ran.stderr.contains("warning"), "{}", ran.stderr);
        result(&ran)
    }

    #[track_caller]
    fn plain(&self, prompt: &str) -> Vec<u64> {
        result(&self.run(prompt, &[])).0
    }

    /// A run that refuses the cache, says that it does, and writes what it would have without one.
    #[track_caller]
    fn refused(&self, more: &[&str], reason: &str) {
        let plain = result(&self.run(PROMPT, more)).0;
        let cache = ["--prompt-cache", "cache"];
        let ran = self.run(PROMPT, &[more, &cache].concat());
        assert_eq!(result(&ran), (plain, 0));
        let warning = ran
            .stderr
            .lines()
            .find(|line| line.starts_with("warning: "));
        let warning = warning.unwrap_or_else(|| panic!("no warning: {}", ran.stderr));
        assert!(
            warning.contains("cache is not used: ") && warning.contains(reason),
            "{warning}"
        );
        assert!(warning.ends_with("; it will be replaced"), "{warning}");
        // It was.
        assert_eq!(
            result(&self.run(PROMPT, &[more, &cache].concat())).1,
            tokens(PROMPT)
        );
    }
}

#[track_caller]
fn result(ran: &Ran) -> (Vec<u64>, u64) {
    let lines = Lines::parse(ran.stdout());
    let ids = lines.tokens.iter().map(|token| token["id"].as_u64());
    let cached = lines.done["cached_tokens"].as_u64();
    (
        ids.map(|id| id.expect("an id")).collect(),
        cached.expect("a number"),
    )
}

/// Of `text` in the byte vocabulary.
fn tokens(text: &str) -> u64 {
    let ran = Runs::new(&[]).run(text, &[]);
    let start = &Lines::parse(ran.stdout()).start;
    start["prompt_ids"].as_array().expect("ids").len() as u64
}

#[test]
fn the_text_is_that_without_a_cache() {
    let flags: [&[&str]; 2] = [&[], &["--kv-type", "k4v4"]];
    for flags in flags {
        let runs = Runs::new(flags);
        let long = PROMPT.repeat(30);
        let (len, all) = (tokens(PROMPT), tokens(&long));
        let longer = format!("{long} and on");
        let parts = format!("{} quite other words", PROMPT.repeat(29));
        let shorter = PROMPT.repeat(29);
        assert_eq!(runs.cached(&long, &[]), (runs.plain(&long), 0));
        assert_eq!(runs.cached(&long, &[]), (runs.plain(&long), all));
        assert_eq!(runs.cached(&longer, &[]), (runs.plain(&longer), all));
        // The whole of it is there now, and stays for the shorter one.
        let before = runs.bytes();
        let (ids, cached) = runs.cached(&long, &[]);
        assert_eq!((ids, cached), (runs.plain(&long), all - 1));
        let (ids, cached) = runs.cached(&shorter, &[]);
        assert_eq!((ids, cached), (runs.plain(&shorter), all - len - 1));
        assert!(runs.bytes() == before);
        let (ids, cached) = runs.cached(&parts, &[]);
        assert_eq!((ids, cached), (runs.plain(&parts), all - len));
        assert!(runs.bytes() != before);
    }
}

#[test]
fn with_a_budget_a_prompt_goes_on_behind_what_stayed_of_it() {
    let runs = Runs::new(&["--kv-budget", "68"]);
    let long = PROMPT.repeat(30);
    let all = tokens(&long);
    assert_eq!(runs.cached(&long, &[]), (runs.plain(&long), 0));
    assert_eq!(runs.cached(&long, &[]), (runs.plain(&long), all));
    let longer = format!("{long} and on");
    let ran = runs.run(&longer, &["--prompt-cache", "cache"]);
    assert_eq!(result(&ran).1, all);
    let note = format!("goes on behind what --kv-budget 68 kept of its first {all} tokens");
    assert!(ran.stderr.contains(&note), "{}", ran.stderr);
    // Of its beginning too little is left.
    let shorter = PROMPT.repeat(29);
    assert_eq!(runs.cached(&shorter, &[]), (runs.plain(&shorter), 0));
    assert_eq!(runs.cached(&shorter, &[]).1, tokens(&shorter));
}

#[test]
fn messages_say_what_came_from_where() {
    let dir = Dir::new();
    let run = |prompt: &str, more: &[&str]| {
        let fixed = ["run", "--raw", "-n", "2", "--prompt-cache", "it"];
        let ran = dir.run(&[&fixed[..], &["-p", prompt], more].concat());
        ran.stdout();
        ran.stderr
    };
    let first = run("Once upon a time", &["-v"]);
    assert!(first.contains("bytes written to it"), "{first}");
    let again = run("Once upon a time", &["-v"]);
    assert!(
        again.contains("debug: prompt cache: 4 of 4 tokens from it"),
        "{again}"
    );
    assert!(
        again.contains("prompt: 4 tokens, all from the prompt cache; generated: 2"),
        "{again}"
    );
    assert!(!again.contains("written"), "{again}");
    let longer = run("Once upon a time there was", &[]);
    assert!(
        longer.contains("prompt: 6 tokens, 4 from the prompt cache, "),
        "{longer}"
    );
    assert!(!longer.contains("prompt cache: "), "{longer}");
}

#[test]
fn a_file_for_another_run_is_refused() {
    let runs = Runs::new(&[]);
    runs.cached(PROMPT, &[]);
    let (freq, scale) = (
        &["--rope-freq-base", "5000"],
        &["--rope-scale", "2", "--rope-scaling", "linear"],
    );
    runs.refused(freq, "other --rope-* and --yarn-* options");
    runs.refused(scale, "other --rope-* and --yarn-* options");
    runs.refused(
        &["--kv-type", "k4v4"],
        r#"its --kv-type is "f32", and this run's is "k4v4""#,
    );
    runs.refused(
        &["--kv-type", "k4v4", "--kv-budget", "99"],
        "its --kv-budget is none, and this run's is 99",
    );
    runs.dir.file("m.gguf", random_model(2));
    runs.refused(
        &["--kv-type", "k4v4", "--kv-budget", "99"],
        "it belongs to another model",
    );
    // Not enough room for all of it.
    let long = PROMPT.repeat(30);
    let flags = ["--kv-type", "k4v4", "--kv-budget", "99"];
    runs.cached(&long, &flags);
    let short = ["--kv-type", "k4v4", "--kv-budget", "99", "-c", "390"];
    let ran = runs.run(PROMPT, &[&short[..], &["--prompt-cache", "cache"]].concat());
    assert_eq!(result(&ran).1, 0);
    assert!(ran.stderr.contains("it holds "), "{}", ran.stderr);
}

#[test]
fn a_damaged_file_is_refused_and_replaced() {
    let runs = Runs::new(&[]);
    runs.cached(PROMPT, &[]);
    let whole = runs.bytes();
    for (at, reason) in [
        (17, "it is of version 257, and this sharpi reads version 1"),
        (30, "its first bytes do not match their checksum"),
        (60, "its header does not match its checksum"),
        (
            whole.len() / 2,
            "what follows byte 0 of its body does not match its checksum",
        ),
        (whole.len() - 1, "does not match its checksum"),
    ] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        runs.dir.file("cache", damaged);
        runs.refused(&[], reason);
    }
    for len in [3, 16, 40, 48, 100, whole.len() / 2, whole.len() - 1] {
        runs.dir.file("cache", &whole[..len]);
        runs.refused(&[], "it is damaged: it ");
    }
    assert!(runs.bytes() == whole);
    // As `mktemp` makes it.
    runs.dir.file("cache", "");
    assert_eq!(runs.cached(PROMPT, &[]).1, 0);
    assert!(runs.bytes() == whole);
}

#[test]
fn a_read_only_cache_is_never_written() {
    let runs = Runs::new(&[]);
    let only = ["--prompt-cache", "cache", "--prompt-cache-ro"];
    let ran = runs.run(PROMPT, &only);
    assert!(
        ran.stderr
            .contains("warning: there is no prompt cache cache to read"),
        "{}",
        ran.stderr
    );
    assert_eq!(result(&ran), (runs.plain(PROMPT), 0));
    assert!(!runs.cache().exists());
    runs.cached(PROMPT, &[]);
    let state = || {
        let modified = fs::metadata(runs.cache()).and_then(|kind| kind.modified());
        (modified.expect("a time"), runs.bytes())
    };
    let before = state();
    let longer = format!("{PROMPT} and on");
    for _ in 0..2 {
        let (ids, cached) = runs.cached(&longer, &["--prompt-cache-ro"]);
        assert_eq!((ids, cached), (runs.plain(&longer), tokens(PROMPT)));
    }
    let other = runs.run(PROMPT, &[&only[..], &["--kv-budget", "68"]].concat());
    let warning = other
        .stderr
        .lines()
        .find(|line| line.starts_with("warning: "));
    assert!(
        warning.is_some_and(|line| line.ends_with("this run's is 68")),
        "{}",
        other.stderr
    );
    assert!(state() == before);
    let ran = runs.dir.run(&["run", "-p", "x", "--prompt-cache-ro"]);
    assert!(ran.error(2).contains("--prompt-cache <FILE>"), "{ran:?}");
}

#[test]
fn other_files_are_left_alone() {
    let runs = Runs::new(&[]);
    runs.dir.file("notes.txt", "sharpi notes");
    for (name, reason) in [
        (
            "notes.txt",
            "it is something else than a prompt cache, and stays as it is",
        ),
        (
            "m.gguf",
            "it is something else than a prompt cache, and stays as it is",
        ),
        (".", "it is not a regular file"),
        ("nowhere/cache", "there is no directory nowhere"),
    ] {
        for more in [&[][..], &["--prompt-cache-ro"]] {
            let ran = runs.run(PROMPT, &[&["--prompt-cache", name], more].concat());
            let error = ran.error(1);
            assert!(
                error.contains(&format!("--prompt-cache {name}: {reason}")),
                "{error}"
            );
        }
    }
    let notes = fs::read_to_string(runs.dir.path().join("notes.txt"));
    assert_eq!(notes.expect("still there"), "sharpi notes");
    assert!(fs::read(runs.dir.path().join("m.gguf")).expect("still there") == random_model(1));
}

/// A prompt that is read is kept, however its text ends, and one whose reading ends is not.
#[cfg(unix)]
mod endings {
    use std::{
        fs::Permissions,
        io::Read,
        os::unix::fs::{PermissionsExt, symlink},
        process::{Child, Command},
    };

    use super::*;

    /// Starts a text without end, and waits for its first byte.
    fn endless(dir: &Dir) -> Child {
        dir.file("m.gguf", model::endless(200_000));
        let args = ["run", "-m", "m.gguf", "--raw", "-p", "a", "--temp", "0"];
        let cache = ["--prompt-cache", "cache"];
        let mut child = dir
            .command(&[&args[..], &cache].concat())
            .spawn()
            .expect("starting sharpi");
        let stdout = child.stdout.as_mut().expect("standard output is piped");
        stdout
            .read_exact(&mut [0])
            .expect("sharpi writes as it goes");
        child
    }

    #[track_caller]
    fn assert_kept(dir: &Dir) {
        let args = [
            "run", "-m", "m.gguf", "--raw", "-p", "a", "-n", "1", "--json",
        ];
        let cache = ["--prompt-cache", "cache", "--prompt-cache-ro"];
        assert_eq!(result(&dir.run(&[&args[..], &cache].concat())).1, 1);
    }

    #[test]
    fn ctrl_c_in_a_text_keeps_its_prompt() {
        let dir = Dir::new();
        let mut child = endless(&dir);
        let pid = child.id().to_string();
        let sent = Command::new("kill").args(["-s", "INT", &pid]).status();
        assert!(sent.expect("starting kill").success());
        let mut rest = Vec::new();
        let stdout = child.stdout.as_mut().expect("still there");
        stdout.read_to_end(&mut rest).expect("reading the rest");
        assert_eq!(child.wait().expect("waiting for sharpi").code(), Some(130));
        assert_kept(&dir);
    }

    #[test]
    fn a_reader_that_leaves_keeps_its_prompt() {
        let dir = Dir::new();
        let mut child = endless(&dir);
        drop(child.stdout.take());
        let ran = Ran::from(child.wait_with_output().expect("waiting for sharpi"));
        assert_eq!((ran.code, &ran.stderr[..]), (Some(0), ""));
        assert_kept(&dir);
    }

    #[test]
    fn a_prompt_alone_can_be_kept() {
        let runs = Runs::new(&[]);
        assert_eq!(runs.cached(PROMPT, &["-n", "0"]), (Vec::new(), 0));
        assert_eq!(
            runs.cached(PROMPT, &[]),
            (runs.plain(PROMPT), tokens(PROMPT))
        );
    }

    #[test]
    fn links_and_permissions_stay() {
        let runs = Runs::new(&[]);
        runs.cached(PROMPT, &[]);
        let mode = |path: &Path| {
            fs::metadata(path)
                .expect("it is there")
                .permissions()
                .mode()
                & 0o777
        };
        // Prompts are nobody else's business.
        assert_eq!(mode(&runs.cache()), 0o600);
        let real = runs.dir.path().join("real");
        fs::rename(runs.cache(), &real).expect("renaming");
        fs::set_permissions(&real, Permissions::from_mode(0o640)).expect("setting a mode");
        symlink("real", runs.cache()).expect("linking");
        let longer = format!("{PROMPT} and on");
        runs.cached(&longer, &[]);
        assert!(
            fs::symlink_metadata(runs.cache())
                .expect("it is there")
                .is_symlink()
        );
        assert_eq!(mode(&real), 0o640);
        assert_eq!(runs.cached(&longer, &[]).1, tokens(&longer));
    }

    /// A run whose file cannot be written: the text is there, the error too, and the old file is as it was.
    #[track_caller]
    fn assert_not_written(runs: &Runs, ran: &Ran, name: &str, reason: &str, files: usize) {
        assert_eq!(ran.code, Some(1), "{ran:#?}");
        let lines = Lines::parse(&ran.stdout);
        assert_eq!(lines.tokens.len(), 6);
        let expected = format!("error: the prompt cache {name} was not written: {reason}");
        assert!(ran.stderr.contains(&expected), "{}", ran.stderr);
        let entries = fs::read_dir(runs.dir.path()).expect("reading the directory");
        assert_eq!(entries.count(), files, "nothing is left behind");
    }

    #[test]
    fn what_cannot_be_written_is_said_behind_the_text() {
        let runs = Runs::new(&[]);
        runs.cached(PROMPT, &[]);
        let before = runs.bytes();
        let longer = PROMPT.repeat(3);
        // What a full disk does, at another size.
        let limited = "ulimit -f 20; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", limited, env!("CARGO_BIN_EXE_sharpi")]);
        command.args(runs.args(&longer, &["--prompt-cache", "cache"]));
        command.current_dir(runs.dir.path());
        let ran = Ran::from(command.output().expect("starting sh"));
        assert_not_written(&runs, &ran, "cache", "File too large", 2);
        assert!(runs.bytes() == before);

        fs::set_permissions(runs.cache(), Permissions::from_mode(0o444)).expect("setting a mode");
        let ran = runs.run(&longer, &["--prompt-cache", "cache"]);
        assert_not_written(&runs, &ran, "cache", "it is write-protected", 2);
        assert!(runs.bytes() == before);
        assert_eq!(runs.cached(PROMPT, &[]).1, tokens(PROMPT));

        if cfg!(target_os = "linux") {
            // Nobody can make a file there.
            let ran = runs.run(&longer, &["--prompt-cache", "/proc/cache"]);
            assert_not_written(&runs, &ran, "/proc/cache", "", 2);
        }
    }
}

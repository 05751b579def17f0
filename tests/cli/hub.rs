//! Models from a hub: found, downloaded, resumed, checked, and what happens where the hub or the way to it fails.

mod server;

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::Duration,
};

use sharpi::quant::TensorType;

use crate::{Dir, Ran, common::gguf_writer::RandomModel, json::valid, sharpi};
use server::{FakeHub, Fault, Hosted, SIGNATURE, sha256};

const DEMO: &[u8] = include_bytes!("../../assets/stories-10m-q4_k_m.gguf");
const NAME: &str = "stories-10m-q4_k_m.gguf";
const TOKEN: &str = "hf_topsecret";
/// What a model is for a test that does not run it.
const SMALL: &[u8] = b"GGUF and what else there is in a file";

fn demo_hub() -> FakeHub {
    FakeHub::new([
        Hosted::new(NAME, DEMO),
        Hosted::small("README.md", "no model"),
    ])
}

fn small_hub() -> FakeHub {
    FakeHub::new([Hosted::new("m-Q4_K_M.gguf", SMALL)])
}

/// `sharpi` with the cache below `dir`, and an environment in which nothing else says anything about a hub.
fn command(dir: &Dir, address: &str, args: &[&str]) -> Command {
    let mut command = dir.command(args);
    for name in [
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "SHARPI_MODEL",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", address)
        .env("HF_HOME", dir.path().join("hf"));
    command
}

fn run(dir: &Dir, hub: &FakeHub, args: &[&str]) -> Ran {
    finish(command(dir, &hub.address, args))
}

fn finish(mut command: Command) -> Ran {
    Ran::from(command.output().expect("starting sharpi"))
}

fn pull(dir: &Dir, hub: &FakeHub) -> Ran {
    run(dir, hub, &["pull", "hf:test/demo"])
}

/// The cache's directory of the repository.
fn cached(dir: &Dir) -> PathBuf {
    dir.path().join("hf/hub/models--test--demo")
}

fn blob(dir: &Dir, bytes: &[u8]) -> PathBuf {
    cached(dir).join("blobs").join(sha256(bytes))
}

fn part(dir: &Dir, bytes: &[u8]) -> PathBuf {
    blob(dir, bytes).with_extension("incomplete")
}

/// Leaves `left` as what an earlier download got of `bytes`.
fn leave_part(dir: &Dir, bytes: &[u8], left: &[u8]) {
    let path = part(dir, bytes);
    fs::create_dir_all(path.parent().expect("it is in blobs")).expect("making the cache");
    fs::write(path, left).expect("writing a part");
}

/// Asserts that `path`, printed by a command, is a file with these bytes.
#[track_caller]
fn assert_file(ran: &Ran, bytes: &[u8]) {
    let path = ran.stdout().strip_suffix('\n').expect("a line");
    assert!(fs::read(path).expect("it is there") == bytes, "{path}");
}

/// Asserts that there is no model in the cache.
#[track_caller]
fn assert_nothing_usable(dir: &Dir, hub: &FakeHub) {
    let message = run(dir, hub, &["info", "--offline", "-m", "hf:test/demo"]);
    assert!(message.error(1).contains("not in the cache"), "{message:?}");
    assert!(!cached(dir).join("snapshots").exists());
}

#[test]
fn a_model_is_downloaded_once_and_runs() {
    let (dir, hub) = (Dir::new(), demo_hub());
    let text = ["-p", "A fox", "-n", "8", "--temp", "0", "--device", "cpu"];
    let built_in = dir.run(&[&["run"], &text[..]].concat());
    let args = [&["run", "-m", "hf:test/demo"], &text[..]].concat();
    let first = run(&dir, &hub, &args);
    assert_eq!(first.stdout(), built_in.stdout());
    assert!(
        first
            .stderr
            .contains("downloading hf:test/demo:Q4_K_M: 6.04 MiB"),
        "{first:?}"
    );
    assert_eq!(hub.requests().len(), 3, "the list, the redirect, the file");

    // Where huggingface_hub has it, too.
    let revision = "a".repeat(40);
    assert!(fs::read(blob(&dir, DEMO)).expect("a blob") == DEMO);
    let link = cached(&dir).join("snapshots").join(&revision).join(NAME);
    assert!(fs::read(&link).expect("a link") == DEMO);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(link).expect("a link"),
        Path::new("../../blobs").join(sha256(DEMO))
    );
    assert_eq!(
        fs::read_to_string(cached(&dir).join("refs/main")).expect("a reference"),
        revision
    );

    let short = [
        "run",
        "hf:test/demo:q4_k_m",
        "A fox",
        "-n",
        "8",
        "--temp",
        "0",
        "--device",
        "cpu",
    ];
    assert_eq!(run(&dir, &hub, &short).stdout(), built_in.stdout());
    let mut by_variable = command(&dir, &hub.address, &[&["run"], &text[..]].concat());
    by_variable.env("SHARPI_MODEL", "hf:test/demo");
    assert_eq!(finish(by_variable).stdout(), built_in.stdout());
    for args in [
        &["info", "-m", "hf:test/demo"][..],
        &[
            "tokenize",
            "-p",
            "x",
            "-m",
            "hf:test/demo:stories-10m-q4_k_m.gguf",
        ],
    ] {
        run(&dir, &hub, args).stdout();
    }
    assert_eq!(hub.requests().len(), 0);
}

#[test]
fn wrong_references_are_wrong_usage_and_no_connection_is_made() {
    let (dir, hub) = (Dir::new(), demo_hub());
    for args in [
        &["run", "-p", "x", "-m", "hf:demo"][..],
        &["info", "-m", "hf:test/../demo"],
        &["run", "hf:test/demo:../../etc/x.gguf", "x"],
        &["pull", "demo"],
        &["pull", "hf:test/demo:"],
    ] {
        let ran = run(&dir, &hub, args);
        assert!(ran.error(2).contains("hf:OWNER/REPO"), "{args:?}: {ran:?}");
    }
    // Other mistakes come before a download.
    run(&dir, &hub, &["run", "-m", "hf:test/demo", "--system", "x"]).error(2);
    assert_eq!(hub.requests().len(), 0);
    // A file may have such a name.
    dir.file("hf:m.gguf", DEMO);
    run(&dir, &hub, &["info", "-m", "./hf:m.gguf"]).stdout();
}

#[test]
fn pull_fetches_the_newest_revision_and_prints_where_it_is() {
    let (dir, hub) = (Dir::new(), small_hub());
    assert_file(&run(&dir, &hub, &["pull", "test/demo"]), SMALL);
    hub.requests();
    // What is there is not downloaded again, also under another revision.
    hub.publish(&"b".repeat(40), [Hosted::new("m-Q4_K_M.gguf", SMALL)]);
    let again = pull(&dir, &hub);
    assert!(again.stdout().contains(&"b".repeat(40)), "{again:?}");
    assert_eq!(again.stderr, "");
    assert_eq!(hub.file_requests().len(), 0);
    let newer = [SMALL, SMALL].concat();
    hub.publish(&"c".repeat(40), [Hosted::new("m-Q4_K_M.gguf", &newer[..])]);
    let offline = run(&dir, &hub, &["pull", "--offline", "hf:test/demo"]);
    assert_file(&offline, SMALL);
    assert_file(&pull(&dir, &hub), &newer);
    let offline = run(&dir, &hub, &["pull", "--offline", "hf:test/demo"]);
    assert_file(&offline, &newer);
}

/// Git's checksum names it, and only its size is checked.
#[test]
fn a_small_file_and_one_in_a_directory_are_named_by_their_paths() {
    let dir = Dir::new();
    let mut file = Hosted::small("sub/a b%.gguf", SMALL);
    // As it arrives in an address.
    file.name = "sub/a%20b%25.gguf".to_owned();
    let hub = FakeHub::new([file]);
    let ran = run(&dir, &hub, &["pull", "hf:test/demo:sub/a b%.gguf"]);
    assert_file(&ran, SMALL);
    assert!(ran.stdout.ends_with("/sub/a b%.gguf\n"), "{ran:?}");
    assert!(cached(&dir).join("blobs").join("5".repeat(40)).is_file());
    let models = run(&dir, &hub, &["models"]);
    assert!(
        models
            .stdout()
            .starts_with("hf:test/demo:sub/a b%.gguf  - "),
        "{models:?}"
    );
}

#[test]
fn what_a_repository_has_is_listed_where_a_reference_means_none_of_it() {
    let dir = Dir::new();
    let files = [
        "m-Q8_0.gguf",
        "m-Q5_K_M.gguf",
        "x/n-Q5_K_M.gguf",
        "mmproj-m-Q4_K_M.gguf",
        "m-q6_k-00001-of-00002.gguf",
    ];
    let hub = FakeHub::new(files.map(|name| Hosted::new(name, SMALL)));
    let ran = pull(&dir, &hub);
    let message = ran.error(1);
    assert!(
        message.contains("test/demo has no model in Q4_K_M. It has:"),
        "{message}"
    );
    let listed: Vec<_> = message.lines().skip(1).map(str::trim).collect();
    assert_eq!(
        listed,
        [
            "hf:test/demo:m-Q5_K_M.gguf",
            "hf:test/demo:Q8_0",
            "hf:test/demo:mmproj-m-Q4_K_M.gguf",
            "hf:test/demo:x/n-Q5_K_M.gguf",
        ]
    );
    for reference in &listed {
        run(&dir, &hub, &["pull", reference]).stdout();
    }
    let ambiguous = run(&dir, &hub, &["pull", "hf:test/demo:q5_k_m"]);
    let message = ambiguous.error(1);
    assert!(
        message.contains("name the file") && message.contains("\n  hf:test/demo:x/n-Q5_K_M.gguf"),
        "{message}"
    );
    // Half of a split model is none.
    run(
        &dir,
        &hub,
        &["pull", "hf:test/demo:m-q6_k-00001-of-00002.gguf"],
    )
    .error(1);
    let none = FakeHub::new([Hosted::new("model.safetensors", SMALL)]);
    assert!(pull(&dir, &none).error(1).contains("no GGUF files"));
}

#[test]
fn a_split_model_is_fetched_whole_and_runs() {
    let dir = Dir::new();
    let parts = RandomModel::new("qwen3", TensorType::F32).file().split(3);
    let names = (1..).map(|number| format!("Q8_0/m-Q8_0-{number:05}-of-00003.gguf"));
    let files: Vec<_> = names
        .zip(parts)
        .map(|(name, part)| Hosted::new(&name, part.to_bytes()))
        .collect();
    let hub = FakeHub::new(files);
    // The second part breaks off for good, and the first alone is no model.
    hub.fail_files([Fault::NoRanges, Fault::Status(404, "")]);
    let model = "hf:test/demo:Q8_0";
    run(&dir, &hub, &["pull", model]).error(1);
    run(&dir, &hub, &["info", "--offline", "-m", model]).error(1);
    hub.requests();
    let args = [
        "run",
        "-m",
        model,
        "--raw",
        "-p",
        "a",
        "-n",
        "4",
        "--temp",
        "0",
        "--ignore-eos",
        "--device",
        "cpu",
    ];
    assert!(!run(&dir, &hub, &args).stdout().is_empty());
    assert_eq!(hub.file_requests().len(), 2);
    let offline = [&args[..], &["--offline"]].concat();
    assert!(!run(&dir, &hub, &offline).stdout().is_empty());
    let models = run(&dir, &hub, &["models"]);
    assert!(
        models.stdout().starts_with("hf:test/demo:Q8_0  Q8_0 "),
        "{models:?}"
    );
    assert_eq!(models.stdout.lines().count(), 1);
}

#[test]
fn the_token_goes_to_the_hub_alone_and_is_never_shown() {
    for by_file in [false, true] {
        let with_token = |dir: &Dir, hub: &FakeHub| {
            let mut command = command(dir, &hub.address, &["pull", "-v", "hf:test/demo"]);
            if by_file {
                fs::create_dir_all(dir.path().join("hf")).expect("a directory");
                dir.file("hf/token", format!("{TOKEN}\n"));
            } else {
                command.env("HF_TOKEN", TOKEN);
            }
            finish(command)
        };
        let (dir, hub) = (Dir::new(), small_hub());
        let pulled = with_token(&dir, &hub);
        assert_file(&pulled, SMALL);
        for request in hub.requests() {
            let sent = request.authorization.as_deref();
            let expected = format!("Bearer {TOKEN}");
            assert_eq!(sent, request.to_hub.then_some(&expected[..]), "{request:?}");
        }
        let mut all = vec![pulled];
        for (status, tries) in [(401, 1), (403, 1), (404, 1), (500, 5)] {
            hub.fail_api(vec![Fault::Status(status, "Retry-After: 0"); tries]);
            let failed = with_token(&dir, &hub);
            assert!(failed.error(1).contains(&status.to_string()), "{failed:?}");
            all.push(failed);
        }
        hub.fail_files([Fault::Status(403, "")]);
        let failed = with_token(&Dir::new(), &hub);
        assert!(failed.error(1).contains("403"), "{failed:?}");
        all.push(failed);
        for ran in all {
            let shown = ran.stdout + &ran.stderr;
            assert!(
                !shown.contains(TOKEN) && !shown.contains(SIGNATURE),
                "{shown}"
            );
        }
    }
    let (dir, hub) = (Dir::new(), small_hub());
    let mut odd = command(&dir, &hub.address, &["pull", "hf:test/demo"]);
    odd.env("HF_TOKEN", "hf_\u{7}odd");
    let odd = finish(odd);
    assert!(
        odd.error(1).contains("HF_TOKEN") && !odd.stderr.contains("odd"),
        "{odd:?}"
    );
    assert_eq!(hub.requests().len(), 0);
}

#[test]
fn a_refusal_says_what_to_do() {
    let (dir, hub) = (Dir::new(), small_hub());
    for (status, parts) in [
        (
            401,
            &["401", "HF_TOKEN", "accept its licence", "/test/demo"][..],
        ),
        (403, &["403", "HF_TOKEN", "accept its licence"]),
        (404, &["404", "no test/demo", "check the name"]),
        (418, &["418"]),
    ] {
        hub.fail_api([Fault::Status(status, "")]);
        let ran = pull(&dir, &hub);
        let host = hub.address.strip_prefix("http://").expect("an address");
        for part in parts.iter().chain(&[host]) {
            assert!(ran.error(1).contains(part), "no {part}: {ran:?}");
        }
    }
    assert_eq!(hub.requests().len(), 4, "none is worth a second try");
}

#[test]
fn a_hub_that_is_busy_is_asked_again_when_it_says() {
    let (dir, hub) = (Dir::new(), small_hub());
    let busy = |seconds| [429, 503].map(|status| Fault::Status(status, seconds));
    hub.fail_api(busy("Retry-After: 0"))
        .fail_files(busy("Retry-After: 1"));
    let ran = pull(&dir, &hub);
    assert_file(&ran, SMALL);
    for part in [
        "too many requests",
        "503",
        "trying again in 0.0 s",
        "trying again in 1.0 s",
    ] {
        assert!(ran.stderr.contains(part), "no {part}: {}", ran.stderr);
    }
    // Not for ever, and not for hours.
    hub.requests();
    hub.fail_api(vec![Fault::Status(503, "Retry-After: 0"); 5]);
    let ran = pull(&dir, &hub);
    assert!(
        ran.error(1).contains("503") && ran.stderr.contains("tried 5 times"),
        "{ran:?}"
    );
    assert_eq!(hub.requests().len(), 5);
    hub.fail_api([Fault::Status(429, "Retry-After: 3600")]);
    assert!(pull(&dir, &hub).error(1).contains("asks to wait 3600 s"));
    assert_eq!(hub.requests().len(), 1);
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let (dir, hub) = (Dir::new(), demo_hub());
    hub.fail_files([Fault::Cut(3_000_000), Fault::Cut(2_000_000)]);
    let ran = pull(&dir, &hub);
    assert_file(&ran, DEMO);
    assert!(
        ran.stderr
            .contains("the connection broke after 3000000 of 6336352 bytes"),
        "{ran:?}"
    );
    let ranges: Vec<_> = hub
        .file_requests()
        .into_iter()
        .map(|request| request.range)
        .collect();
    let from = |start: &str| Some(format!("bytes={start}-"));
    assert_eq!(ranges, [None, from("3000000"), from("5000000")]);
}

#[test]
fn a_connection_that_keeps_breaking_is_given_up_and_the_part_stays() {
    let (dir, hub) = (Dir::new(), small_hub());
    hub.fail_files(vec![Fault::Cut(3); 5]);
    let ran = pull(&dir, &hub);
    assert!(ran.error(1).contains("tried 5 times"), "{ran:?}");
    assert_eq!(fs::read(part(&dir, SMALL)).expect("a part"), &SMALL[..15]);
    assert_nothing_usable(&dir, &hub);
    hub.requests();
    let ran = pull(&dir, &hub);
    assert_file(&ran, SMALL);
    assert!(ran.stderr.contains("of which 15 B are here"), "{ran:?}");
    assert_eq!(hub.file_requests()[0].range.as_deref(), Some("bytes=15-"));
    assert!(!part(&dir, SMALL).exists());
}

/// Starts a download that stops after `bytes`, and waits until these are in the cache.
fn stalled(dir: &Dir, hub: &FakeHub, bytes: usize) -> Child {
    hub.fail_files([Fault::Stall(bytes)]);
    let mut child = command(dir, &hub.address, &["pull", "hf:test/demo"])
        .spawn()
        .expect("starting sharpi");
    while fs::metadata(part(dir, DEMO)).map_or(0, |data| data.len()) < bytes as u64 {
        let state = child.try_wait().expect("asking for its state");
        assert_eq!(state, None, "it ended before");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_killed_download_is_no_model_and_the_next_fetches_the_rest_alone() {
    let (dir, hub) = (Dir::new(), demo_hub());
    let mut child = stalled(&dir, &hub, 4_000_000);
    child.kill().expect("killing it");
    child.wait().expect("waiting for sharpi");
    assert_nothing_usable(&dir, &hub);
    let models = run(&dir, &hub, &["models"]);
    assert_eq!(
        models.stdout().split_whitespace().collect::<Vec<_>>(),
        ["hf:test/demo", "unfinished", "3.81", "MiB"]
    );
    hub.requests();
    let ran = run(&dir, &hub, &["info", "-m", "hf:test/demo"]);
    assert!(ran.stdout().contains("sharpi-stories-10M"), "{ran:?}");
    let requests = hub.file_requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].range.as_deref(), Some("bytes=4000000-"));
    assert!(fs::read(blob(&dir, DEMO)).expect("a blob") == DEMO);
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_a_download_with_130_and_the_part_stays() {
    let (dir, hub) = (Dir::new(), demo_hub());
    let child = stalled(&dir, &hub, 1_000_000);
    let sent = Command::new("kill")
        .args(["-s", "INT", &child.id().to_string()])
        .status();
    assert!(sent.expect("starting kill").success());
    let ran = Ran::from(child.wait_with_output().expect("waiting for sharpi"));
    assert_eq!((ran.code, &ran.stdout[..]), (Some(130), ""), "{ran:?}");
    assert!(fs::read(part(&dir, DEMO)).expect("a part") == DEMO[..1_000_000]);
}

#[test]
fn of_two_downloads_of_a_file_the_second_waits_and_takes_the_firsts() {
    let (dir, hub) = (Dir::new(), demo_hub());
    let first = stalled(&dir, &hub, 1_000_000);
    let mut second = command(&dir, &hub.address, &["pull", "hf:test/demo"])
        .spawn()
        .expect("starting sharpi");
    let stderr = second.stderr.take().expect("standard error is piped");
    let said = BufReader::new(stderr)
        .lines()
        .next()
        .expect("a line")
        .expect("text");
    assert!(
        said.contains("another process is downloading") && said.contains(NAME),
        "{said}"
    );
    hub.release();
    for child in [first, second] {
        let ran = Ran::from(child.wait_with_output().expect("waiting for sharpi"));
        assert_file(&ran, DEMO);
    }
    assert_eq!(hub.file_requests().len(), 1);
}

#[test]
fn a_damaged_part_is_downloaded_again() {
    let (dir, hub) = (Dir::new(), small_hub());
    for left in [
        &b"other bytes"[..],
        &[0; 500],
        &[&SMALL[1..], b"x"].concat(),
    ] {
        fs::remove_dir_all(dir.path().join("hf")).ok();
        leave_part(&dir, SMALL, left);
        assert_file(&pull(&dir, &hub), SMALL);
    }
    // A server that cannot begin in the middle begins at the start.
    fs::remove_dir_all(dir.path().join("hf")).expect("a cache");
    leave_part(&dir, SMALL, &SMALL[..9]);
    hub.fail_files([Fault::NoRanges]);
    assert_file(&pull(&dir, &hub), SMALL);
    // All of it may be there already.
    fs::remove_dir_all(dir.path().join("hf")).expect("a cache");
    leave_part(&dir, SMALL, SMALL);
    hub.requests();
    assert_file(&pull(&dir, &hub), SMALL);
    assert_eq!(hub.file_requests().len(), 0);
}

#[test]
fn a_file_with_a_wrong_checksum_is_deleted_and_the_error_says_so() {
    let (dir, hub) = (Dir::new(), small_hub());
    hub.fail_files([Fault::Damage, Fault::Damage]);
    let ran = pull(&dir, &hub);
    let message = ran.error(1);
    assert!(
        message.contains("m-Q4_K_M.gguf") && message.contains("damaged, and deleted"),
        "{message}"
    );
    assert!(message.contains(&sha256(SMALL)), "{message}");
    assert!(!part(&dir, SMALL).exists() && !blob(&dir, SMALL).exists());
    assert_nothing_usable(&dir, &hub);
    hub.fail_files([Fault::Damage]);
    assert_file(&pull(&dir, &hub), SMALL);
}

#[test]
fn sizes_that_are_lies_are_refused() {
    let (dir, hub) = (Dir::new(), small_hub());
    for fault in [
        Fault::Length(SMALL.len() - 1),
        Fault::Length(1 << 40),
        Fault::Endless,
    ] {
        hub.fail_files([fault]);
        let ran = pull(&dir, &hub);
        assert!(
            ran.error(1)
                .contains("says that it has 37 bytes, but sends"),
            "{ran:?}"
        );
        assert_nothing_usable(&dir, &hub);
    }
    let mut lying = Hosted::new("m-Q4_K_M.gguf", SMALL);
    lying.description["lfs"]["size"] = 12.into();
    let hub = FakeHub::new([lying.clone()]);
    assert!(
        pull(&dir, &hub)
            .error(1)
            .contains("says that it has 12 bytes, but sends 37 bytes")
    );
    leave_part(&dir, SMALL, &SMALL[..9]);
    assert!(
        pull(&dir, &hub)
            .error(1)
            .contains("the range \"bytes 9-36/37\"")
    );
    assert_nothing_usable(&dir, &hub);
    lying.description = serde_json::json!({"rfilename": lying.name});
    assert!(
        pull(&dir, &FakeHub::new([lying]))
            .error(1)
            .contains("does not say how large")
    );
}

#[test]
fn a_hub_cannot_name_a_place_outside_the_cache() {
    let dir = Dir::new();
    let evil = [
        "../../../evil-Q4_K_M.gguf",
        "/tmp/evil-Q4_K_M.gguf",
        "a/../../evil-Q4_K_M.gguf",
        "e\u{1b}vil-Q4_K_M.gguf",
    ];
    let hub = FakeHub::new(evil.map(|name| Hosted::new(name, SMALL)));
    let ran = pull(&dir, &hub);
    assert!(ran.error(1).contains("no GGUF files"), "{ran:?}");
    hub.publish("../../../../evil", [Hosted::new("m-Q4_K_M.gguf", SMALL)]);
    assert!(pull(&dir, &hub).error(1).contains("no revision"));
    let mut evil = Hosted::new("m-Q4_K_M.gguf", SMALL);
    evil.description["lfs"]["sha256"] = "../evil".into();
    hub.publish(&"a".repeat(40), [evil]);
    assert!(pull(&dir, &hub).error(1).contains("checksum"));
    assert!(!cached(&dir).exists());
}

#[test]
fn offline_makes_no_connection_and_uses_the_cache() {
    let (dir, hub) = (Dir::new(), demo_hub());
    let text = ["-p", "A fox", "-n", "4", "--temp", "0", "--device", "cpu"];
    let offline = [&["run", "--offline", "-m", "hf:test/demo"], &text[..]].concat();
    let variable = |value: &str| {
        let mut command = command(
            &dir,
            &hub.address,
            &[&["run", "-m", "hf:test/demo"], &text[..]].concat(),
        );
        command.env("HF_HUB_OFFLINE", value);
        finish(command)
    };
    for ran in [
        run(&dir, &hub, &offline),
        variable("1"),
        variable("True"),
        run(&dir, &hub, &["pull", "--offline", "test/demo"]),
    ] {
        let message = ran.error(1);
        assert!(
            message.contains("not in the cache")
                && message.contains("`sharpi pull hf:test/demo:Q4_K_M`"),
            "{message}"
        );
    }
    assert_eq!(hub.requests().len(), 0);
    pull(&dir, &hub).stdout();
    hub.requests();
    assert_eq!(run(&dir, &hub, &offline).stdout(), variable("yes").stdout());
    // Also where another tool asked for a newer revision, but not for this file of it.
    fs::write(cached(&dir).join("refs/main"), "b".repeat(40)).expect("writing it");
    run(&dir, &hub, &offline).stdout();
    // Where the hub is not to be reached, what is there will do as well.
    finish(command(
        &dir,
        "http://127.0.0.1:9",
        &[&["run", "-m", "hf:test/demo"], &text[..]].concat(),
    ))
    .stdout();
    assert_eq!(hub.requests().len(), 0);
    run(&dir, &hub, &["run", "--offline", "-p", "x", "-n", "1"]).stdout();
}

#[test]
fn models_lists_what_is_there() {
    let dir = Dir::new();
    let hub = FakeHub::new([
        Hosted::new("m-Q4_K_M.gguf", SMALL),
        Hosted::new("odd.gguf", [SMALL, SMALL].concat()),
    ]);
    let empty = run(&dir, &hub, &["models"]);
    assert_eq!(empty.stdout(), "");
    assert!(
        empty.stderr.contains("no models") && empty.stderr.contains("sharpi pull"),
        "{empty:?}"
    );
    for reference in ["test/demo", "test/demo:odd.gguf"] {
        run(&dir, &hub, &["pull", reference]).stdout();
    }
    leave_part(&dir, DEMO, &DEMO[..1000]);
    leave_part(&dir, b"no model", b"PK of another tool");
    let table = run(&dir, &hub, &["models"]);
    let rows: Vec<Vec<_>> = table
        .stdout()
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows,
        [
            &["hf:test/demo:Q4_K_M", "Q4_K_M", "37", "B"][..],
            &["hf:test/demo:odd.gguf", "-", "74", "B"],
            &["hf:test/demo", "unfinished", "1000", "B"],
        ]
    );
    let json = run(&dir, &hub, &["models", "--json"]);
    let lines: Vec<_> = json
        .stdout()
        .lines()
        .map(|line| valid("models.json", line))
        .collect();
    assert_eq!(lines[0]["model"], "hf:test/demo:Q4_K_M");
    assert_eq!(lines[0]["bytes"], SMALL.len());
    let complete: Vec<_> = lines
        .iter()
        .map(|line| line["complete"].as_bool())
        .collect();
    assert_eq!(complete, [Some(true), Some(true), Some(false)]);
    let path = lines[0]["path"].as_str().expect("a path");
    assert_eq!(fs::read(path).expect("it is there"), SMALL);
    assert!(run(&dir, &hub, &["models", "-v"]).stdout().contains(path));
    // Elsewhere, by the other variable.
    let mut moved = command(&dir, &hub.address, &["models"]);
    moved
        .env("HF_HUB_CACHE", dir.path().join("hf/hub"))
        .env("HF_HOME", "/nowhere");
    assert_eq!(finish(moved).stdout(), table.stdout);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_told_and_leaves_no_model() {
    let (dir, hub) = (Dir::new(), small_hub());
    let part = part(&dir, SMALL);
    fs::create_dir_all(part.parent().expect("blobs")).expect("making the cache");
    std::os::unix::fs::symlink("/dev/full", &part).expect("linking it");
    let ran = pull(&dir, &hub);
    let message = ran.error(1);
    assert!(
        message.contains("No space left") && message.contains(".incomplete"),
        "{message}"
    );
    assert_nothing_usable(&dir, &hub);
}

#[test]
fn a_host_that_is_not_there_is_named() {
    let dir = Dir::new();
    let pull = |address: &str| finish(command(&dir, address, &["pull", "hf:test/demo"]));
    let unknown = pull("http://no-such-host.invalid");
    assert!(
        unknown
            .error(1)
            .contains("cannot reach no-such-host.invalid"),
        "{unknown:?}"
    );
    // A server that speaks first, and no TLS.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let host = listener.local_addr().expect("it is bound").to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream
            .write_all(b"220 no TLS here\r\n")
            .expect("greeting it");
        // Until the other side has heard enough.
        io::copy(&mut stream, &mut io::sink()).ok();
    });
    let ran = pull(&format!("https://{host}"));
    let message = ran.error(1);
    assert!(
        message.contains(&format!("cannot reach {host}")) && !message.contains("tried"),
        "{message}"
    );
    // A port that nobody listens on: where another process has taken it meanwhile, that is no hub either.
    let free = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    assert!(
        pull(&format!("http://{free}"))
            .error(1)
            .contains(&free.to_string())
    );
    let wrong = pull("huggingface.co");
    assert!(
        wrong.error(1).contains("HF_ENDPOINT is \"huggingface.co\""),
        "{wrong:?}"
    );
}

#[test]
fn help_tells_of_references() {
    let help = sharpi(&["help", "run"]);
    assert!(
        help.stdout().contains("hf:OWNER/REPO[:QUANT]") && help.stdout.contains("--offline"),
        "{help:?}"
    );
}

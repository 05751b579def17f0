//! Defaults for flags: what was typed, the environment, the configuration file, and where each value comes from.

use std::fs;

use crate::{Dir, Ran};

/// A directory whose configuration file holds `text`.
fn configured(text: &str) -> Dir {
    let dir = Dir::new();
    fs::create_dir(dir.path().join("sharpi")).expect("a directory for the configuration");
    dir.file("sharpi/config.toml", text);
    dir
}

fn run(dir: &Dir, args: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = dir.command(args);
    command.envs(variables.iter().copied());
    Ran::from(command.output().expect("starting sharpi"))
}

/// The line of `sharpi config` that begins with `key`.
#[track_caller]
fn line<'a>(printed: &'a str, key: &str) -> Vec<&'a str> {
    let line = printed.lines().find(|line| line.starts_with(key));
    let line = line.unwrap_or_else(|| panic!("{key} in {printed}"));
    line.splitn(2, " # ").map(str::trim).collect()
}

#[test]
fn a_flag_precedes_the_environment_and_that_the_file() {
    let dir = configured("max-tokens = 3\ntemp = 0");
    let generated = |args: &[&str], variables: &[(&str, &str)]| {
        let args = [
            &["run", "--raw", "-p", "Once", "--json", "--ignore-eos"],
            args,
        ]
        .concat();
        let ran = run(&dir, &args, variables);
        ran.stdout()
            .lines()
            .filter(|line| line.contains(r#""type":"token""#))
            .count()
    };
    let variables = [("SHARPI_MAX_TOKENS", "2")];
    assert_eq!(generated(&[], &[]), 3);
    assert_eq!(generated(&[], &variables), 2);
    assert_eq!(generated(&["-n", "1"], &variables), 1);
}

#[test]
fn a_table_is_for_one_command_and_the_top_for_all_that_write_text() {
    let dir = configured(
        "max-tokens = 3\nthreads = 1\n\n[run]\nmax_tokens = 2\n[verify]\nmax-tokens = 5\n",
    );
    let printed = run(&dir, &["config"], &[]);
    let printed = printed.stdout();
    assert_eq!(line(printed, "max-tokens"), ["max-tokens = 3", "line 1"]);
    assert_eq!(line(printed, "threads"), ["threads = 1", "line 2"]);
    let tables = printed.split_once("[run]").expect("a table of run").1;
    assert_eq!(line(tables, "max-tokens"), ["max-tokens = 2", "line 5"]);
    let ran = run(&dir, &["run", "--raw", "-p", "Once", "--ignore-eos"], &[]);
    assert!(ran.stderr.contains("generated: 2 tokens"), "{ran:#?}");
}

#[test]
fn what_config_prints_is_a_configuration_that_says_the_same() {
    let dir = configured(
        "stop = [\"a\\\"b\", \"c\"]\nsystem = \"Be brief\"\nctx_size = 1_024\nquiet = true",
    );
    let variables = [("SHARPI_TEMP", "0.25"), ("SHARPI_NO_THINK", "1")];
    let printed = run(&dir, &["config"], &variables);
    let printed = printed.stdout().to_owned();
    assert_eq!(line(&printed, "stop"), [r#"stop = ['a"b', "c"]"#, "line 1"]);
    assert_eq!(line(&printed, "ctx-size"), ["ctx-size = 1024", "line 3"]);
    assert_eq!(line(&printed, "quiet"), ["quiet = true", "line 4"]);
    assert_eq!(line(&printed, "temp"), ["temp = 0.25", "SHARPI_TEMP"]);
    assert_eq!(
        line(&printed, "no-think"),
        ["no-think = true", "SHARPI_NO_THINK"]
    );
    assert_eq!(line(&printed, "device"), ["device = \"auto\"", "default"]);
    assert_eq!(line(&printed, "# top-k"), ["# top-k", "default: 40"]);
    let again = configured(&printed);
    let again = run(&again, &["config"], &[]);
    let values = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .skip(1)
            .map(|line| line.split(" # ").next().unwrap_or_default());
        lines.map(|line| line.trim().to_owned()).collect()
    };
    assert_eq!(values(&printed), values(again.stdout()));
}

#[test]
fn what_the_file_gets_wrong_is_named_with_its_line_and_what_was_meant() {
    let cases = [
        (
            "tmp = 1",
            &["config.toml: line 1", "tmp", "did you mean \"temp\"?"][..],
        ),
        (
            "\ntemp = \"x\"",
            &["line 2", "'x'", "--temp", "expected a number"],
        ),
        ("temp = -1", &["must not be negative"]),
        ("raw = 1", &["line 1: raw: expected true or false"]),
        ("stop = []", &["stop", "an empty list"]),
        (
            "prompt = \"hi\"",
            &["prompt", "no flag that can have a default"],
        ),
        ("repetitions = 3", &["repetitions", "[bench]"]),
        (
            "[bensh]\n",
            &["no command \"bensh\"", "did you mean \"bench\"?"],
        ),
        (
            "[bench]\nrepetition = 3",
            &["line 2", "did you mean \"repetitions\"?"],
        ),
        ("a =", &["line 1"]),
        (
            "raw = true\nsystem = \"x\"",
            &["raw (line 1)", "system (line 2)", "exclude each other"],
        ),
    ];
    for (text, expected) in cases {
        let dir = configured(text);
        let ran = run(&dir, &["run", "-p", "hi", "-m", "missing.gguf"], &[]);
        let error = ran.error(1);
        assert!(error.contains("reading the "), "{text}: {error}");
        for part in expected {
            assert!(error.contains(part), "{text}: {part} in {error}");
        }
    }
}

#[test]
fn a_variable_with_a_value_that_cannot_be_is_an_error_and_one_without_meaning_a_warning() {
    let dir = Dir::new();
    let args = ["run", "--raw", "-p", "Once", "-n", "1"];
    let ran = run(&dir, &args, &[("SHARPI_TOP_P", "2")]);
    let error = ran.error(1);
    assert!(
        error.contains("SHARPI_TOP_P") && error.contains("between 0 and 1"),
        "{error}"
    );
    let ran = run(&dir, &args, &[("SHARPI_TEMPERATUR", "2")]);
    ran.stdout();
    assert!(
        ran.stderr
            .contains("warning: SHARPI_TEMPERATUR means nothing"),
        "{ran:#?}"
    );
}

#[test]
fn a_default_gives_way_to_a_flag_that_it_excludes() {
    let dir = configured("raw = true\nquiet = true");
    let model = ["tokenize", "-p", "x"];
    run(&dir, &model, &[]).stdout();
    // --raw and --system, typed together, are an error.
    let ran = run(
        &dir,
        &["run", "--system", "Be brief.", "-p", "Once", "-n", "1"],
        &[],
    );
    assert!(!ran.stderr.contains("cannot be used with"), "{ran:#?}");
    // -v and -q likewise.
    let ran = run(&dir, &["run", "-v", "-p", "Once", "-n", "1"], &[]);
    assert!(ran.stderr.contains("debug: "), "{ran:#?}");
}

#[test]
fn the_model_of_the_file_is_the_one_where_none_is_given() {
    let dir = configured("model = \"missing.gguf\"");
    let named =
        |args: &[&str], variables: &[(&str, &str)]| run(&dir, args, variables).error(1).to_owned();
    assert!(named(&["run", "hello"], &[]).contains("missing.gguf"));
    assert!(named(&["info"], &[]).contains("missing.gguf"));
    let other = [("SHARPI_MODEL", "other.gguf")];
    assert!(named(&["run", "hello"], &other).contains("other.gguf"));
    assert!(named(&["run", "third.gguf", "hello"], &other).contains("third.gguf"));
}

/// The two variables that there were before a flag's own name was one.
#[test]
fn a_variable_that_forbids_a_way_of_computing_counts_as_its_flag() {
    let dir = Dir::new();
    let variables = [("SHARPI_CUDA_GRAPH", "0"), ("SHARPI_STEP_KERNEL", "1")];
    let printed = run(&dir, &["config"], &variables);
    let graph = line(printed.stdout(), "no-cuda-graph");
    assert_eq!(graph, ["no-cuda-graph = true", "SHARPI_CUDA_GRAPH"]);
    let step = line(printed.stdout(), "no-step-kernel");
    assert_eq!(step, ["no-step-kernel = false", "default"]);
}

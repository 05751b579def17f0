//! `sharpi chat`: conversations in a terminal, with models whose answers are known beforehand.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::{Value, json};

use crate::{
    Dir,
    common::gguf_writer::{GgufFile, byte_vocabulary_with},
    model, sharpi,
    terminal::{CTRL_C, CTRL_D, ENTER, Terminal, UP},
};

/// Ends every prompt of the writer's chat template, and so sets off every answer.
const START: u32 = b'\n' as u32;

/// `assistant` and a line's end, what the template puts around them, and around `user` and a message of one letter.
const TURN: usize = 20;

/// A model that answers every message with `text`, of bytes that occur once each and no line's end.
fn answers(text: &str) -> GgufFile {
    let text = text.bytes().map(u32::from);
    let links: Vec<u32> = [START]
        .into_iter()
        .chain(text)
        .chain([model::END])
        .collect();
    model::chain(&links)
}

/// A directory with `m.gguf`.
fn with_model(mut file: GgufFile) -> Dir {
    let dir = Dir::new();
    file.set("llama.context_length", 100_000u32);
    dir.file("m.gguf", file.to_bytes());
    dir
}

/// One whose answers are `Hi`.
fn polite() -> Dir {
    with_model(answers("Hi"))
}

fn chat(dir: &Dir, args: &[&str]) -> Terminal {
    let fixed = ["chat", "-m", "m.gguf", "--temp", "0"];
    Terminal::start(dir, &[&fixed, args].concat(), 100, &[])
}

/// The conversation so far.
#[track_caller]
fn saved(dir: &Dir, terminal: &mut Terminal) -> Value {
    let path = dir.path().join("saved.json");
    let _ = fs::remove_file(&path);
    terminal.enter("/save saved.json");
    let json =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{error}: {}", terminal.text()));
    serde_json::from_str(&json).expect("JSON")
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

fn assistant(content: &str) -> Value {
    json!({"role": "assistant", "content": content})
}

/// What `/stats` says of reading the last prompt.
#[track_caller]
fn tokens_read(terminal: &mut Terminal) -> String {
    terminal.enter("/stats");
    let text = terminal.text();
    let (before, _) = text.rsplit_once(" tokens read").expect("statistics");
    let (_, counts) = before.rsplit_once("  ").expect("statistics");
    counts.to_owned()
}

/// Behind an answer of `len` tokens: its end, and a line's.
#[test]
fn a_turn_reads_its_own_tokens_alone() {
    // Merging would make one token of the second answer.
    for text in ["Hi", "he"] {
        let dir = with_model(answers(text));
        let mut terminal = chat(&dir, &[]);
        let mut len = TURN;
        terminal.enter("a");
        assert_eq!(tokens_read(&mut terminal), format!("{len} of {len}"));
        for message in ["b", "c"] {
            terminal.enter(message);
            let new = TURN + 2;
            len += text.len() + new;
            assert_eq!(tokens_read(&mut terminal), format!("{new} of {len}"));
        }
        assert!(
            terminal.text().contains(&format!("> c\n{text}\n>")),
            "{}",
            terminal.text()
        );
        let turns = ["a", "b", "c"].map(|message| [user(message), assistant(text)]);
        assert_eq!(saved(&dir, &mut terminal), json!(turns.concat()));
    }
}

#[test]
fn messages_may_have_several_lines() {
    let dir = polite();
    let mut terminal = chat(&dir, &[]);
    let typed = [
        ("a\\\rb", "a\nb"),
        ("\"\"\"\r  c \\\r\rd\r\"\"\"", "  c \\\n\nd"),
        ("\x1b[200~e\nf \\\ng\x1b[201~", "e\nf \\\ng"),
        ("//h", "/h"),
    ];
    for (keys, _) in typed {
        terminal.enter(keys);
    }
    let turns = typed.map(|(_, message)| [user(message), assistant("Hi")]);
    assert_eq!(saved(&dir, &mut terminal), json!(turns.concat()));
}

#[test]
fn what_was_typed_can_be_had_again_in_later_conversations_too() {
    let dir = polite();
    let mut terminal = chat(&dir, &[]);
    terminal.enter("first");
    terminal.enter("a\\\rsecond");
    terminal.press(UP);
    terminal.wait_for("Hi\n> a\nsecond");
    // One up within the message, and one to that before.
    terminal.press(UP);
    terminal.press(UP);
    terminal.wait_for("Hi\n> first");
    terminal.press(CTRL_C);
    terminal.wait_for_prompt();
    terminal.press(CTRL_D);
    assert_eq!(terminal.end().0, 0);
    let history = dir.path().join("sharpi/history");
    let mode = fs::metadata(&history)
        .expect("a history")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut terminal = chat(&dir, &[]);
    terminal.wait_for_prompt();
    terminal.enter(UP);
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([user("a\nsecond"), assistant("Hi")])
    );
}

#[test]
fn a_history_that_cannot_be_used_is_said_once() {
    let dir = polite();
    // Read as a directory, and written where nothing can be.
    for (state, said) in [("m.gguf", "cannot be read"), ("/proc", "cannot be kept")] {
        let state = dir.path().join(state);
        let state = state.to_str().expect("a path in UTF-8");
        let args = ["chat", "-m", "m.gguf", "--temp", "0"];
        let mut terminal = Terminal::start(&dir, &args, 200, &[("XDG_STATE_HOME", state)]);
        terminal.enter("a");
        terminal.enter("b");
        let text = terminal.text();
        assert_eq!(
            text.matches(&format!("/sharpi/history {said}: ")).count(),
            1,
            "{text}"
        );
        assert_eq!(text.matches("the history in").count(), 1, "{text}");
        assert_eq!(text.matches("\nHi\n").count(), 2, "{text}");
    }
}

#[test]
fn commands_change_the_conversation() {
    let dir = polite();
    let mut terminal = chat(&dir, &["--system", "s"]);
    let system = |text: &str| json!({"role": "system", "content": text});
    terminal.enter("a");
    terminal.enter("/system");
    assert!(
        terminal.text().ends_with("> /system\ns\n> "),
        "{}",
        terminal.text()
    );
    terminal.enter("/system be kind");
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([system("be kind"), user("a"), assistant("Hi")])
    );
    terminal.enter("/reset");
    assert_eq!(saved(&dir, &mut terminal), json!([system("be kind")]));
    terminal.enter("/system \"\"");
    assert_eq!(saved(&dir, &mut terminal), json!([]));
    for nothing_there in ["/retry", "/edit", "/system"] {
        terminal.enter(nothing_there);
        let (_, said) = terminal
            .text()
            .rsplit_once(nothing_there)
            .map(|(_, said)| ((), said.to_owned()))
            .expect("it was typed");
        assert!(said.starts_with("\nthere is no "), "{said}");
    }
    terminal.enter("/help");
    terminal.wait_for("/stats          how full");
    terminal.enter("/sawe x");
    terminal.wait_for("there is no /sawe: /save?");
    terminal.wait_for_prompt();
    terminal.press(&format!("/exit{ENTER}"));
    assert_eq!(terminal.end().0, 0);
}

#[test]
fn the_last_message_can_be_edited() {
    let dir = polite();
    let mut terminal = chat(&dir, &[]);
    terminal.enter("a");
    terminal.enter("x\\\ry");
    let edit = |terminal: &mut Terminal, keys: &str| {
        terminal.wait_for_prompt();
        terminal.press(&format!("/edit{ENTER}"));
        terminal.wait_for_last("> x\ny");
        terminal.enter_more(keys);
    };
    edit(&mut terminal, CTRL_C);
    edit(&mut terminal, "z\r");
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([user("a"), assistant("Hi"), user("x\nyz"), assistant("Hi")])
    );
}

/// The demo model's stories differ by their seeds.
#[test]
fn another_answer_takes_the_place_of_the_last() {
    let dir = Dir::new();
    let mut terminal = Terminal::start(&dir, &["chat", "--seed", "1", "-n", "24"], 100, &[]);
    terminal.enter("A fox");
    terminal.wait_for("cut off by --max-tokens");
    let first = saved(&dir, &mut terminal);
    terminal.enter("/retry");
    let second = saved(&dir, &mut terminal);
    assert_eq!(second.as_array().map(Vec::len), Some(2));
    assert_eq!(first[0], second[0]);
    assert_ne!(first[1]["content"], second[1]["content"]);
}

#[test]
fn conversations_are_saved_and_loaded() {
    let dir = polite();
    let there = dir.file("there.json", "[]");
    let mut terminal = chat(&dir, &[]);
    terminal.enter("a");
    for (answer, overwritten) in [("n", false), ("", false), ("y", true)] {
        terminal.wait_for_prompt();
        terminal.press(&format!("/save there.json{ENTER}"));
        terminal.wait_for_last("overwrite there.json? [y/N]");
        terminal.enter_more(&format!("{answer}{ENTER}"));
        let saved = fs::read_to_string(&there).expect("it is there");
        assert_eq!(saved != "[]", overwritten, "{answer:?}: {saved}");
    }
    terminal.enter("/save nowhere/x.json");
    terminal.wait_for("error: /save nowhere/x.json: No such file or directory");

    dir.file(
        "turns.json",
        json!([user("q"), assistant("A"), user("r")]).to_string(),
    );
    terminal.enter("/load turns.json");
    terminal.wait_for("3 messages were read; /retry has the last one answered");
    terminal.enter("/retry");
    let loaded = json!([user("q"), assistant("A"), user("r"), assistant("Hi")]);
    assert_eq!(saved(&dir, &mut terminal), loaded);
    // A file that is none leaves the conversation as it is.
    dir.file("broken.json", "[{}]");
    terminal.enter("/load broken.json");
    terminal.wait_for("error: /load broken.json: expected");
    assert_eq!(saved(&dir, &mut terminal), loaded);
    // `run` takes what was saved, but for the answer at its end.
    terminal.enter("/load there.json");
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([user("a"), assistant("Hi")])
    );
}

#[test]
fn ctrl_c_stops_an_answer_and_not_the_conversation() {
    let dir = with_model(model::chain(&[
        START,
        b'a'.into(),
        b'b'.into(),
        b'a'.into(),
    ]));
    let mut terminal = chat(&dir, &[]);
    for message in ["x", "y"] {
        terminal.wait_for_prompt();
        terminal.press(&format!("{message}{ENTER}"));
        terminal.wait_for(&format!("> {message}\nabab"));
        // A finger that presses twice means the same.
        terminal.press(CTRL_C);
        terminal.press(CTRL_C);
        terminal.wait_for_prompt();
    }
    let turns = saved(&dir, &mut terminal);
    let contents: Vec<_> = (turns.as_array().expect("turns").iter())
        .map(|turn| turn["content"].as_str().expect("a text"))
        .collect();
    assert_eq!((contents.len(), contents[0], contents[2]), (4, "x", "y"));
    assert!(contents[1].starts_with("abab") && contents[3].starts_with("abab"));

    terminal.press("typed");
    terminal.wait_for("> typed");
    terminal.press(CTRL_C);
    terminal.wait_for_prompt();
    assert!(!terminal.text().contains("ends the conversation"));
    terminal.press(CTRL_C);
    terminal.wait_for("/exit or Ctrl-D ends the conversation");
    terminal.wait_for_prompt();
    terminal.press(CTRL_D);
    assert_eq!(terminal.end().0, 0);
}

#[test]
fn the_oldest_turns_make_room_for_a_message() {
    let dir = polite();
    let mut terminal = chat(&dir, &["-c", "50"]);
    terminal.enter("a");
    terminal.enter("b");
    let question =
        "the conversation takes 68 tokens, and the context holds 50: drop the oldest turns? [y/N]";
    let refused = |terminal: &mut Terminal, message: &str, answer: &str| {
        terminal.wait_for_prompt();
        terminal.press(&format!("{message}{ENTER}"));
        terminal.wait_for_last("turns? [y/N]");
        terminal.enter_more(&format!("{answer}{ENTER}"));
    };
    let both = json!([user("a"), assistant("Hi"), user("b"), assistant("Hi")]);
    refused(&mut terminal, "c", "n");
    assert!(
        terminal.text().replace('\n', "").contains(question),
        "{}",
        terminal.text()
    );
    terminal.wait_for("the message was not sent");
    assert_eq!(saved(&dir, &mut terminal), both);
    // 19 more than a letter.
    refused(&mut terminal, &"x".repeat(40), "y");
    terminal.wait_for("the message takes 59 tokens, and the context holds 50");
    assert_eq!(saved(&dir, &mut terminal), both);
    refused(&mut terminal, "c", "y");
    terminal.wait_for("turns dropped: 2 of 3; the others take 20 of 50 tokens");
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([user("c"), assistant("Hi")])
    );
}

#[test]
fn the_oldest_turns_make_room_behind_an_answer_that_was_cut_off() {
    let dir = with_model(model::chain(&[
        START,
        b'a'.into(),
        b'b'.into(),
        b'a'.into(),
    ]));
    let full = "the context of 48 tokens is full, which cut the answer off: ";
    let mut terminal = chat(&dir, &["-c", "48"]);
    terminal.enter("x");
    terminal.wait_for(&format!("{full}/reset begins anew"));

    let mut terminal = chat(&dir, &["-c", "48", "-n", "5"]);
    terminal.enter("x");
    terminal.wait_for_prompt();
    terminal.press(&format!("y{ENTER}"));
    terminal.wait_for(&format!("{full}drop the oldest turns?"));
    terminal.enter_more(&format!("y{ENTER}"));
    terminal.wait_for("turns dropped: 1 of 2");
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([user("y"), assistant("ab")])
    );
}

/// A model that thinks `hm` and answers `Yo`.
fn thoughtful() -> Dir {
    const THINK: u32 = 264;
    let [h, m, y, o] = [b'h', b'm', b'Y', b'o'].map(u32::from);
    let vocabulary = byte_vocabulary_with(&[("<think>", 4), ("</think>", 4)]);
    let links = [START, THINK, h, m, THINK + 1, y, o, model::END];
    with_model(model::chain_over(vocabulary, &links))
}

#[test]
fn reasoning_is_dimmed_and_no_part_of_the_answer() {
    let dir = thoughtful();
    let is_dim = |terminal: &Terminal, text: &str| {
        terminal.look(|screen| {
            let row = screen
                .rows(0, 100)
                .position(|line| line.contains(text))
                .expect("the text") as u16;
            screen.cell(row, 0).expect("a cell").dim()
        })
    };
    let mut terminal = chat(&dir, &[]);
    terminal.enter("a");
    terminal.wait_for("\n<think>hm</think>\n\nYo\n> ");
    assert!(is_dim(&terminal, "<think>hm") && !is_dim(&terminal, "Yo"));
    let answer = json!({"role": "assistant", "content": "Yo", "reasoning_content": "hm"});
    assert_eq!(saved(&dir, &mut terminal), json!([user("a"), answer]));
    // The template leaves it out of the next prompt, which is read from there.
    terminal.enter("b");
    let len = 2 * TURN + 4;
    assert_eq!(
        tokens_read(&mut terminal),
        format!("{} of {len}", len - TURN)
    );

    let mut terminal = Terminal::start(&dir, &["chat", "m.gguf"], 100, &[("NO_COLOR", "1")]);
    terminal.enter("a");
    assert!(!is_dim(&terminal, "<think>hm"));

    let mut terminal = chat(&dir, &["--reasoning", "stderr"]);
    terminal.enter("a");
    terminal.wait_for("> a\n<think>hm</think>\nYo\n> ");
    assert!(is_dim(&terminal, "<think>hm") && !is_dim(&terminal, "Yo"));

    let mut terminal = chat(&dir, &["--reasoning", "hide"]);
    terminal.enter("a");
    assert!(
        terminal.text().contains("> a\nYo\n> "),
        "{}",
        terminal.text()
    );
}

#[test]
fn a_model_commands_no_terminal() {
    let dir = with_model(answers("\x1b[31mX"));
    let mut terminal = chat(&dir, &[]);
    terminal.enter("a");
    assert!(
        terminal.text().contains("> a\n\\u{1b}[31mX\n> "),
        "{}",
        terminal.text()
    );
}

#[test]
fn a_narrow_terminal_wraps_what_is_typed() {
    let dir = polite();
    let mut terminal = Terminal::start(
        &dir,
        &["chat", "-q", "-m", "m.gguf", "--temp", "0"],
        20,
        &[],
    );
    let message = "one two three four five six";
    terminal.enter(message);
    let screen = terminal.look(|screen| screen.rows(0, 20).collect::<Vec<_>>());
    assert_eq!(
        &screen[..4],
        ["> one two three four", " five six", "Hi", "> "].map(|line| line.to_owned())
    );
    assert_eq!(
        saved(&dir, &mut terminal),
        json!([user(message), assistant("Hi")])
    );
}

#[test]
fn answers_alone_go_to_an_output_that_is_no_terminal() {
    let dir = polite();
    let mut terminal = Terminal::shell(&dir, "\"$sharpi\" chat m.gguf --temp 0 > answers.txt");
    terminal.wait_for_prompt();
    terminal.press(&format!("a{ENTER}"));
    terminal.wait_for_last("> a\n>");
    terminal.press(CTRL_D);
    assert_eq!(terminal.end().0, 0);
    let answers = fs::read_to_string(dir.path().join("answers.txt")).expect("answers");
    assert_eq!(answers, "Hi\n");
}

#[test]
fn a_run_without_a_prompt_opens_a_conversation_on_a_terminal() {
    let dir = polite();
    for args in [
        &["run", "m.gguf"][..],
        &["run", "-m", "m.gguf", "--system", "s"],
    ] {
        let mut terminal = Terminal::start(&dir, &[args, &["--temp", "0"]].concat(), 100, &[]);
        terminal.enter("a");
        assert!(
            terminal.text().contains("> a\nHi\n> "),
            "{}",
            terminal.text()
        );
    }
    // What asks for something else gets it, or hears what is missing.
    for flag in ["--raw", "--json"] {
        let terminal = Terminal::start(&dir, &["run", "m.gguf", flag], 100, &[]);
        terminal.wait_for("error: no prompt");
        assert_eq!(terminal.end().0, 2);
    }
    let terminal = Terminal::start(&dir, &["run", "m.gguf", "a", "--temp", "0"], 100, &[]);
    terminal.wait_for("Hi\n");
    assert_eq!(terminal.end().0, 0);
}

#[test]
fn what_the_template_makes_no_use_of_is_said_once() {
    let dir = polite();
    let mut terminal = chat(&dir, &["--no-think"]);
    terminal.enter("a");
    terminal.enter("b");
    let text = terminal.text();
    assert_eq!(text.matches("has no effect").count(), 1, "{text}");
    assert!(text.contains("warning: --no-think has no effect"), "{text}");
}

#[test]
fn without_a_terminal_or_a_template_there_is_no_conversation() {
    let ran = sharpi(&["chat"]);
    assert!(ran.error(2).contains("standard input is none"));
    let dir = Dir::new();
    dir.file(
        "m.gguf",
        answers("Hi").unset("tokenizer.chat_template").to_bytes(),
    );
    let terminal = chat(&dir, &[]);
    terminal.wait_for("m.gguf has no chat template");
    terminal.wait_for("sharpi run --raw");
    assert_eq!(terminal.end().0, 1);
}

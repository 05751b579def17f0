//! What a conversation becomes: turns that are continued, and flags of which a template makes no use.

use serde_json::{Value, json};

use crate::{Dir, Ran, json::valid, model};

/// A model that goes on from `a` with `bcd`, and a directory that it lies in.
fn dir_with_model(template: &str) -> Dir {
    let mut file = model::chain(
        &[b'a', b'b', b'c', b'd']
            .map(u32::from)
            .into_iter()
            .chain([model::END])
            .collect::<Vec<_>>(),
    );
    file.set("tokenizer.chat_template", template);
    let dir = Dir::new();
    dir.file("m.gguf", file.to_bytes());
    dir
}

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn turns(said: &Value) -> String {
    json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]).to_string()
}

#[test]
fn a_conversation_that_ends_with_the_assistant_goes_on_there() {
    let dir = dir_with_model(CHATML);
    let run = |said: &Value, args: &[&str]| {
        dir.file("turns.json", turns(said));
        let flags = ["-m", "m.gguf", "--messages", "turns.json"];
        dir.run(&[&args[..1], &flags, &args[1..]].concat())
    };
    // Only what is new.
    let said = json!("so far:a");
    assert_eq!(run(&said, &["run", "--temp", "0"]).stdout(), "bcd\n");
    let parts = json!([{"type": "text", "text": "so"}, {"type": "text", "text": "a"}]);
    assert_eq!(run(&parts, &["run", "--temp", "0"]).stdout(), "bcd\n");
    let lines = run(&said, &["run", "--temp", "0", "--json"]);
    let done = lines.stdout().lines().last().expect("a line");
    assert_eq!(valid("run.json", done)["text"], "bcd");

    let tokenized = run(&said, &["tokenize", "--chat", "--json"]);
    let tokenized: Value = serde_json::from_str(tokenized.stdout()).expect("JSON");
    assert_eq!(
        tokenized["text"],
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nso far:a"
    );
    let none = run(&Value::Null, &["run"]);
    assert!(none.error(1).contains("no text to continue"), "{none:?}");
}

#[test]
fn a_template_that_changes_the_last_text_says_that_it_cannot_be_continued() {
    let dir =
        dir_with_model("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}");
    dir.file("turns.json", turns(&json!("<think>x</think>a")));
    let ran = dir.run(&["run", "-m", "m.gguf", "--messages", "turns.json"]);
    let error = ran.error(1);
    assert!(
        error.contains("m.gguf: the chat template changes the text"),
        "{error}"
    );
}

#[test]
fn what_a_template_does_not_look_at_is_a_warning() {
    let warnings = |dir: &Dir, args: &[&str]| {
        let ran: Ran = dir.run(&[&["run", "-m", "m.gguf", "-n", "1"], args].concat());
        ran.stdout();
        let warnings = ran
            .stderr
            .lines()
            .filter_map(|line| line.strip_prefix("warning: "));
        warnings.map(str::to_owned).collect::<Vec<_>>()
    };
    let dir = dir_with_model("{{ messages[-1].content }}");
    dir.file(
        "tools.json",
        r#"[{"type":"function","function":{"name":"clock"}}]"#,
    );
    assert_eq!(warnings(&dir, &["-p", "a"]), [""; 0]);
    for (flags, start) in [
        (&["--no-think"][..], "--no-think has no effect"),
        (&["--tools", "tools.json"], "--tools has no effect"),
        (&["--date", "2026-01-31"], "--date has no effect"),
        (
            &["--system", "Be brief."],
            "the chat template of m.gguf leaves a system message out",
        ),
    ] {
        let told = warnings(&dir, &[&["-p", "a"], flags].concat());
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with(start) && told[0].contains("m.gguf"),
            "{told:?}"
        );
        assert_eq!(
            warnings(&dir, &[&["-p", "a", "-q"], flags].concat()),
            [""; 0]
        );
    }
    let dir = dir_with_model(
        "{{ tools }}{{ strftime_now('%Y') if enable_thinking is false }}{% for m in messages %}{{ m.content }}{% endfor %}",
    );
    dir.file("tools.json", "[]");
    let all = [
        "-p",
        "a",
        "--no-think",
        "--tools",
        "tools.json",
        "--date",
        "2026-01-31",
        "--system",
        "s",
    ];
    assert_eq!(warnings(&dir, &all), [""; 0]);
}

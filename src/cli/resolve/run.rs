//! `sharpi run`.

use std::{ffi::OsString, path::Path};

use anyhow::Result;

use super::{
    Input, ModelSource, SamplingFlags,
    input::{chat, is_stdin, read_text, reads_stdin, text},
    machine::compute,
    model::model,
    usage,
};
use crate::{
    cli::{
        args::{ReasoningPlace, RunArgs, VerbosityArgs},
        backend::Compute,
        prompt_cache::PromptCacheFile,
    },
    engine::Grammar,
    hub::Reference,
};

pub struct RunRequest {
    pub model: ModelSource,
    pub input: Input,
    /// `None`: until the end of the answer or of the context.
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub sampling: SamplingFlags,
    /// What the answer must match.
    pub grammar: Option<Grammar>,
    pub format: Format,
    pub prompt_cache: Option<PromptCacheFile>,
    pub compute: Compute,
}

/// What goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text(ReasoningPlace),
    /// With the `top_logprobs` likeliest tokens at every step.
    Json {
        top_logprobs: Option<usize>,
    },
}

/// `args` without its short form.
pub fn run(args: RunArgs, verbosity: &VerbosityArgs) -> Result<RunRequest> {
    let grammar = grammar(&args)?;
    let place = match grammar {
        Some(_) if verbosity.quiet => ReasoningPlace::Hide,
        Some(_) => ReasoningPlace::Stderr,
        None => ReasoningPlace::Show,
    };
    Ok(RunRequest {
        input: if args.raw {
            Input::Raw(text(&args.prompt)?)
        } else {
            chat(args.prompt)?
        },
        model: model(args.model, Some(args.rope), verbosity)?,
        compute: compute(
            args.machine,
            args.generation.context_len(),
            "--ctx-size",
            verbosity,
        ),
        max_tokens: args.generation.max_tokens,
        stop: args.generation.stop,
        ignore_eos: args.generation.ignore_eos,
        sampling: SamplingFlags(args.sampling),
        grammar,
        format: match args.json {
            true => Format::Json {
                top_logprobs: args.logprobs,
            },
            false => Format::Text(args.reasoning.unwrap_or(place)),
        },
        prompt_cache: args.prompt_cache.map(|path| PromptCacheFile {
            path,
            read_only: args.prompt_cache_ro,
        }),
    })
}

/// What the answer must match.
fn grammar(args: &RunArgs) -> Result<Option<Grammar>> {
    let file = args.json_schema.as_deref().map(Path::new);
    let file = file.or(args.grammar.as_deref());
    if file.is_some_and(is_stdin) && reads_stdin(&args.prompt) {
        return Err(usage(
            "standard input can be read once: give --json-schema or --grammar, or the prompt, a file",
        ));
    }
    let (what, grammar) = if let Some(schema) = &args.json_schema {
        let typed = schema.trim();
        let (what, json) = match typed.starts_with('{') || matches!(typed, "true" | "false") {
            true => ("--json-schema".to_owned(), schema.clone()),
            false => (
                format!("--json-schema {schema}"),
                read_text("--json-schema", Path::new(schema))?,
            ),
        };
        let json = json.trim_start_matches('\u{feff}');
        let schema =
            serde_json::from_str(json).map_err(|error| usage(&format!("{what}: {error}")))?;
        (what, Grammar::json_schema(&schema))
    } else if let Some(regex) = &args.regex {
        ("--regex".to_owned(), Grammar::regex(regex))
    } else if let Some(file) = &args.grammar {
        let what = format!("--grammar {}", file.display());
        (what, Grammar::lark(&read_text("--grammar", file)?))
    } else {
        return Ok(None);
    };
    if args.reasoning == Some(ReasoningPlace::Show) {
        return Err(usage(
            "--reasoning show would put reasoning into the answer that has a form to keep to: use stderr or hide",
        ));
    }
    let grammar = grammar.map_err(|error| usage(&format!("{what}: {error:#}")))?;
    Ok(Some(grammar))
}

/// Takes `[MODEL] [PROMPT]` for what `--model` and `--prompt` give.
pub fn take_short_form(args: &mut RunArgs) -> Result<()> {
    let is_model = |name: &OsString| {
        let is_file = Path::new(name).extension().is_some_and(|e| e == "gguf");
        is_file || name.to_str().is_some_and(Reference::is_meant_by)
    };
    let (model, prompt) = match (args.first.take(), args.second.take()) {
        (Some(one), None) if args.model.model.is_some() => (None, Some(one)),
        (Some(one), None) if args.model.default.is_some() && !is_model(&one) => (None, Some(one)),
        both => both,
    };
    let twice = |what, flag| {
        usage(&format!(
            "the {what} is given twice, as an argument and with {flag}"
        ))
    };
    if let Some(model) = model
        && args.model.model.replace(model.into()).is_some()
    {
        return Err(twice("model", "--model"));
    }
    if let Some(prompt) = prompt {
        let prompt = prompt
            .into_string()
            .map_err(|_| usage("the prompt is not UTF-8 text"))?;
        if args.prompt.messages.is_some() {
            return Err(usage(
                "a prompt as an argument cannot be used with --messages",
            ));
        }
        if args.prompt.prompt.replace(prompt).is_some() {
            return Err(twice("prompt", "--prompt"));
        }
    }
    Ok(())
}

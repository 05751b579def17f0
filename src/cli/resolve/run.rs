//! `sharpi run`.

use std::{ffi::OsString, path::Path};

use anyhow::Result;

use super::{
    Input, ModelSource, SamplingFlags,
    input::{chat, text},
    machine::compute,
    model::model,
    usage,
};
use crate::{
    cli::{
        args::{RunArgs, VerbosityArgs},
        backend::Compute,
    },
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
    pub format: Format,
    pub compute: Compute,
}

/// What goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    /// With the `top_logprobs` likeliest tokens at every step.
    Json {
        top_logprobs: Option<usize>,
    },
}

/// `args` without its short form.
pub fn run(args: RunArgs, verbosity: &VerbosityArgs) -> Result<RunRequest> {
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
        format: match args.json {
            true => Format::Json {
                top_logprobs: args.logprobs,
            },
            false => Format::Text,
        },
    })
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

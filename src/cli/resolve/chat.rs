//! `sharpi chat`, and `sharpi run` where it opens one.

use std::io::{self, IsTerminal};

use anyhow::Result;
use jiff::ZonedDateTime;

use super::{
    ModelSource, SamplingFlags, input::template_options, machine::compute, model::model, usage,
};
use crate::{
    cli::{
        args::{ChatArgs, PromptArgs, ReasoningPlace, RunArgs, VerbosityArgs},
        backend::Compute,
    },
    model::TemplateOptions,
};

pub struct ChatRequest {
    pub model: ModelSource,
    pub system: Option<String>,
    /// With the date of now where none is given: the earlier turns of a conversation are to stay as they were read.
    pub template: TemplateOptions,
    /// Whether a date was given.
    pub day_matters: bool,
    /// Of each answer. `None`: until its end or that of the context.
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub sampling: SamplingFlags,
    pub reasoning: ReasoningPlace,
    pub compute: Compute,
}

pub fn chat(mut args: ChatArgs, verbosity: &VerbosityArgs) -> Result<ChatRequest> {
    if !io::stdin().is_terminal() {
        return Err(usage(
            "a conversation is typed in a terminal, and standard input is none: `sharpi run` takes prompts from pipes and files",
        ));
    }
    let context_len = args.generation.context_len();
    let system = args.template.system.take();
    let mut template = template_options(args.template)?;
    let day_matters = template.date.is_some();
    template
        .date
        .get_or_insert_with(|| ZonedDateTime::now().datetime());
    Ok(ChatRequest {
        model: model(args.model.into(), Some(args.rope), verbosity)?,
        system,
        template,
        day_matters,
        max_tokens: args.generation.max_tokens,
        stop: args.generation.stop,
        ignore_eos: args.generation.ignore_eos,
        sampling: SamplingFlags(args.sampling),
        reasoning: args.reasoning,
        compute: compute(args.machine, context_len, "--ctx-size", verbosity),
    })
}

/// The conversation that `sharpi run` opens where a person at a terminal gives it no prompt, and no flag that asks for
/// something else; the arguments as they were where it opens none.
pub fn instead_of_run(args: Box<RunArgs>) -> Result<ChatArgs, Box<RunArgs>> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(args);
    }
    match *args {
        RunArgs {
            first: None,
            second: None,
            model,
            prompt:
                PromptArgs {
                    prompt: None,
                    file: None,
                    messages: None,
                    template,
                },
            raw: false,
            generation,
            sampling,
            json_schema: None,
            regex: None,
            grammar: None,
            prompt_cache: None,
            prompt_cache_ro: false,
            reasoning,
            json: false,
            logprobs: None,
            rope,
            machine,
        } => Ok(ChatArgs {
            model: model.into(),
            template,
            generation,
            sampling,
            reasoning: reasoning.unwrap_or(ReasoningPlace::Show),
            rope,
            machine,
        }),
        args => Err(Box::new(args)),
    }
}

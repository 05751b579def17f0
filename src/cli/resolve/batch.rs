//! `sharpi batch`.

use std::path::PathBuf;

use anyhow::Result;

use super::{
    LineFlags, ModelSource,
    input::{is_stdin, template_options},
    machine::compute,
    model::model,
    usage,
};
use crate::cli::{
    args::{BatchArgs, VerbosityArgs},
    backend::Compute,
};

pub struct BatchRequest {
    pub model: ModelSource,
    /// `-`: standard input.
    pub input: PathBuf,
    /// `-`: standard output.
    pub output: PathBuf,
    /// Whether to go on behind what the output holds.
    pub resume: bool,
    pub flags: LineFlags,
    pub compute: Compute,
}

pub fn batch(mut args: BatchArgs, verbosity: &VerbosityArgs) -> Result<BatchRequest> {
    if args.resume && is_stdin(&args.output) {
        return Err(usage(
            "--resume goes on behind what a file holds: name it with --output FILE",
        ));
    }
    if is_stdin(&args.input) && args.template.tools.as_deref().is_some_and(is_stdin) {
        return Err(usage(
            "standard input can be read once: give --tools, or --input, a file",
        ));
    }
    Ok(BatchRequest {
        compute: compute(
            args.machine,
            args.generation.context_len(),
            "--ctx-size",
            verbosity,
        ),
        flags: LineFlags {
            raw: args.raw,
            system: args.template.system.take(),
            options: template_options(args.template)?,
            max_tokens: args.generation.max_tokens,
            stop: args.generation.stop,
            ignore_eos: args.generation.ignore_eos,
            sampling: args.sampling,
        },
        model: model(args.model, Some(args.rope), verbosity)?,
        input: args.input,
        output: args.output,
        resume: args.resume,
    })
}

//! From what was typed to what the commands need: conflicts refused, files read, defaults filled in. Nothing below
//! this layer asks the command line anything.

mod batch;
mod chat;
mod input;
mod line;
mod machine;
mod measure;
mod model;
mod run;
mod sampling;
mod tokenize;

use anyhow::Result;
use clap_complete::Shell;

pub use batch::BatchRequest;
pub use chat::ChatRequest;
pub use input::{Input, is_stdin, read_turns, say_typing, without_effect};
pub use line::{Line, LineFlags, Task};
pub use model::ModelSource;
pub use run::{Format, RunRequest};
pub use sampling::SamplingFlags;
pub use tokenize::TokenizeRequest;

use self::{
    input::read_text,
    machine::{compute, with_graph},
    model::model,
};
use super::{
    args::{self, VerbosityArgs},
    bench::BenchRequest,
    download::Download,
    exit::UsageError,
    info::{InfoRequest, View},
    models,
    perplexity::PerplexityRequest,
    progress,
    verify::VerifyRequest,
};

/// One command, ready to be carried out.
pub enum Request {
    Run(Box<RunRequest>),
    Chat(Box<ChatRequest>),
    Batch(Box<BatchRequest>),
    Info(InfoRequest),
    Tokenize(TokenizeRequest),
    Bench(BenchRequest),
    Perplexity(PerplexityRequest),
    Verify(VerifyRequest),
    Pull(Download),
    Models(models::Format),
    Devices,
    Config,
    Completions(Shell),
    /// Of a command, or of all.
    Man(Option<String>),
    /// Likewise.
    Help(Option<String>),
}

/// Turns what was typed into a request, reading the files that it names except for the model.
pub fn resolve(command: args::Command, verbosity: &VerbosityArgs) -> Result<Request> {
    Ok(match command {
        args::Command::Run(mut args) => {
            run::take_short_form(&mut args)?;
            match chat::instead_of_run(args) {
                Ok(args) => Request::Chat(Box::new(chat::chat(args, verbosity)?)),
                Err(args) => Request::Run(Box::new(run::run(*args, verbosity)?)),
            }
        }
        args::Command::Chat(args) => Request::Chat(Box::new(chat::chat(*args, verbosity)?)),
        args::Command::Batch(args) => Request::Batch(Box::new(batch::batch(*args, verbosity)?)),
        args::Command::Info(args) => Request::Info(InfoRequest {
            view: match (args.template, args.metadata) {
                (Some(name), _) => View::Template(name),
                (None, Some(key)) => View::Metadata(key),
                (None, None) => View::Summary,
            },
            model: model(args.model.into(), None, verbosity)?,
            json: args.json,
        }),
        args::Command::Tokenize(args) => Request::Tokenize(tokenize::tokenize(args, verbosity)?),
        args::Command::Bench(args) => Request::Bench(measure::bench(args, verbosity)?),
        args::Command::Perplexity(args) => Request::Perplexity(PerplexityRequest {
            text: read_text("--file", &args.file)?,
            model: model(args.model.into(), Some(args.rope), verbosity)?,
            compute: compute(args.machine, Some(args.ctx_size), "--ctx-size", verbosity),
            window: args.ctx_size,
            kl: args.kl,
        }),
        args::Command::Verify(args) => Request::Verify(VerifyRequest {
            compute: with_graph(
                "verify",
                compute(args.machine, None, "--prompt and --max-tokens", verbosity),
            )?,
            model: model(args.model.into(), Some(args.rope), verbosity)?,
            cpu: args.cpu,
            tokens: args.max_tokens,
            prompt: args.prompt,
        }),
        args::Command::Pull(args) => Request::Pull(Download {
            reference: args.reference,
            offline: args.offline,
            show_progress: progress::wanted(verbosity),
        }),
        args::Command::Models(args) => Request::Models(match (args.json, verbosity.verbose) {
            (true, _) => models::Format::Json,
            (false, paths) => models::Format::Table { paths },
        }),
        args::Command::Devices => Request::Devices,
        args::Command::Config => Request::Config,
        args::Command::Completions { shell } => Request::Completions(shell),
        args::Command::Man { command } => Request::Man(command),
        args::Command::Help { command } => Request::Help(command),
    })
}

fn usage(message: &str) -> anyhow::Error {
    UsageError(message.to_owned()).into()
}

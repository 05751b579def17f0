//! `sharpi run`.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, ValueEnum};

use super::{
    GenerationArgs, MachineArgs, ModelArgs, PromptArgs, RopeArgs, SamplingArgs,
    values::at_least_one,
};

const RUN_EXAMPLES: &str = "\
Examples:
  sharpi run m.gguf \"Why is the sky blue?\"
  sharpi run -m m.gguf -p \"Summarise this:\" -f report.txt > summary.txt
  git diff | sharpi run -m m.gguf -p \"Write a commit message for:\" -f -
  sharpi run -m m.gguf --messages turns.json --no-think --temp 0
  sharpi run -m m.gguf --raw -p \"Once upon a time\" --stop \"The end\" -n 200
  sharpi run -m m.gguf -f report.txt --prompt-cache report.kv
  sharpi run -m m.gguf -p \"Yes or no?\" -n 1 --json --logprobs 5 | jq .

Only the generated text goes to standard output; messages and statistics go to standard error.
Standard input is read for `-f -` and `--messages -`, and as the prompt where there is no other one.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// In the place of --model; where the model is known, in that of --prompt
    #[arg(value_name = "MODEL", hide_short_help = true)]
    pub first: Option<OsString>,

    /// In the place of --prompt
    #[arg(value_name = "PROMPT", hide_short_help = true)]
    pub second: Option<OsString>,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    /// Take the prompt as it is, without the chat template
    #[arg(long, help_heading = "Prompt", conflicts_with_all = ["system", "messages", "tools", "date", "no_think"])]
    pub raw: bool,

    #[command(flatten)]
    pub generation: GenerationArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Go on behind what FILE holds of the prompt, and leave the whole prompt there for the next run
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "Prompt",
        hide_short_help = true
    )]
    pub prompt_cache: Option<PathBuf>,

    /// With --prompt-cache: never write the file
    #[arg(
        long,
        requires = "prompt_cache",
        help_heading = "Prompt",
        hide_short_help = true
    )]
    pub prompt_cache_ro: bool,

    /// Print one JSON document of a schema
    ///
    /// Standard output is a document that the schema accepts, on one line. JSON is the schema, or the name of its file.
    #[arg(
        long,
        value_name = "JSON",
        help_heading = "Output",
        conflicts_with_all = ["regex", "grammar", "stop", "ignore_eos"]
    )]
    pub json_schema: Option<String>,

    /// Print a text that the regular expression matches as a whole
    #[arg(
        long,
        value_name = "REGEX",
        help_heading = "Output",
        allow_hyphen_values = true,
        hide_short_help = true,
        conflicts_with_all = ["grammar", "stop", "ignore_eos"]
    )]
    pub regex: Option<String>,

    /// Print a text of the grammar in FILE (Lark)
    #[arg(long, value_name = "FILE", help_heading = "Output", hide_short_help = true, conflicts_with_all = ["stop", "ignore_eos"])]
    pub grammar: Option<PathBuf>,

    /// Where the model's reasoning goes: with the answer, nowhere, or to standard error [default: show; stderr where the
    /// answer is held to a schema, an expression or a grammar]
    #[arg(
        long,
        value_enum,
        value_name = "WHERE",
        help_heading = "Output",
        hide_short_help = true,
        conflicts_with = "json"
    )]
    pub reasoning: Option<ReasoningPlace>,

    /// Print one JSON object a line, as in docs/json.md
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// With --json: the N likeliest tokens at every step, with their log-probabilities
    #[arg(long, value_name = "N", requires = "json", help_heading = "Output", allow_negative_numbers = true, value_parser = at_least_one, hide_short_help = true)]
    pub logprobs: Option<usize>,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

/// What `--reasoning` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReasoningPlace {
    Show,
    Hide,
    Stderr,
}

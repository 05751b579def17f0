//! `sharpi batch`.

use std::path::PathBuf;

use clap::Args;

use super::{GenerationArgs, MachineArgs, ModelArgs, RopeArgs, SamplingArgs, TemplateArgs};

const BATCH_EXAMPLES: &str = "\
Examples:
  sharpi batch -m m.gguf -i prompts.jsonl -o answers.jsonl
  sharpi batch -m m.gguf -i prompts.jsonl -o answers.jsonl --resume
  jq -c '{id, prompt: .title}' items.jsonl | sharpi batch --temp 0 | jq .text

A line is {\"prompt\":\"...\"} or {\"messages\":[...]}, and may have an \"id\", and options under the names of flags, such as \
\"max_tokens\", which precede the flags. docs/json.md lists them.
A line that cannot be answered gets one that says why, and the exit status is 1.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = BATCH_EXAMPLES)]
pub struct BatchArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Prompts, one JSON object a line
    ///
    /// - is standard input
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub input: PathBuf,

    /// Answers, one JSON object a line
    ///
    /// - is standard output. A file that is there already is refused, unless --resume goes on behind it
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,

    /// Go on behind the answers that --output holds
    #[arg(long)]
    pub resume: bool,

    #[command(flatten)]
    pub template: TemplateArgs,

    /// Take prompts as they are, without the chat template
    #[arg(long, help_heading = "Prompt", conflicts_with_all = ["system", "tools", "date", "no_think"])]
    pub raw: bool,

    #[command(flatten)]
    pub generation: GenerationArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

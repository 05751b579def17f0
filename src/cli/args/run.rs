//! `sharpi run`.

use std::ffi::OsString;

use clap::{Args, builder::NonEmptyStringValueParser};

use super::{
    MachineArgs, ModelArgs, PromptArgs, RopeArgs, SamplingArgs,
    values::{at_least_one, count, tokens},
};

const RUN_EXAMPLES: &str = "\
Examples:
  sharpi run -p \"Write a story about a fox and a lantern.\"
  sharpi run -m m.gguf -p \"Summarise this:\" -f report.txt > summary.txt
  git diff | sharpi run -m m.gguf -p \"Write a commit message for:\" -f -
  sharpi run -m m.gguf --messages turns.json --no-think --temp 0
  sharpi run -m m.gguf --raw -p \"Once upon a time\" --stop \"The end\" -n 200
  sharpi run m.gguf \"Why is the sky blue?\"
  sharpi run -m m.gguf -p \"Yes or no?\" -n 1 --json --logprobs 5 | jq .

Only the generated text goes to standard output; messages and statistics go to standard error.
Standard input is read for `-f -` and `--messages -`, and as the prompt where there is no other one.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// In the place of --model; where the model is known, in that of --prompt
    #[arg(value_name = "MODEL")]
    pub first: Option<OsString>,

    /// In the place of --prompt
    #[arg(value_name = "PROMPT")]
    pub second: Option<OsString>,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    /// Take the prompt as it is, without the model's chat template
    #[arg(long, help_heading = "Prompt", conflicts_with_all = ["system", "messages", "tools", "date", "no_think"])]
    pub raw: bool,

    /// Stop after N tokens [default: at the end of the answer or of the context]
    #[arg(
        short = 'n',
        long,
        visible_alias = "n-predict",
        value_name = "N",
        help_heading = "Generation",
        allow_negative_numbers = true,
        value_parser = count
    )]
    pub max_tokens: Option<usize>,

    /// Room for N tokens of prompt and text; 0: what the model was trained for, as far as memory allows
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 0,
        help_heading = "Generation",
        allow_negative_numbers = true,
        value_parser = tokens
    )]
    pub ctx_size: usize,

    /// Stop where the text would contain TEXT, which is not printed; repeatable
    #[arg(
        long,
        value_name = "TEXT",
        help_heading = "Generation",
        allow_hyphen_values = true,
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub stop: Vec<String>,

    /// Go on when the model ends its answer
    #[arg(long, help_heading = "Generation")]
    pub ignore_eos: bool,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Print one JSON object a line (docs/json.md describes them)
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// With --json: the N likeliest tokens at every step, with their log-probabilities
    #[arg(long, value_name = "N", requires = "json", help_heading = "Output", allow_negative_numbers = true, value_parser = at_least_one)]
    pub logprobs: Option<usize>,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

//! `sharpi bench`, `perplexity` and `verify`.

use std::path::PathBuf;

use clap::Args;

use super::{
    MachineArgs, OneModelArgs, RopeArgs,
    values::{at_least_one, some_tokens, tokens, window},
};

const BENCH_EXAMPLES: &str = "\
Examples:
  sharpi bench -m m.gguf
  sharpi bench -m m.gguf -p 0 -n 128 -d 0,4096,16384 --compare-graph

Rows are named as in llama-bench: pp512 reads a prompt of 512 tokens, tg128@d4096 decodes 128 tokens after 4,096.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = BENCH_EXAMPLES)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: OneModelArgs,

    /// Read prompts of N tokens; 0: none
    #[arg(
        short = 'p',
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "512",
        allow_negative_numbers = true,
        value_parser = tokens
    )]
    pub n_prompt: Vec<usize>,

    /// Decode N tokens; 0: none
    #[arg(
        short = 'n',
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "128",
        allow_negative_numbers = true,
        value_parser = tokens
    )]
    pub n_gen: Vec<usize>,

    /// Do so behind N tokens of context
    #[arg(
        short = 'd',
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "0",
        allow_negative_numbers = true,
        value_parser = tokens
    )]
    pub n_depth: Vec<usize>,

    /// Repeat every measurement N times
    #[arg(short, long, value_name = "N", default_value_t = 5, allow_negative_numbers = true, value_parser = at_least_one)]
    pub repetitions: usize,

    /// Measure decoding with CUDA graphs off and on
    #[arg(long)]
    pub compare_graph: bool,

    /// Read prompts through all layers, also those that are skipped where nobody looks, to see what skipping gains
    #[arg(long, hide_short_help = true)]
    pub all_layers: bool,

    /// Print one JSON object, as in docs/json.md
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

const PERPLEXITY_EXAMPLES: &str = "\
Examples:
  sharpi perplexity -m m.gguf -f text.txt
  sharpi perplexity -m m.gguf -f text.txt --kl";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = PERPLEXITY_EXAMPLES)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: OneModelArgs,

    /// The text (-: standard input)
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,

    /// Cut the text into windows of N tokens
    ///
    /// The second half of each is predicted
    #[arg(short, long, value_name = "N", default_value_t = 512, allow_negative_numbers = true, value_parser = window)]
    pub ctx_size: usize,

    /// Compare every prediction with the CPU's
    #[arg(long)]
    pub kl: bool,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  sharpi verify -m m.gguf
  sharpi verify -m m.gguf -n 300 --cpu";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = VERIFY_EXAMPLES)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub model: OneModelArgs,

    /// What to begin with
    #[arg(
        short,
        long,
        value_name = "TEXT",
        default_value = "Once upon a time",
        allow_hyphen_values = true
    )]
    pub prompt: String,

    /// Decode N tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64, allow_negative_numbers = true, value_parser = some_tokens)]
    pub max_tokens: usize,

    /// Compare with the CPU even if the model is large
    #[arg(long)]
    pub cpu: bool,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

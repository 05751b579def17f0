//! What was typed: plain fields, checked one by one. Nothing is opened and nothing is decided here; `resolve`
//! turns these into what a command needs.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum, builder::NonEmptyStringValueParser};
use clap_complete::Shell;
use jiff::civil::DateTime;

use crate::backend::{MIN_BUDGET, Tiles};

/// The longest context that a flag can ask for: a GPU counts positions in 32 bits.
pub const MOST_TOKENS: usize = i32::MAX as usize;

const EXAMPLES: &str = "\
Examples:
  sharpi run -p \"Write a story about a fox and a lantern.\"
  sharpi run -m qwen3-8b.gguf -p \"Summarise this:\" -f report.txt > summary.txt
  git diff | sharpi run -m qwen3-8b.gguf -p \"Write a commit message for:\" -f -
  sharpi info -m qwen3-8b.gguf

Exit status: 0 done, 1 it failed, 2 wrong usage, 130 interrupted with Ctrl-C.";

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

const TOKENIZE_EXAMPLES: &str = "\
Examples:
  sharpi tokenize -m m.gguf -p \"Hello world\"
  sharpi tokenize -m m.gguf -f page.txt | wc -l
  sharpi tokenize -m m.gguf --chat --system \"Be brief.\" -p \"Hello\" --json

Without --chat the text is taken byte for byte, trailing newlines included.";

const BENCH_EXAMPLES: &str = "\
Examples:
  sharpi bench -m m.gguf
  sharpi bench -m m.gguf -p 0 -n 128 -d 0,4096,16384 --compare-graph

Rows are named as in llama-bench: pp512 reads a prompt of 512 tokens, tg128@d4096 decodes 128 tokens after 4,096.";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  sharpi completions bash > ~/.local/share/bash-completion/completions/sharpi
  sharpi completions zsh > ~/.zfunc/_sharpi
  sharpi completions fish > ~/.config/fish/completions/sharpi.fish";

const MAN_EXAMPLES: &str = "\
Examples:
  sharpi man | man -l -
  sharpi man run > ~/.local/share/man/man1/sharpi-run.1";

/// Run GGUF language models from the command line.
#[derive(Debug, Parser)]
#[command(name = "sharpi", bin_name = "sharpi", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub verbosity: VerbosityArgs,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct VerbosityArgs {
    /// Say nothing on standard error but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Say on standard error what is being done
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text from a prompt
    Run(Box<RunArgs>),
    /// Show what a model file holds
    Info(InfoArgs),
    /// Show how a text becomes tokens
    Tokenize(TokenizeArgs),
    /// Measure tokens per second
    Bench(BenchArgs),
    /// Measure how well a model predicts a text
    Perplexity(PerplexityArgs),
    /// Compare direct launches, the CUDA graph, the step kernel and the CPU on a model
    Verify(VerifyArgs),
    /// Show what this binary can compute on
    Devices,
    /// Print a script that completes commands and flags in a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions { shell: Shell },
    /// Print the manual page, as man reads it
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// The page of one command
        command: Option<String>,
    },
}

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

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = BENCH_EXAMPLES)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,

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

    /// Do so with N tokens already in the context
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
    #[arg(long)]
    pub all_layers: bool,

    /// Print one JSON object (docs/json.md describes it)
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// The text (-: standard input)
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,

    /// Tokens that are read together; the second half of them is predicted
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

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub model: ModelArgs,

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

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct InfoArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = TOKENIZE_EXAMPLES)]
pub struct TokenizeArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    /// Render the model's chat template first, as `sharpi run` does
    #[arg(long, help_heading = "Prompt")]
    pub chat: bool,

    /// Print one JSON object: the text that was tokenized and the ids
    #[arg(long)]
    pub json: bool,
}

/// What `--kv-type` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    /// All as they are
    F16,
    /// Keys and values in 8 bits
    #[value(alias = "q8_0")]
    K8v8,
    /// Keys and values in 4 bits
    K4v4,
    /// Keys in 4 bits, values in 3
    K4v3,
}

impl KvType {
    pub fn tiles(self) -> Option<Tiles> {
        match self {
            Self::F16 => None,
            Self::K8v8 => Some(Tiles::of(8, 8)),
            Self::K4v4 => Some(Tiles::of(4, 4)),
            Self::K4v3 => Some(Tiles::of(4, 3)),
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,

    /// Threads to compute with on the CPU [default: one per core]
    #[arg(short, long, value_name = "N", allow_negative_numbers = true, value_parser = thread_count)]
    pub threads: Option<usize>,

    /// Tokens of a prompt that a GPU reads at once; for perplexity, 1 decodes them [default: 2048]
    #[arg(long, visible_alias = "ubatch-size", value_name = "N", allow_negative_numbers = true, value_parser = some_tokens)]
    pub ubatch: Option<usize>,

    /// Launch CUDA kernels one by one instead of replaying a graph (as SHARPI_CUDA_GRAPH=0 does)
    #[arg(long)]
    pub no_cuda_graph: bool,

    /// How the KV cache keeps tokens that are far behind
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvType::F16)]
    pub kv_type: KvType,

    /// Of a prompt, keep N tokens in each head of the KV cache: those that its end attends to
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = kv_budget)]
    pub kv_budget: Option<usize>,

    /// Compute a token by separate CUDA kernels instead of one (as SHARPI_STEP_KERNEL=0 does)
    #[arg(long)]
    pub no_step_kernel: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Positions (defaults come from the model file)")]
pub struct RopeArgs {
    /// How positions beyond those of the training are brought into its range: none, linear or yarn
    #[arg(long, value_name = "TYPE")]
    pub rope_scaling: Option<RopeScaling>,

    /// Hold X times the context of the training
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = rope_scale)]
    pub rope_scale: Option<f32>,

    /// Base of the rotation frequencies
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = at_least_1)]
    pub rope_freq_base: Option<f32>,

    /// YaRN: tokens of the training's context
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = tokens)]
    pub yarn_orig_ctx: Option<usize>,

    /// YaRN: how much of the ramp between kept and scaled frequencies counts; 0: none, linear scaling
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = probability)]
    pub yarn_ext_factor: Option<f32>,

    /// YaRN: multiply queries and keys with X
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero)]
    pub yarn_attn_factor: Option<f32>,

    /// YaRN: frequencies that turn more often within the training's context stay
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero)]
    pub yarn_beta_fast: Option<f32>,

    /// YaRN: frequencies that turn less often are scaled in full
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero)]
    pub yarn_beta_slow: Option<f32>,
}

/// What `--rope-scaling` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RopeScaling {
    None,
    Linear,
    Yarn,
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// GGUF file; of a split model, the first part [default: $SHARPI_MODEL, or a small built-in demo model]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArgs {
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// Read the prompt from FILE (-: standard input); after --prompt and a blank line where both are given
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// System message of the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,

    /// Read a conversation from FILE (-: standard input): [{"role":"user","content":"..."}, ...]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file", "system"])]
    pub messages: Option<PathBuf>,

    /// Tell the chat template of the tools in FILE (-: standard input), a JSON list as OpenAI's interface takes it
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,

    /// Tell the chat template that it is DATE: 2026-01-31 or 2026-01-31T18:30 [default: now]
    #[arg(long, value_name = "DATE", value_parser = date)]
    pub date: Option<DateTime>,

    /// Ask the chat template for an answer without thinking (enable_thinking=false)
    #[arg(long)]
    pub no_think: bool,
}

/// `None` stands for the model file's recommendation (`general.sampling.*`) or the program's default.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (defaults come from the model file where it has them)")]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the likeliest token [default: 0.7]
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = zero_or_more)]
    pub temp: Option<f32>,

    /// Choose among the K likeliest tokens; 0: all [default: 40]
    #[arg(long, value_name = "K", allow_negative_numbers = true, value_parser = count)]
    pub top_k: Option<usize>,

    /// Choose among the likeliest tokens that together reach probability P; 1: all [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    pub top_p: Option<f32>,

    /// Leave out tokens less likely than P times the likeliest; 0: none [default: 0.05]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    pub min_p: Option<f32>,

    /// Weaken tokens that occurred lately by this factor; 1: not at all [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero)]
    pub repeat_penalty: Option<f32>,

    /// How many tokens back the penalties look; 0: none, -1: the whole context [default: 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    pub repeat_last_n: Option<i64>,

    /// Subtract X from the logit of every token that occurred lately
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, value_parser = finite)]
    pub presence_penalty: f32,

    /// Subtract X from a token's logit for every time that it occurred lately
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, value_parser = finite)]
    pub frequency_penalty: f32,

    /// Seed of the random choices; the same seed gives the same text [default: a new one each time]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<u64>,
}

/// What `--device` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Auto,
    Cpu,
    /// The CUDA device with this index.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected auto, cpu, cuda or cuda:N";
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or(expected)?;
                // No wider than any driver counts: a number that it cuts would open another GPU.
                let index: u16 = index.parse().map_err(|_| expected)?;
                Ok(Self::Cuda(index.into()))
            }
        }
    }
}

fn date(text: &str) -> Result<DateTime, String> {
    let expected = "expected a date, such as 2026-01-31 or 2026-01-31T18:30";
    text.parse().map_err(|_| expected.to_owned())
}

fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err("expected a number".to_owned()),
    }
}

fn zero_or_more(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "must not be negative")
}

fn more_than_zero(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0, "must be more than 0")
}

fn at_least_1(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 1.0, "must be at least 1")
}

/// The range that a file's own factor may have.
fn rope_scale(text: &str) -> Result<f32, String> {
    number(
        text,
        |value| (1e-3..=1e6).contains(&value),
        "must be between 0.001 and 1000000",
    )
}

fn probability(text: &str) -> Result<f32, String> {
    number(
        text,
        |value| (0.0..=1.0).contains(&value),
        "must be between 0 and 1",
    )
}

fn number(text: &str, valid: fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    let value = finite(text)?;
    valid(value)
        .then_some(value)
        .ok_or_else(|| expected.to_owned())
}

fn count(text: &str) -> Result<usize, String> {
    whole_number(text, 0, usize::MAX)
}

fn at_least_one(text: &str) -> Result<usize, String> {
    whole_number(text, 1, usize::MAX)
}

fn tokens(text: &str) -> Result<usize, String> {
    whole_number(text, 0, MOST_TOKENS)
}

fn kv_budget(text: &str) -> Result<usize, String> {
    whole_number(text, MIN_BUDGET, MOST_TOKENS)
}

fn some_tokens(text: &str) -> Result<usize, String> {
    whole_number(text, 1, MOST_TOKENS)
}

/// Half of a window is predicted, and its last token has no successor.
fn window(text: &str) -> Result<usize, String> {
    whole_number(text, 4, MOST_TOKENS)
}

/// More threads than this is a slip of the finger, and would only run into the system's own limit.
fn thread_count(text: &str) -> Result<usize, String> {
    whole_number(text, 1, 1024)
}

fn whole_number(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let expected = match most {
        usize::MAX => format!("expected a whole number, at least {least}"),
        _ => format!("expected a whole number between {least} and {most}"),
    };
    let value = text
        .parse()
        .ok()
        .filter(|value| (least..=most).contains(value));
    value.ok_or(expected)
}

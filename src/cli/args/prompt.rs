//! What a model is to read, how far its text goes, and how its tokens are chosen.

use std::path::PathBuf;

use clap::{Args, builder::NonEmptyStringValueParser};
use jiff::civil::DateTime;

use super::values::{count, date, finite, more_than_zero, probability, seed, tokens, zero_or_more};

#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArgs {
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// Read the prompt from FILE (-: standard input)
    ///
    /// After --prompt and a blank line where both are given
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Read a conversation from FILE (-: standard input)
    ///
    /// A JSON list: [{"role":"user","content":"..."}, ...]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file", "system"])]
    pub messages: Option<PathBuf>,

    #[command(flatten)]
    pub template: TemplateArgs,
}

/// What a chat template is told besides the prompt.
#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
pub struct TemplateArgs {
    /// System message of the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,

    /// Tell the chat template of the tools in FILE (-: standard input), a JSON list as OpenAI's interface takes it
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub tools: Option<PathBuf>,

    /// Tell the chat template that it is DATE: 2026-01-31 or 2026-01-31T18:30 [default: now]
    #[arg(long, value_name = "DATE", value_parser = date, hide_short_help = true)]
    pub date: Option<DateTime>,

    /// Ask the chat template for an answer without thinking
    ///
    /// With enable_thinking=false
    #[arg(long)]
    pub no_think: bool,
}

/// How far a text goes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Stop after N tokens
    ///
    /// Where no number is given, at the end of the answer or of the context
    #[arg(
        short = 'n',
        long,
        visible_alias = "n-predict",
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = count
    )]
    pub max_tokens: Option<usize>,

    /// Room for N tokens; 0: the model's
    ///
    /// Prompt and text together; by default what the model was trained for, as far as memory allows
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true,
        value_parser = tokens
    )]
    pub ctx_size: usize,

    /// Stop where the text would contain TEXT; repeatable
    ///
    /// TEXT is not printed
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub stop: Vec<String>,

    /// Go on when the model ends its answer
    #[arg(long, hide_short_help = true)]
    pub ignore_eos: bool,
}

impl GenerationArgs {
    /// Tokens of context, where any number is asked for.
    pub fn context_len(&self) -> Option<usize> {
        (self.ctx_size > 0).then_some(self.ctx_size)
    }
}

/// `None` stands for the model file's recommendation (`general.sampling.*`) or the program's default.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling (defaults come from the model file where it has them)")]
pub struct SamplingArgs {
    /// Temperature; 0: the likeliest token [default: 0.7]
    #[arg(long, alias = "temperature", value_name = "T", allow_negative_numbers = true, value_parser = zero_or_more)]
    pub temp: Option<f32>,

    /// Choose among the K likeliest tokens; 0: all [default: 40]
    #[arg(long, value_name = "K", allow_negative_numbers = true, value_parser = count, hide_short_help = true)]
    pub top_k: Option<usize>,

    /// Choose among the likeliest tokens that together reach probability P; 1: all [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability, hide_short_help = true)]
    pub top_p: Option<f32>,

    /// Leave out tokens less likely than P times the likeliest; 0: none [default: 0.05]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability, hide_short_help = true)]
    pub min_p: Option<f32>,

    /// Weaken tokens that occurred lately by this factor; 1: not at all [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero, hide_short_help = true)]
    pub repeat_penalty: Option<f32>,

    /// How many tokens back the penalties look; 0: none, -1: the whole context [default: 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..), hide_short_help = true)]
    pub repeat_last_n: Option<i64>,

    /// Subtract X from the logit of every token that occurred lately [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite, hide_short_help = true)]
    pub presence_penalty: Option<f32>,

    /// Subtract X from a token's logit for every time that it occurred lately [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite, hide_short_help = true)]
    pub frequency_penalty: Option<f32>,

    /// Seed of the random choices [default: a new one]
    ///
    /// The same seed gives the same text, on the same device with the same flags
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = seed)]
    pub seed: Option<u64>,
}

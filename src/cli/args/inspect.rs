//! `sharpi info` and `tokenize`.

use clap::Args;

use super::{ModelArgs, PromptArgs};

const TOKENIZE_EXAMPLES: &str = "\
Examples:
  sharpi tokenize -m m.gguf -p \"Hello world\"
  sharpi tokenize -m m.gguf -f page.txt | wc -l
  sharpi tokenize -m m.gguf --chat --system \"Be brief.\" -p \"Hello\" --json

Without --chat the text is taken byte for byte, trailing newlines included.";

const INFO_EXAMPLES: &str = "\
Examples:
  sharpi info -m m.gguf
  sharpi info -m m.gguf --json | jq .tensor_types";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = INFO_EXAMPLES)]
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

    /// Render the chat template first, as `sharpi run` does
    #[arg(long, help_heading = "Prompt")]
    pub chat: bool,

    /// Print one JSON object: the text and its ids
    #[arg(long)]
    pub json: bool,
}

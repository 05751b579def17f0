//! `sharpi info` and `tokenize`.

use clap::Args;

use super::{OneModelArgs, PromptArgs};

const INFO_EXAMPLES: &str = "\
Examples:
  sharpi info -m m.gguf
  sharpi info -m m.gguf --metadata
  sharpi info -m m.gguf --metadata=general.license
  sharpi info -m m.gguf --template > chat.jinja

Files that cannot be run are described as far as they can be read, and why they cannot be run.";

const TOKENIZE_EXAMPLES: &str = "\
Examples:
  sharpi tokenize -m m.gguf -p \"Hello world\"
  sharpi tokenize -m m.gguf -f page.txt | wc -l
  sharpi tokenize -m m.gguf --chat --system \"Be brief.\" -p \"Hello\" --json

Without --chat the text is taken byte for byte, trailing newlines included.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = INFO_EXAMPLES)]
pub struct InfoArgs {
    #[command(flatten)]
    pub model: OneModelArgs,

    /// Print every metadata key with its type and value, long ones abbreviated; or the whole value of KEY
    #[arg(long, value_name = "KEY", num_args = 0..=1, require_equals = true)]
    pub metadata: Option<Option<String>>,

    /// Print the chat template as it is; or the one called NAME
    #[arg(
        long,
        value_name = "NAME",
        num_args = 0..=1,
        require_equals = true,
        conflicts_with_all = ["metadata", "json"]
    )]
    pub template: Option<Option<String>>,

    /// Print one JSON object (docs/json.md describes it); with --metadata, all keys and whole values in it
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = TOKENIZE_EXAMPLES)]
pub struct TokenizeArgs {
    #[command(flatten)]
    pub model: OneModelArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    /// Render the chat template first, as `sharpi run` does
    #[arg(long, help_heading = "Prompt")]
    pub chat: bool,

    /// Print one JSON object: the text and its ids
    #[arg(long)]
    pub json: bool,
}

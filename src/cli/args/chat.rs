//! `sharpi chat`.

use clap::Args;

use super::{
    GenerationArgs, MachineArgs, OneModelArgs, ReasoningPlace, RopeArgs, SamplingArgs, TemplateArgs,
};

const CHAT_EXAMPLES: &str = "\
Examples:
  sharpi chat qwen3-8b.gguf
  sharpi chat -m m.gguf --system \"Be brief.\" --temp 0.6 --reasoning hide
  sharpi chat m.gguf | tee answers.txt

/help lists what can be typed besides messages. Ctrl-C stops an answer, and Ctrl-D ends the conversation.
Answers go to standard output, all else to the terminal and to standard error.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = CHAT_EXAMPLES)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: OneModelArgs,

    #[command(flatten)]
    pub template: TemplateArgs,

    #[command(flatten)]
    pub generation: GenerationArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Where the model's reasoning goes
    ///
    /// Before the answer, dimmed on a terminal; nowhere; or to standard error
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = ReasoningPlace::Show, help_heading = "Output")]
    pub reasoning: ReasoningPlace,

    #[command(flatten)]
    pub rope: RopeArgs,

    #[command(flatten)]
    pub machine: MachineArgs,
}

//! What was typed: plain fields, checked one by one, a file for what belongs together. Nothing is opened and nothing is
//! decided here; `resolve` turns these into what a command needs.

mod batch;
mod chat;
mod help;
mod hub;
mod inspect;
mod machine;
mod measure;
mod model;
mod prompt;
mod run;
mod values;

use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;

pub use batch::BatchArgs;
pub use chat::ChatArgs;
pub use help::on_a_screen;
pub use hub::{ModelsArgs, PullArgs};
pub use inspect::{InfoArgs, TokenizeArgs};
pub use machine::{Device, MachineArgs};
pub use measure::{BenchArgs, PerplexityArgs, VerifyArgs};
pub use model::{ModelArgs, OneModelArgs, RopeArgs, RopeScaling};
pub use prompt::{GenerationArgs, PromptArgs, SamplingArgs, TemplateArgs};
pub use run::{ReasoningPlace, RunArgs};
pub use values::{count, date};

/// The longest context that a flag can ask for: a GPU counts positions in 32 bits.
pub const MOST_TOKENS: usize = i32::MAX as usize;

const EXAMPLES: &str = "\
Examples:
  sharpi run -p \"Write a story about a fox and a lantern.\"
  sharpi run -m qwen3-8b.gguf -p \"Summarise this:\" -f report.txt > summary.txt
  git diff | sharpi run -m qwen3-8b.gguf -p \"Write a commit message for:\" -f -
  sharpi chat qwen3-8b.gguf
  sharpi info -m qwen3-8b.gguf

Exit status: 0 done, 1 it failed, 2 wrong usage, 130 interrupted with Ctrl-C.";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  sharpi completions bash > ~/.local/share/bash-completion/completions/sharpi
  sharpi completions zsh > ~/.zfunc/_sharpi
  sharpi completions fish > ~/.config/fish/completions/sharpi.fish";

const CONFIG_EXAMPLES: &str = "\
Examples:
  sharpi config
  SHARPI_TEMP=0 sharpi config | grep temp";

const MAN_EXAMPLES: &str = "\
Examples:
  sharpi man | man -l -
  sharpi man run > ~/.local/share/man/man1/sharpi-run.1";

const HELP_EXAMPLES: &str = "\
Examples:
  sharpi help run | less
  sharpi run --help";

const DEVICES_EXAMPLES: &str = "\
Examples:
  sharpi devices";

/// Run GGUF language models from the command line.
#[derive(Debug, Parser)]
#[command(
    name = "sharpi",
    bin_name = "sharpi",
    version,
    disable_help_flag = true,
    disable_help_subcommand = true,
    after_help = EXAMPLES
)]
pub struct Cli {
    #[command(flatten)]
    pub verbosity: VerbosityArgs,

    /// Show the flags that are asked for most
    #[arg(short, long, global = true, hide_short_help = true, display_order = 1000, action = ArgAction::HelpShort)]
    pub help: Option<bool>,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct VerbosityArgs {
    /// Say nothing on standard error but errors
    #[arg(
        short,
        long,
        global = true,
        hide_short_help = true,
        display_order = 1000,
        conflicts_with = "verbose"
    )]
    pub quiet: bool,

    /// Say on standard error what is being done
    #[arg(
        short,
        long,
        global = true,
        hide_short_help = true,
        display_order = 1000
    )]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text from a prompt
    Run(Box<RunArgs>),
    /// Talk with a model in the terminal
    Chat(Box<ChatArgs>),
    /// Answer every line of a file
    Batch(Box<BatchArgs>),
    /// Show what a model file holds
    Info(InfoArgs),
    /// Show how a text becomes tokens
    Tokenize(TokenizeArgs),
    /// Measure tokens per second
    Bench(BenchArgs),
    /// Measure how well a model predicts a text
    Perplexity(PerplexityArgs),
    /// Compare the ways of computing on a GPU, and the CPU, on a model
    Verify(VerifyArgs),
    /// Download a model from Hugging Face
    Pull(PullArgs),
    /// List the models that were downloaded from Hugging Face
    Models(ModelsArgs),
    /// Show what this binary can compute on
    #[command(after_help = DEVICES_EXAMPLES)]
    Devices,
    /// Show the defaults that the environment and the configuration give
    #[command(after_help = CONFIG_EXAMPLES)]
    Config,
    /// Print a script that completes commands and flags in a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions { shell: Shell },
    /// Print the manual page, as man reads it
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// The page of one command
        command: Option<String>,
    },
    /// Show all flags of a command
    #[command(after_help = HELP_EXAMPLES)]
    Help {
        /// The command, such as run
        command: Option<String>,
    },
}

impl Command {
    /// The model that the command is for, where it is for one.
    pub fn model_args(&mut self) -> Option<&mut ModelArgs> {
        match self {
            Self::Run(args) => Some(&mut args.model),
            Self::Chat(args) => Some(&mut args.model.flags),
            Self::Batch(args) => Some(&mut args.model),
            Self::Info(args) => Some(&mut args.model.flags),
            Self::Tokenize(args) => Some(&mut args.model.flags),
            Self::Bench(args) => Some(&mut args.model.flags),
            Self::Perplexity(args) => Some(&mut args.model.flags),
            Self::Verify(args) => Some(&mut args.model.flags),
            Self::Pull(_)
            | Self::Models(_)
            | Self::Devices
            | Self::Config
            | Self::Completions { .. }
            | Self::Man { .. }
            | Self::Help { .. } => None,
        }
    }
}

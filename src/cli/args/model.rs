//! Which model, and how far its context reaches.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::values::{at_least_1, more_than_zero, probability, rope_scale, tokens};

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// GGUF file or hf:OWNER/REPO[:QUANT] [default: a demo]
    ///
    /// Of a split model, the first part. What is on Hugging Face is downloaded first. Where no model is given, $SHARPI_MODEL
    /// is taken, or a small built-in demo model
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,

    /// Download nothing: of models from Hugging Face, use what is in the cache (as HF_HUB_OFFLINE=1 does)
    #[arg(long, hide_short_help = true)]
    pub offline: bool,

    /// The model where none is given: the environment's, or the configuration file's.
    #[arg(skip)]
    pub default: Option<PathBuf>,
}

/// The model of a command that takes nothing else without a flag.
#[derive(Debug, Args)]
pub struct OneModelArgs {
    /// In the place of --model
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    argument: Option<PathBuf>,

    #[command(flatten)]
    pub flags: ModelArgs,
}

impl From<ModelArgs> for OneModelArgs {
    fn from(flags: ModelArgs) -> Self {
        Self {
            argument: None,
            flags,
        }
    }
}

impl From<OneModelArgs> for ModelArgs {
    fn from(args: OneModelArgs) -> Self {
        Self {
            model: args.argument.or(args.flags.model),
            ..args.flags
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Positions (defaults come from the model file)")]
pub struct RopeArgs {
    /// How positions beyond those of the training are brought into its range: none, linear or yarn
    #[arg(long, value_name = "TYPE", hide_short_help = true)]
    pub rope_scaling: Option<RopeScaling>,

    /// Hold X times the context of the training
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = rope_scale, hide_short_help = true)]
    pub rope_scale: Option<f32>,

    /// Base of the rotation frequencies
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = at_least_1, hide_short_help = true)]
    pub rope_freq_base: Option<f32>,

    /// YaRN: tokens of the training's context
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = tokens, hide_short_help = true)]
    pub yarn_orig_ctx: Option<usize>,

    /// YaRN: how much of the ramp between kept and scaled frequencies counts; 0: none, linear scaling
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = probability, hide_short_help = true)]
    pub yarn_ext_factor: Option<f32>,

    /// YaRN: multiply queries and keys with X
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero, hide_short_help = true)]
    pub yarn_attn_factor: Option<f32>,

    /// YaRN: frequencies that turn more often within the training's context stay
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero, hide_short_help = true)]
    pub yarn_beta_fast: Option<f32>,

    /// YaRN: frequencies that turn less often are scaled in full
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = more_than_zero, hide_short_help = true)]
    pub yarn_beta_slow: Option<f32>,
}

/// What `--rope-scaling` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RopeScaling {
    None,
    Linear,
    Yarn,
}

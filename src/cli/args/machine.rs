//! What a model is computed on, and how.

use std::str::FromStr;

use clap::{Args, ValueEnum};

use super::values::{kv_budget, some_tokens, thread_count};
use crate::backend::Tiles;

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
    /// Compute on auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,

    /// Threads to compute with on the CPU [default: one per core, of those built for speed]
    #[arg(short, long, value_name = "N", allow_negative_numbers = true, value_parser = thread_count, hide_short_help = true)]
    pub threads: Option<usize>,

    /// Tokens of a prompt that a GPU reads at once; for perplexity, 1 decodes them [default: 2048]
    #[arg(long, visible_alias = "ubatch-size", value_name = "N", allow_negative_numbers = true, value_parser = some_tokens, hide_short_help = true)]
    pub ubatch: Option<usize>,

    /// Launch CUDA kernels one by one instead of replaying a graph (as SHARPI_CUDA_GRAPH=0 does)
    #[arg(long, hide_short_help = true)]
    pub no_cuda_graph: bool,

    /// On the CPU, multiply in float32, not with activations of 8 bits
    #[arg(long, hide_short_help = true)]
    pub cpu_exact: bool,

    /// How the KV cache keeps tokens that are far behind
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvType::F16, hide_short_help = true)]
    pub kv_type: KvType,

    /// Of a prompt, keep N tokens in each head of the KV cache: those that its end attends to
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = kv_budget, hide_short_help = true)]
    pub kv_budget: Option<usize>,

    /// Compute a token by separate CUDA kernels instead of one (as SHARPI_STEP_KERNEL=0 does)
    #[arg(long, hide_short_help = true)]
    pub no_step_kernel: bool,
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

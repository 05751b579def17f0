//! What a model is computed on, and how.

use std::env;

use anyhow::Result;

use super::usage;
use crate::{
    backend::KvOptions,
    cli::{
        args::{Device, MachineArgs, VerbosityArgs},
        backend::Compute,
        progress,
    },
    cpu::Arithmetic,
    cuda::StepKernel,
};

pub fn compute(
    args: MachineArgs,
    context_len: Option<usize>,
    context_flags: &'static str,
    verbosity: &VerbosityArgs,
) -> Compute {
    Compute {
        device: args.device,
        threads: args.threads.unwrap_or(0),
        arithmetic: match args.cpu_exact {
            true => Arithmetic::Exact,
            false => Arithmetic::EightBits,
        },
        graph_disabled: forbidden(args.no_cuda_graph, "--no-cuda-graph", "SHARPI_CUDA_GRAPH"),
        step_kernel: step_kernel(args.no_step_kernel),
        ubatch: args.ubatch,
        context_len,
        kv: KvOptions {
            tiles: args.kv_type.tiles(),
            budget: args.kv_budget,
        },
        context_flags,
        show_progress: progress::wanted(verbosity),
    }
}

/// When the step kernel computes tokens: the flag or the variable forbids it, or the variable asks for it in any case.
fn step_kernel(forbidden_by_flag: bool) -> StepKernel {
    const VARIABLE: &str = "SHARPI_STEP_KERNEL";
    match forbidden(forbidden_by_flag, "--no-step-kernel", VARIABLE) {
        Some(forbids) => StepKernel::Never(forbids),
        None if env::var_os(VARIABLE).is_some_and(|value| value == "1") => StepKernel::Always,
        None => StepKernel::WhereFaster,
    }
}

/// What forbids a way of computing, where the flag is given or the environment's variable stands for it.
fn forbidden(given: bool, flag: &str, variable: &str) -> Option<String> {
    let is_zero = env::var_os(variable).is_some_and(|value| value == "0");
    given.then(|| match is_zero {
        true => format!("{variable}=0"),
        false => flag.to_owned(),
    })
}

/// For `what` compares a graph with direct launches: a GPU, and nothing that forbids the graph.
pub fn with_graph(what: &str, compute: Compute) -> Result<Compute> {
    if let Some(forbids) = &compute.graph_disabled {
        return Err(usage(&format!(
            "{what} compares the CUDA graph with direct launches, and {forbids} forbids the graph: use one or the other"
        )));
    }
    let device = match compute.device {
        Device::Cpu => {
            return Err(usage(&format!(
                "{what} compares ways of computing on a GPU, and --device cpu asks for none: use one or the other"
            )));
        }
        Device::Auto => Device::Cuda(0),
        gpu => gpu,
    };
    Ok(Compute { device, ..compute })
}

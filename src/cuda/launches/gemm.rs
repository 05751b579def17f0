//! One to three matrices times a chunk of tokens (GEMM): which kernel of `kernels/gemm.cu` or `kernels/gemm_strips.cu`
//! does it, and how its work is cut up (`kernels/README.md`).

use anyhow::{Result, anyhow, bail, ensure};
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{Chunk, GATE_SCALE, Linear, SplitKWorkspace, WARP, gelu};
use crate::{
    cuda::{
        device::{Device, Function, Launch, Parameter},
        params::{GemmMatrix, GemmParams},
        tensor_types::{Gemm, KernelType, Run},
    },
    model::decoder::Activation,
};

/// Rows that a warp of `gemm_strips.cu` multiplies; of gate and up, half of each.
const STRIP: usize = 16;

/// `MAX_WARPS` of `gemm_strips.cu`: of a block, those that multiply and those that fetch tokens.
const MAX_STRIP_WARPS: usize = 16;

/// What becomes of the sums.
#[derive(Clone, Copy, PartialEq)]
pub enum Epilogue {
    /// `out = W x + bias`
    Store,
    /// `out += factor * W x`
    Add { factor: f32 },
    /// `gated = activation(G x) * (U x) / GATE_SCALE`, float16
    Gate { activation: Activation },
}

/// f32 values of the [`SplitKWorkspace`] of all GEMMs: two of the largest tiles for each multiprocessor. Strips take
/// less.
pub fn gemm_partial_len(device: &Device) -> usize {
    2 * device.multiprocessors() * 131_072 / size_of::<f32>()
}

/// Counters of the [`SplitKWorkspace`] of all GEMMs: one for each strip that may be cut into slices.
pub fn gemm_counters(device: &Device) -> usize {
    MAX_STRIP_WARPS * device.multiprocessors()
}

/// One to three matrices of one type and one count of columns (with [`Epilogue::Gate`]: gate and up) times a chunk.
/// `x` and `gated` are float16 activations.
pub fn gemm(
    device: &Device,
    linears: &[Linear],
    x: CUdeviceptr,
    gated: CUdeviceptr,
    epilogue: Epilogue,
    workspace: SplitKWorkspace,
    chunk: Chunk,
) -> Result<Launch> {
    let config = GemmLaunchConfig::choose(device, linears, epilogue, chunk)?;
    let mut matrix = [GemmMatrix::zeroed(); 3];
    for (matrix, linear) in matrix.iter_mut().zip(linears) {
        *matrix = GemmMatrix {
            weights: linear.weights.address,
            bias: linear.bias,
            out: linear.out,
            rows: linear.weights.rows as i32,
            out_stride: linear.weights.rows as i32,
        };
    }
    let (number, factor, gelu) = match epilogue {
        Epilogue::Store => (0, 1.0, 0),
        Epilogue::Add { factor } => (1, factor, 0),
        Epilogue::Gate { activation } => (2, 1.0 / GATE_SCALE, gelu(activation)),
    };
    Ok(Launch {
        function: config.function,
        grid: [config.blocks as u32, config.slices as u32, 1],
        block: [config.threads as u32, 1],
        shared_bytes: config.shared_bytes as u32,
        parameter: Parameter::new(GemmParams {
            matrix,
            x,
            gated,
            partial: workspace.partial,
            finished: workspace.finished,
            factor,
            matrices: linears.len() as i32,
            epilogue: number,
            tokens: chunk.tokens as i32,
            padded_tokens: chunk.padded() as i32,
            columns: linears[0].weights.columns as i32,
            stages: config.stages as i32,
            gelu,
        }),
        dependent: true,
        cooperative: false,
    })
}

/// Which kernel runs, and how the work is cut up.
struct GemmLaunchConfig {
    function: Function,
    threads: usize,
    blocks: usize,
    /// Stages of tokens in shared memory.
    stages: usize,
    /// Parts of a row's columns.
    slices: usize,
    shared_bytes: usize,
}

impl GemmLaunchConfig {
    fn choose(
        device: &Device,
        linears: &[Linear],
        epilogue: Epilogue,
        chunk: Chunk,
    ) -> Result<Self> {
        let kernel_type = KernelType::of(linears[0].weights.tensor_type)?;
        let all = device.multiprocessors();
        let rows: usize = linears.iter().map(|linear| linear.weights.rows).sum();
        let gate = matches!(epilogue, Epilogue::Gate { .. });
        let strips = |tokens| Self::strips(device, linears, kernel_type, epilogue, tokens);
        let tiles = |tokens, blocks| Self::tiles(device, kernel_type, tokens, blocks);
        // By what was measured on Qwen3-8B's shapes. Multiples of 32 blocks cut the rows evenly.
        let even = if all >= 32 { all / 32 * 32 } else { all };
        let more_strips = device.has_warpgroup_mma();
        match chunk.tokens {
            ..=32 => strips(32),
            33..=64 if more_strips => strips(64),
            65..=128 if more_strips => strips(128),
            33..=64 => tiles(64, even),
            65..=256 if gate => tiles(
                128,
                all.min(rows.div_ceil(256) * chunk.tokens.div_ceil(128)),
            ),
            65..=256 => tiles(64, even),
            _ => tiles(128, all),
        }
    }

    /// Tiles of 64 or 128 tokens.
    fn tiles(
        device: &Device,
        kernel_type: &KernelType,
        tokens: usize,
        blocks: usize,
    ) -> Result<Self> {
        const STAGES: std::ops::RangeInclusive<usize> = 2..=8;
        let wide = tokens == 128;
        let wide_weights = wide && device.has_warpgroup_mma();
        let (narrow_run, wide_run) = runs(kernel_type)?;
        let function = device.function("gemm", &format!("gemm_{}_n{tokens}", kernel_type.name))?;
        let weights = match wide_weights {
            true => 32 * wide_run.bytes,
            false => 16 * narrow_run.bytes,
        };
        let stage = 256 * tokens;
        let limit = device.shared_bytes_per_block();
        let stages = limit.saturating_sub(function.static_shared_bytes + weights) / stage;
        ensure!(
            stages >= *STAGES.start(),
            too_little_shared_memory(device, kernel_type)
        );
        let stages = stages.min(*STAGES.end());
        Ok(Self {
            function,
            threads: if wide { 384 } else { 288 },
            blocks,
            stages,
            slices: 1,
            shared_bytes: weights + stages * stage,
        })
    }

    /// Strips of rows, for few tokens: up to `tokens`, which is 32, 64 or 128.
    fn strips(
        device: &Device,
        linears: &[Linear],
        kernel_type: &KernelType,
        epilogue: Epilogue,
        tokens: usize,
    ) -> Result<Self> {
        const STAGES: std::ops::RangeInclusive<usize> = 2..=16;
        let (run, _) = runs(kernel_type)?;
        let stage = 256 * tokens;
        // Runs of weights that a warp has room for, and warps that fetch tokens.
        let (ring, fetching) = if tokens == 128 { (2, 4) } else { (3, 1) };
        let function = device.function(
            "gemm_strips",
            &format!("gemm_strips_{}_n{tokens}", kernel_type.name),
        )?;
        let limit = device.shared_bytes_per_block() - function.static_shared_bytes;
        let together = if device.has_warpgroup_mma() { 4 } else { 1 };
        let most_warps = limit.saturating_sub(*STAGES.start() * stage) / (ring * run.bytes);
        ensure!(
            most_warps >= together,
            too_little_shared_memory(device, kernel_type)
        );
        let strips: usize = match epilogue {
            Epilogue::Gate { .. } => linears[0].weights.rows.next_multiple_of(128) / (STRIP / 2),
            _ => linears
                .iter()
                .map(|linear| linear.weights.rows.div_ceil(STRIP))
                .sum(),
        };
        let runs = linears[0].weights.columns.div_ceil(run.values);
        let all = device.multiprocessors();
        // What the busiest block takes, in steps of 128 columns of a warp: few warps do not fill a multiprocessor, and
        // joining a slice takes about as long as four. Only one round of blocks may have slices: `partial` has room for
        // that.
        let run_steps = run.values / 128;
        let mut best = (usize::MAX, 1, 1);
        for warps in (together..=most_warps.min(MAX_STRIP_WARPS - fetching)).step_by(together) {
            let groups = strips.div_ceil(warps);
            for slices in 1..=runs.min((all / groups).max(1)) {
                let rounds = groups.div_ceil(all / slices);
                let work = rounds * runs.div_ceil(slices) * run_steps * warps.max(8) + 4 * slices;
                best = best.min((work, warps, slices));
            }
        }
        let (_, warps, slices) = best;
        let weights = warps * ring * run.bytes;
        let stages = ((limit - weights) / stage).min(*STAGES.end());
        Ok(Self {
            function,
            threads: (warps + fetching) * WARP,
            blocks: strips.div_ceil(warps).min(all / slices),
            stages,
            slices,
            shared_bytes: weights + stages * stage,
        })
    }
}

/// The narrow and the wide run.
fn runs(kernel_type: &KernelType) -> Result<(Run, Run)> {
    match kernel_type.gemm {
        Gemm::Direct { narrow, wide } => Ok((narrow, wide)),
        Gemm::Copied => bail!(
            "no kernel multiplies {} weights with a chunk",
            kernel_type.tensor_type.name()
        ),
    }
}

fn too_little_shared_memory(device: &Device, kernel_type: &KernelType) -> anyhow::Error {
    anyhow!(
        "{} has too little shared memory for products of {} weights: use --device cpu",
        device.name(),
        kernel_type.tensor_type.name()
    )
}

//! The products of a matrix with a chunk of tokens as typed launches: which kernel of `kernels/matmul.cu` or
//! `kernels/matmul_few.cu` computes one, and how its work is cut up (`kernels/PREFILL.md`).

use anyhow::{Result, anyhow, ensure};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    chunk_kernels::{Chunk, GATE_SCALE},
    device::{Arguments, Device, Function, Launch},
    kernels::{Product, WARP},
    weights::Matrix,
};
use crate::quant::TensorType;

/// Rows that a warp of `matmul_few.cu` multiplies; of gate and up, half of each.
const STRIP: usize = 16;

/// `MAX_WARPS` of `matmul_few.cu`: of a block, those that multiply and those that fetch tokens.
const MOST_STRIP_WARPS: usize = 16;

/// What a product does with its sums.
#[derive(Clone, Copy, PartialEq)]
pub enum Epilogue {
    /// `out = W x + bias`
    Store,
    /// `out += factor * W x`
    Add { factor: f32 },
    /// `gated = silu(G x) * (U x) / GATE_SCALE`, float16
    Gate,
}

/// Where those who share a tile of a product meet; for all products.
#[derive(Clone, Copy)]
pub struct Meeting {
    /// f32 ([`partial_len`])
    pub partial: CUdeviceptr,
    /// u32 ([`counters`]), zero between launches
    pub finished: CUdeviceptr,
}

/// f32 values that products need to meet: two of the largest tiles for each multiprocessor. Strips take less.
pub fn partial_len(device: &Device) -> usize {
    2 * device.multiprocessors() * 131_072 / size_of::<f32>()
}

/// Counters that products need to meet: one for each strip that may be cut into slices.
pub fn counters(device: &Device) -> usize {
    MOST_STRIP_WARPS * device.multiprocessors()
}

/// `struct Matrix` of `kernels/products.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MatrixParams {
    weights: CUdeviceptr,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    rows: i32,
    out_stride: i32,
}

/// `struct ProductParams` of `kernels/products.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProductParams {
    matrix: [MatrixParams; 3],
    x: CUdeviceptr,
    gated: CUdeviceptr,
    partial: CUdeviceptr,
    finished: CUdeviceptr,
    factor: f32,
    matrices: i32,
    epilogue: i32,
    tokens: i32,
    padded_tokens: i32,
    columns: i32,
    stages: i32,
    unused: i32,
}

/// One to three matrices of one type and one count of columns (with [`Epilogue::Gate`]: gate and up) times a chunk.
/// `x` and `gated` are float16 activations.
pub fn matmul(
    device: &Device,
    products: &[Product],
    x: CUdeviceptr,
    gated: CUdeviceptr,
    epilogue: Epilogue,
    meeting: Meeting,
    chunk: Chunk,
) -> Result<Launch> {
    let Matrix { columns, kind, .. } = products[0].weights;
    let tensor_type = TensorType::from_ggml_id(kind as u32)
        .ok_or_else(|| anyhow!("no kernel multiplies weights of type {kind}"))?;
    let cut = Cut::choose(device, products, tensor_type, epilogue, chunk)?;
    let mut matrix = [MatrixParams::zeroed(); 3];
    for (matrix, product) in matrix.iter_mut().zip(products) {
        *matrix = MatrixParams {
            weights: product.weights.address,
            bias: product.bias,
            out: product.out,
            rows: product.weights.rows as i32,
            out_stride: product.weights.rows as i32,
        };
    }
    let (number, factor) = match epilogue {
        Epilogue::Store => (0, 1.0),
        Epilogue::Add { factor } => (1, factor),
        Epilogue::Gate => (2, 1.0 / GATE_SCALE),
    };
    Ok(Launch {
        function: cut.function,
        grid: [cut.blocks as u32, cut.slices as u32, 1],
        block: [cut.threads as u32, 1],
        shared_bytes: cut.shared_bytes as u32,
        arguments: Arguments::default().with(ProductParams {
            matrix,
            x,
            gated,
            partial: meeting.partial,
            finished: meeting.finished,
            factor,
            matrices: products.len() as i32,
            epilogue: number,
            tokens: chunk.tokens as i32,
            padded_tokens: chunk.padded() as i32,
            columns: columns as i32,
            stages: cut.stages as i32,
            unused: 0,
        }),
        dependent: true,
    })
}

/// How a product is cut up.
struct Cut {
    function: Function,
    threads: usize,
    blocks: usize,
    /// Stages of tokens in shared memory.
    stages: usize,
    /// Parts of a row's columns.
    slices: usize,
    shared_bytes: usize,
}

impl Cut {
    fn choose(
        device: &Device,
        products: &[Product],
        tensor_type: TensorType,
        epilogue: Epilogue,
        chunk: Chunk,
    ) -> Result<Self> {
        let all = device.multiprocessors();
        let rows: usize = products.iter().map(|product| product.weights.rows).sum();
        let gate = epilogue == Epilogue::Gate;
        let strips = |tokens| Self::strips(device, products, tensor_type, epilogue, tokens);
        let tiles = |tokens, blocks| Self::tiles(device, tensor_type, tokens, blocks);
        // By what was measured on Qwen3-8B's shapes. Multiples of 32 blocks cut the rows evenly.
        let even = if all >= 32 { all / 32 * 32 } else { all };
        let more_strips = device.has_warpgroup_products();
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
        tensor_type: TensorType,
        tokens: usize,
        blocks: usize,
    ) -> Result<Self> {
        const STAGES: std::ops::RangeInclusive<usize> = 2..=8;
        let wide = tokens == 128;
        let wide_weights = wide && device.has_warpgroup_products();
        let function = device.function("matmul", tile_kernel(tensor_type, tokens)?)?;
        let (_, run_bytes) = run(tensor_type, wide_weights)?;
        let weights = if wide_weights { 32 } else { 16 } * run_bytes;
        let stage = 256 * tokens;
        let limit = device.shared_bytes_per_block();
        let stages = limit.saturating_sub(function.static_shared_bytes + weights) / stage;
        ensure!(
            stages >= *STAGES.start(),
            too_little_shared_memory(device, tensor_type)
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
        products: &[Product],
        tensor_type: TensorType,
        epilogue: Epilogue,
        tokens: usize,
    ) -> Result<Self> {
        const STAGES: std::ops::RangeInclusive<usize> = 2..=16;
        let stage = 256 * tokens;
        // Runs of weights that a warp has room for, and warps that fetch tokens.
        let (ring, fetching) = if tokens == 128 { (2, 4) } else { (3, 1) };
        let function = device.function("matmul_few", strip_kernel(tensor_type, tokens)?)?;
        let (run_values, run_bytes) = run(tensor_type, false)?;
        let limit = device.shared_bytes_per_block() - function.static_shared_bytes;
        let together = if device.has_warpgroup_products() {
            4
        } else {
            1
        };
        let most_warps = limit.saturating_sub(*STAGES.start() * stage) / (ring * run_bytes);
        ensure!(
            most_warps >= together,
            too_little_shared_memory(device, tensor_type)
        );
        let strips: usize = match epilogue {
            Epilogue::Gate => products[0].weights.rows.next_multiple_of(128) / (STRIP / 2),
            _ => products
                .iter()
                .map(|product| product.weights.rows.div_ceil(STRIP))
                .sum(),
        };
        let runs = products[0].weights.columns.div_ceil(run_values);
        let all = device.multiprocessors();
        // What the busiest block takes, in steps of 128 columns of a warp: few warps do not fill a multiprocessor, and
        // joining a slice takes about as long as four. Only one round of blocks may have slices: `partial` has room for that.
        let run_steps = run_values / 128;
        let mut best = (usize::MAX, 1, 1);
        for warps in (together..=most_warps.min(MOST_STRIP_WARPS - fetching)).step_by(together) {
            let groups = strips.div_ceil(warps);
            for slices in 1..=runs.min((all / groups).max(1)) {
                let rounds = groups.div_ceil(all / slices);
                let work = rounds * runs.div_ceil(slices) * run_steps * warps.max(8) + 4 * slices;
                best = best.min((work, warps, slices));
            }
        }
        let (_, warps, slices) = best;
        let weights = warps * ring * run_bytes;
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

/// Values of a row that a warp copies at a time, and bytes of 16 rows of them: `Run<TYPE, MT>` of `kernels/fragments.cuh`. MT
/// is 2 for wide weights, else 1.
fn run(tensor_type: TensorType, wide_weights: bool) -> Result<(usize, usize)> {
    Ok(match (tensor_type, wide_weights) {
        (TensorType::Q4_K | TensorType::Q4_0, false) => (512, 4608),
        (TensorType::Q4_K | TensorType::Q4_0, true) => (256, 2304),
        (TensorType::Q4_1, false) => (512, 5120),
        (TensorType::Q4_1, true) => (256, 2560),
        (TensorType::Q6_K, _) => (256, 3392),
        (TensorType::Q5_K | TensorType::Q5_0, _) => (256, 2816),
        (TensorType::Q5_1, _) => (256, 3072),
        (TensorType::Q8_0, _) => (256, 4352),
        (TensorType::F16, _) => (128, 4096),
        _ => return no_kernel(tensor_type),
    })
}

fn too_little_shared_memory(device: &Device, tensor_type: TensorType) -> anyhow::Error {
    anyhow!(
        "{} has too little shared memory for products of {} weights: use --device cpu",
        device.name(),
        tensor_type.name()
    )
}

fn no_kernel<T>(tensor_type: TensorType) -> Result<T> {
    Err(anyhow!(
        "no kernel multiplies {} weights with a chunk",
        tensor_type.name()
    ))
}

/// The name of a type's kernel, between what stands before and behind.
macro_rules! kernel_name {
    ($tensor_type:expr, $before:literal, $behind:literal) => {
        match $tensor_type {
            TensorType::Q4_K => Ok(concat!($before, "q4_k", $behind)),
            TensorType::Q6_K => Ok(concat!($before, "q6_k", $behind)),
            TensorType::Q5_K => Ok(concat!($before, "q5_k", $behind)),
            TensorType::Q8_0 => Ok(concat!($before, "q8_0", $behind)),
            TensorType::Q4_0 => Ok(concat!($before, "q4_0", $behind)),
            TensorType::Q4_1 => Ok(concat!($before, "q4_1", $behind)),
            TensorType::Q5_0 => Ok(concat!($before, "q5_0", $behind)),
            TensorType::Q5_1 => Ok(concat!($before, "q5_1", $behind)),
            TensorType::F16 => Ok(concat!($before, "f16", $behind)),
            other => no_kernel(other),
        }
    };
}

fn strip_kernel(tensor_type: TensorType, tokens: usize) -> Result<&'static str> {
    match tokens {
        32 => kernel_name!(tensor_type, "matmul_few_", "_n32"),
        64 => kernel_name!(tensor_type, "matmul_few_", "_n64"),
        _ => kernel_name!(tensor_type, "matmul_few_", "_n128"),
    }
}

fn tile_kernel(tensor_type: TensorType, tokens: usize) -> Result<&'static str> {
    match tokens {
        64 => kernel_name!(tensor_type, "matmul_", "_n64"),
        _ => kernel_name!(tensor_type, "matmul_", "_n128"),
    }
}

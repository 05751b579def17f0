//! What the device gives at best: its memory, the yardstick of decoding, and its matrix units, that of reading prompts.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use cudarc::{
    cublaslt::{CudaBlasLT, Matmul, MatmulConfig, sys as cublaslt},
    driver::CudaEvent,
};
use half::f16;

use super::{
    device::{Device, Launch, Parameter, explain},
    params::ReadParams,
};

/// Read at a time: far more than any cache holds.
const BYTES: usize = 4 << 30;
const REPETITIONS: usize = 10;

/// Bytes per second that a kernel reads which does nothing else, the best of several passes over 4 GiB (or half of
/// what is free).
pub fn read_ceiling(device: &Arc<Device>) -> Result<f64> {
    let bytes = BYTES.min(device.memory()?.0 / 2) / 16 * 16;
    let memory = device.allocate(bytes)?;
    memory.clear()?;
    let launch = Launch {
        function: device.function("bandwidth", "read_all")?,
        grid: [2 * device.multiprocessors() as u32, 1, 1],
        block: [1024, 1],
        shared_bytes: 0,
        parameter: Parameter::new(ReadParams {
            from: memory.at(0),
            count: bytes as u64 / 16,
            sum: memory.at(0),
        }),
        dependent: false,
        cooperative: false,
    };
    let seconds = best_seconds(device, || {
        // SAFETY: the parameter is that of `read_all`; it reads `bytes` bytes and writes at most four.
        unsafe { device.launch(&launch) }
    })?;
    Ok(bytes as f64 / seconds)
}

/// Rows, tokens and columns of the product that stands for all: a feed-forward's of Qwen3-8B.
const GEMM: [usize; 3] = [12_288, 2_048, 4_096];

/// Operations per second of cuBLASLt on float16 matrices with float32 sums, or `None` where the machine has no cuBLASLt.
pub fn gemm_ceiling(device: &Arc<Device>) -> Result<Option<f64>> {
    // SAFETY: loads the library, which is what every program that uses it does.
    if !unsafe { cublaslt::is_culib_present() } {
        return Ok(None);
    }
    let stream = device.stream();
    let [rows, tokens, columns] = GEMM;
    let failed = |error| anyhow!("measuring a matrix product with cuBLASLt: {error:?}");
    let (weights, x) = (noise(rows * columns), noise(tokens * columns));
    let copies = [&weights, &x].map(|values| stream.clone_htod(values).map_err(explain));
    // The copies may still be read from `weights` and `x`.
    device.synchronize()?;
    let [weights, x] = copies;
    let (weights, x) = (weights?, x?);
    let mut out = stream.alloc_zeros::<f16>(rows * tokens).map_err(explain)?;
    // Behind calls that make the context current, which this takes as it finds it.
    let blas = CudaBlasLT::new(stream.clone()).map_err(failed)?;
    let config = MatmulConfig {
        transa: true,
        transb: false,
        transc: false,
        m: rows as u64,
        n: tokens as u64,
        k: columns as u64,
        alpha: 1.0,
        lda: columns as i64,
        ldb: columns as i64,
        beta: 0.0,
        ldc: rows as i64,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    };
    let seconds = best_seconds(device, || {
        // SAFETY: the matrices have the sizes that the configuration gives.
        unsafe { blas.matmul(config, &weights, &x, &mut out, None, None) }.map_err(failed)
    })?;
    Ok(Some(2.0 * (rows * tokens * columns) as f64 / seconds))
}

/// Numbers in -1..1 that look random: matrix units draw less power on zeros, and run faster.
fn noise(len: usize) -> Vec<f16> {
    let mut state = 0x9e37_79b9u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f16::from_f32(state as i32 as f32 / 2f32.powi(31))
    };
    (0..len).map(|_| next()).collect()
}

/// The shortest time that the device takes for what `queue` queues.
fn best_seconds(device: &Arc<Device>, mut queue: impl FnMut() -> Result<()>) -> Result<f64> {
    let record = |event: &CudaEvent| event.record(device.stream()).map_err(explain);
    let mut best = f64::INFINITY;
    for _ in 0..REPETITIONS {
        let (start, end) = (device.new_timer()?, device.new_timer()?);
        record(&start)?;
        queue()?;
        record(&end)?;
        let elapsed_ms = start
            .elapsed_ms(&end)
            .map_err(explain)
            .context("timing a kernel")?;
        best = best.min(f64::from(elapsed_ms) / 1e3);
    }
    Ok(best)
}

//! Matrices in another layout: the file's blocks in that of the kernels, and float matrices in float16.

use std::ops::Range;

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use crate::cuda::{
    device::{Device, Launch, Parameter},
    params::{ConvertParams, RepackParams},
    tensor_types::KernelType,
    weights::Matrix,
};

/// Brings rows `rows` of a matrix, whose blocks lie at `input` as in the file, to their places in `matrix`.
pub fn repack(
    device: &Device,
    input: CUdeviceptr,
    rows: Range<usize>,
    matrix: Matrix,
) -> Result<Launch> {
    let row = KernelType::of(matrix.tensor_type)?;
    // A row more: its pair may begin before these.
    let threads = (rows.len() + 1) * row.repack_threads_per_row(matrix.columns);
    Ok(Launch {
        function: device.function("repack", "repack")?,
        grid: [threads.div_ceil(256) as u32, 1, 1],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(RepackParams {
            input,
            out: matrix.address,
            tensor_type: row.id,
            matrix_rows: matrix.rows as i32,
            columns: matrix.columns as i32,
            row_begin: rows.start as i32,
            row_count: rows.len() as i32,
            unused: 0,
        }),
        dependent: false,
        cooperative: false,
    })
}

/// A float matrix in float16, which [`super::gemm()`] reads. `out` has room for a matrix of
/// [`COPY_TYPE`](crate::cuda::tensor_types::COPY_TYPE).
pub fn float_to_half(device: &Device, weights: Matrix, out: CUdeviceptr) -> Result<Launch> {
    Ok(Launch {
        function: device.function("convert", "float_to_half")?,
        grid: [
            weights.columns.div_ceil(2048) as u32,
            weights.rows as u32,
            1,
        ],
        block: [256, 1],
        shared_bytes: 0,
        parameter: Parameter::new(ConvertParams {
            weights: weights.address,
            out,
            tensor_type: KernelType::of(weights.tensor_type)?.id,
            columns: weights.columns as i32,
        }),
        dependent: true,
        cooperative: false,
    })
}

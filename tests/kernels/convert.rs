//! Float matrices in float16.

use half::f16;
use sharpi::{
    cuda::{
        Matrix,
        launches::{self, Chunk},
        tensor_types::{COPY_TYPE, KernelType},
    },
    quant::TensorType::*,
};

use crate::{
    common::gpu::TestResult,
    gemm::{ChunkInput, WorkspaceBuffers},
    harness::{Buffer, Findings, device, random, run, widened},
    matrices::Weights,
};

/// And what it wrote is what a GEMM with float16 weights reads.
pub fn float_to_half_rounds_to_nearest() -> TestResult {
    let (mut random, mut findings) = (random(10), Findings::default());
    let workspace = WorkspaceBuffers::new()?;
    for tensor_type in [F32, BF16] {
        for shape in [(1, 512), (7, 96), (33, 4864), (577, 576), (32, 523)] {
            let mut weights = Weights::new(&mut random, tensor_type, shape)?;
            let (case, (rows, columns)) = (weights.shape(), shape);
            let out = Buffer::poisoned(KernelType::of(COPY_TYPE)?.matrix_bytes(rows, columns))?;
            let launch = launches::float_to_half(device()?, weights.matrix, out.address())?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let halves: Vec<f16> = weights.values.iter().map(|&v| f16::from_f32(v)).collect();
            // Rows are filled up with zeros to 16 bytes.
            let ours: Vec<f16> = out.read()?;
            let mut rows = ours.chunks_exact(columns.next_multiple_of(8));
            let same = halves.chunks_exact(columns).all(|halves| {
                let row = rows.next().unwrap_or_default();
                let (values, filling) = row.split_at(columns);
                values == halves && filling.iter().all(|value| value.to_bits() == 0)
            });
            findings.holds(same, || format!("{case}: not the nearest float16"));

            weights.values = widened(&halves);
            let matrix = Matrix {
                address: out.address(),
                tensor_type: COPY_TYPE,
                ..weights.matrix
            };
            let input = ChunkInput::new(&mut random, columns, Chunk { tokens: 33 })?;
            let stored = input.store(&[(matrix, 0)], &workspace)?;
            let reference = input.product(&weights);
            findings.sums("stored", &case, &reference, &stored[0], 1e-4);
        }
    }
    findings.verdict()
}

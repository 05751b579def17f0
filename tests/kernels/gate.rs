//! The gate of a chunk, apart from a GEMM.

use half::f16;
use sharpi::cuda::launches::{self, Chunk, GATE_SCALE, Gate};

use crate::{
    common::gpu::TestResult,
    harness::{Buffer, CHUNK_LENS, Findings, activate, activation_of, device, floats, random, run},
    tiles::read_tiles,
};

pub fn gate_tokens_gates_and_stays_finite() -> TestResult {
    let (mut random, mut findings) = (random(11), Findings::default());
    let mut count = 0;
    // Two of them without four values side by side in each row.
    for columns in [256, 523, 576, 896, 1026, 1056, 4864] {
        for tokens in CHUNK_LENS {
            let (case, chunk) = (format!("{columns} x {tokens}"), Chunk { tokens });
            let mut gate = floats(&mut random, columns * tokens, 3.0);
            let mut up = floats(&mut random, columns * tokens, 3.0);
            // Past float16's range, on both sides, and where the exponential is infinite.
            (gate[0], up[0]) = (1e4, 1e4);
            (gate[1], up[1]) = (1e4, -1e4);
            (gate[2], up[2]) = (-1e4, 1e4);
            let inputs = (Buffer::new(&gate)?, Buffer::new(&up)?);
            count += 1;
            let activation = activation_of(count);
            let out = Buffer::poisoned(chunk.tile_bytes(columns))?;
            let launch = launches::gate_tokens(
                device()?,
                Gate {
                    gate: inputs.0.address(),
                    up: inputs.1.address(),
                    up_stride: columns,
                    rms: 0,
                    columns,
                    activation,
                },
                out.address(),
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let largest = f16::MAX.to_f64();
            let pairs = gate.iter().zip(&up);
            let reference: Vec<f64> = pairs
                .map(|(&g, &u)| {
                    activate(activation, g.into()) * f64::from(u) / f64::from(GATE_SCALE)
                })
                .map(|v| v.clamp(-largest, largest))
                .collect();
            let ours = read_tiles(&mut findings, &case, &out, columns, chunk)?;
            findings.rounded("gated values", &case, &reference, &ours, 1e-6);
        }
    }
    findings.verdict()
}

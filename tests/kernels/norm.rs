//! Norms of a chunk.

use sharpi::cuda::launches::{self, Chunk};

use crate::{
    common::gpu::TestResult,
    harness::{
        Buffer, CHUNK_LENS, EPSILON, Findings, device, floats, norm_weights, random, run,
        sum_of_squares,
    },
    tiles::read_tiles,
};

pub fn norm_tokens_normalizes() -> TestResult {
    let (mut random, mut findings) = (random(6), Findings::default());
    // Two of them without four values side by side in each row.
    for columns in [256, 512, 523, 576, 896, 1026, 1056, 4864] {
        for tokens in CHUNK_LENS {
            let (case, chunk) = (format!("{columns} x {tokens}"), Chunk { tokens });
            let x = floats(&mut random, columns * tokens, 1.5);
            let weight = norm_weights(&mut random, columns);
            let (x_buffer, weight_buffer) = (Buffer::new(&x)?, Buffer::new(&weight)?);
            let out = Buffer::poisoned(chunk.tile_bytes(columns))?;
            let launch = launches::norm_tokens(
                device()?,
                x_buffer.address(),
                weight_buffer.address(),
                out.address(),
                EPSILON,
                columns,
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let rows = x.chunks_exact(columns);
            let reference: Vec<f64> = rows
                .flat_map(|row| {
                    let mean = sum_of_squares(row) / columns as f64;
                    let scale = (mean + f64::from(EPSILON)).sqrt().recip();
                    let pairs = row.iter().zip(&weight);
                    pairs.map(move |(&x, &w)| f64::from(x) * scale * f64::from(w))
                })
                .collect();
            let ours = read_tiles(&mut findings, &case, &out, columns, chunk)?;
            findings.rounded("norms", &case, &reference, &ours, 1e-6);
        }
    }
    findings.verdict()
}

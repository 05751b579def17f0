//! Norms of a chunk.

use bytemuck::Zeroable;
use sharpi::cuda::{
    launches::{self, Chunk},
    params::NormParams,
};

use crate::{
    common::gpu::TestResult,
    harness::{
        Buffer, CHUNK_LENS, EPSILON, Findings, device, floats, norm_weights, random, run,
        sum_of_squares,
    },
    tiles::read_tiles,
};

fn root_mean_square(row: &[f32]) -> f64 {
    (sum_of_squares(row) / row.len() as f64 + f64::from(EPSILON)).sqrt()
}

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
            let rms = Buffer::poisoned(tokens * size_of::<f32>())?;
            let weighs = tokens % 2 == 0;
            let launch = launches::norm_tokens(
                device()?,
                NormParams {
                    x: x_buffer.address(),
                    weight: if weighs { weight_buffer.address() } else { 0 },
                    out: out.address(),
                    rms: if weighs { 0 } else { rms.address() },
                    epsilon: EPSILON,
                    columns: columns as i32,
                    ..NormParams::zeroed()
                },
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let rows = x.chunks_exact(columns);
            let reference: Vec<f64> = rows
                .flat_map(|row| {
                    let scale = root_mean_square(row).recip();
                    let pairs = row.iter().zip(&weight);
                    pairs.map(move |(&x, &w)| {
                        f64::from(x) * scale * if weighs { f64::from(w) } else { 1.0 }
                    })
                })
                .collect();
            let ours = read_tiles(&mut findings, &case, &out, columns, chunk)?;
            findings.rounded("norms", &case, &reference, &ours, 1e-6);
            if !weighs {
                let rms: Vec<f32> = rms.read()?;
                let expected: Vec<f64> = x.chunks_exact(columns).map(root_mean_square).collect();
                let rms = rms.into_iter().map(f64::from);
                findings.relative("root mean squares", &case, &expected, rms, 1e-6);
            }
        }
    }
    findings.verdict()
}

//! Rows of the embedding matrix.

use sharpi::cuda::{
    Matrix,
    launches::{self, Chunk},
};

use crate::{
    common::gpu::TestResult,
    harness::{Buffer, Findings, device, norm_weights, random, run},
    matrices::{SHAPES, TYPES, Weights},
    quantized::{Output, check_normed},
};

/// Of every row.
const SCALE: f32 = 11.3;

pub fn embed_gives_the_files_values() -> TestResult {
    let (mut random, mut findings) = (random(1), Findings::default());
    for tensor_type in TYPES {
        for shape in SHAPES {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            let (case, Matrix { rows, columns, .. }) = (weights.shape(), weights.matrix);
            let chunk = Chunk { tokens: rows };
            let tokens: Vec<i32> = (0..rows as i32).rev().collect();
            let tokens = Buffer::new(&tokens)?;
            let x = Buffer::poisoned(rows * columns * 4)?;
            let launch = launches::embed_tokens(
                device()?,
                weights.matrix,
                SCALE,
                tokens.address(),
                x.address(),
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let reversed = weights.values.chunks_exact(columns).rev().flatten();
            let reference: Vec<f64> = reversed.map(|&v| f64::from(v) * f64::from(SCALE)).collect();
            let ours: Vec<f32> = x.read()?;
            let ours = ours.into_iter().map(f64::from);
            findings.relative("values of a chunk", &case, &reference, ours, 1e-6);

            // One token, for the norm of the first layer.
            let x = Buffer::poisoned(columns * 4)?;
            let norm = norm_weights(&mut random, columns);
            let norm_buffer = Buffer::new(&norm)?;
            let next = Output::new(columns)?;
            let launch = launches::embed_token(
                device()?,
                weights.matrix,
                SCALE,
                tokens.address(),
                x.address(),
                norm_buffer.address(),
                next.normed(),
            )?;
            // SAFETY: as above.
            unsafe { run(&launch)? };
            let x: Vec<f32> = x.read()?;
            let ours = x.iter().map(|&v| f64::from(v));
            let reference = &reference[..columns];
            findings.relative("values of a token", &case, reference, ours, 1e-6);
            let values = next.read(&mut findings, &case)?;
            check_normed(&mut findings, &case, &values, &x, &norm);
            next.check_squares(&mut findings, &case, &x)?;
        }
    }
    findings.verdict()
}

//! Float16 activations of a chunk as GEMMs read them.

use anyhow::Result;
use half::f16;
use sharpi::cuda::launches::Chunk;

use crate::harness::{Buffer, Findings};

/// Where value `column` of a token stands in activations for GEMMs, by kernels/token_tiles.cuh: blocks of 64 columns
/// of all tokens, in them 16-byte pieces, in them the order in which a lane decodes weights.
pub fn tile_index(padded: usize, token: usize, column: usize) -> usize {
    let v = column % 128 / 4 * 4;
    let (odd, second) = (column % 2, column % 4 / 2);
    let lane = v / 64 * 2 + v / 16 % 2;
    let step = v / 4 % 4 * 2 + v / 32 % 2;
    let block = column / 128 * 2 + step / 4;
    let piece = (step % 4 * 2 + odd) ^ (token % 8);
    (block * padded + token) * 64 + piece * 8 + lane * 2 + second
}

/// Activations of a chunk as GEMMs read them. Tokens past the chunk hold NaN.
pub fn tiles(values: &[f16], columns: usize, chunk: Chunk) -> Vec<f16> {
    let mut out = vec![f16::from_bits(0xffff); chunk.tile_bytes(columns) / 2];
    for (token, row) in values.chunks_exact(columns).enumerate() {
        for column in 0..columns.next_multiple_of(128) {
            let value = row.get(column).copied().unwrap_or(f16::ZERO);
            out[tile_index(chunk.padded(), token, column)] = value;
        }
    }
    out
}

/// What a kernel wrote as such activations, with zeros past the columns.
pub fn read_tiles(
    findings: &mut Findings,
    case: &str,
    out: &Buffer,
    columns: usize,
    chunk: Chunk,
) -> Result<Vec<f16>> {
    let stored: Vec<f16> = out.read()?;
    let at = |token, column| stored[tile_index(chunk.padded(), token, column)];
    let past = columns..columns.next_multiple_of(128);
    let zeros = (0..chunk.tokens).all(|t| past.clone().all(|c| at(t, c) == f16::ZERO));
    findings.holds(zeros, || format!("{case}: no zeros past the columns"));
    let values = (0..chunk.tokens).flat_map(|t| (0..columns).map(move |c| (t, c)));
    Ok(values.map(|(t, c)| at(t, c)).collect())
}

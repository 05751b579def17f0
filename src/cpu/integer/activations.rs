//! Activations in 8 bits: 32 values share a scale.

use std::{ops::Range, sync::Mutex};

use super::instructions::Detected;
use crate::{
    cpu::{
        simd::{LANES, Lanes, Matrix, vectorized},
        workers::Workers,
    },
    quant::{MOST_GROUPS, MOST_VALUES},
};

/// Values that share a scale.
const SHARING: usize = 32;

/// 256 values of a token: value `i` is `scale * codes[i]`, with the scale of its 32 values.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Block8 {
    pub codes: [i8; MOST_VALUES],
    /// Of groups of 16 and of 32 values.
    groups: [Groups8; 2],
}

/// What products need of the groups of a [`Block8`]. Behind the last group there are zeros.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Groups8 {
    pub scales: [f32; MOST_GROUPS],
    /// Of codes.
    pub sums: [i32; MOST_GROUPS],
    /// Of values: scales times sums.
    pub scaled_sums: [f32; MOST_GROUPS],
}

impl Groups8 {
    const ZERO: Self = Self {
        scales: [0.0; MOST_GROUPS],
        sums: [0; MOST_GROUPS],
        scaled_sums: [0.0; MOST_GROUPS],
    };
}

impl Block8 {
    const ZERO: Self = Self {
        codes: [0; MOST_VALUES],
        groups: [Groups8::ZERO; 2],
    };

    #[cfg(test)]
    pub fn values(&self) -> impl Iterator<Item = f64> {
        let groups = self.groups(SHARING);
        let codes = self.codes.iter().enumerate();
        codes.map(|(i, code)| f64::from(*code) * f64::from(groups.scales[i / SHARING]))
    }

    /// Four codes of a group of `len` values, the first in the lowest byte.
    #[inline(always)]
    pub fn four(&self, len: usize, group: usize, index: usize) -> i32 {
        let fours: &[[u8; 4]; MOST_VALUES / 4] = bytemuck::must_cast_ref(&self.codes);
        i32::from_le_bytes(fours[group * (len / 4) + index])
    }

    /// Groups of `len` values, 16 or 32.
    #[inline(always)]
    pub fn groups(&self, len: usize) -> &Groups8 {
        &self.groups[usize::from(len == SHARING)]
    }
}

/// Rows of activations, each filled up with zeros to whole blocks.
pub struct Activations8 {
    /// What they are multiplied with.
    pub instructions: Detected,
    blocks: Vec<Block8>,
    /// Blocks of a row.
    row_blocks: usize,
}

impl Activations8 {
    /// For `rows` rows of up to `len` values, or `None` where there is no memory for them.
    pub fn new(instructions: Detected, len: usize, rows: usize) -> Option<Self> {
        let blocks = len.div_ceil(MOST_VALUES).checked_mul(rows)?;
        let mut zeros = Vec::new();
        zeros.try_reserve_exact(blocks).ok()?;
        zeros.resize(blocks, Block8::ZERO);
        Some(Self {
            instructions,
            blocks: zeros,
            row_blocks: 0,
        })
    }

    /// Takes over the rows `rows` of `x`.
    pub fn quantize<S: Send>(&mut self, workers: &Workers<S>, x: &Matrix, rows: Range<usize>) {
        self.row_blocks = x.len().div_ceil(MOST_VALUES);
        let blocks = self.blocks.chunks_exact_mut(self.row_blocks);
        let blocks = blocks.enumerate().take(rows.end).skip(rows.start);
        let tasks: Vec<_> = blocks.map(Mutex::new).collect();
        workers.run(tasks.len(), |task, _| {
            let mut task = tasks[task].lock().expect("no other task has this row");
            let (row, blocks) = &mut *task;
            quantize(x.row_lanes(*row), blocks);
        });
    }

    pub fn row(&self, row: usize) -> &[Block8] {
        &self.blocks[row * self.row_blocks..][..self.row_blocks]
    }
}

vectorized! {
    /// Quantizes a row.
    fn quantize(x: &[Lanes], blocks: &mut [Block8]) {
        const LANES_OF_BLOCK: usize = MOST_VALUES / LANES;
        let (whole, rest) = x.as_chunks::<LANES_OF_BLOCK>();
        for (block, x) in blocks.iter_mut().zip(whole) {
            quantize_block(x, block);
        }
        if !rest.is_empty() {
            let mut x = [Lanes::ZERO; LANES_OF_BLOCK];
            x[..rest.len()].copy_from_slice(rest);
            quantize_block(&x, &mut blocks[whole.len()]);
        }
    }
}

#[inline(always)]
fn quantize_block(x: &[Lanes; MOST_VALUES / LANES], block: &mut Block8) {
    let Block8 {
        codes,
        groups: [sixteens, thirty_twos],
    } = block;
    let (pairs, codes) = (x.as_chunks::<2>().0, codes.as_chunks_mut::<SHARING>().0);
    for (group, (pair, codes)) in pairs.iter().zip(codes).enumerate() {
        let (scale, sums) = quantize_group(pair, codes);
        for (half, sum) in sums.into_iter().enumerate() {
            sixteens.set(2 * group + half, scale, sum);
        }
        thirty_twos.set(group, scale, sums[0] + sums[1]);
    }
}

impl Groups8 {
    #[inline(always)]
    fn set(&mut self, group: usize, scale: f32, sum: i32) {
        self.scales[group] = scale;
        self.sums[group] = sum;
        self.scaled_sums[group] = scale * sum as f32;
    }
}

/// Writes the codes of 32 values, and returns their scale and the sums of the codes of each half.
#[inline(always)]
fn quantize_group(x: &[Lanes; 2], codes: &mut [i8; SHARING]) -> (f32, [i32; 2]) {
    /// Added to a number of at most 2^22, it leaves the nearest integer, the even one of two, in the low bits.
    const ROUND: f32 = (3 << 22) as f32;
    let mut greatest = Lanes::ZERO;
    for x in x {
        greatest.keep_greater(&Lanes(x.0.map(f32::abs)));
    }
    let greatest = greatest.max();
    let scale = greatest / 127.0;
    let inverse = 127.0 / greatest;
    // Of zeros, and of numbers so small that their inverse is none.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut sums = [0; 2];
    for half in 0..2 {
        for i in 0..LANES {
            let code = (x[half].0[i] * inverse + ROUND).to_bits() as i8;
            codes[half * LANES + i] = code;
            sums[half] += i32::from(code);
        }
    }
    (scale, sums)
}

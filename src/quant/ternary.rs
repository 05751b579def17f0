//! Formats of ternary values: blocks of 256, each `scale * (q - 1)` with `q` from 0 to 2 (in TQ2_0 up to 3).
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Block, float::F16, vectorize_inside};

const LEN: usize = 256;

/// A byte is a fraction of 256 whose first digits in base 3 are five quants, or four. Each array holds first all first
/// digits, then all second ones, and so on.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct TQ1_0 {
    fives: [u8; 32],
    more_fives: [u8; 16],
    fours: [u8; 4],
    scale: F16,
}

const _: () = assert!(size_of::<TQ1_0>() == 54);

impl Block for TQ1_0 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        let (fives, rest) = out.split_at_mut(5 * 32);
        let (more_fives, fours) = rest.split_at_mut(5 * 16);
        digits(scale, &self.fives, fives);
        digits(scale, &self.more_fives, more_fives);
        digits(scale, &self.fours, fours);
    }
}

/// Writes as many digits of every fraction as there is room for.
#[inline(always)]
fn digits<const N: usize>(scale: f32, fractions: &[u8; N], out: &mut [f32]) {
    for (out, power) in out.chunks_exact_mut(N).zip([1, 3, 9, 27, 81]) {
        vectorize_inside();
        for i in 0..N {
            let digit = (u16::from(fractions[i].wrapping_mul(power)) * 3) >> 8;
            out[i] = scale * (i32::from(digit) - 1) as f32;
        }
    }
}

/// Every 32 bytes hold 128 quants, the first 32 of them in the lowest two bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct TQ2_0 {
    quants: [u8; LEN / 4],
    scale: F16,
}

const _: () = assert!(size_of::<TQ2_0>() == 66);

impl Block for TQ2_0 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            vectorize_inside();
            let quants = &self.quants[i / 4 * 32..][..32];
            for (out, quants) in out.iter_mut().zip(quants) {
                *out = scale * (i32::from(quants >> (i % 4 * 2) & 3) - 1) as f32;
            }
        }
    }
}

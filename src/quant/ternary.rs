//! Formats of ternary values: blocks of 256, each `scale * (q - 1)` with `q` from 0 to 2 (in TQ2_0 up to 3).
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Quantized, Reader, eight, float::F16, put, vectorize_inside, words};

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

impl Quantized for TQ1_0 {
    const BLOCK: usize = LEN;
    const GROUP: usize = 32;
    const SIGNED: bool = true;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack<R: Reader>(
        &self,
        reader: R,
        codes: &mut [i8],
        scales: &mut [f32],
        _mins: &mut [f32],
    ) {
        scales.fill(reader.to_f32(self.scale));
        let (fives, rest) = codes.split_at_mut(5 * 32);
        let (more_fives, fours) = rest.split_at_mut(5 * 16);
        digits(&self.fives, fives);
        digits(&self.more_fives, more_fives);
        digits(&self.fours, fours);
    }
}

/// Writes as many digits of every fraction as there is room for.
#[inline(always)]
fn digits<const N: usize>(fractions: &[u8; N], codes: &mut [i8]) {
    for (codes, power) in codes.chunks_exact_mut(N).zip([1, 3, 9, 27, 81]) {
        vectorize_inside();
        for i in 0..N {
            let digit = (u16::from(fractions[i].wrapping_mul(power)) * 3) >> 8;
            codes[i] = digit as i8 - 1;
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

impl Quantized for TQ2_0 {
    const BLOCK: usize = LEN;
    const GROUP: usize = 32;
    const SIGNED: bool = true;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack<R: Reader>(
        &self,
        reader: R,
        codes: &mut [i8],
        scales: &mut [f32],
        _mins: &mut [f32],
    ) {
        scales.fill(reader.to_f32(self.scale));
        for i in 0..LEN / 32 {
            let mut quants: [u64; 4] = words(&self.quants[i / 4 * 32..]);
            for word in &mut quants {
                *word = *word >> (i % 4 * 2) & eight(3);
            }
            put(quants, 1, &mut codes[i * 32..]);
        }
    }
}

//! Formats with one scale for 32 values: `Qn_0` is `scale * q`, `Qn_1` is `scale * q + min`.
//!
//! Four-bit quants lie two to a byte: value `i` in the low half of byte `i`, value `i + 16` in its high half.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Block, float::F16};

const LEN: usize = 32;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q4_0 {
    scale: F16,
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q4_0>() == 18);

impl Block for Q4_0 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        let (low, high) = out.split_at_mut(LEN / 2);
        for (low, quants) in low.iter_mut().zip(&self.quants) {
            *low = scale * (i32::from(quants & 15) - 8) as f32;
        }
        for (high, quants) in high.iter_mut().zip(&self.quants) {
            *high = scale * (i32::from(quants >> 4) - 8) as f32;
        }
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q4_1 {
    scale: F16,
    min: F16,
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q4_1>() == 20);

impl Block for Q4_1 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        let (low, high) = out.split_at_mut(LEN / 2);
        for (low, quants) in low.iter_mut().zip(&self.quants) {
            *low = scale * f32::from(quants & 15) + min;
        }
        for (high, quants) in high.iter_mut().zip(&self.quants) {
            *high = scale * f32::from(quants >> 4) + min;
        }
    }
}

/// The fifth bit of value `i` is bit `i` of `fifth_bits`, little-endian.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q5_0 {
    scale: F16,
    fifth_bits: [u8; LEN / 8],
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q5_0>() == 22);

impl Block for Q5_0 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        five_bits(&self.quants, self.fifth_bits, out, |q| {
            scale * (q - 16) as f32
        });
    }
}

/// As [`Q5_0`], with a minimum.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q5_1 {
    scale: F16,
    min: F16,
    fifth_bits: [u8; LEN / 8],
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q5_1>() == 24);

impl Block for Q5_1 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        five_bits(&self.quants, self.fifth_bits, out, |q| {
            scale * q as f32 + min
        });
    }
}

/// Puts five-bit quants together and writes what `value` makes of them.
#[inline(always)]
fn five_bits(
    quants: &[u8; LEN / 2],
    fifth_bits: [u8; LEN / 8],
    out: &mut [f32],
    value: impl Fn(i32) -> f32,
) {
    let fifth_bits = u32::from_le_bytes(fifth_bits);
    let (low, high) = out.split_at_mut(LEN / 2);
    for i in 0..LEN / 2 {
        let fifth = |i: usize| ((fifth_bits >> i & 1) << 4) as i32;
        low[i] = value(i32::from(quants[i] & 15) | fifth(i));
        high[i] = value(i32::from(quants[i] >> 4) | fifth(i + LEN / 2));
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q8_0 {
    scale: F16,
    quants: [i8; LEN],
}

const _: () = assert!(size_of::<Q8_0>() == 34);

impl Block for Q8_0 {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        for (out, quant) in out.iter_mut().zip(self.quants) {
            *out = scale * f32::from(quant);
        }
    }
}

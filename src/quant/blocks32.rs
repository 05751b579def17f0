//! Formats with one scale for 32 values: `Qn_0` is `scale * q`, `Qn_1` is `scale * q + min`.
//!
//! Four-bit quants lie two to a byte: value `i` in the low half of byte `i`, value `i + 16` in its high half.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Quantized, Reader, eight, float::F16, put, words};

const LEN: usize = 32;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q4_0 {
    scale: F16,
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q4_0>() == 18);

impl Quantized for Q4_0 {
    const BLOCK: usize = LEN;
    const GROUP: usize = LEN;
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
        scales[0] = reader.to_f32(self.scale);
        four_bits(&self.quants, 8, codes);
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

impl Quantized for Q4_1 {
    const BLOCK: usize = LEN;
    const GROUP: usize = LEN;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<R: Reader>(&self, reader: R, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        (scales[0], mins[0]) = (reader.to_f32(self.scale), -reader.to_f32(self.min));
        four_bits(&self.quants, 0, codes);
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

impl Quantized for Q5_0 {
    const BLOCK: usize = LEN;
    const GROUP: usize = LEN;
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
        scales[0] = reader.to_f32(self.scale);
        five_bits(reader, &self.quants, self.fifth_bits, 16, codes);
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

impl Quantized for Q5_1 {
    const BLOCK: usize = LEN;
    const GROUP: usize = LEN;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<R: Reader>(&self, reader: R, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        (scales[0], mins[0]) = (reader.to_f32(self.scale), -reader.to_f32(self.min));
        five_bits(reader, &self.quants, self.fifth_bits, 0, codes);
    }
}

/// Writes quants of four bits, less `offset`.
#[inline(always)]
fn four_bits(quants: &[u8; LEN / 2], offset: u8, codes: &mut [i8]) {
    let quants: [u64; 2] = words(quants);
    put(
        [quants[0] & eight(15), quants[1] & eight(15)],
        offset,
        codes,
    );
    let high = [quants[0] >> 4 & eight(15), quants[1] >> 4 & eight(15)];
    put(high, offset, &mut codes[LEN / 2..]);
}

/// Writes quants of five bits, less `offset`.
#[inline(always)]
fn five_bits(
    reader: impl Reader,
    quants: &[u8; LEN / 2],
    fifth_bits: [u8; LEN / 8],
    offset: u8,
    codes: &mut [i8],
) {
    let quants: [u64; 2] = words(quants);
    let low = [quants[0] & eight(15), quants[1] & eight(15)];
    let high = [quants[0] >> 4 & eight(15), quants[1] >> 4 & eight(15)];
    let fifth = reader.ones(fifth_bits).map(|ones| ones << 4);
    put([low[0] | fifth[0], low[1] | fifth[1]], offset, codes);
    put(
        [high[0] | fifth[2], high[1] | fifth[3]],
        offset,
        &mut codes[LEN / 2..],
    );
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q8_0 {
    scale: F16,
    quants: [i8; LEN],
}

const _: () = assert!(size_of::<Q8_0>() == 34);

impl Quantized for Q8_0 {
    const BLOCK: usize = LEN;
    const GROUP: usize = LEN;
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
        scales[0] = reader.to_f32(self.scale);
        codes.copy_from_slice(&self.quants);
    }
}

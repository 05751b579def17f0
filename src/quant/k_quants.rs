//! The k-quants: blocks of 256 values in groups of 16 or 32, each group with a small integer scale (and minimum)
//! that the block's float16 scale (and minimum) multiplies.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Quantized, Reader, eight, float::F16, put, vectorize_inside, words};

const LEN: usize = 256;

/// 16 groups of 16. Value: `scale * group_scale * q - min * group_min`, `q` of 2 bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q2_K {
    /// Per group: scale in the low four bits, minimum in the high four.
    group_scales: [u8; LEN / 16],
    quants: [u8; LEN / 4],
    scale: F16,
    min: F16,
}

const _: () = assert!(size_of::<Q2_K>() == 84);

impl Quantized for Q2_K {
    const BLOCK: usize = LEN;
    const GROUP: usize = 16;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<R: Reader>(&self, reader: R, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        let (scale, min) = (reader.to_f32(self.scale), reader.to_f32(self.min));
        for group in 0..LEN / 16 {
            scales[group] = scale * f32::from(self.group_scales[group] & 15);
            mins[group] = min * f32::from(self.group_scales[group] >> 4);
        }
        for i in 0..LEN / 32 {
            put(two_bits(&self.quants, i), 0, &mut codes[i * 32..]);
        }
    }
}

/// Two-bit quants: every 32 bytes hold 128 values, the first 32 of them in the lowest two bits. The 32 from `32 * i` on.
#[inline(always)]
fn two_bits(quants: &[u8; LEN / 4], i: usize) -> [u64; 4] {
    let mut quants: [u64; 4] = words(&quants[i / 4 * 32..]);
    for word in &mut quants {
        *word = *word >> (i % 4 * 2) & eight(3);
    }
    quants
}

/// 16 groups of 16. Value: `scale * group_scale * q`, `q` from -4 to 3.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q3_K {
    /// The third bit of value `i` is bit `i / 32` of byte `i % 32`; where it is 0, four is subtracted.
    third_bits: [u8; LEN / 8],
    quants: [u8; LEN / 4],
    /// 16 six-bit scales, 32 added to each.
    group_scales: [u8; 12],
    scale: F16,
}

const _: () = assert!(size_of::<Q3_K>() == 110);

impl Q3_K {
    /// Low four bits: two to a byte in the first eight bytes. High two bits: four to a byte in the last four. Four bytes are
    /// worked on at a time.
    #[inline(always)]
    fn group_scales(&self) -> [u8; LEN / 16] {
        let [a, b, high] = bytemuck::cast::<_, [[u8; 4]; 3]>(self.group_scales);
        let [a, b, high] = [a, b, high].map(u32::from_le_bytes);
        let mut scales = [[0; 4]; 4];
        for i in 0..4 {
            let low = [a, b][i % 2] >> (i / 2 * 4) & 0x0f0f_0f0f;
            scales[i] = (low | (high >> (i * 2) & 0x0303_0303) << 4).to_le_bytes();
        }
        bytemuck::cast(scales)
    }
}

impl Quantized for Q3_K {
    const BLOCK: usize = LEN;
    const GROUP: usize = 16;
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
        let scale = reader.to_f32(self.scale);
        let group_scales = self.group_scales();
        for group in 0..LEN / 16 {
            scales[group] = scale * (i32::from(group_scales[group]) - 32) as f32;
        }
        let third_bits: [u64; 4] = words(&self.third_bits);
        for i in 0..LEN / 32 {
            vectorize_inside();
            let mut quants = two_bits(&self.quants, i);
            for (quant, third) in quants.iter_mut().zip(third_bits) {
                *quant |= (third >> i & eight(1)) << 2;
            }
            put(quants, 4, &mut codes[i * 32..]);
        }
    }
}

/// Eight groups of 32. Value: `scale * group_scale * q - min * group_min`, `q` of 4 bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q4_K {
    scale: F16,
    min: F16,
    group_scales: GroupScales,
    /// Every 32 bytes hold two groups, the first in the low halves.
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q4_K>() == 144);

impl Quantized for Q4_K {
    const BLOCK: usize = LEN;
    const GROUP: usize = 32;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<R: Reader>(&self, reader: R, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        let (scale, min) = (reader.to_f32(self.scale), reader.to_f32(self.min));
        self.group_scales.unpack(scale, min, scales, mins);
        for pair in 0..LEN / 64 {
            vectorize_inside();
            let quants: [u64; 4] = words(&self.quants[pair * 32..]);
            put(low_halves(quants), 0, &mut codes[pair * 64..]);
            put(high_halves(quants), 0, &mut codes[pair * 64 + 32..]);
        }
    }
}

/// The low four bits of each byte.
#[inline(always)]
fn low_halves(mut bytes: [u64; 4]) -> [u64; 4] {
    for word in &mut bytes {
        *word &= eight(15);
    }
    bytes
}

/// The high four bits of each byte.
#[inline(always)]
fn high_halves(mut bytes: [u64; 4]) -> [u64; 4] {
    for word in &mut bytes {
        *word = *word >> 4 & eight(15);
    }
    bytes
}

/// Eight six-bit scales and eight six-bit minimums.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
struct GroupScales([u8; 12]);

impl GroupScales {
    /// Writes scale and minimum of each group. Those of the first four groups are the low six bits of bytes 0 to 3 and
    /// 4 to 7; those of the others have their low four bits in bytes 8 to 11, scale first, and their high two in
    /// what bytes 0 to 7 have left. Four bytes are worked on at a time.
    #[inline(always)]
    fn unpack(&self, scale: f32, min: f32, scales: &mut [f32], mins: &mut [f32]) {
        let [low, high]: [u32; 2] = bytemuck::pod_read_unaligned(&self.0[..8]);
        let rest: u32 = bytemuck::pod_read_unaligned(&self.0[8..]);
        let (low, high, rest) = (u64::from(low), u64::from(high), u64::from(rest));
        let eight = |first: u64, rest: u64| {
            let last = rest & 0x0f0f_0f0f | first >> 2 & 0x3030_3030;
            (first & 0x3f3f_3f3f | last << 32).to_le_bytes()
        };
        let (group_scales, group_mins) = (eight(low, rest), eight(high, rest >> 4));
        for group in 0..LEN / 32 {
            scales[group] = scale * f32::from(group_scales[group]);
        }
        for group in 0..LEN / 32 {
            mins[group] = min * f32::from(group_mins[group]);
        }
    }
}

/// As [`Q4_K`], with `q` of 5 bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q5_K {
    scale: F16,
    min: F16,
    group_scales: GroupScales,
    /// The fifth bit of value `i` is bit `i / 32` of byte `i % 32`.
    fifth_bits: [u8; LEN / 8],
    quants: [u8; LEN / 2],
}

const _: () = assert!(size_of::<Q5_K>() == 176);

impl Quantized for Q5_K {
    const BLOCK: usize = LEN;
    const GROUP: usize = 32;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<R: Reader>(&self, reader: R, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        let (scale, min) = (reader.to_f32(self.scale), reader.to_f32(self.min));
        self.group_scales.unpack(scale, min, scales, mins);
        let fifth_bits: [u64; 4] = words(&self.fifth_bits);
        for pair in 0..LEN / 64 {
            vectorize_inside();
            let quants: [u64; 4] = words(&self.quants[pair * 32..]);
            let (mut low, mut high) = (low_halves(quants), high_halves(quants));
            for i in 0..4 {
                let fifth = fifth_bits[i] >> (pair * 2);
                low[i] |= (fifth & eight(1)) << 4;
                high[i] |= (fifth & eight(2)) << 3;
            }
            put(low, 0, &mut codes[pair * 64..]);
            put(high, 0, &mut codes[pair * 64 + 32..]);
        }
    }
}

/// 16 groups of 16. Value: `scale * group_scale * q`, `q` from -32 to 31.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Q6_K {
    /// Every 64 bytes hold the low four bits of 128 values, the first 64 of them in the low halves.
    low_bits: [u8; LEN / 2],
    /// Every 32 bytes hold the high two bits of 128 values, the first 32 of them in the lowest two bits.
    high_bits: [u8; LEN / 4],
    group_scales: [i8; LEN / 16],
    scale: F16,
}

const _: () = assert!(size_of::<Q6_K>() == 210);

impl Quantized for Q6_K {
    const BLOCK: usize = LEN;
    const GROUP: usize = 16;
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
        let scale = reader.to_f32(self.scale);
        for group in 0..LEN / 16 {
            scales[group] = scale * f32::from(self.group_scales[group]);
        }
        for half in 0..2 {
            let high_bits: [u64; 4] = words(&self.high_bits[half * 32..]);
            let low_bits = [0, 1].map(|i| words(&self.low_bits[half * 64 + i * 32..]));
            for quarter in 0..4 {
                vectorize_inside();
                let low_bits = low_bits[quarter % 2];
                let mut quants = if quarter < 2 {
                    low_halves(low_bits)
                } else {
                    high_halves(low_bits)
                };
                for i in 0..4 {
                    quants[i] |= (high_bits[i] >> (quarter * 2) & eight(3)) << 4;
                }
                put(quants, 32, &mut codes[half * 128 + quarter * 32..]);
            }
        }
    }
}

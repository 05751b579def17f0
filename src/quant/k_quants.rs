//! The k-quants: blocks of 256 values in groups of 16 or 32, each group with a small integer scale (and minimum)
//! that the block's float16 scale (and minimum) multiplies.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Block, float::F16, vectorize_inside};

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

impl Block for Q2_K {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        for (group, out) in out.chunks_exact_mut(16).enumerate() {
            vectorize_inside();
            let (byte, shift) = two_bit_position(group);
            let scale = scale * f32::from(self.group_scales[group] & 15);
            let min = min * f32::from(self.group_scales[group] >> 4);
            for (out, quants) in out.iter_mut().zip(&self.quants[byte..byte + 16]) {
                *out = scale * f32::from(quants >> shift & 3) - min;
            }
        }
    }
}

/// Where the two-bit quants of a group of 16 lie: the first byte, and the shift inside each byte. Every 32 bytes
/// hold 128 values, the first 32 of them in the lowest two bits.
#[inline(always)]
fn two_bit_position(group: usize) -> (usize, usize) {
    (group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2)
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
    /// Low four bits: two to a byte in the first eight bytes. High two bits: four to a byte in the last four.
    #[inline(always)]
    fn group_scale(&self, group: usize) -> i32 {
        let low = self.group_scales[group % 8] >> (group / 8 * 4) & 15;
        let high = self.group_scales[8 + group % 4] >> (group / 4 * 2) & 3;
        i32::from(low | high << 4) - 32
    }
}

impl Block for Q3_K {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        for (group, out) in out.chunks_exact_mut(16).enumerate() {
            vectorize_inside();
            let (byte, shift) = two_bit_position(group);
            let scale = scale * self.group_scale(group) as f32;
            let quants = &self.quants[byte..byte + 16];
            let third_bits = &self.third_bits[group % 2 * 16..][..16];
            for i in 0..16 {
                let q = quants[i] >> shift & 3 | (third_bits[i] >> (group / 2) & 1) << 2;
                out[i] = scale * (i32::from(q) - 4) as f32;
            }
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

impl Block for Q4_K {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let groups = self.group_scales.unpack(self.scale, self.min);
        for (pair, out) in out.chunks_exact_mut(64).enumerate() {
            let quants = &self.quants[pair * 32..][..32];
            let [(low_scale, low_min), (high_scale, high_min)] =
                [groups[pair * 2], groups[pair * 2 + 1]];
            let (low, high) = out.split_at_mut(32);
            for i in 0..32 {
                low[i] = low_scale * f32::from(quants[i] & 15) - low_min;
                high[i] = high_scale * f32::from(quants[i] >> 4) - high_min;
            }
        }
    }
}

/// Eight six-bit scales and eight six-bit minimums.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
struct GroupScales([u8; 12]);

impl GroupScales {
    /// Scale and minimum of each group. Those of the first four groups are the low six bits of bytes 0 to 3 and
    /// 4 to 7; those of the others have their low four bits in bytes 8 to 11, scale first, and their high two in
    /// what bytes 0 to 7 have left. Four bytes are worked on at a time.
    #[inline(always)]
    fn unpack(&self, scale: F16, min: F16) -> [(f32, f32); 8] {
        let (scale, min) = (scale.to_f32(), min.to_f32());
        let [a, b, c] =
            [0, 4, 8].map(|at| u32::from_le_bytes(std::array::from_fn(|i| self.0[at + i])));
        let high_two = |word: u32| word >> 2 & 0x3030_3030;
        let scales = [a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | high_two(a)].map(u32::to_le_bytes);
        let mins = [b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | high_two(b)].map(u32::to_le_bytes);
        std::array::from_fn(|group| {
            let (half, byte) = (group / 4, group % 4);
            (
                scale * f32::from(scales[half][byte]),
                min * f32::from(mins[half][byte]),
            )
        })
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

impl Block for Q5_K {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let groups = self.group_scales.unpack(self.scale, self.min);
        for (pair, out) in out.chunks_exact_mut(64).enumerate() {
            let quants = &self.quants[pair * 32..][..32];
            let [(low_scale, low_min), (high_scale, high_min)] =
                [groups[pair * 2], groups[pair * 2 + 1]];
            let (low, high) = out.split_at_mut(32);
            for i in 0..32 {
                let fifth = self.fifth_bits[i] >> (pair * 2);
                low[i] = low_scale * f32::from(quants[i] & 15 | (fifth & 1) << 4) - low_min;
                high[i] = high_scale * f32::from(quants[i] >> 4 | (fifth & 2) << 3) - high_min;
            }
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

impl Block for Q6_K {
    const LEN: usize = LEN;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        for half in 0..2 {
            let high_bits = &self.high_bits[half * 32..][..32];
            for quarter in 0..4 {
                let low_bits = &self.low_bits[half * 64 + quarter % 2 * 32..][..32];
                let low_shift = quarter / 2 * 4;
                for group in 0..2 {
                    vectorize_inside();
                    let first = half * 128 + quarter * 32 + group * 16;
                    let scale = scale * f32::from(self.group_scales[first / 16]);
                    for i in 0..16 {
                        let low = low_bits[group * 16 + i] >> low_shift & 15;
                        let high = high_bits[group * 16 + i] >> (quarter * 2) & 3;
                        out[first + i] = scale * (i32::from(low | high << 4) - 32) as f32;
                    }
                }
            }
        }
    }
}

//! Formats whose quants of four bits are indexes of a table of sixteen values: the value is scale times entry.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Block, float::F16, nibble, vectorize_inside};

/// Of IQ4: steps that grow with the distance from zero.
const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice the E2M1 numbers of the Open Compute Project's microscaling formats, without a negative zero.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Writes 32 values: value `i` is in the low half of byte `i`, value `i + 16` in its high half.
#[inline(always)]
fn look_up(scale: f32, table: &[i8; 16], quants: &[u8; 16], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    for i in 0..16 {
        low[i] = scale * entry(table, quants[i] & 15);
        high[i] = scale * entry(table, quants[i] >> 4);
    }
}

/// Looks a number up by selects and shifts, which LLVM does for several numbers at once: three times as fast as loads.
#[inline(always)]
fn entry(table: &[i8; 16], index: u8) -> f32 {
    let [a, b, c, d] = bytemuck::cast::<_, [u32; 4]>(*table).map(u32::from_le);
    let (low, high) = if index & 4 == 0 { (a, c) } else { (b, d) };
    let word = if index & 8 == 0 { low } else { high };
    let at_the_top = word << (24 - u32::from(index & 3) * 8);
    (at_the_top as i32 >> 24) as f32
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ4_NL {
    scale: F16,
    quants: [u8; 16],
}

const _: () = assert!(size_of::<IQ4_NL>() == 18);

impl Block for IQ4_NL {
    const LEN: usize = 32;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        look_up(self.scale.to_f32(), &IQ4, &self.quants, out);
    }
}

/// Eight groups of 32, whose scales of six bits have 32 added.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ4_XS {
    scale: F16,
    /// Little-endian: the high two bits of every group's scale, the first in the lowest bits.
    group_scales_high: [u8; 2],
    /// The low four bits: two to a byte, the first in the low half.
    group_scales_low: [u8; 4],
    groups: [[u8; 16]; 8],
}

const _: () = assert!(size_of::<IQ4_XS>() == 136);

impl Block for IQ4_XS {
    const LEN: usize = 256;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        let scale = self.scale.to_f32();
        let high = u16::from_le_bytes(self.group_scales_high);
        for (group, out) in out.chunks_exact_mut(32).enumerate() {
            vectorize_inside();
            let high = (high >> (2 * group)) as u8 & 3;
            let group_scale = i32::from(nibble(&self.group_scales_low, group) | high << 4) - 32;
            look_up(scale * group_scale as f32, &IQ4, &self.groups[group], out);
        }
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MXFP4 {
    /// The exponent of a power of two, 127 added.
    scale: u8,
    quants: [u8; 16],
}

const _: () = assert!(size_of::<MXFP4>() == 17);

impl Block for MXFP4 {
    const LEN: usize = 32;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        // Half the scale, since the table is doubled. The two smallest halves are subnormal.
        let half = match self.scale {
            exponent @ 0..2 => 0x0020_0000 << exponent,
            exponent => u32::from(exponent - 1) << 23,
        };
        look_up(f32::from_bits(half), &E2M1, &self.quants, out);
    }
}

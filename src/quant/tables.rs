//! Formats whose quants of four bits are indexes of a table of sixteen values: the value is scale times entry.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{Quantized, Reader, float::F16, nibble, vectorize_inside};

/// Of IQ4: steps that grow with the distance from zero.
const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice the E2M1 numbers of the Open Compute Project's microscaling formats, without a negative zero.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Writes 32 codes: code `i` is in the low half of byte `i`, code `i + 16` in its high half.
#[inline(always)]
fn put_entries<R: Reader>(reader: R, table: &[i8; 16], quants: &[u8; 16], codes: &mut [i8]) {
    let (mut low, mut high) = (*quants, *quants);
    for i in 0..16 {
        low[i] &= 15;
        high[i] >>= 4;
    }
    codes[..16].copy_from_slice(&reader.look_up(table, low));
    codes[16..32].copy_from_slice(&reader.look_up(table, high));
}

/// [`Reader::look_up`]
#[inline(always)]
pub fn look_up(table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
    let mut entries = [0; 16];
    for i in 0..16 {
        entries[i] = entry(table, indexes[i]);
    }
    entries
}

/// Looks a number up by selects and shifts, which LLVM does for several numbers at once: three times as fast as loads.
#[inline(always)]
fn entry(table: &[i8; 16], index: u8) -> i8 {
    let [a, b, c, d] = bytemuck::cast::<_, [u32; 4]>(*table).map(u32::from_le);
    let (low, high) = if index & 4 == 0 { (a, c) } else { (b, d) };
    let word = if index & 8 == 0 { low } else { high };
    let at_the_top = word << (24 - u32::from(index & 3) * 8);
    (at_the_top as i32 >> 24) as i8
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ4_NL {
    scale: F16,
    quants: [u8; 16],
}

const _: () = assert!(size_of::<IQ4_NL>() == 18);

impl Quantized for IQ4_NL {
    const BLOCK: usize = 32;
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
        scales[0] = reader.to_f32(self.scale);
        put_entries(reader, &IQ4, &self.quants, codes);
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

impl Quantized for IQ4_XS {
    const BLOCK: usize = 256;
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
        let scale = reader.to_f32(self.scale);
        let high = u16::from_le_bytes(self.group_scales_high);
        for group in 0..codes.len() / 32 {
            let codes = &mut codes[group * 32..][..32];
            vectorize_inside();
            let high = (high >> (2 * group)) as u8 & 3;
            let group_scale = i32::from(nibble(&self.group_scales_low, group) | high << 4) - 32;
            scales[group] = scale * group_scale as f32;
            put_entries(reader, &IQ4, &self.groups[group], codes);
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

impl Quantized for MXFP4 {
    const BLOCK: usize = 32;
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
        // Half the scale, since the table is doubled. The two smallest halves are subnormal.
        let half = match self.scale {
            exponent @ 0..2 => 0x0020_0000 << exponent,
            exponent => u32::from(exponent - 1) << 23,
        };
        scales[0] = f32::from_bits(half);
        put_entries(reader, &E2M1, &self.quants, codes);
    }
}

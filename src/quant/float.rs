//! Formats that store every value on its own.

use bytemuck::{Pod, Zeroable};

use super::Block;

/// IEEE binary32, little-endian.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct F32([u8; 4]);

const _: () = assert!(size_of::<F32>() == 4);

impl Block for F32 {
    const LEN: usize = 1;

    #[inline(always)]
    fn dequantize(blocks: &[Self], out: &mut [f32]) {
        for (out, block) in out.iter_mut().zip(blocks) {
            *out = f32::from_le_bytes(block.0);
        }
    }
}

/// IEEE binary16, little-endian; also the scale in every block format.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct F16([u8; 2]);

const _: () = assert!(size_of::<F16>() == 2);

impl F16 {
    pub fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// The same number as a float32. Written without branches or run-time feature checks, since it stands in the
    /// innermost loops.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        const REBIAS: f32 = f32::from_bits((127 + 127 - 15) << 23); // 2^112
        let bits = u32::from(u16::from_le_bytes(self.0));
        let sign = (bits & 0x8000) << 16;
        let special = if bits & 0x7c00 == 0x7c00 {
            0xff << 23
        } else {
            0
        }; // infinities and NaN
        // The product is exact, and normalizes subnormals.
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * REBIAS;
        f32::from_bits(magnitude.to_bits() | sign | special)
    }
}

impl Block for F16 {
    const LEN: usize = 1;

    #[inline(always)]
    fn dequantize(blocks: &[Self], out: &mut [f32]) {
        for (out, block) in out.iter_mut().zip(blocks) {
            *out = block.to_f32();
        }
    }
}

/// The upper half of a binary32, little-endian.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct BF16([u8; 2]);

const _: () = assert!(size_of::<BF16>() == 2);

impl Block for BF16 {
    const LEN: usize = 1;

    #[inline(always)]
    fn dequantize(blocks: &[Self], out: &mut [f32]) {
        for (out, block) in out.iter_mut().zip(blocks) {
            *out = f32::from_bits(u32::from(u16::from_le_bytes(block.0)) << 16);
        }
    }
}

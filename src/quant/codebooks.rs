//! The formats IQ1 to IQ3: blocks of 256 values, of which every four or eight are a point of a codebook, in groups of
//! 16 or 32 with a small integer scale. IQ2 and IQ3 have a sign for every value beside the points, IQ1 a small shift
//! for all values of a point.
#![allow(non_camel_case_types)]

use bytemuck::{Pod, Zeroable};

use super::{
    Quantized, Reader, codebook_points as points, float::F16, nibble, put, vectorize_inside,
};

const LEN: usize = 256;

type Codebook<const COORDINATES: usize, const POINTS: usize> = [[i8; COORDINATES]; POINTS];

static IQ1_CODEBOOK: Codebook<8, 2048> = codebook(&points::IQ1, &[-1, 0, 1]);
static IQ2_XXS_CODEBOOK: Codebook<8, 256> = codebook(&points::IQ2_XXS, &[8, 25, 43]);
static IQ2_XS_CODEBOOK: Codebook<8, 512> = codebook(&points::IQ2_XS, &[8, 25, 43]);
static IQ2_S_CODEBOOK: Codebook<8, 1024> = codebook(&points::IQ2_S, &[8, 25, 43]);
static IQ3_XXS_CODEBOOK: Codebook<4, 256> =
    codebook(&points::IQ3_XXS, &[4, 12, 20, 28, 36, 44, 52, 62]);
static IQ3_S_CODEBOOK: Codebook<4, 512> = codebook(&points::IQ3_S, &[1, 3, 5, 7, 9, 11, 13, 15]);

/// Unpacks points whose coordinates are indexes of `levels`, the first in the lowest bits.
const fn codebook<const COORDINATES: usize, const POINTS: usize>(
    points: &[u16; POINTS],
    levels: &[i8],
) -> Codebook<COORDINATES, POINTS> {
    let bits = levels.len().next_power_of_two().ilog2();
    let mut codebook = [[0; COORDINATES]; POINTS];
    let mut i = 0;
    while i < POINTS * COORDINATES {
        let (point, coordinate) = (i / COORDINATES, i % COORDINATES);
        let level = points[point] >> (bits * coordinate as u32) & ((1 << bits) - 1);
        codebook[point][coordinate] = levels[level as usize];
        i += 1;
    }
    codebook
}

/// Writes four points, negated where the coordinate's bit of `signs` is 1.
#[inline(always)]
fn put_signed(reader: impl Reader, points: [[i8; 8]; 4], signs: [u8; 4], codes: &mut [i8]) {
    let points: [u64; 4] = bytemuck::cast(points);
    let ones = reader.ones(signs);
    let mut words = [0; 4];
    for i in 0..4 {
        // No coordinate is zero, whose negation would reach into the next.
        words[i] = (points[i] ^ (ones[i] * 255)) + ones[i];
    }
    put(words, 0, codes);
}

/// Signs of eight values, of which seven are stored: the number of minus signs is even.
#[inline(always)]
fn even_signs(seven: u32) -> u8 {
    let seven = seven as u8 & 127;
    seven | (seven.count_ones() as u8 & 1) << 7
}

/// Four even signs of eight values each, and above them the scale of 32 values, as IQ2_XXS and IQ3_XXS store them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
struct SignsAndScale([u8; 4]);

impl SignsAndScale {
    #[inline(always)]
    fn unpack(self) -> ([u8; 4], f32) {
        let word = u32::from_le_bytes(self.0);
        let signs = std::array::from_fn(|i| even_signs(word >> (7 * i)));
        (signs, 0.5 + (word >> 28) as f32)
    }
}

/// Value: `scale * (0.5 + group_scale) / 4 * point`, signed; eight groups of 32.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ2_XXS {
    scale: F16,
    groups: [IQ2_XXS_Group; LEN / 32],
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct IQ2_XXS_Group {
    points: [u8; 4],
    signs_and_scale: SignsAndScale,
}

const _: () = assert!(size_of::<IQ2_XXS>() == 66);

impl Quantized for IQ2_XXS {
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
        let scale = reader.to_f32(self.scale);
        for group in 0..codes.len() / 32 {
            let codes = &mut codes[group * 32..][..32];
            let IQ2_XXS_Group {
                points,
                signs_and_scale,
            } = &self.groups[group];
            let (signs, group_scale) = signs_and_scale.unpack();
            scales[group] = scale * group_scale * 0.25;
            let points = points.map(|point| IQ2_XXS_CODEBOOK[usize::from(point)]);
            put_signed(reader, points, signs, codes);
        }
    }
}

/// As [`IQ2_XXS`], with groups of 16.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ2_XS {
    scale: F16,
    /// Little-endian: the point in the low nine bits, even signs above it.
    points_and_signs: [[u8; 2]; LEN / 8],
    /// Two to a byte, the first in the low half.
    group_scales: [u8; LEN / 32],
}

const _: () = assert!(size_of::<IQ2_XS>() == 74);

impl Quantized for IQ2_XS {
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
            scales[group] = scale * (0.5 + f32::from(nibble(&self.group_scales, group))) * 0.25;
        }
        for i in 0..LEN / 32 {
            let four: &[[u8; 2]; 4] = self.points_and_signs[i * 4..].first_chunk().expect("four");
            let four = four.map(u16::from_le_bytes);
            let points = four.map(|both| IQ2_XS_CODEBOOK[usize::from(both & 511)]);
            let signs = four.map(|both| even_signs(u32::from(both >> 9)));
            put_signed(reader, points, signs, &mut codes[i * 32..]);
        }
    }
}

/// As [`IQ2_XS`], with eight free signs.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ2_S {
    scale: F16,
    points: [u8; LEN / 8],
    signs: [u8; LEN / 8],
    /// The two high bits of four points in each byte, the first in the lowest bits.
    points_high: [u8; LEN / 32],
    /// Two to a byte, the first in the low half.
    group_scales: [u8; LEN / 32],
}

const _: () = assert!(size_of::<IQ2_S>() == 82);

impl Quantized for IQ2_S {
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
            scales[group] = scale * (0.5 + f32::from(nibble(&self.group_scales, group))) * 0.25;
        }
        for i in 0..LEN / 32 {
            let points = [0, 1, 2, 3].map(|point| {
                let high = usize::from(self.points_high[i] >> (point * 2) & 3);
                IQ2_S_CODEBOOK[usize::from(self.points[i * 4 + point]) | high << 8]
            });
            let signs = *self.signs[i * 4..].first_chunk().expect("four");
            put_signed(reader, points, signs, &mut codes[i * 32..]);
        }
    }
}

/// Value: `scale * (0.5 + group_scale) / 2 * point`, signed; eight groups of 32.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ3_XXS {
    scale: F16,
    points: [u8; LEN / 4],
    groups: [SignsAndScale; LEN / 32],
}

const _: () = assert!(size_of::<IQ3_XXS>() == 98);

impl Quantized for IQ3_XXS {
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
        let scale = reader.to_f32(self.scale);
        for group in 0..codes.len() / 32 {
            let codes = &mut codes[group * 32..][..32];
            let (signs, group_scale) = self.groups[group].unpack();
            scales[group] = scale * group_scale * 0.5;
            let points: &[u8; 8] = self.points[group * 8..].first_chunk().expect("eight");
            let points = points.map(|point| IQ3_XXS_CODEBOOK[usize::from(point)]);
            put_signed(reader, bytemuck::cast(points), signs, codes);
        }
    }
}

/// Value: `scale * (1 + 2 * group_scale) * point`, signed; eight groups of 32.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ3_S {
    scale: F16,
    points: [u8; LEN / 4],
    /// The ninth bit of eight points in each byte, the first in the lowest bit.
    points_high: [u8; LEN / 32],
    signs: [u8; LEN / 8],
    /// Two to a byte, the first in the low half.
    group_scales: [u8; LEN / 64],
}

const _: () = assert!(size_of::<IQ3_S>() == 110);

impl Quantized for IQ3_S {
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
        let scale = reader.to_f32(self.scale);
        for group in 0..LEN / 32 {
            scales[group] = scale * f32::from(1 + 2 * nibble(&self.group_scales, group));
        }
        for i in 0..LEN / 32 {
            let points = [0, 1, 2, 3, 4, 5, 6, 7].map(|point| {
                let high = usize::from(self.points_high[i] >> point & 1);
                IQ3_S_CODEBOOK[usize::from(self.points[i * 8 + point]) | high << 8]
            });
            let signs = *self.signs[i * 4..].first_chunk().expect("four");
            put_signed(reader, bytemuck::cast(points), signs, &mut codes[i * 32..]);
        }
    }
}

/// Writes eight times `point + shift` where the shift is an eighth, negated by `negative`.
#[inline(always)]
fn shifted(point: usize, negative: bool, codes: &mut [i8]) {
    vectorize_inside();
    let shift = if negative { -1 } else { 1 };
    for i in 0..8 {
        codes[i] = 8 * IQ1_CODEBOOK[point][i] + shift;
    }
}

/// Value: `scale * (1 + 2 * group_scale) * (point + shift)`, as codes eight times as large; eight groups of 32.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ1_S {
    scale: F16,
    points: [u8; LEN / 8],
    /// Little-endian: the three high bits of four points, the scale in three bits, the sign of the shift.
    groups: [[u8; 2]; LEN / 32],
}

const _: () = assert!(size_of::<IQ1_S>() == 50);

impl Quantized for IQ1_S {
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
        let scale = reader.to_f32(self.scale) * 0.125;
        for group in 0..codes.len() / 32 {
            let codes = &mut codes[group * 32..][..32];
            let bits = u16::from_le_bytes(self.groups[group]);
            scales[group] = scale * f32::from(1 + 2 * (bits >> 12 & 7));
            for i in 0..codes.len() / 8 {
                let codes = &mut codes[i * 8..][..8];
                let high = usize::from(bits >> (i * 3) & 7);
                let point = usize::from(self.points[group * 4 + i]) | high << 8;
                shifted(point, bits >> 15 == 1, codes);
            }
        }
    }
}

/// As [`IQ1_S`], with groups of 16 and a shift of its own for each point.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IQ1_M {
    points: [u8; LEN / 8],
    /// Two to a byte, the first in the low half: the three high bits of a point, the sign of its shift.
    points_high: [u8; LEN / 16],
    /// Four little-endian words, in each of them four scales of three bits and a quarter of the float16 scale.
    scales: [u8; 8],
}

const _: () = assert!(size_of::<IQ1_M>() == 56);

impl Quantized for IQ1_M {
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
        let bits = u64::from_le_bytes(self.scales);
        let quarter = |i: u32| (bits >> (16 * i + 12) & 15) << (4 * i);
        let scale = (quarter(0) | quarter(1) | quarter(2) | quarter(3)) as u16;
        let scale = reader.to_f32(bytemuck::cast(scale.to_le_bytes())) * 0.125;
        for group in 0..LEN / 16 {
            let (word, group_in_word) = (group / 4, group % 4);
            let group_scale = (bits >> (16 * word + 3 * group_in_word)) as u8 & 7;
            scales[group] = scale * f32::from(1 + 2 * group_scale);
        }
        for i in 0..codes.len() / 8 {
            let codes = &mut codes[i * 8..][..8];
            let high = nibble(&self.points_high, i);
            let point = usize::from(self.points[i]) | usize::from(high & 7) << 8;
            shifted(point, high & 8 != 0, codes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of `tests/quant.rs` meet some of the points only. Hashes are FNV-1a, printed by
    /// `codebook_points.py`.
    #[test]
    fn codebooks_are_the_references() {
        let codebooks = [
            (IQ1_CODEBOOK.as_flattened(), 0x6703_ed86_3501_ae2e),
            (IQ2_XXS_CODEBOOK.as_flattened(), 0xbb4e_e025_b5ac_6e8e),
            (IQ2_XS_CODEBOOK.as_flattened(), 0xc9b1_ee61_e799_09bd),
            (IQ2_S_CODEBOOK.as_flattened(), 0x123e_dd38_a3b6_2b90),
            (IQ3_XXS_CODEBOOK.as_flattened(), 0xdfa5_dc83_d6a1_55d5),
            (IQ3_S_CODEBOOK.as_flattened(), 0xfa37_020c_25b4_4829_u64),
        ];
        for (i, (codebook, expected)) in codebooks.into_iter().enumerate() {
            let hash = codebook
                .iter()
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &coordinate| {
                    (hash ^ u64::from(coordinate as u8)).wrapping_mul(0x100_0000_01b3)
                });
            assert_eq!(hash, expected, "codebook {i}");
        }
    }
}

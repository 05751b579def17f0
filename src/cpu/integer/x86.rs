//! What all instruction sets of x86 share: reading blocks, and products of single rows, in registers of 256 bits. These hold the
//! eight groups of 32 among 256 values, and processors with wider ones are no slower with them.

use std::arch::x86_64::*;

use super::{activations::Block8, panel::RowBlock};
use crate::{
    cpu::simd::Lanes,
    quant::{F16, MOST_VALUES, Quantized},
};

/// Numbers of 32 bits in a register.
pub const HALF: usize = 8;

/// Bytes in a register.
pub const BYTES: usize = 32;

/// Products of unsigned and signed codes. A value exists only where the processor has AVX2, FMA and F16C, and the functions' own
/// instructions.
pub trait DotProducts: Copy {
    /// What codes of weights are brought into: here 128 is added to those that may be negative.
    #[inline(always)]
    fn prepare(self, signed: bool, codes: __m256i) -> __m256i {
        // SAFETY: the processor has AVX2.
        unsafe {
            match signed {
                true => _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN)),
                false => codes,
            }
        }
    }

    /// Adds the products of four codes each.
    fn dot(self, signed: bool, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i;

    /// What the sum of products is too large by, where the activations' codes add up to `x_sums`.
    #[inline(always)]
    fn excess(self, signed: bool, x_sums: __m256i) -> __m256i {
        // SAFETY: the processor has AVX2.
        unsafe {
            match signed {
                true => _mm256_slli_epi32::<7>(x_sums),
                false => _mm256_setzero_si256(),
            }
        }
    }

    /// [`Instructions::add_block`](super::instructions::Instructions::add_block)
    #[inline(always)]
    fn add_block<Q: Quantized>(self, weights: &RowBlock, x: &Block8, places: &mut Lanes) {
        let groups = x.groups(Q::GROUP);
        // SAFETY: the processor has the instructions, and arrays are as long as what is read.
        unsafe {
            // Of four codes each.
            let mut fours = [_mm256_setzero_si256(); 8];
            for eighth in 0..8 {
                let codes = _mm256_load_si256(weights.codes.0[eighth * BYTES..].as_ptr().cast());
                let x = _mm256_load_si256(x.codes[eighth * BYTES..].as_ptr().cast());
                fours[eighth] =
                    self.dot(Q::SIGNED, fours[eighth], self.prepare(Q::SIGNED, codes), x);
            }
            let sums = add_lanes(Q::GROUP, fours);
            // The upper half of the lanes is for groups of 16.
            for half in 0..MOST_VALUES / Q::GROUP / HALF {
                let at = half * HALF;
                let x_sums = _mm256_load_si256(groups.sums[at..].as_ptr().cast());
                let sums = _mm256_sub_epi32(sums[half], self.excess(Q::SIGNED, x_sums));
                let scales = _mm256_loadu_ps(weights.scales[at..].as_ptr());
                let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scales);
                let x_scales = _mm256_load_ps(groups.scales[at..].as_ptr());
                let mut sums = _mm256_loadu_ps(places.0[at..].as_ptr());
                sums = _mm256_fmadd_ps(scaled, x_scales, sums);
                if Q::HAS_MIN {
                    let mins = _mm256_loadu_ps(weights.mins[at..].as_ptr());
                    let x_sums = _mm256_load_ps(groups.scaled_sums[at..].as_ptr());
                    sums = _mm256_fnmadd_ps(mins, x_sums, sums);
                }
                _mm256_storeu_ps(places.0[at..].as_mut_ptr(), sums);
            }
        }
    }
}

/// The sums of groups of 16 or 32 codes, from those of four codes each. Where there are eight, the second register is zeros.
#[inline(always)]
unsafe fn add_lanes(group: usize, fours: [__m256i; 8]) -> [__m256i; 2] {
    let [a, b, c, d, e, f, g, h] = fours;
    // SAFETY: by the caller's word, the processor has AVX2.
    unsafe {
        let [first, last] = [add_fours([a, b, c, d]), add_fours([e, f, g, h])];
        if group == 32 {
            let low = _mm256_permute2x128_si256::<0x20>(first, last);
            let high = _mm256_permute2x128_si256::<0x31>(first, last);
            [_mm256_add_epi32(low, high), _mm256_setzero_si256()]
        } else {
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            [
                _mm256_permutevar8x32_epi32(first, order),
                _mm256_permutevar8x32_epi32(last, order),
            ]
        }
    }
}

/// Adds up the lanes of each half of four registers: the sums of the lower halves, in the order of the registers, then those of
/// the upper ones.
#[inline(always)]
unsafe fn add_fours([a, b, c, d]: [__m256i; 4]) -> __m256i {
    // SAFETY: by the caller's word, the processor has AVX2.
    unsafe {
        let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
    }
}

/// [`Reader::to_f32`](crate::quant::Reader::to_f32)
///
/// # Safety
///
/// The processor has F16C.
#[inline(always)]
pub unsafe fn to_f32(half: F16) -> f32 {
    // SAFETY: by the caller's word.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half.to_bits().into()))) }
}

/// [`Reader::ones`](crate::quant::Reader::ones)
///
/// # Safety
///
/// The processor has AVX2.
#[inline(always)]
pub unsafe fn ones(bits: [u8; 4]) -> [u64; 4] {
    let mut ones = [0; 4];
    // SAFETY: by the caller's word, and the array is as long as what is written.
    unsafe {
        let bits = _mm256_set1_epi32(i32::from_le_bytes(bits));
        let order = _mm256_setr_epi64x(
            0,
            0x0101_0101_0101_0101,
            0x0202_0202_0202_0202,
            0x0303_0303_0303_0303,
        );
        let own = _mm256_set1_epi64x(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
        let bits = _mm256_and_si256(_mm256_shuffle_epi8(bits, order), own);
        let is_set = _mm256_cmpeq_epi8(bits, own);
        _mm256_storeu_si256(ones.as_mut_ptr().cast(), _mm256_abs_epi8(is_set));
    }
    ones
}

/// [`Reader::look_up`](crate::quant::Reader::look_up)
///
/// # Safety
///
/// The processor has AVX.
#[inline(always)]
pub unsafe fn look_up(table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
    let mut entries = [0; 16];
    // SAFETY: by the caller's word, and arrays are as long as what is read and written.
    unsafe {
        let table = _mm_loadu_si128(table.as_ptr().cast());
        let indexes = _mm_loadu_si128(indexes.as_ptr().cast());
        _mm_storeu_si128(
            entries.as_mut_ptr().cast(),
            _mm_shuffle_epi8(table, indexes),
        );
    }
    entries
}

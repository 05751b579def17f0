//! Products in integers by AVX-512 VNNI.
//!
//! The dot products there are of unsigned and signed numbers. Codes of weights are the unsigned ones; where they may be negative
//! 128 is added, and 128 times the sum of the activations' codes subtracted.

use std::arch::x86_64::*;

use super::{
    activations::Block8,
    avx2,
    instructions::{Instructions, PanelCodes, ROWS, RowCodes, Work},
};
use crate::quant::{F16, Reader};

/// The processor has AVX-512 with VNNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512Vnni(());

impl Avx512Vnni {
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
    fn run_inside<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }
}

/// Adds 128 to codes that may be negative.
#[inline(always)]
fn unsigned(signed: bool, codes: __m512i) -> __m512i {
    // SAFETY: called where the processor has AVX-512.
    unsafe {
        match signed {
            true => _mm512_xor_si512(codes, _mm512_set1_epi8(i8::MIN)),
            false => codes,
        }
    }
}

impl Reader for Avx512Vnni {
    #[inline(always)]
    fn to_f32(self, half: F16) -> f32 {
        // SAFETY: the processor has F16C.
        unsafe { avx2::to_f32(half) }
    }

    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
        // SAFETY: the processor has AVX.
        unsafe { avx2::look_up(table, indexes) }
    }
}

// Every block below is sound because an `Avx512Vnni` exists only where `detect` found the instructions; pointers are to arrays
// as long as what is read.
impl Instructions for Avx512Vnni {
    type Codes = __m512i;
    type Sums = __m512i;
    type Floats = __m512;

    const TOKENS: usize = 8;

    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: as above; an address that is not valid is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }

    #[inline(always)]
    fn group_sums(self, group: usize, signed: bool, codes: &RowCodes, x: &Block8) -> __m512i {
        // SAFETY: as above.
        unsafe {
            // Of four codes each.
            let mut fours = [_mm512_setzero_si512(); 4];
            for quarter in 0..4 {
                let codes = _mm512_load_si512(codes.0[quarter * 64..].as_ptr().cast());
                let x = _mm512_load_si512(x.codes[quarter * 64..].as_ptr().cast());
                fours[quarter] = _mm512_dpbusd_epi32(fours[quarter], unsigned(signed, codes), x);
            }
            let [a, b, c, d] = fours;
            // Four sums of four become one of sixteen: lane 4 i + j is that of group 4 j + i.
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            let sixteens =
                _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let sums = if group == 16 {
                let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                _mm512_permutexvar_epi32(order, sixteens)
            } else {
                let swapped = _mm512_shuffle_i32x4::<0b10_11_00_01>(sixteens, sixteens);
                let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11);
                _mm512_permutexvar_epi32(order, _mm512_add_epi32(sixteens, swapped))
            };
            match signed {
                true => {
                    let x_sums = _mm512_load_si512(x.groups(group).sums.as_ptr().cast());
                    _mm512_sub_epi32(sums, _mm512_slli_epi32::<7>(x_sums))
                }
                false => sums,
            }
        }
    }

    #[inline(always)]
    fn load_codes(self, signed: bool, codes: &PanelCodes) -> __m512i {
        // SAFETY: as above.
        unsafe { unsigned(signed, _mm512_load_si512(codes.0.as_ptr().cast())) }
    }

    #[inline(always)]
    fn begin(self, signed: bool, x_sum: i32) -> __m512i {
        // SAFETY: as above.
        unsafe {
            match signed {
                true => _mm512_set1_epi32(-128 * x_sum),
                false => _mm512_setzero_si512(),
            }
        }
    }

    #[inline(always)]
    fn dot(self, _signed: bool, sums: __m512i, codes: __m512i, x: i32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x)) }
    }

    #[inline(always)]
    fn splat(self, number: f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(number) }
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS]) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, numbers: __m512) -> [f32; ROWS] {
        let mut stored = [0.0; ROWS];
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(stored.as_mut_ptr(), numbers) };
        stored
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn add_scaled(self, to: __m512, sums: __m512i, scales: __m512, x_scales: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe {
            _mm512_fmadd_ps(
                _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales),
                x_scales,
                to,
            )
        }
    }

    #[inline(always)]
    fn subtract_product(self, from: __m512, mins: __m512, x_sums: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fnmadd_ps(mins, x_sums, from) }
    }
}

//! Products in integers by AVX-512 VNNI.
//!
//! The dot products there are of unsigned and signed numbers. Codes of weights are the unsigned ones; where they may be negative
//! 128 is added, and 128 times the sum of the activations' codes subtracted.

use std::arch::x86_64::*;

use super::{
    activations::Block8,
    instructions::{AT_ONCE, Instructions, PanelCodes, ROWS, Work},
    panel::RowBlock,
    x86::{self, DotProducts},
};
use crate::{
    cpu::simd::Lanes,
    quant::{F16, Quantized, Reader},
};

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
        unsafe { x86::to_f32(half) }
    }

    #[inline(always)]
    fn ones(self, bits: [u8; 4]) -> [u64; 4] {
        // SAFETY: the processor has AVX2.
        unsafe { x86::ones(bits) }
    }

    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
        // SAFETY: the processor has AVX.
        unsafe { x86::look_up(table, indexes) }
    }
}

impl DotProducts for Avx512Vnni {
    #[inline(always)]
    fn dot(self, _signed: bool, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the processor has AVX-512 VNNI and VL.
        unsafe { _mm256_dpbusd_epi32(sums, codes, x) }
    }
}

// Every block below is sound because an `Avx512Vnni` exists only where `detect` found the instructions; pointers are to arrays
// as long as what is read.
impl Instructions for Avx512Vnni {
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
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }

    #[inline(always)]
    fn add_block<Q: Quantized>(self, weights: &RowBlock, x: &Block8, places: &mut Lanes) {
        DotProducts::add_block::<Q>(self, weights, x, places);
    }

    #[inline(always)]
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [__m512i; T] {
        // SAFETY: as above.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); T];
            if Q::SIGNED {
                for token in 0..T {
                    let excess = 128 * tokens[token].groups(Q::GROUP).sums[group];
                    sums[token] = _mm512_set1_epi32(-excess);
                }
            }
            for i in 0..Q::GROUP / AT_ONCE {
                let codes = unsigned(Q::SIGNED, _mm512_load_si512(codes[i].0.as_ptr().cast()));
                for token in 0..T {
                    let x = _mm512_set1_epi32(tokens[token].four(Q::GROUP, group, i));
                    sums[token] = _mm512_dpbusd_epi32(sums[token], codes, x);
                }
            }
            sums
        }
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

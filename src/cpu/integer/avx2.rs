//! Products in integers by AVX2, or AVX-VNNI, on halves of what AVX-512 computes at once.
//!
//! The dot products there are of unsigned and signed numbers. AVX2 sums two of them in 16 bits, which hold 128 times 127 twice:
//! where codes of weights may be negative, their signs go over to the activations. AVX-VNNI sums four in 32 bits: there 128 is
//! added to the codes, and 128 times the sum of the activations' codes subtracted.

use std::arch::x86_64::*;

use super::{
    activations::Block8,
    instructions::{AT_ONCE, Instructions, PanelCodes, ROWS, Work},
    panel::RowBlock,
    x86::{self, BYTES, DotProducts, HALF},
};
use crate::{
    cpu::simd::Lanes,
    quant::{F16, Quantized, Reader},
};

/// The processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

/// The processor has AVX-VNNI, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AvxVnni(());

/// Those that multiply panels in two registers.
trait HalfWidth: DotProducts {
    fn run<W: Work>(self, work: W) -> W::Output;
}

impl Avx2 {
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn run_inside<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }
}

impl AvxVnni {
    pub fn detect() -> Option<Self> {
        Avx2::detect()?;
        is_x86_feature_detected!("avxvnni").then_some(Self(()))
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    fn run_inside<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }
}

// Every block below is sound because an `Avx2` or `AvxVnni` exists only where `detect` found the instructions; pointers are to
// arrays as long as what is read.
impl HalfWidth for Avx2 {
    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }
}

impl DotProducts for Avx2 {
    #[inline(always)]
    fn prepare(self, _signed: bool, codes: __m256i) -> __m256i {
        codes
    }

    #[inline(always)]
    fn dot(self, signed: bool, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let pairs = match signed {
                true => _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes)),
                false => _mm256_maddubs_epi16(codes, x),
            };
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn excess(self, _signed: bool, _x_sums: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_setzero_si256() }
    }
}

impl HalfWidth for AvxVnni {
    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }
}

impl DotProducts for AvxVnni {
    #[inline(always)]
    fn dot(self, _signed: bool, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_dpbusd_avx_epi32(sums, codes, x) }
    }
}

impl<D: HalfWidth> Reader for D {
    #[inline(always)]
    fn to_f32(self, half: F16) -> f32 {
        // SAFETY: as above.
        unsafe { x86::to_f32(half) }
    }

    #[inline(always)]
    fn ones(self, bits: [u8; 4]) -> [u64; 4] {
        // SAFETY: the processor has AVX2.
        unsafe { x86::ones(bits) }
    }

    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
        // SAFETY: as above.
        unsafe { x86::look_up(table, indexes) }
    }
}

impl<D: HalfWidth> Instructions for D {
    type Sums = [__m256i; 2];
    type Floats = [__m256; 2];

    const TOKENS: usize = 4;

    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        HalfWidth::run(self, work)
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
    ) -> [[__m256i; 2]; T] {
        // SAFETY: as above.
        unsafe {
            let mut sums = [[_mm256_setzero_si256(); 2]; T];
            for token in 0..T {
                let x_sum = _mm256_set1_epi32(tokens[token].groups(Q::GROUP).sums[group]);
                let excess = self.excess(Q::SIGNED, x_sum);
                sums[token] = [_mm256_sub_epi32(_mm256_setzero_si256(), excess); 2];
            }
            for i in 0..Q::GROUP / AT_ONCE {
                let halves: &[[i8; BYTES]; 2] = bytemuck::must_cast_ref(&codes[i].0);
                let mut codes = [_mm256_setzero_si256(); 2];
                for half in 0..2 {
                    let loaded = _mm256_load_si256(halves[half].as_ptr().cast());
                    codes[half] = self.prepare(Q::SIGNED, loaded);
                }
                for token in 0..T {
                    let x = _mm256_set1_epi32(tokens[token].four(Q::GROUP, group, i));
                    for half in 0..2 {
                        let sum = &mut sums[token][half];
                        *sum = self.dot(Q::SIGNED, *sum, codes[half], x);
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    fn splat(self, number: f32) -> [__m256; 2] {
        // SAFETY: as above.
        [unsafe { _mm256_set1_ps(number) }; 2]
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_loadu_ps(numbers.as_ptr()),
                _mm256_loadu_ps(numbers[HALF..].as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn store(self, [low, high]: [__m256; 2]) -> [f32; ROWS] {
        let mut stored = [0.0; ROWS];
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(stored.as_mut_ptr(), low);
            _mm256_storeu_ps(stored[HALF..].as_mut_ptr(), high);
        }
        stored
    }

    #[inline(always)]
    fn add(self, [a, b]: [__m256; 2], [c, d]: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_add_ps(a, c), _mm256_add_ps(b, d)] }
    }

    #[inline(always)]
    fn add_scaled(
        self,
        to: [__m256; 2],
        sums: [__m256i; 2],
        scales: [__m256; 2],
        x_scales: [__m256; 2],
    ) -> [__m256; 2] {
        let mut added = to;
        for half in 0..2 {
            // SAFETY: as above.
            unsafe {
                let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), scales[half]);
                added[half] = _mm256_fmadd_ps(scaled, x_scales[half], to[half]);
            }
        }
        added
    }

    #[inline(always)]
    fn subtract_product(
        self,
        from: [__m256; 2],
        mins: [__m256; 2],
        x_sums: [__m256; 2],
    ) -> [__m256; 2] {
        let mut rest = from;
        for half in 0..2 {
            // SAFETY: as above.
            rest[half] = unsafe { _mm256_fnmadd_ps(mins[half], x_sums[half], from[half]) };
        }
        rest
    }
}

//! Products in integers by AVX2, or AVX-VNNI, on halves of what AVX-512 computes at once.
//!
//! The dot products there are of unsigned and signed numbers. AVX2 sums two of them in 16 bits, which hold 128 times 127 twice:
//! where codes of weights may be negative, their signs go over to the activations. AVX-VNNI sums four in 32 bits: there 128 is
//! added to the codes, and 128 times the sum of the activations' codes subtracted.

use std::arch::x86_64::*;

use super::{
    activations::Block8,
    instructions::{Instructions, PanelCodes, ROWS, RowCodes, Work},
};
use crate::quant::{F16, Reader};

/// The processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

/// The processor has AVX-VNNI, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AvxVnni(());

/// Numbers of 32 bits in a register.
const LANES: usize = 8;

/// Bytes in a register.
const BYTES: usize = 32;

/// What the two differ in. A value exists only where the processor has AVX2, FMA and F16C, and the functions' own instructions.
trait DotProducts: Copy {
    fn run<W: Work>(self, work: W) -> W::Output;

    /// What codes of weights are brought into.
    fn prepare(self, signed: bool, codes: __m256i) -> __m256i;

    /// Adds the products of four codes each.
    fn dot(self, signed: bool, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i;

    /// What the sum of products is too large by, where the activations' codes add up to `x_sums`.
    fn excess(self, signed: bool, x_sums: __m256i) -> __m256i;
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
impl DotProducts for Avx2 {
    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }

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

impl DotProducts for AvxVnni {
    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }

    #[inline(always)]
    fn prepare(self, signed: bool, codes: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            match signed {
                true => _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN)),
                false => codes,
            }
        }
    }

    #[inline(always)]
    fn dot(self, _signed: bool, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_dpbusd_avx_epi32(sums, codes, x) }
    }

    #[inline(always)]
    fn excess(self, signed: bool, x_sums: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            match signed {
                true => _mm256_slli_epi32::<7>(x_sums),
                false => _mm256_setzero_si256(),
            }
        }
    }
}

impl<D: DotProducts> Reader for D {
    #[inline(always)]
    fn to_f32(self, half: F16) -> f32 {
        // SAFETY: as above.
        unsafe { to_f32(half) }
    }

    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
        // SAFETY: as above.
        unsafe { look_up(table, indexes) }
    }
}

/// [`Reader::to_f32`]
///
/// # Safety
///
/// The processor has F16C.
#[inline(always)]
pub unsafe fn to_f32(half: F16) -> f32 {
    // SAFETY: by the caller's word.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half.to_bits().into()))) }
}

/// [`Reader::look_up`]
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

impl<D: DotProducts> Instructions for D {
    type Codes = [__m256i; 2];
    type Sums = [__m256i; 2];
    type Floats = [__m256; 2];

    const TOKENS: usize = 4;

    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        DotProducts::run(self, work)
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: as above; an address that is not valid is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }

    #[inline(always)]
    fn group_sums(self, group: usize, signed: bool, codes: &RowCodes, x: &Block8) -> [__m256i; 2] {
        // SAFETY: as above.
        unsafe {
            // Of four codes each.
            let mut fours = [_mm256_setzero_si256(); 8];
            for eighth in 0..8 {
                let codes = _mm256_load_si256(codes.0[eighth * BYTES..].as_ptr().cast());
                let x = _mm256_load_si256(x.codes[eighth * BYTES..].as_ptr().cast());
                let codes = self.prepare(signed, codes);
                fours[eighth] = DotProducts::dot(self, signed, fours[eighth], codes, x);
            }
            let x_sums = &x.groups(group).sums;
            let mut sums = [_mm256_setzero_si256(); 2];
            let mut thirty_twos = [_mm_setzero_si128(); 2];
            for half in 0..2 {
                let ab = _mm256_hadd_epi32(fours[half * 4], fours[half * 4 + 1]);
                let cd = _mm256_hadd_epi32(fours[half * 4 + 2], fours[half * 4 + 3]);
                // Of sixteen: those of even groups in the lower half, those of odd ones in the upper.
                let sixteens = _mm256_hadd_epi32(ab, cd);
                let even = _mm256_castsi256_si128(sixteens);
                let odd = _mm256_extracti128_si256::<1>(sixteens);
                thirty_twos[half] = _mm_add_epi32(even, odd);
                sums[half] =
                    _mm256_set_m128i(_mm_unpackhi_epi32(even, odd), _mm_unpacklo_epi32(even, odd));
            }
            if group == 32 {
                let [low, high] = thirty_twos;
                sums = [_mm256_set_m128i(high, low), _mm256_setzero_si256()];
            }
            for half in 0..2 {
                let x_sums = _mm256_load_si256(x_sums[half * LANES..].as_ptr().cast());
                sums[half] = _mm256_sub_epi32(sums[half], self.excess(signed, x_sums));
            }
            sums
        }
    }

    #[inline(always)]
    fn load_codes(self, signed: bool, codes: &PanelCodes) -> [__m256i; 2] {
        let [low, high] = bytemuck::must_cast_ref::<_, [[i8; BYTES]; 2]>(&codes.0);
        // SAFETY: as above.
        unsafe {
            [
                self.prepare(signed, _mm256_load_si256(low.as_ptr().cast())),
                self.prepare(signed, _mm256_load_si256(high.as_ptr().cast())),
            ]
        }
    }

    #[inline(always)]
    fn begin(self, signed: bool, x_sum: i32) -> [__m256i; 2] {
        // SAFETY: as above.
        unsafe {
            let excess = self.excess(signed, _mm256_set1_epi32(x_sum));
            [_mm256_sub_epi32(_mm256_setzero_si256(), excess); 2]
        }
    }

    #[inline(always)]
    fn dot(
        self,
        signed: bool,
        [low, high]: [__m256i; 2],
        [low_codes, high_codes]: [__m256i; 2],
        x: i32,
    ) -> [__m256i; 2] {
        // SAFETY: as above.
        let x = unsafe { _mm256_set1_epi32(x) };
        [
            DotProducts::dot(self, signed, low, low_codes, x),
            DotProducts::dot(self, signed, high, high_codes, x),
        ]
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
                _mm256_loadu_ps(numbers[LANES..].as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn store(self, [low, high]: [__m256; 2]) -> [f32; ROWS] {
        let mut stored = [0.0; ROWS];
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(stored.as_mut_ptr(), low);
            _mm256_storeu_ps(stored[LANES..].as_mut_ptr(), high);
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

//! Products in integers by NEON, on quarters of what AVX-512 computes at once: by dot products of signed numbers, or, where there
//! are those, products of matrices.

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use super::{
    activations::Block8,
    instructions::{AT_ONCE, Instructions, PanelCodes, ROWS, Work},
    panel::RowBlock,
};
use crate::{
    cpu::simd::Lanes,
    quant::{MOST_VALUES, Quantized, Reader},
};

/// The processor has NEON with dot products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neon(());

/// The processor has products of matrices, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeonI8mm(());

/// Numbers of 32 bits in a register.
const QUARTER: usize = 4;

/// Bytes in a register.
const BYTES: usize = 16;

/// What the two differ in. A value exists only where the processor has dot products, and the functions' own instructions.
trait PanelProducts: Copy {
    fn run<W: Work>(self, work: W) -> W::Output;

    /// [`Instructions::panel_sums`]
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [[int32x4_t; 4]; T];
}

impl Neon {
    pub fn detect() -> Option<Self> {
        is_aarch64_feature_detected!("dotprod").then_some(Self(()))
    }

    #[target_feature(enable = "neon,dotprod")]
    fn run_inside<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }
}

impl NeonI8mm {
    pub fn detect() -> Option<Self> {
        Neon::detect()?;
        is_aarch64_feature_detected!("i8mm").then_some(Self(()))
    }

    #[target_feature(enable = "neon,dotprod,i8mm")]
    fn run_inside<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }
}

/// Adds the products of four codes each.
///
/// # Safety
///
/// The processor has dot products.
#[inline(always)]
unsafe fn sdot(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // The standard library has no stable function for this instruction.
    // SAFETY: it only reads and writes the registers that are named, and is there by the caller's word.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Adds the products of eight codes each: of both rows, in halves of `codes`, with both tokens, in halves of `x`.
///
/// # Safety
///
/// The processor has products of matrices.
#[inline(always)]
unsafe fn smmla(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // As above.
    // SAFETY: it only reads and writes the registers that are named, and is there by the caller's word.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The codes of a panel's rows, four rows in a register.
#[inline(always)]
fn quarters(codes: &PanelCodes) -> &[[i8; BYTES]; 4] {
    bytemuck::must_cast_ref(&codes.0)
}

// Every block below is sound because a `Neon` or `NeonI8mm` exists only where `detect` found the instructions; pointers are to
// arrays as long as what is read.
impl PanelProducts for Neon {
    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }

    #[inline(always)]
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [[int32x4_t; 4]; T] {
        // SAFETY: as above.
        unsafe {
            let mut sums = [[vdupq_n_s32(0); 4]; T];
            for i in 0..Q::GROUP / AT_ONCE {
                for token in 0..T {
                    let x = vdupq_n_s32(tokens[token].four(Q::GROUP, group, i));
                    for quarter in 0..4 {
                        let codes = vld1q_s8(quarters(&codes[i])[quarter].as_ptr());
                        let sums = &mut sums[token][quarter];
                        *sums = sdot(*sums, codes, vreinterpretq_s8_s32(x));
                    }
                }
            }
            sums
        }
    }
}

impl PanelProducts for NeonI8mm {
    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }

    #[inline(always)]
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [[int32x4_t; 4]; T] {
        // SAFETY: as above.
        unsafe {
            let mut sums = [[vdupq_n_s32(0); 4]; T];
            for first in (0..T).step_by(2) {
                // Of an odd number of tokens, the last one is its own neighbour.
                let second = (first + 1).min(T - 1);
                // Two rows with two tokens: the first row with the first and second token, then the second row.
                let mut pairs = [[vdupq_n_s32(0); 2]; 4];
                for i in (0..Q::GROUP / AT_ONCE).step_by(2) {
                    let start = group * Q::GROUP + i * AT_ONCE;
                    let x = vcombine_s8(
                        vld1_s8(tokens[first].codes[start..].as_ptr()),
                        vld1_s8(tokens[second].codes[start..].as_ptr()),
                    );
                    for quarter in 0..4 {
                        let [four, next] = [0, 1].map(|at| {
                            let codes = quarters(&codes[i + at])[quarter].as_ptr();
                            vreinterpretq_s32_s8(vld1q_s8(codes))
                        });
                        let eights = [vzip1q_s32(four, next), vzip2q_s32(four, next)];
                        for pair in 0..2 {
                            let codes = vreinterpretq_s8_s32(eights[pair]);
                            pairs[quarter][pair] = smmla(pairs[quarter][pair], codes, x);
                        }
                    }
                }
                for quarter in 0..4 {
                    let [low, high] = pairs[quarter];
                    sums[second][quarter] = vuzp2q_s32(low, high);
                    sums[first][quarter] = vuzp1q_s32(low, high);
                }
            }
            sums
        }
    }
}

impl<P: PanelProducts> Reader for P {
    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
        let mut entries = [0; 16];
        // SAFETY: the processor has NEON, and arrays are as long as what is read and written.
        unsafe {
            let looked_up = vqtbl1q_s8(vld1q_s8(table.as_ptr()), vld1q_u8(indexes.as_ptr()));
            vst1q_s8(entries.as_mut_ptr(), looked_up);
        }
        entries
    }
}

impl<P: PanelProducts> Instructions for P {
    type Sums = [int32x4_t; 4];
    type Floats = [float32x4_t; 4];

    const TOKENS: usize = 4;

    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        PanelProducts::run(self, work)
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: it neither reads nor writes anything that the program sees; an address that is not valid is ignored.
        unsafe {
            asm!(
                "prfm pldl2strm, [{address}]",
                address = in(reg) address,
                options(readonly, nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    fn add_block<Q: Quantized>(self, weights: &RowBlock, x: &Block8, places: &mut Lanes) {
        let groups = x.groups(Q::GROUP);
        // SAFETY: as above.
        unsafe {
            for quarter in 0..MOST_VALUES / Q::GROUP / QUARTER {
                let mut of_groups = [vdupq_n_s32(0); QUARTER];
                for i in 0..QUARTER {
                    for part in 0..Q::GROUP / BYTES {
                        let start = (quarter * QUARTER + i) * Q::GROUP + part * BYTES;
                        let codes = vld1q_s8(weights.codes.0[start..].as_ptr());
                        let x = vld1q_s8(x.codes[start..].as_ptr());
                        of_groups[i] = sdot(of_groups[i], codes, x);
                    }
                }
                let [a, b, c, d] = of_groups;
                let sums = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
                let at = quarter * QUARTER;
                let scales = vld1q_f32(weights.scales[at..].as_ptr());
                let scaled = vmulq_f32(vcvtq_f32_s32(sums), scales);
                let x_scales = vld1q_f32(groups.scales[at..].as_ptr());
                let mut sums = vld1q_f32(places.0[at..].as_ptr());
                sums = vfmaq_f32(sums, scaled, x_scales);
                if Q::HAS_MIN {
                    let mins = vld1q_f32(weights.mins[at..].as_ptr());
                    let x_sums = vld1q_f32(groups.scaled_sums[at..].as_ptr());
                    sums = vfmsq_f32(sums, mins, x_sums);
                }
                vst1q_f32(places.0[at..].as_mut_ptr(), sums);
            }
        }
    }

    #[inline(always)]
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [[int32x4_t; 4]; T] {
        PanelProducts::panel_sums::<Q, T>(self, codes, tokens, group)
    }

    #[inline(always)]
    fn splat(self, number: f32) -> [float32x4_t; 4] {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(number); 4] }
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS]) -> [float32x4_t; 4] {
        // SAFETY: as above.
        unsafe {
            [
                vld1q_f32(numbers.as_ptr()),
                vld1q_f32(numbers[QUARTER..].as_ptr()),
                vld1q_f32(numbers[2 * QUARTER..].as_ptr()),
                vld1q_f32(numbers[3 * QUARTER..].as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn store(self, numbers: [float32x4_t; 4]) -> [f32; ROWS] {
        let mut stored = [0.0; ROWS];
        for quarter in 0..4 {
            // SAFETY: as above.
            unsafe { vst1q_f32(stored[quarter * QUARTER..].as_mut_ptr(), numbers[quarter]) };
        }
        stored
    }

    #[inline(always)]
    fn add(self, mut a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        for quarter in 0..4 {
            // SAFETY: as above.
            a[quarter] = unsafe { vaddq_f32(a[quarter], b[quarter]) };
        }
        a
    }

    #[inline(always)]
    fn add_scaled(
        self,
        mut to: [float32x4_t; 4],
        sums: [int32x4_t; 4],
        scales: [float32x4_t; 4],
        x_scales: [float32x4_t; 4],
    ) -> [float32x4_t; 4] {
        for quarter in 0..4 {
            // SAFETY: as above.
            unsafe {
                let scaled = vmulq_f32(vcvtq_f32_s32(sums[quarter]), scales[quarter]);
                to[quarter] = vfmaq_f32(to[quarter], scaled, x_scales[quarter]);
            }
        }
        to
    }

    #[inline(always)]
    fn subtract_product(
        self,
        mut from: [float32x4_t; 4],
        mins: [float32x4_t; 4],
        x_sums: [float32x4_t; 4],
    ) -> [float32x4_t; 4] {
        for quarter in 0..4 {
            // SAFETY: as above.
            from[quarter] = unsafe { vfmsq_f32(from[quarter], mins[quarter], x_sums[quarter]) };
        }
        from
    }
}

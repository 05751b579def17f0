//! Products in integers by NEON's dot products of signed numbers, on quarters of what AVX-512 computes at once.

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use super::{
    activations::Block8,
    instructions::{Instructions, PanelCodes, ROWS, RowCodes, Work},
};
use crate::quant::{MOST_VALUES, Reader};

/// The processor has NEON with dot products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neon(());

/// Numbers of 32 bits in a register.
const LANES: usize = 4;

/// Bytes in a register.
const BYTES: usize = 16;

impl Neon {
    pub fn detect() -> Option<Self> {
        is_aarch64_feature_detected!("dotprod").then_some(Self(()))
    }

    #[target_feature(enable = "neon,dotprod")]
    fn run_inside<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }
}

impl Reader for Neon {
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

// Every block below is sound because a `Neon` exists only where `detect` found the instructions; pointers are to arrays as long
// as what is read.
impl Instructions for Neon {
    type Codes = [int8x16_t; 4];
    type Sums = [int32x4_t; 4];
    type Floats = [float32x4_t; 4];

    const TOKENS: usize = 4;

    #[inline(always)]
    fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: the processor has these instructions.
        unsafe { self.run_inside(work) }
    }

    #[inline(always)]
    fn group_sums(
        self,
        group: usize,
        _signed: bool,
        codes: &RowCodes,
        x: &Block8,
    ) -> [int32x4_t; 4] {
        // SAFETY: as above.
        unsafe {
            let mut sums = [vdupq_n_s32(0); 4];
            let groups = MOST_VALUES / group;
            for four in 0..groups / 4 {
                let mut of_groups = [vdupq_n_s32(0); 4];
                for i in 0..4 {
                    for part in 0..group / BYTES {
                        let start = (four * 4 + i) * group + part * BYTES;
                        let codes = vld1q_s8(codes.0[start..].as_ptr());
                        let x = vld1q_s8(x.codes[start..].as_ptr());
                        of_groups[i] = sdot(of_groups[i], codes, x);
                    }
                }
                let [a, b, c, d] = of_groups;
                sums[four] = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
            }
            sums
        }
    }

    #[inline(always)]
    fn load_codes(self, _signed: bool, codes: &PanelCodes) -> [int8x16_t; 4] {
        let codes: &[[i8; BYTES]; 4] = bytemuck::must_cast_ref(&codes.0);
        // SAFETY: as above.
        unsafe {
            [
                vld1q_s8(codes[0].as_ptr()),
                vld1q_s8(codes[1].as_ptr()),
                vld1q_s8(codes[2].as_ptr()),
                vld1q_s8(codes[3].as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn begin(self, _signed: bool, _x_sum: i32) -> [int32x4_t; 4] {
        // SAFETY: as above.
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    fn dot(
        self,
        _signed: bool,
        mut sums: [int32x4_t; 4],
        codes: [int8x16_t; 4],
        x: i32,
    ) -> [int32x4_t; 4] {
        // SAFETY: as above.
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
            for quarter in 0..4 {
                sums[quarter] = sdot(sums[quarter], codes[quarter], x);
            }
        }
        sums
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
                vld1q_f32(numbers[LANES..].as_ptr()),
                vld1q_f32(numbers[2 * LANES..].as_ptr()),
                vld1q_f32(numbers[3 * LANES..].as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn store(self, numbers: [float32x4_t; 4]) -> [f32; ROWS] {
        let mut stored = [0.0; ROWS];
        for quarter in 0..4 {
            // SAFETY: as above.
            unsafe { vst1q_f32(stored[quarter * LANES..].as_mut_ptr(), numbers[quarter]) };
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

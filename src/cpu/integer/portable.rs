//! Products in integers without instructions of any kind in particular: what all others are held to.

use super::{
    activations::Block8,
    instructions::{AT_ONCE, Instructions, PanelCodes, ROWS, RowCodes, Work},
};
use crate::quant::{MOST_VALUES, Reader};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portable;

impl Reader for Portable {}

impl Instructions for Portable {
    type Codes = PanelCodes;
    type Sums = [i32; ROWS];
    type Floats = [f32; ROWS];

    const TOKENS: usize = 1;

    fn run<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }

    #[inline(always)]
    fn group_sums(self, group: usize, _signed: bool, codes: &RowCodes, x: &Block8) -> [i32; ROWS] {
        let mut sums = [0; ROWS];
        for i in 0..MOST_VALUES {
            sums[i / group] += i32::from(codes.0[i]) * i32::from(x.codes[i]);
        }
        sums
    }

    #[inline(always)]
    fn load_codes(self, _signed: bool, codes: &PanelCodes) -> PanelCodes {
        *codes
    }

    #[inline(always)]
    fn begin(self, _signed: bool, _x_sum: i32) -> [i32; ROWS] {
        [0; ROWS]
    }

    #[inline(always)]
    fn dot(self, _signed: bool, mut sums: [i32; ROWS], codes: PanelCodes, x: i32) -> [i32; ROWS] {
        let x = x.to_le_bytes();
        for row in 0..ROWS {
            for i in 0..AT_ONCE {
                sums[row] += i32::from(codes.0[row][i]) * i32::from(x[i] as i8);
            }
        }
        sums
    }

    #[inline(always)]
    fn splat(self, number: f32) -> [f32; ROWS] {
        [number; ROWS]
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS]) -> [f32; ROWS] {
        *numbers
    }

    #[inline(always)]
    fn store(self, numbers: [f32; ROWS]) -> [f32; ROWS] {
        numbers
    }

    #[inline(always)]
    fn add(self, mut a: [f32; ROWS], b: [f32; ROWS]) -> [f32; ROWS] {
        for i in 0..ROWS {
            a[i] += b[i];
        }
        a
    }

    #[inline(always)]
    fn add_scaled(
        self,
        to: [f32; ROWS],
        sums: [i32; ROWS],
        scales: [f32; ROWS],
        x_scales: [f32; ROWS],
    ) -> [f32; ROWS] {
        std::array::from_fn(|i| (sums[i] as f32 * scales[i]).mul_add(x_scales[i], to[i]))
    }

    #[inline(always)]
    fn subtract_product(
        self,
        from: [f32; ROWS],
        mins: [f32; ROWS],
        x_sums: [f32; ROWS],
    ) -> [f32; ROWS] {
        std::array::from_fn(|i| (-mins[i]).mul_add(x_sums[i], from[i]))
    }
}

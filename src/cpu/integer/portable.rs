//! Products in integers without instructions of any kind in particular: what all others are held to.

use super::{
    activations::Block8,
    instructions::{AT_ONCE, Instructions, PanelCodes, ROWS, Work},
    panel::RowBlock,
};
use crate::{
    cpu::simd::Lanes,
    quant::{MOST_VALUES, Quantized, Reader},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portable;

impl Reader for Portable {}

impl Instructions for Portable {
    type Sums = [i32; ROWS];
    type Floats = [f32; ROWS];

    const TOKENS: usize = 1;

    fn run<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }

    #[inline(always)]
    fn add_block<Q: Quantized>(self, weights: &RowBlock, x: &Block8, places: &mut Lanes) {
        let groups = x.groups(Q::GROUP);
        for i in 0..MOST_VALUES / Q::GROUP {
            let mut sum = 0;
            for at in i * Q::GROUP..(i + 1) * Q::GROUP {
                sum += i32::from(weights.codes.0[at]) * i32::from(x.codes[at]);
            }
            let place = &mut places.0[i];
            *place = (sum as f32 * weights.scales[i]).mul_add(groups.scales[i], *place);
            if Q::HAS_MIN {
                *place = (-weights.mins[i]).mul_add(groups.scaled_sums[i], *place);
            }
        }
    }

    #[inline(always)]
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [[i32; ROWS]; T] {
        tokens.map(|x| {
            let mut sums = [0; ROWS];
            for i in 0..Q::GROUP / AT_ONCE {
                let x = x.four(Q::GROUP, group, i).to_le_bytes();
                for row in 0..ROWS {
                    for at in 0..AT_ONCE {
                        sums[row] += i32::from(codes[i].0[row][at]) * i32::from(x[at] as i8);
                    }
                }
            }
            sums
        })
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

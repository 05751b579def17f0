//! Sixteen rows of weights, taken apart for many tokens.

use super::instructions::{AT_ONCE, PanelCodes, ROWS, RowCodes};
use crate::quant::{MOST_GROUPS, MOST_VALUES, Quantized, Reader, vectorize_inside};

/// 256 values of a row of weights. Where the row ends they are those of blocks of zeros, which activations that are zeros there,
/// too, make nothing of.
#[derive(Clone)]
pub struct RowBlock {
    pub codes: RowCodes,
    pub scales: [f32; MOST_GROUPS],
    pub mins: [f32; MOST_GROUPS],
}

impl RowBlock {
    pub const ZERO: Self = Self {
        codes: RowCodes([0; MOST_VALUES]),
        scales: [0.0; MOST_GROUPS],
        mins: [0.0; MOST_GROUPS],
    };

    /// Takes 256 values apart; `block` gives the blocks that hold them. Where groups are of 32 values, scales and minimums in the
    /// upper half stay.
    #[inline(always)]
    pub fn unpack<'a, Q: Quantized>(
        &mut self,
        reader: impl Reader,
        block: impl Fn(usize) -> &'a Q,
    ) {
        let groups = Q::BLOCK / Q::GROUP;
        for i in 0..MOST_VALUES / Q::BLOCK {
            vectorize_inside();
            block(i).unpack(
                reader,
                &mut self.codes.0[i * Q::BLOCK..][..Q::BLOCK],
                &mut self.scales[i * groups..][..groups],
                &mut self.mins[i * groups..][..groups],
            );
        }
    }
}

/// Sixteen rows, four codes of each side by side. What belongs to one place of a group among 256 values lies together, since
/// that is what is summed first.
#[derive(Default)]
pub struct Panel {
    /// (GROUP / 4, blocks of 256 values, groups of a block)
    codes: Vec<PanelCodes>,
    /// (blocks of 256 values, groups of a block), as are `mins`
    scales: Vec<[f32; ROWS]>,
    mins: Vec<[f32; ROWS]>,
    /// Of 256 values.
    blocks: usize,
}

/// A group of each row.
pub struct PanelGroup<'a> {
    pub codes: &'a [PanelCodes],
    pub scales: &'a [f32; ROWS],
    pub mins: &'a [f32; ROWS],
}

impl Panel {
    /// For rows of up to `len` values.
    pub fn new(len: usize) -> Self {
        let blocks = len.div_ceil(MOST_VALUES);
        Self {
            codes: vec![PanelCodes([[0; AT_ONCE]; ROWS]); blocks * MOST_VALUES / AT_ONCE],
            scales: vec![[0.0; ROWS]; blocks * MOST_GROUPS],
            mins: vec![[0.0; ROWS]; blocks * MOST_GROUPS],
            blocks,
        }
    }

    /// Fills it with `rows`, sixteen or fewer, each of as many blocks. What is in the place of rows that are not there is left
    /// open.
    #[inline(always)]
    pub fn fill<Q: Quantized>(
        &mut self,
        reader: impl Reader,
        rows: &[&[Q]],
        unpacked: &mut RowBlock,
    ) {
        let per_256 = MOST_VALUES / Q::BLOCK;
        self.blocks = rows[0].len().div_ceil(per_256);
        let zeros = Q::zeroed();
        for block in 0..self.blocks {
            for row in 0..rows.len() {
                let (blocks, start) = (rows[row], block * per_256);
                unpacked.unpack(reader, |i| blocks.get(start + i).unwrap_or(&zeros));
                self.put::<Q>(row, block, unpacked);
            }
        }
    }

    #[inline(always)]
    fn put<Q: Quantized>(&mut self, row: usize, block: usize, unpacked: &RowBlock) {
        let fours: &[[i8; AT_ONCE]; MOST_VALUES / AT_ONCE] =
            bytemuck::must_cast_ref(&unpacked.codes.0);
        for group in 0..MOST_VALUES / Q::GROUP {
            let place = group * self.blocks + block;
            let codes = &mut self.codes[place * (Q::GROUP / AT_ONCE)..][..Q::GROUP / AT_ONCE];
            for i in 0..Q::GROUP / AT_ONCE {
                codes[i].0[row] = fours[group * (Q::GROUP / AT_ONCE) + i];
            }
            self.scales[place][row] = unpacked.scales[group];
            if Q::HAS_MIN {
                self.mins[place][row] = unpacked.mins[group];
            }
        }
    }

    /// Blocks of 256 values.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The group of `len` values at this place of a block.
    #[inline(always)]
    pub fn group(&self, len: usize, group: usize, block: usize) -> PanelGroup<'_> {
        let place = group * self.blocks + block;
        PanelGroup {
            codes: &self.codes[place * (len / AT_ONCE)..][..len / AT_ONCE],
            scales: &self.scales[place],
            mins: &self.mins[place],
        }
    }
}

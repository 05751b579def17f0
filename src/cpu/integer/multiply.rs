//! The walk over rows of weights and tokens.

use std::ops::Range;

use super::{
    activations::{Activations8, Block8},
    instructions::{Detected, Instructions, ROWS, Work},
    panel::{Panel, RowBlock},
};
use crate::{
    cpu::simd::Lanes,
    quant::{MOST_GROUPS, MOST_VALUES, Quantized, QuantizedVisitor, TensorType},
};

/// Tokens for which rows are not brought into a panel, which costs as much as multiplying them with about as many.
const FEW: usize = 4;

/// Rows that are multiplied with one token side by side, so that one's sums are not waited for.
const SIDE_BY_SIDE: usize = 2;

/// Bytes ahead of what is read that weights are asked for: memory answers in the time that these take. Processors by themselves
/// look less far, and not beyond a page of 4 KiB.
const PREFETCHED: usize = 16384;

const CACHE_LINE: usize = 64;

/// The greatest [`Instructions::TOKENS`].
const MOST_TOKENS: usize = 8;

/// What a worker needs of memory.
pub struct IntegerScratch {
    panel: Panel,
    unpacked: RowBlock,
}

impl IntegerScratch {
    /// For rows of up to `len` values.
    pub fn new(len: usize) -> Self {
        Self {
            panel: Panel::new(len),
            unpacked: RowBlock::ZERO,
        }
    }
}

/// Multiplies the rows of weights that are `blocks` with the rows `tokens` of `x`: `results` is (rows, tokens).
///
/// # Panics
///
/// Where the weights are not quantized.
#[allow(clippy::too_many_arguments)]
pub fn multiply(
    tensor_type: TensorType,
    blocks: &[u8],
    rows: usize,
    x: &Activations8,
    tokens: Range<usize>,
    scratch: &mut IntegerScratch,
    results: &mut [f32],
) {
    let multiply = Multiply {
        blocks,
        rows,
        x,
        tokens,
        scratch,
        results,
    };
    if tensor_type
        .visit_quantized(Dispatch(x.instructions, multiply))
        .is_err()
    {
        unreachable!("{} is not quantized", tensor_type.name());
    }
}

struct Dispatch<'a>(Detected, Multiply<'a>);

impl QuantizedVisitor for Dispatch<'_> {
    type Output = ();

    fn visit<Q: Quantized>(self) {
        let Self(instructions, multiply) = self;
        instructions.run(OfFormat::<Q> {
            rows: bytemuck::cast_slice(multiply.blocks),
            multiply,
        });
    }
}

struct Multiply<'a> {
    blocks: &'a [u8],
    rows: usize,
    x: &'a Activations8,
    tokens: Range<usize>,
    scratch: &'a mut IntegerScratch,
    results: &'a mut [f32],
}

struct OfFormat<'a, Q> {
    rows: &'a [Q],
    multiply: Multiply<'a>,
}

impl<Q: Quantized> Work for OfFormat<'_, Q> {
    type Output = ();

    #[inline(always)]
    fn run<I: Instructions>(self, instructions: I) {
        let Multiply {
            rows: row_count,
            x,
            tokens,
            scratch: IntegerScratch { panel, unpacked },
            results,
            ..
        } = self.multiply;
        let row_len = self.rows.len() / row_count;
        if tokens.len() < FEW {
            for first in (0..row_count).step_by(SIDE_BY_SIDE) {
                let last = row_count - 1;
                let mut rows = [&self.rows[..0]; SIDE_BY_SIDE];
                for i in 0..SIDE_BY_SIDE {
                    rows[i] = &self.rows[last.min(first + i) * row_len..][..row_len];
                }
                for i in 0..tokens.len() {
                    let products = multiply_rows(instructions, rows, x.row(tokens.start + i));
                    for row in first..row_count.min(first + SIDE_BY_SIDE) {
                        results[i * row_count + row] = products[row - first];
                    }
                }
            }
            return;
        }
        let mut first = 0;
        while first < row_count {
            let count = ROWS.min(row_count - first);
            let mut rows = [&self.rows[..0]; ROWS];
            for row in 0..count {
                rows[row] = &self.rows[(first + row) * row_len..][..row_len];
            }
            panel.fill(instructions, &rows[..count], unpacked);
            let mut token = 0;
            while token < tokens.len() {
                let many = token + I::TOKENS <= tokens.len();
                let at = tokens.start + token;
                let mut sums = [[0.0; ROWS]; MOST_TOKENS];
                let done = match I::TOKENS {
                    8 if many => multiply_tile::<I, Q, 8>(instructions, panel, x, at, &mut sums),
                    4 if many => multiply_tile::<I, Q, 4>(instructions, panel, x, at, &mut sums),
                    _ => multiply_tile::<I, Q, 1>(instructions, panel, x, at, &mut sums),
                };
                for sums in &sums[..done] {
                    results[token * row_count + first..][..count].copy_from_slice(&sums[..count]);
                    token += 1;
                }
            }
            first += count;
        }
    }
}

/// The products of two rows and a token.
#[inline(always)]
fn multiply_rows<I: Instructions, Q: Quantized>(
    instructions: I,
    rows: [&[Q]; SIDE_BY_SIDE],
    x: &[Block8],
) -> [f32; SIDE_BY_SIDE] {
    let mut places = [Lanes::ZERO; SIDE_BY_SIDE];
    let at_once = MOST_VALUES / Q::BLOCK;
    let whole = rows[0].len() / at_once;
    for block in 0..whole {
        for row in 0..SIDE_BY_SIDE {
            let blocks = &rows[row][block * at_once..][..at_once];
            prefetch(instructions, blocks);
            add_block(instructions, |i| &blocks[i], &x[block], &mut places[row]);
        }
    }
    if Q::BLOCK < MOST_VALUES && whole < x.len() {
        let zeros = Q::zeroed();
        for row in 0..SIDE_BY_SIDE {
            let blocks = &rows[row][whole * at_once..];
            prefetch(instructions, blocks);
            let block = |i| blocks.get(i).unwrap_or(&zeros);
            add_block(instructions, block, &x[whole], &mut places[row]);
        }
    }
    let mut products = [0.0; SIDE_BY_SIDE];
    for row in 0..SIDE_BY_SIDE {
        products[row] = places[row].sum();
    }
    products
}

#[inline(always)]
fn prefetch<I: Instructions, Q: Quantized>(instructions: I, blocks: &[Q]) {
    let ahead = blocks.as_ptr().cast::<u8>().wrapping_add(PREFETCHED);
    for line in 0..size_of_val(blocks).div_ceil(CACHE_LINE) {
        instructions.prefetch(ahead.wrapping_add(line * CACHE_LINE));
    }
}

/// Adds what 256 values of a row add.
#[inline(always)]
fn add_block<'a, I: Instructions, Q: Quantized>(
    instructions: I,
    block: impl Fn(usize) -> &'a Q,
    x: &Block8,
    places: &mut Lanes,
) {
    // It never lies in memory: what is written to it are registers' contents, which are read as such.
    let mut unpacked = RowBlock::ZERO;
    unpacked.unpack(instructions, block);
    instructions.add_block::<Q>(&unpacked, x, places);
}

/// Writes the products of a panel's rows and `T` tokens from `first` on, and returns how many these are.
#[inline(always)]
fn multiply_tile<I: Instructions, Q: Quantized, const T: usize>(
    instructions: I,
    panel: &Panel,
    x: &Activations8,
    first: usize,
    results: &mut [[f32; ROWS]; MOST_TOKENS],
) -> usize {
    let mut tokens = [&x.row(first)[..panel.blocks()]; T];
    for token in 1..T {
        tokens[token] = &x.row(first + token)[..panel.blocks()];
    }
    let mut places = [[instructions.splat(0.0); MOST_GROUPS]; T];
    for group in 0..MOST_VALUES / Q::GROUP {
        let mut sums = [instructions.splat(0.0); T];
        for block in 0..panel.blocks() {
            let of_rows = panel.group(Q::GROUP, group, block);
            let scales = instructions.load(of_rows.scales);
            let mut x = [&tokens[0][block]; T];
            // Loops over tokens are so short that they are unrolled, which keeps sums in registers.
            for token in 0..T {
                x[token] = &tokens[token][block];
            }
            let products = instructions.panel_sums::<Q, T>(of_rows.codes, x, group);
            for token in 0..T {
                let x_scale = instructions.splat(x[token].groups(Q::GROUP).scales[group]);
                sums[token] =
                    instructions.add_scaled(sums[token], products[token], scales, x_scale);
            }
            if Q::HAS_MIN {
                let mins = instructions.load(of_rows.mins);
                for token in 0..T {
                    let x_sum = x[token].groups(Q::GROUP).scaled_sums[group];
                    let x_sum = instructions.splat(x_sum);
                    sums[token] = instructions.subtract_product(sums[token], mins, x_sum);
                }
            }
        }
        for token in 0..T {
            places[token][group] = sums[token];
        }
    }
    for token in 0..T {
        results[token] = instructions.store(sum_places(instructions, places[token]));
    }
    T
}

/// For each row what [`Lanes::sum`] makes of the sums of the places.
#[inline(always)]
fn sum_places<I: Instructions>(instructions: I, mut places: [I::Floats; MOST_GROUPS]) -> I::Floats {
    let mut half = MOST_GROUPS / 2;
    while half > 0 {
        for i in 0..half {
            places[i] = instructions.add(places[i], places[i + half]);
        }
        half /= 2;
    }
    places[0]
}

//! The walk over rows of weights and tokens.

use std::ops::Range;

use super::{
    activations::{Activations8, Block8},
    instructions::{AT_ONCE, Detected, Instructions, ROWS, Work},
    panel::{Panel, RowBlock},
};
use crate::{
    cpu::simd::Lanes,
    quant::{MOST_GROUPS, MOST_VALUES, Quantized, QuantizedVisitor, TensorType},
};

/// Tokens for which rows are not brought into a panel, which costs as much as multiplying them with about as many.
const FEW: usize = 4;

/// Blocks of a row that are taken apart before they are multiplied: what is read as soon as it was written, in pieces of another
/// size, would be waited for.
const AHEAD: usize = 8;

/// Bytes ahead of what is read that weights are asked for: memory answers in the time that these take, and processors do not
/// look beyond the page of 4 KiB by themselves.
const PREFETCHED: usize = 4096;

const CACHE_LINE: usize = 64;

/// The greatest [`Instructions::TOKENS`].
const MOST_TOKENS: usize = 8;

/// What a worker needs of memory.
pub struct IntegerScratch {
    panel: Panel,
    unpacked: [RowBlock; AHEAD],
}

impl IntegerScratch {
    /// For rows of up to `len` values.
    pub fn new(len: usize) -> Self {
        Self {
            panel: Panel::new(len),
            unpacked: [const { RowBlock::ZERO }; AHEAD],
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
            // A format with smaller groups may have left its scales.
            unpacked.fill(RowBlock::ZERO);
            for row in 0..row_count {
                let blocks = &self.rows[row * row_len..][..row_len];
                for i in 0..tokens.len() {
                    let x = x.row(tokens.start + i);
                    results[i * row_count + row] = multiply_row(instructions, blocks, x, unpacked);
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
            panel.fill(instructions, &rows[..count], &mut unpacked[0]);
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

/// The product of a row and a token.
#[inline(always)]
fn multiply_row<I: Instructions, Q: Quantized>(
    instructions: I,
    row: &[Q],
    x: &[Block8],
    unpacked: &mut [RowBlock; AHEAD],
) -> f32 {
    let mut sums = instructions.splat(0.0);
    let mut first = 0;
    while first < x.len() {
        let x = &x[first..x.len().min(first + AHEAD)];
        for i in 0..x.len() {
            let start = (first + i) * (MOST_VALUES / Q::BLOCK);
            let end = row.len().min(start + MOST_VALUES / Q::BLOCK);
            let ahead = row[start..].as_ptr().cast::<u8>().wrapping_add(PREFETCHED);
            for line in 0..(MOST_VALUES / Q::BLOCK * size_of::<Q>()).div_ceil(CACHE_LINE) {
                instructions.prefetch(ahead.wrapping_add(line * CACHE_LINE));
            }
            unpacked[i].unpack(instructions, &row[start..end]);
        }
        for i in 0..x.len() {
            let (unpacked, groups) = (&unpacked[i], x[i].groups(Q::GROUP));
            let products = instructions.group_sums(Q::GROUP, Q::SIGNED, &unpacked.codes, &x[i]);
            let scales = instructions.load(&unpacked.scales);
            let x_scales = instructions.load(&groups.scales);
            sums = instructions.add_scaled(sums, products, scales, x_scales);
            if Q::HAS_MIN {
                let mins = instructions.load(&unpacked.mins);
                let x_sums = instructions.load(&groups.scaled_sums);
                sums = instructions.subtract_product(sums, mins, x_sums);
            }
        }
        first += x.len();
    }
    Lanes(instructions.store(sums)).sum()
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
            // Loops over tokens are so short that they are unrolled, which keeps sums in registers.
            let mut products = [instructions.begin(false, 0); T];
            for token in 0..T {
                let x_sum = tokens[token][block].groups(Q::GROUP).sums[group];
                products[token] = instructions.begin(Q::SIGNED, x_sum);
            }
            for i in 0..Q::GROUP / AT_ONCE {
                let codes = instructions.load_codes(Q::SIGNED, &of_rows.codes[i]);
                for token in 0..T {
                    let x = tokens[token][block].four(group * (Q::GROUP / AT_ONCE) + i);
                    products[token] = instructions.dot(Q::SIGNED, products[token], codes, x);
                }
            }
            for token in 0..T {
                let x_scale = tokens[token][block].groups(Q::GROUP).scales[group];
                let x_scale = instructions.splat(x_scale);
                sums[token] =
                    instructions.add_scaled(sums[token], products[token], scales, x_scale);
            }
            if Q::HAS_MIN {
                let mins = instructions.load(of_rows.mins);
                for token in 0..T {
                    let x_sum = tokens[token][block].groups(Q::GROUP).scaled_sums[group];
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

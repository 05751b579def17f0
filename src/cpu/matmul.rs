//! Products of weight matrices and activations.
//!
//! Weights stay as they lie in the file. Those that are multiplied in float32 a worker reads a few rows at a time into a panel
//! that fits the first-level cache, and multiplies the panel with every token of the chunk; `integer` has the others. A result
//! is summed in the same order whatever the number of tokens and workers.

use std::ops::Range;

use super::{
    Workers, elementwise,
    integer::{self, Activations8, IntegerScratch},
    simd::{LANES, Lanes, Matrix, vectorized},
    workers::SharedMatrix,
};
use crate::{
    model::{Tensor, decoder::Activation},
    quant::{Block, TensorType, Visitor},
};

/// Rows that a worker takes at a time.
const TASK_ROWS: usize = 32;
/// Rows of a panel, multiplied with a token at once: their sums take half the registers of AVX2.
const PANEL_ROWS: usize = 4;
/// Values of a panel's row: whole blocks of every format. The panel takes 16 KiB.
const PANEL_LEN: usize = 1024;
const PANEL_LANES: usize = PANEL_LEN / LANES;

type PanelRow = [Lanes; PANEL_LANES];

/// What a product needs of a worker's memory.
pub struct MatmulScratch {
    kernels: KernelScratch,
    /// (TASK_ROWS, tokens), for each of two matrices
    results: [Vec<f32>; 2],
}

struct KernelScratch {
    /// (PANEL_LEN, PANEL_ROWS): dequantized weights
    panel: Vec<PanelRow>,
    /// (PANEL_ROWS, tokens): partial sums
    sums: Vec<Lanes>,
    integer: IntegerScratch,
}

impl MatmulScratch {
    /// For chunks of up to `tokens` tokens, and rows of up to `longest_row` values that are multiplied in integers.
    pub fn new(tokens: usize, longest_row: usize) -> Self {
        Self {
            kernels: KernelScratch {
                panel: vec![[Lanes::ZERO; PANEL_LANES]; PANEL_ROWS],
                sums: vec![Lanes::ZERO; PANEL_ROWS * tokens],
                integer: IntegerScratch::new(longest_row),
            },
            results: std::array::from_fn(|_| vec![0.0; TASK_ROWS * tokens]),
        }
    }
}

/// A matrix and where its results go.
pub struct Product<'a> {
    /// (row_len, rows)
    pub weights: &'a Tensor,
    /// (rows, tokens)
    pub out: SharedMatrix<'a>,
    /// The row of `out` that belongs to the first token.
    pub first_row: usize,
}

/// What matrices are multiplied with.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// (row_len, tokens)
    pub exact: &'a Matrix,
    /// The same, for matrices that are quantized; `None`: these take `exact`, too.
    pub in_8_bits: Option<&'a Activations8>,
    /// Rows that count.
    pub tokens: &'a Range<usize>,
}

/// Multiplies the matrices, of one row_len, with `x`, and calls `store` with every place of their outputs and its result.
pub fn matmul(
    workers: &Workers,
    products: &[Product],
    x: Input,
    store: impl Fn(&mut f32, f32) + Sync,
) {
    let tasks: Vec<_> = products
        .iter()
        .flat_map(|product| row_tasks(product.weights).map(move |rows| (product, rows)))
        .collect();
    workers.run(tasks.len(), |task, scratch| {
        let (product, rows) = &tasks[task];
        let MatmulScratch {
            kernels,
            results: [results, _],
        } = &mut scratch.matmul;
        let results = &mut results[..rows.len() * x.tokens.len()];
        multiply_rows(product.weights, rows, x, kernels, results);
        // SAFETY: no other task has these rows of this matrix.
        unsafe { write(&product.out, product.first_row, rows, results, &store) };
    });
}

/// `out = activation(gate x) * (up x)` for `gate` and `up` of one shape (row_len, rows).
pub fn matmul_gated(
    workers: &Workers,
    activation: Activation,
    [gate, up]: [&Tensor; 2],
    x: Input,
    out: &mut Matrix,
) {
    let out = out.share();
    let tasks: Vec<_> = row_tasks(gate).collect();
    workers.run(tasks.len(), |task, scratch| {
        let rows = &tasks[task];
        let MatmulScratch { kernels, results } = &mut scratch.matmul;
        let [gated, upped] = results
            .each_mut()
            .map(|results| &mut results[..rows.len() * x.tokens.len()]);
        multiply_rows(gate, rows, x, kernels, gated);
        multiply_rows(up, rows, x, kernels, upped);
        elementwise::gate(activation, gated, upped);
        // SAFETY: no other task has these rows.
        unsafe { write(&out, x.tokens.start, rows, gated, |out, value| *out = value) };
    });
}

/// The rows of `matrix` in portions for one worker.
fn row_tasks(matrix: &Tensor) -> impl Iterator<Item = Range<usize>> {
    let rows = matrix.rows();
    (0..rows)
        .step_by(TASK_ROWS)
        .map(move |start| start..rows.min(start + TASK_ROWS))
}

/// Stores `results` (rows, tokens) at `rows` of every token, the first of which has row `first_row` of `out`.
///
/// # Safety
///
/// No other thread may use these rows of `out` meanwhile.
unsafe fn write(
    out: &SharedMatrix,
    first_row: usize,
    rows: &Range<usize>,
    results: &[f32],
    store: impl Fn(&mut f32, f32),
) {
    for (token, results) in results.chunks_exact(rows.len()).enumerate() {
        // SAFETY: the caller answers for these rows.
        let places = unsafe { out.part(first_row + token, rows.clone()) };
        for (place, result) in places.iter_mut().zip(results) {
            store(place, *result);
        }
    }
}

/// Multiplies some rows of `matrix` with `x`: `results` is (rows, tokens).
fn multiply_rows(
    matrix: &Tensor,
    rows: &Range<usize>,
    x: Input,
    kernels: &mut KernelScratch,
    results: &mut [f32],
) {
    let row_bytes = matrix.row_bytes();
    let blocks = &matrix.bytes()[rows.start * row_bytes..rows.end * row_bytes];
    let (tensor_type, tokens) = (matrix.tensor_type(), x.tokens);
    if let Some(x) = x.in_8_bits.filter(|_| !tensor_type.is_float()) {
        let scratch = &mut kernels.integer;
        integer::multiply(
            tensor_type,
            blocks,
            rows.len(),
            x,
            tokens.clone(),
            scratch,
            results,
        );
        return;
    }
    let KernelScratch { panel, sums, .. } = kernels;
    multiply(
        tensor_type,
        blocks,
        rows.len(),
        x.exact,
        tokens.start,
        tokens.len(),
        panel,
        sums,
        results,
    );
}

vectorized! {
    /// The kernel behind [`multiply_rows`], on the rows' own bytes.
    fn multiply(
        tensor_type: TensorType,
        blocks: &[u8],
        rows: usize,
        x: &Matrix,
        first_token: usize,
        tokens: usize,
        panel: &mut [PanelRow],
        sums: &mut [Lanes],
        results: &mut [f32],
    ) {
        tensor_type.visit(Multiply { blocks, rows, x, first_token, tokens, panel, sums, results });
    }
}

struct Multiply<'a> {
    blocks: &'a [u8],
    rows: usize,
    x: &'a Matrix,
    first_token: usize,
    tokens: usize,
    panel: &'a mut [PanelRow],
    sums: &'a mut [Lanes],
    results: &'a mut [f32],
}

impl Visitor for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn visit<B: Block>(self) {
        let blocks: &[B] = bytemuck::cast_slice(self.blocks);
        let row_blocks = blocks.len() / self.rows;
        // Plain loops: calls into iterators are not always inlined, and then compiled without wide vectors.
        let mut first_row = 0;
        while first_row < self.rows {
            let rows = PANEL_ROWS.min(self.rows - first_row);
            let sums = &mut self.sums[..rows * self.tokens];
            sums.fill(Lanes::ZERO);
            let mut start = 0;
            while start < row_blocks {
                let end = row_blocks.min(start + PANEL_LEN / B::LEN);
                let values = (end - start) * B::LEN;
                let lanes = values.div_ceil(LANES);
                for row in 0..rows {
                    let blocks = &blocks[(first_row + row) * row_blocks..][start..end];
                    let panel: &mut [f32] = bytemuck::cast_slice_mut(&mut self.panel[row]);
                    B::dequantize(blocks, &mut panel[..values]);
                    panel[values..lanes * LANES].fill(0.0);
                }
                for token in 0..self.tokens {
                    let x = self.x.row_lanes(self.first_token + token);
                    multiply_panel(
                        &self.panel[..rows],
                        &x[start * B::LEN / LANES..][..lanes],
                        &mut sums[token * rows..][..rows],
                    );
                }
                start = end;
            }
            for token in 0..self.tokens {
                for row in 0..rows {
                    self.results[token * self.rows + first_row + row] =
                        sums[token * rows + row].sum();
                }
            }
            first_row += rows;
        }
    }
}

/// Adds the products of each of the panel's rows with `x` to the row's sums.
#[inline(always)]
fn multiply_panel(panel: &[PanelRow], x: &[Lanes], sums: &mut [Lanes]) {
    if let Ok(sums) = <&mut [Lanes; PANEL_ROWS]>::try_from(&mut *sums) {
        multiply_tile(panel, x, sums);
    } else {
        for (sum, row) in sums.iter_mut().zip(panel) {
            multiply_tile(std::slice::from_ref(row), x, std::array::from_mut(sum));
        }
    }
}

/// The micro-kernel: `R` rows with one token, their sums in registers.
#[inline(always)]
fn multiply_tile<const R: usize>(rows: &[PanelRow], x: &[Lanes], sums: &mut [Lanes; R]) {
    let rows: &[PanelRow; R] = rows.try_into().expect("a row for each sum");
    let mut registers = *sums;
    // A range whose end says that no index is out of bounds.
    for i in 0..x.len().min(PANEL_LANES) {
        let x = x[i];
        for row in 0..R {
            registers[row].add_product(&rows[row][i], &x);
        }
    }
    *sums = registers;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::{assert_same_bits, noise};

    #[test]
    fn the_vector_width_changes_no_bit() {
        const ROWS: usize = 7;
        const LEN: usize = 1280;
        for &tensor_type in TensorType::ALL {
            let bytes = ROWS * LEN / tensor_type.block_len() * tensor_type.block_bytes();
            // Without the exponents of infinities, NaN and numbers whose products overflow.
            let blocks: Vec<u8> = (0..bytes as u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 0xbb)
                .collect();
            for tokens in [1, 3] {
                let mut x = Matrix::zeros(LEN, tokens).unwrap();
                for token in 0..tokens {
                    x.row_mut(token).copy_from_slice(&noise(LEN));
                }
                assert_same_bits(tensor_type.name(), || {
                    let KernelScratch {
                        mut panel,
                        mut sums,
                        ..
                    } = MatmulScratch::new(tokens, 0).kernels;
                    let mut results = vec![0.0; ROWS * tokens];
                    multiply(
                        tensor_type,
                        &blocks,
                        ROWS,
                        &x,
                        0,
                        tokens,
                        &mut panel,
                        &mut sums,
                        &mut results,
                    );
                    assert!(results.iter().all(|result| result.is_finite()));
                    results
                });
            }
        }
    }
}

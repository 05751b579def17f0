//! Sums of products, as many side by side as registers hold: each has an order of its own, whatever is beside it.

use std::ops::Range;

use super::simd::{Lanes, VectorInstructions, vectorized};

/// Rows, and columns, that are multiplied at once.
const AT_ONCE: usize = 4;

/// Rows that sums are made of, [`Columns`] beside them.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    pub numbers: &'a [f32],
    /// Numbers between the starts of two rows.
    pub row_len: usize,
    /// Numbers of a row that count.
    pub len: usize,
}

/// Columns of lanes, one for each number of a row.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    pub lanes: &'a [Lanes],
    pub count: usize,
    /// Lanes between the starts of two columns.
    pub spacing: usize,
    /// Lanes between two of a column.
    pub step: usize,
}

vectorized! {
    /// Adds to each of `sums` the products of its row and its column, in their order: (columns, rows), whose rows begin
    /// `row_lanes` apart. They begin `anew` with zero, or go on with what they are.
    pub fn add_products(factors: Factors, columns: Columns, sums: &mut [Lanes], row_lanes: usize, anew: bool) {
        let in_registers = VectorInstructions::available().sums_in_registers();
        let rows = sums.len().div_ceil(row_lanes);
        let mut start = 0;
        while start < columns.count {
            // What lies in these columns stays in the nearest cache until all rows had it.
            let range = start..columns.count.min(start + AT_ONCE);
            let mut row = 0;
            while row < rows {
                let sums = &mut sums[row * row_lanes..];
                let factors = Factors { numbers: &factors.numbers[row * factors.row_len..], ..factors };
                match rows - row {
                    1 => add_rows::<1>(factors, columns, range.clone(), sums, row_lanes, anew, in_registers),
                    2 => add_rows::<2>(factors, columns, range.clone(), sums, row_lanes, anew, in_registers),
                    3 => add_rows::<3>(factors, columns, range.clone(), sums, row_lanes, anew, in_registers),
                    _ => add_rows::<AT_ONCE>(factors, columns, range.clone(), sums, row_lanes, anew, in_registers),
                }
                row += AT_ONCE;
            }
            start = range.end;
        }
    }
}

/// [`add_products`] for `R` rows and the columns in `range`, as many at once as there are registers for their sums.
#[inline(always)]
fn add_rows<const R: usize>(
    factors: Factors,
    columns: Columns,
    range: Range<usize>,
    sums: &mut [Lanes],
    row_lanes: usize,
    anew: bool,
    in_registers: usize,
) {
    let mut column = range.start;
    while column < range.end {
        let left = range.end - column;
        let lanes = &columns.lanes[column * columns.spacing..];
        let columns = Columns { lanes, ..columns };
        let sums = &mut sums[column..];
        if left >= AT_ONCE && R * AT_ONCE <= in_registers {
            add_at_once::<R, AT_ONCE>(factors, columns, sums, row_lanes, anew);
            column += AT_ONCE;
        } else if left >= 2 && R * 2 <= in_registers {
            add_at_once::<R, 2>(factors, columns, sums, row_lanes, anew);
            column += 2;
        } else {
            add_at_once::<R, 1>(factors, columns, sums, row_lanes, anew);
            column += 1;
        }
    }
}

/// The micro-kernel: `R` rows with the first `C` columns, their sums in registers.
#[inline(always)]
fn add_at_once<const R: usize, const C: usize>(
    factors: Factors,
    columns: Columns,
    sums: &mut [Lanes],
    row_lanes: usize,
    anew: bool,
) {
    // Plain loops: what makes arrays of closures is not always inlined.
    let mut rows = [factors.numbers; R];
    let mut registers = [[Lanes::ZERO; C]; R];
    for (row, numbers) in rows.iter_mut().enumerate() {
        *numbers = &numbers[row * factors.row_len..][..factors.len];
    }
    for (row, registers) in registers.iter_mut().enumerate() {
        let sums = &sums[row * row_lanes..][..C];
        for (register, sum) in registers.iter_mut().zip(sums) {
            if !anew {
                *register = *sum;
            }
        }
    }
    for i in 0..factors.len {
        let mut lanes = [Lanes::ZERO; C];
        for (column, lanes) in lanes.iter_mut().enumerate() {
            *lanes = columns.lanes[i * columns.step + column * columns.spacing];
        }
        for (registers, factors) in registers.iter_mut().zip(rows) {
            let factor = factors[i];
            for (sum, lanes) in registers.iter_mut().zip(&lanes) {
                sum.add_scaled(factor, lanes);
            }
        }
    }
    for (row, registers) in registers.iter().enumerate() {
        let sums = &mut sums[row * row_lanes..][..C];
        for (sum, register) in sums.iter_mut().zip(registers) {
            *sum = *register;
        }
    }
}

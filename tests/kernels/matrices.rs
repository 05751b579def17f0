//! Random matrices of every type on the device, and their exact products.

use anyhow::Result;
use rayon::prelude::*;
use sharpi::{
    cuda::{Matrix, UNIT, launches},
    model::decoder::Activation,
    quant::TensorType::{self, *},
};

use crate::{
    common::gguf_writer::{Format, Random},
    harness::{Buffer, activate, device, run},
};

pub const TYPES: [TensorType; 19] = [
    Q4_K, Q6_K, Q5_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q3_K, Q2_K, IQ4_NL, IQ4_XS, MXFP4, IQ3_S,
    IQ3_XXS, IQ2_S, F16, BF16, F32,
];

/// Rows and columns of matrices; columns are rounded up to the type's blocks. The longest rows are the longest that the
/// kernels take; 2,080 values end in a slice of half a unit, 2,560 in a quarter of a slice.
pub const SHAPES: [(usize, usize); 10] = [
    (1, 4864),
    (7, 576),
    (33, 1536),
    (577, 896),
    (2, 256),
    (577, 512),
    (130, 2080),
    (3001, 2560),
    (9, 12_288),
    (3, 28_672),
];

/// A random matrix on the device, and the values that its blocks stand for.
pub struct Weights {
    pub matrix: Matrix,
    pub tensor_type: TensorType,
    pub values: Vec<f32>,
    _memory: Buffer,
}

impl Weights {
    /// Columns are rounded up to whole blocks. Every block has a scale of its own.
    pub fn new(
        random: &mut Random,
        tensor_type: TensorType,
        (rows, columns): (usize, usize),
    ) -> Result<Self> {
        let Format {
            block_len,
            block_bytes,
            ..
        } = Format::of(tensor_type);
        let columns = columns.next_multiple_of(block_len);
        let std = (columns as f32).sqrt().recip();
        let piece = block_len.max(32);
        let bytes: Vec<u8> = (0..rows * columns / piece)
            .flat_map(|_| {
                let std = std * (0.5 + random.below(1000) as f32 / 1000.0);
                random.blocks(tensor_type, piece, std)
            })
            .collect();
        let mut values = vec![0.0; rows * columns];
        tensor_type.dequantize(&bytes, &mut values);

        let file = Buffer::new(&bytes)?;
        let memory = Buffer::zeroed(device_bytes(tensor_type, rows, columns))?;
        let matrix = Matrix {
            address: memory.address(),
            tensor_type,
            rows,
            columns,
            bytes: bytes.len(),
        };
        let row_bytes = columns / block_len * block_bytes;
        // Pieces of an odd count of rows, the last first: any order will do.
        const PIECE: usize = 101;
        for begin in (0..rows).step_by(PIECE).rev() {
            let input = file.address() + (begin * row_bytes) as u64;
            let piece = begin..rows.min(begin + PIECE);
            let launch = launches::repack(device()?, input, piece, matrix)?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
        }
        // The guard.
        memory.read::<u8>()?;
        Ok(Self {
            matrix,
            tensor_type,
            values,
            _memory: memory,
        })
    }

    /// W a of each row.
    pub fn times(&self, a: &[f64]) -> Vec<Sum> {
        let rows = self.values.par_chunks_exact(self.matrix.columns);
        rows.map(|row| Sum::of(row, a)).collect()
    }

    pub fn shape(&self) -> String {
        let Matrix { rows, columns, .. } = self.matrix;
        format!("{} {rows} x {columns}", self.tensor_type.name())
    }
}

/// Bytes of two units of 64 values in the kernels' layout (kernels/README.md); none for float types.
pub fn two_unit_bytes(tensor_type: TensorType) -> Option<usize> {
    match tensor_type {
        Q4_0 | Q4_K | IQ4_NL => Some(72),
        Q4_1 => Some(80),
        Q5_0 | Q5_K => Some(88),
        Q5_1 => Some(96),
        Q8_0 => Some(136),
        Q6_K => Some(105),
        Q3_K => Some(56),
        Q2_K => Some(42),
        IQ4_XS | MXFP4 | IQ3_S | IQ3_XXS => Some(68),
        IQ2_S => Some(53),
        _ => None,
    }
}

pub fn device_bytes(tensor_type: TensorType, rows: usize, columns: usize) -> usize {
    let Some(two_units) = two_unit_bytes(tensor_type) else {
        return rows * (columns * tensor_type.block_bytes()).next_multiple_of(16);
    };
    let units = columns.div_ceil(UNIT);
    let tile = |units: usize| (units * two_units).next_multiple_of(16);
    rows.div_ceil(2) * (units / 32 * tile(32) + tile(units % 32))
}

/// A value, and the square that it would have on average if the signs of its terms were random: what its error is measured
/// against, since a sum may be small by chance.
#[derive(Clone, Copy)]
pub struct Sum {
    pub value: f64,
    pub spread: f64,
}

impl Sum {
    pub fn of(row: &[f32], a: &[f64]) -> Self {
        let (mut value, mut spread) = (0.0, 0.0);
        for (&w, a) in row.iter().zip(a) {
            let term = f64::from(w) * a;
            value += term;
            spread += term * term;
        }
        Self { value, spread }
    }

    /// `factor * self + offset`
    pub fn affine(self, factor: f64, offset: f64) -> Self {
        Self {
            value: self.value * factor + offset,
            spread: self.spread * factor * factor,
        }
    }

    /// `activation(gate) * up`; the spread is what the two's errors make of it.
    pub fn gated(activation: Activation, gate: Self, up: Self) -> Self {
        let factor = activate(activation, gate.value);
        Self {
            value: factor * up.value,
            spread: up.value.powi(2) * gate.spread + factor.powi(2) * up.spread,
        }
    }
}

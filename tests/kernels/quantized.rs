//! Quantized vectors that GEMVs read and write.

use anyhow::Result;
use sharpi::{
    cuda::{UNIT, launches::Normed, params::Activation},
    quant::TensorType,
};

use crate::{
    common::gguf_writer::Random,
    harness::{Buffer, EPSILON, Findings, floats, norm_weights, squares_by_group, sum_of_squares},
    matrices::{Sum, Weights, two_unit_bytes},
};

/// A quantized vector that a GEMV reads, `x * norm weights`.
pub struct Input {
    quantized: Buffer,
    scale: Buffer,
    value: Buffer,
    squares: Buffer,
    /// What float weights meet.
    exact: Vec<f64>,
    /// What quantized weights meet.
    rounded: Vec<f64>,
    /// Of x.
    rms: f64,
}

impl Input {
    pub fn new(random: &mut Random, columns: usize) -> Result<Self> {
        let x = floats(random, columns, 1.5);
        let norm = norm_weights(random, columns);
        let mut value: Vec<f32> = x.iter().zip(&norm).map(|(x, w)| x * w).collect();
        let exact = value.iter().map(|&v| f64::from(v)).collect();
        value.resize(columns.next_multiple_of(UNIT), 0.0);
        let (mut quantized, mut scale) = (Vec::new(), Vec::new());
        for group in value.chunks(32) {
            let largest = group.iter().fold(0.0, |l: f32, v| l.max(v.abs()));
            let per_value = 127.0 / largest.max(1e-30);
            scale.push(largest / 127.0);
            quantized.extend(
                group
                    .iter()
                    .map(|v| (v * per_value).round_ties_even() as i8),
            );
        }
        let rounded = quantized
            .iter()
            .zip(scale.iter().flat_map(|s| [s; 32]))
            .map(|(&q, &s)| f64::from(q) * f64::from(s))
            .take(columns)
            .collect();
        let squares: Vec<f32> = squares_by_group(&x).iter().map(|&s| s as f32).collect();
        Ok(Self {
            quantized: Buffer::new(&quantized)?,
            scale: Buffer::new(&scale)?,
            value: Buffer::new(&value)?,
            squares: Buffer::new(&squares)?,
            exact,
            rounded,
            rms: (sum_of_squares(&x) / columns as f64 + f64::from(EPSILON)).sqrt(),
        })
    }

    pub fn activation(&self) -> Activation {
        Activation {
            q: self.quantized.address(),
            scale: self.scale.address(),
            value: self.value.address(),
        }
    }

    pub fn normed(&self) -> Normed {
        Normed {
            activation: self.activation(),
            squares: self.squares.address(),
        }
    }

    /// As weights of this type meet it.
    pub fn met_by(&self, tensor_type: TensorType) -> &[f64] {
        match two_unit_bytes(tensor_type) {
            None => &self.exact,
            Some(_) => &self.rounded,
        }
    }

    /// W rms_norm(x)
    pub fn product(&self, weights: &Weights) -> Vec<Sum> {
        let sums = weights.times(self.met_by(weights.tensor_type));
        let divided = sums.into_iter().map(|sum| sum.affine(1.0 / self.rms, 0.0));
        divided.collect()
    }
}

/// A quantized vector that a kernel writes, and the sums of squares beside it.
pub struct Output {
    quantized: Buffer,
    scale: Buffer,
    value: Buffer,
    squares: Buffer,
    len: usize,
}

impl Output {
    /// Zero past the vector's groups, as a GEMV expects it.
    pub fn new(len: usize) -> Result<Self> {
        let groups = len.div_ceil(32);
        let padded = (groups * 32).next_multiple_of(UNIT);
        let buffer = |poisoned: usize, bytes: usize| {
            let mut initial = vec![0xffu8; bytes];
            initial[poisoned..].fill(0);
            Buffer::new(&initial)
        };
        Ok(Self {
            quantized: buffer(groups * 32, padded)?,
            scale: buffer(groups * 4, padded / 32 * 4)?,
            value: buffer(groups * 32 * 4, padded * 4)?,
            squares: Buffer::poisoned(groups * 4)?,
            len,
        })
    }

    pub fn normed(&self) -> Normed {
        Normed {
            activation: Activation {
                q: self.quantized.address(),
                scale: self.scale.address(),
                value: self.value.address(),
            },
            squares: self.squares.address(),
        }
    }

    /// The values, with which the integers and scales must agree, and past which there must be zeros.
    pub fn read(&self, findings: &mut Findings, case: &str) -> Result<Vec<f32>> {
        let mut value: Vec<f32> = self.value.read()?;
        let quantized: Vec<i8> = self.quantized.read()?;
        let scale: Vec<f32> = self.scale.read()?;
        for (g, &scale) in scale.iter().enumerate() {
            let range = g * 32..g * 32 + 32;
            let group = &value[range.clone()];
            let largest = group.iter().fold(0.0, |l: f32, v| l.max(v.abs()));
            let right_scale = f64::from(scale - largest / 127.0).abs() <= 1e-6 * f64::from(scale);
            let right_integers = group.iter().zip(&quantized[range]).all(|(&v, &q)| {
                let exact = f64::from(v) * 127.0 / f64::from(largest.max(1e-30));
                (exact - f64::from(q)).abs() <= 0.5 + 1e-4
            });
            findings.holds(right_scale && right_integers, || {
                format!("{case}: group {g} is not its values quantized")
            });
        }
        let past = &value[self.len..];
        findings.holds(past.iter().all(|&v| v == 0.0), || {
            format!("{case}: values past the vector's end")
        });
        value.truncate(self.len);
        Ok(value)
    }

    pub fn check_squares(&self, findings: &mut Findings, case: &str, x: &[f32]) -> Result<()> {
        let squares: Vec<f32> = self.squares.read()?;
        findings.relative(
            "sums of squares",
            case,
            &squares_by_group(x),
            squares.into_iter().map(f64::from),
            1e-6,
        );
        Ok(())
    }

    pub fn bits(&self) -> Result<[Vec<u8>; 3]> {
        Ok([
            self.quantized.read()?,
            self.scale.read()?,
            self.value.read()?,
        ])
    }
}

/// `values = x * norm`
pub fn check_normed(findings: &mut Findings, case: &str, values: &[f32], x: &[f32], norm: &[f32]) {
    let pairs = x.iter().zip(norm);
    let reference: Vec<f64> = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).collect();
    let ours = values.iter().map(|&v| f64::from(v));
    findings.relative("values times the norm", case, &reference, ours, 1e-6);
}

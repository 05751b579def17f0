//! Products of quantized weights and activations of 8 bits, in integers.
//!
//! A row of weights and a token's activations are taken 256 values at a time, in groups of 16 or 32 as the weights' format has
//! them. The sum of a group's products is an exact integer; scaled, it is added to one of sixteen partial sums, that of the
//! group's place among the 256 values, and at the end of a row the partial sums are added up as [`Lanes::sum`] does. So every
//! instruction set, and every number of tokens that are computed at once, gives the same bits.
//!
//! [`multiply`](multiply::multiply) walks over rows and tokens; what it takes of an instruction set is [`Instructions`], of
//! which each has a file of its own.
//!
//! [`Lanes::sum`]: super::simd::Lanes::sum

// Calls into iterators are not always inlined, and then compiled without wide vectors.
#![allow(clippy::needless_range_loop)]

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod instructions;
mod multiply;
#[cfg(target_arch = "aarch64")]
mod neon;
mod panel;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::Activations8;
pub use instructions::Detected;
pub use multiply::{IntegerScratch, multiply};

#[cfg(test)]
mod tests {
    use super::{
        activations::{Activations8, Block8},
        instructions::Detected,
        multiply::{IntegerScratch, multiply},
    };
    use crate::{
        cpu::{
            simd::{Matrix, tests::noise},
            workers::Workers,
        },
        quant::TensorType,
    };

    const ROWS: usize = 21;
    const TOKENS: usize = 11;

    /// Blocks without the exponents of infinities, NaN and numbers whose products overflow.
    fn blocks(tensor_type: TensorType, values: usize) -> Vec<u8> {
        let bytes = values / tensor_type.block_len() * tensor_type.block_bytes();
        (0..bytes as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 0xbb)
            .collect()
    }

    fn activations(instructions: Detected, len: usize) -> (Matrix, Activations8) {
        let mut x = Matrix::zeros(len, TOKENS).unwrap();
        let noise = noise(len * TOKENS);
        for (token, noise) in noise.chunks_exact(len).enumerate() {
            x.row_mut(token).copy_from_slice(noise);
        }
        let mut in_8_bits = Activations8::new(instructions, len, TOKENS).unwrap();
        let workers = Workers::new(2, || Ok(())).unwrap();
        in_8_bits.quantize(&workers, &x, 0..TOKENS);
        (x, in_8_bits)
    }

    fn products(
        tensor_type: TensorType,
        blocks: &[u8],
        x: &Activations8,
        tokens: usize,
        len: usize,
    ) -> Vec<f32> {
        let mut results = vec![f32::NAN; ROWS * tokens];
        let scratch = &mut IntegerScratch::new(len);
        multiply(
            tensor_type,
            blocks,
            ROWS,
            x,
            0..tokens,
            scratch,
            &mut results,
        );
        results
    }

    fn quantized() -> impl Iterator<Item = TensorType> {
        TensorType::ALL
            .iter()
            .copied()
            .filter(|tensor_type| !tensor_type.is_float())
    }

    /// A row that is no whole number of 256 values, where the format allows it, and one that is.
    fn lengths(tensor_type: TensorType) -> [usize; 2] {
        [1280, 1024 + tensor_type.block_len()]
    }

    #[test]
    fn every_instruction_set_and_number_of_tokens_gives_the_same_bits() {
        let instructions: Vec<_> = Detected::all().collect();
        for tensor_type in quantized() {
            for len in lengths(tensor_type) {
                let blocks = blocks(tensor_type, ROWS * len);
                let mut expected: Option<Vec<u32>> = None;
                for &instructions in &instructions {
                    let (_, x) = activations(instructions, len);
                    for tokens in [1, 3, TOKENS] {
                        let bits = products(tensor_type, &blocks, &x, tokens, len);
                        let bits: Vec<_> = bits.into_iter().map(f32::to_bits).collect();
                        let name = (tensor_type.name(), instructions.name(), tokens);
                        let expected = expected.get_or_insert_with(|| {
                            let (_, x) = activations(instructions, len);
                            let all = products(tensor_type, &blocks, &x, TOKENS, len);
                            all.into_iter().map(f32::to_bits).collect()
                        });
                        assert_eq!(bits[..], expected[..ROWS * tokens], "{name:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_float64() {
        for tensor_type in quantized() {
            for len in lengths(tensor_type) {
                let blocks = blocks(tensor_type, ROWS * len);
                let mut weights = vec![0.0; ROWS * len];
                tensor_type.dequantize(&blocks, &mut weights);
                let (_, x) = activations(Detected::best(), len);
                let results = products(tensor_type, &blocks, &x, TOKENS, len);
                for token in 0..TOKENS {
                    let x: Vec<f64> = x.row(token).iter().flat_map(Block8::values).collect();
                    for row in 0..ROWS {
                        let terms = weights[row * len..][..len].iter().zip(&x);
                        let terms: Vec<f64> = terms.map(|(w, x)| f64::from(*w) * x).collect();
                        let (sum, size) = terms.iter().fold((0.0, 0.0), |(sum, size), term| {
                            (sum + term, size + term.abs())
                        });
                        let result = f64::from(results[token * ROWS + row]);
                        assert!(
                            (result - sum).abs() <= 1e-6 * size,
                            "{}: {result} for {sum}",
                            tensor_type.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn activations_are_rounded_to_the_nearest_of_255_steps() {
        let (x, in_8_bits) = activations(Detected::best(), 1000);
        for token in 0..TOKENS {
            let values = in_8_bits.row(token).iter().flat_map(Block8::values);
            let values: Vec<f64> = values.collect();
            for (group, values) in x.row(token).chunks(32).zip(values.chunks(32)) {
                let greatest = group
                    .iter()
                    .fold(0.0, |greatest: f32, x| greatest.max(x.abs()));
                for (x, value) in group.iter().zip(values) {
                    let error = (f64::from(*x) - value).abs();
                    assert!(
                        error <= f64::from(greatest) / 127.0 * 0.500_01,
                        "{value} for {x}"
                    );
                }
            }
        }
    }
}

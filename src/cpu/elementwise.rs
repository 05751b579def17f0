//! Element-wise operations on one token's activations.

use super::simd::{LANES, Lanes, vectorized};
use crate::{math::exp, model::decoder::Activation};

vectorized! {
    /// `out = x / sqrt(mean(x²) + epsilon) * weight`, all of one length.
    pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let scale = rms_scale(x, epsilon);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }

    /// [`rms_norm`] with `x` as its own output.
    pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
        let scale = rms_scale(x, epsilon);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }

    /// `gate = silu(gate) * up`
    fn swiglu(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }

    /// `gate = gelu(gate) * up`: half of `1 + tanh(y)` is `1 / (1 + exp(-2y))`.
    fn geglu(gate: &mut [f32], up: &[f32]) {
        /// `2 sqrt(2 / pi)`
        const FACTOR: f32 = 1.595_769;
        for (gate, up) in gate.iter_mut().zip(up) {
            let y = *gate * (1.0 + 0.044_715 * *gate * *gate);
            *gate = *gate / (1.0 + exp(-FACTOR * y)) * up;
        }
    }

    /// `x = cap * tanh(x / cap)`
    pub fn softcap(x: &mut [f32], cap: f32) {
        for x in x {
            *x = cap * tanh(*x / cap);
        }
    }
}

/// `gate = activation(gate) * up`
pub fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => swiglu(gate, up),
        Activation::GeluTanh => geglu(gate, up),
    }
}

/// To 2e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

#[inline(always)]
fn rms_scale(x: &[f32], epsilon: f32) -> f32 {
    let mut squares = Lanes::ZERO;
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        squares.add_product(&Lanes(*chunk), &Lanes(*chunk));
    }
    for (square, x) in squares.0.iter_mut().zip(rest) {
        *square += x * x;
    }
    1.0 / (squares.sum() / x.len() as f32 + epsilon).sqrt()
}

/// `x += bias`.
pub fn add(x: &mut [f32], bias: &[f32]) {
    for (x, bias) in x.iter_mut().zip(bias) {
        *x += bias;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::{assert_same_bits, noise};

    #[test]
    fn the_vector_width_changes_no_bit() {
        let (x, weight) = (noise(203), noise(406).split_off(203));
        assert_same_bits("rms_norm", || {
            let mut out = vec![0.0; x.len()];
            rms_norm(&x, &weight, 1e-6, &mut out);
            out
        });
        assert_same_bits("rms_norm_in_place", || {
            let mut out = x.clone();
            rms_norm_in_place(&mut out, &weight, 1e-6);
            out
        });
        for activation in [Activation::Silu, Activation::GeluTanh] {
            assert_same_bits(&format!("{activation:?}"), || {
                let mut out = x.clone();
                gate(activation, &mut out, &weight);
                out
            });
        }
        assert_same_bits("softcap", || {
            let mut out = x.clone();
            softcap(&mut out, 0.5);
            out
        });
    }

    #[test]
    fn activations_are_their_formulas() {
        let xs: Vec<f32> = (-1000..=1000).map(|i| i as f32 / 50.0).collect();
        let ones = vec![1.0; xs.len()];
        let (mut gelu, mut capped) = (xs.clone(), xs.clone());
        gate(Activation::GeluTanh, &mut gelu, &ones);
        softcap(&mut capped, 3.0);
        for (i, &x) in xs.iter().enumerate() {
            let x = f64::from(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            let expected = x / 2.0 * (1.0 + inner.tanh());
            assert!((f64::from(gelu[i]) - expected).abs() < 2e-6, "gelu({x})");
            let expected = 3.0 * (x / 3.0).tanh();
            assert!(
                (f64::from(capped[i]) - expected).abs() < 1e-6,
                "softcap({x})"
            );
        }
    }
}

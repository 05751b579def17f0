//! Element-wise operations on one token's activations.

use super::simd::{LANES, Lanes, vectorized};
use crate::math::exp;

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

    /// `gate = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
    pub fn swiglu(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }
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
        assert_same_bits("swiglu", || {
            let mut out = x.clone();
            swiglu(&mut out, &weight);
            out
        });
    }
}

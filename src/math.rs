//! Functions whose bits must not depend on the machine, and whose loops must vectorize.

/// `e^x` to 2 units in the last place, 0 below -87 and infinite above 88. Only additions and products, so that loops
/// over it vectorize and every machine gives the same bits: `2^n * e^r` with `x = n ln 2 + r`, `|r| <= ln 2 / 2`, and
/// the Taylor polynomial of degree 7, whose remainder `r^8 / 8!` is below 6e-9.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding and subtracting this rounds to an integer: the last mantissa bit of numbers around it is worth 1.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    /// `ln 2` in two parts, the first short enough for exact products with `n`.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut power = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        power = power * r + coefficient;
    }
    // The integer n stands in the low bits of `rounded`; what is above them is shifted out.
    let two_to_n = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let value = power * two_to_n;
    if x < -87.0 {
        0.0
    } else if x > 88.0 {
        f32::INFINITY
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let (value, expected) = (exp(x), f64::from(x).exp());
            let unit = f64::from((expected as f32).next_up() - expected as f32);
            assert!(
                (f64::from(value) - expected).abs() <= 2.0 * unit,
                "exp({x}) = {value} for {expected}"
            );
        }
    }

    #[test]
    fn exp_keeps_its_limits() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}

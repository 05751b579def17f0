//! What a compressed KV cache keeps of the keys or values of 128 tokens: numbers of a few bits, and for each group of them a
//! scale and a zero, so that `code * scale + zero` is the number. `docs/kv-cache.md` has the format.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// Tokens of a tile.
pub const TILE: usize = 128;

/// Tokens of a tile whose keys share, in each channel, a scale and a zero.
pub const KEY_GROUP: usize = 64;

/// Codes that lie in bytes of their own, two for each bit of a code: the first in the lowest bits.
pub const CODES: usize = 16;

/// As many codes as fill a byte for each of their bits, so that those of up to 8 bits are whole bytes of one word.
const WORD_CODES: usize = 8;

/// What the codes of a group stand for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Group {
    pub scale: f16,
    pub zero: f16,
}

impl Group {
    /// The least number becomes code 0, the greatest the greatest code.
    pub fn of(numbers: impl Iterator<Item = f32>, bits: usize) -> Self {
        let ends = (f32::INFINITY, f32::NEG_INFINITY);
        let (least, greatest) =
            numbers.fold(ends, |(least, greatest), x| (least.min(x), greatest.max(x)));
        Self {
            scale: f16::from_f32((greatest - least) / greatest_code(bits)),
            zero: f16::from_f32(least),
        }
    }

    /// The code that is nearest to a number.
    pub fn code(&self, number: f32, bits: usize) -> u8 {
        let scale = self.scale.to_f32();
        if scale == 0.0 {
            return 0;
        }
        let code = ((number - self.zero.to_f32()) / scale).round_ties_even();
        code.clamp(0.0, greatest_code(bits)) as u8
    }

    /// What a code stands for.
    pub fn number(&self, code: f32) -> f32 {
        code * self.scale.to_f32() + self.zero.to_f32()
    }
}

fn greatest_code(bits: usize) -> f32 {
    ((1 << bits) - 1) as f32
}

/// Bytes of [`CODES`] codes.
pub const fn packed_len(bits: usize) -> usize {
    CODES / WORD_CODES * bits
}

/// Packs codes into [`packed_len`] bytes.
pub fn pack(codes: [u8; CODES], bits: usize, bytes: &mut [u8]) {
    let words = codes.chunks_exact(WORD_CODES);
    for (codes, bytes) in words.zip(bytes.chunks_exact_mut(bits)) {
        let codes = codes.iter().rev();
        let word = codes.fold(0, |word, &code| word << bits | u64::from(code));
        bytes.copy_from_slice(&word.to_le_bytes()[..bits]);
    }
}

/// The codes of [`packed_len`] bytes, as numbers.
#[inline(always)]
pub fn unpack<const BITS: usize>(bytes: &[u8]) -> [f32; CODES] {
    let words: [u64; CODES / WORD_CODES] = std::array::from_fn(|i| {
        let mut word = [0; 8];
        word[..BITS].copy_from_slice(&bytes[BITS * i..][..BITS]);
        u64::from_le_bytes(word)
    });
    std::array::from_fn(|i| {
        let word = words[i / WORD_CODES] >> (BITS * (i % WORD_CODES));
        (word as u32 & ((1 << BITS) - 1)) as f32
    })
}

/// Rotates the numbers of a head by a Hadamard transform that is its own inverse: in blocks of the greatest power of two that
/// divides their count, `y[i] = sum over j of (-1)^popcount(i & j) x[j] / sqrt(block)`.
pub fn rotate(head: &mut [f32]) {
    let block = 1 << head.len().trailing_zeros();
    let scale = 1.0 / (block as f32).sqrt();
    for block in head.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block.len() {
            for pair in block.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        block.iter_mut().for_each(|x| *x *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back() {
        for bits in [3, 4, 8] {
            let codes: [u8; CODES] = std::array::from_fn(|i| (i * 247 % (1 << bits)) as u8);
            let mut bytes = [0xff; CODES];
            pack(codes, bits, &mut bytes[..packed_len(bits)]);
            let unpacked = match bits {
                3 => unpack::<3>(&bytes),
                4 => unpack::<4>(&bytes),
                _ => unpack::<8>(&bytes),
            };
            assert_eq!(unpacked, codes.map(f32::from));
        }
    }

    #[test]
    fn a_code_is_at_most_half_a_step_away() {
        let numbers: Vec<f32> = (0..100)
            .map(|i| ((i * 37) % 100) as f32 / 7.0 - 3.0)
            .collect();
        for bits in [3, 4, 8] {
            let group = Group::of(numbers.iter().copied(), bits);
            let (scale, zero) = (group.scale.to_f32(), group.zero.to_f32());
            // Scale and zero are rounded to 11 bits.
            let bound = scale * 0.5 + greatest_code(bits) * scale / 2048.0 + 3.0 / 2048.0;
            for &number in &numbers {
                let near = f32::from(group.code(number, bits)) * scale + zero;
                assert!((near - number).abs() <= bound, "{number} became {near}");
            }
        }
        let same = Group::of([2.5; 4].into_iter(), 4);
        assert_eq!((same.code(2.5, 4), same.zero.to_f32()), (0, 2.5));
    }

    #[test]
    fn rotating_twice_gives_the_head_back() {
        for len in [8, 40, 64, 96, 128] {
            let head: Vec<f32> = (0..len).map(|i| ((i * 31) % 17) as f32 - 8.0).collect();
            let mut rotated = head.clone();
            rotate(&mut rotated);
            let squares = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
            assert!((squares(&rotated) / squares(&head) - 1.0).abs() < 1e-5);
            rotate(&mut rotated);
            for (a, b) in head.iter().zip(&rotated) {
                assert!((a - b).abs() < 1e-5);
            }
        }
        // Sylvester's order: the second row alternates.
        let mut second = [0.0, 1.0, 0.0, 0.0];
        rotate(&mut second);
        assert_eq!(second, [0.5, -0.5, 0.5, -0.5]);
    }
}

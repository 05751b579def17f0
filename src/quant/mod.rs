//! The ggml tensor formats: how many bytes a block of values takes and how to read it back.
//!
//! Each format is a `#[repr(C)]` struct with the bytes of a block as they lie in a file and one implementation
//! of [`Quantized`], or of [`Block`] where values stand on their own; the table at the end of this file names them all.
//! Layouts and formulas are those of ggml's `ggml-common.h` and `ggml-quants.c`. [`kv_tile`] has what a compressed KV cache
//! holds instead.

// Calls into iterators are not always inlined, and then compiled without wide vectors.
#![allow(clippy::needless_range_loop)]

mod blocks32;
mod codebook_points;
mod codebooks;
mod float;
mod k_quants;
pub mod kv_tile;
mod tables;
mod ternary;

use bytemuck::Pod;

pub use float::F16;

/// One block of a format, as it lies in a file. Alignment 1, so that blocks can be read at any offset.
pub trait Block: Pod {
    /// Values in a block.
    const LEN: usize;

    /// Writes the values of `blocks` to `out`, `blocks.len() * LEN` long. The arithmetic is ggml's, operation by operation, so
    /// that values agree with every other reader of the format to the bit. Always inlined, so that it is compiled for the
    /// vector width of its caller.
    fn dequantize(blocks: &[Self], out: &mut [f32]);
}

/// Values of the largest block, and a multiple of those of all others.
pub const MOST_VALUES: usize = 256;

/// Groups of the smallest size in as many values.
pub const MOST_GROUPS: usize = 16;

/// A block of small integers, by groups that share a scale, and in some formats a minimum.
pub trait Quantized: Pod {
    /// Values in a block.
    const BLOCK: usize;
    /// Values that share a scale: 16 or 32.
    const GROUP: usize;
    /// Whether codes can be negative.
    const SIGNED: bool;
    /// Whether groups have a minimum. Others' `mins` are left as they are.
    const HAS_MIN: bool;

    /// Takes the block apart: value `i` is `scales[i / GROUP] * codes[i] - mins[i / GROUP]`. There are `BLOCK` codes, and as
    /// many scales and minimums as there are groups.
    fn unpack<R: Reader>(&self, reader: R, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]);
}

/// What blocks are taken apart with: some instruction sets have instructions for it.
pub trait Reader: Copy {
    #[inline(always)]
    fn to_f32(self, half: F16) -> f32 {
        half.to_f32()
    }

    /// Eight bytes for each of `bits`: 1 where the bit is 1, the lowest first, and 0 where it is 0.
    #[inline(always)]
    fn ones(self, bits: [u8; 4]) -> [u64; 4] {
        bits.map(ones)
    }

    /// The entries of a table at `indexes`, each below 16.
    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indexes: [u8; 16]) -> [i8; 16] {
        tables::look_up(table, indexes)
    }
}

/// Without instructions of any kind in particular.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlainReader;

impl Reader for PlainReader {}

impl<Q: Quantized> Block for Q {
    const LEN: usize = Q::BLOCK;

    #[inline(always)]
    fn dequantize(blocks: &[Self], out: &mut [f32]) {
        assert_eq!(out.len(), blocks.len() * Q::BLOCK);
        let mut codes = [0; MOST_VALUES];
        let mut scales = [0.0; MOST_GROUPS];
        let mut mins = [0.0; MOST_GROUPS];
        let (at_once, groups) = (MOST_VALUES / Q::BLOCK, Q::BLOCK / Q::GROUP);
        let mut first = 0;
        while first < blocks.len() {
            let blocks = &blocks[first..blocks.len().min(first + at_once)];
            // All before the first is read: what was just written, in pieces of another size, would be waited for.
            for i in 0..blocks.len() {
                blocks[i].unpack(
                    PlainReader,
                    &mut codes[i * Q::BLOCK..][..Q::BLOCK],
                    &mut scales[i * groups..][..groups],
                    &mut mins[i * groups..][..groups],
                );
            }
            for group in 0..blocks.len() * groups {
                vectorize_inside();
                let out = &mut out[first * Q::BLOCK + group * Q::GROUP..][..Q::GROUP];
                let codes = &codes[group * Q::GROUP..][..Q::GROUP];
                let (scale, min) = (scales[group], mins[group]);
                for i in 0..Q::GROUP {
                    let value = scale * f32::from(codes[i]);
                    out[i] = if Q::HAS_MIN { value - min } else { value };
                }
            }
            first += blocks.len();
        }
    }
}

/// Called in a loop around a short loop over values that lie together. LLVM would otherwise unroll the inner loop, or both, and
/// vectorize across the outer one, gathering single values from many places: up to ten times slower.
#[inline(always)]
pub(crate) fn vectorize_inside() {
    std::hint::black_box(());
}

/// As many bytes as make `N` words, in which they are computed eight at a time.
#[inline(always)]
fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    bytemuck::pod_read_unaligned(&bytes[..8 * N])
}

/// A word of eight times the same byte.
const fn eight(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// [`Reader::ones`] of eight bits.
#[inline(always)]
fn ones(bits: u8) -> u64 {
    // Each byte keeps one bit of its own, which the sum carries to the byte's highest place.
    let own = eight(bits) & u64::from_ne_bytes([1, 2, 4, 8, 16, 32, 64, 128]);
    (own + eight(127)) >> 7 & eight(1)
}

/// Writes codes, which are `bytes` below 128 less `offset`.
#[inline(always)]
fn put<const N: usize>(bytes: [u64; N], offset: u8, codes: &mut [i8]) {
    let mut words = bytes;
    if offset > 0 {
        // The highest bit of each byte keeps differences from reaching into the next.
        for word in &mut words {
            *word = (*word + eight(128 - offset)) ^ eight(128);
        }
    }
    codes[..8 * N].copy_from_slice(bytemuck::must_cast_slice(&words));
}

/// The numbers of four bits that lie two to a byte, the first in the low half.
#[inline(always)]
fn nibble(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 2] >> (index % 2 * 4) & 15
}

/// Work that is generic over a format, for [`TensorType::visit`].
pub trait Visitor {
    type Output;

    fn visit<B: Block>(self) -> Self::Output;
}

/// Work that is generic over a quantized format, for [`TensorType::visit_quantized`].
pub trait QuantizedVisitor {
    type Output;

    fn visit<Q: Quantized>(self) -> Self::Output;
}

macro_rules! tensor_types {
    (
        values of their own: { $($float:ident = $float_id:literal, $float_block:ty;)* }
        quantized: { $($quantized:ident = $quantized_id:literal, $quantized_block:ty;)* }
    ) => {
        tensor_types! {
            $($float = $float_id, $float_block;)*
            $($quantized = $quantized_id, $quantized_block;)*
        }

        impl TensorType {
            /// Runs `visitor` with this type's block, or hands it back where values stand on their own.
            #[inline(always)]
            pub fn visit_quantized<V: QuantizedVisitor>(self, visitor: V) -> Result<V::Output, V> {
                match self {
                    $(Self::$quantized => Ok(visitor.visit::<$quantized_block>()),)*
                    $(Self::$float => Err(visitor),)*
                }
            }
        }
    };
    ($($name:ident = $id:literal, $block:ty;)*) => {
        /// The format of a tensor's values.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types)]
        pub enum TensorType {
            $($name,)*
        }

        impl TensorType {
            /// Every supported type.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The type with this id in a GGUF file, or `None` where it is not supported.
            pub fn from_ggml_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The name that ggml uses, such as `Q4_K`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// Values in one block.
            pub fn block_len(self) -> usize {
                match self {
                    $(Self::$name => <$block>::LEN,)*
                }
            }

            /// Bytes of one block.
            pub fn block_bytes(self) -> usize {
                match self {
                    $(Self::$name => size_of::<$block>(),)*
                }
            }

            /// Runs `visitor` with this type's block.
            #[inline(always)]
            pub fn visit<V: Visitor>(self, visitor: V) -> V::Output {
                match self {
                    $(Self::$name => visitor.visit::<$block>(),)*
                }
            }
        }
    };
}

// Name, id in a GGUF file (`enum ggml_type`), block.
tensor_types! {
    values of their own: {
        F32 = 0, float::F32;
        F16 = 1, float::F16;
        BF16 = 30, float::BF16;
    }
    quantized: {
        Q4_0 = 2, blocks32::Q4_0;
        Q4_1 = 3, blocks32::Q4_1;
        Q5_0 = 6, blocks32::Q5_0;
        Q5_1 = 7, blocks32::Q5_1;
        Q8_0 = 8, blocks32::Q8_0;
        Q2_K = 10, k_quants::Q2_K;
        Q3_K = 11, k_quants::Q3_K;
        Q4_K = 12, k_quants::Q4_K;
        Q5_K = 13, k_quants::Q5_K;
        Q6_K = 14, k_quants::Q6_K;
        IQ4_NL = 20, tables::IQ4_NL;
        IQ4_XS = 23, tables::IQ4_XS;
        MXFP4 = 39, tables::MXFP4;
        IQ3_S = 21, codebooks::IQ3_S;
        IQ3_XXS = 18, codebooks::IQ3_XXS;
        IQ2_S = 22, codebooks::IQ2_S;
        IQ2_XS = 17, codebooks::IQ2_XS;
        IQ2_XXS = 16, codebooks::IQ2_XXS;
        IQ1_M = 29, codebooks::IQ1_M;
        IQ1_S = 19, codebooks::IQ1_S;
        TQ2_0 = 35, ternary::TQ2_0;
        TQ1_0 = 34, ternary::TQ1_0;
    }
}

impl TensorType {
    /// Whether values are numbers of their own: F32, F16 and BF16.
    pub fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// Writes the values of `blocks` (whole blocks) to `out`, `blocks.len() / block_bytes() * block_len()` long.
    ///
    /// # Panics
    ///
    /// Where the two lengths disagree.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        struct Dequantize<'a>(&'a [u8], &'a mut [f32]);

        impl Visitor for Dequantize<'_> {
            type Output = ();

            fn visit<B: Block>(self) {
                B::dequantize(bytemuck::cast_slice(self.0), self.1);
            }
        }

        self.visit(Dequantize(blocks, out));
    }
}

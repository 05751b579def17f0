//! Vector arithmetic that gives the same bits on every machine and for every vector width.
//!
//! Kernels are plain Rust over [`Lanes`], sixteen numbers that are computed side by side; sums run in sixteen
//! partial sums, reduced in a fixed order. Products and sums round on their own (rustc fuses nothing), so a wider
//! register changes the speed and nothing else. [`vectorized!`] compiles a kernel for several widths and picks one
//! when it is called.

use bytemuck::{Pod, Zeroable};

use super::workers::SharedMatrix;
use crate::quant::vectorize_inside;

/// Numbers in a [`Lanes`].
pub const LANES: usize = 16;

/// Sixteen numbers on a cache line of their own.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Lanes(pub [f32; LANES]);

impl Lanes {
    pub const ZERO: Self = Self([0.0; LANES]);

    /// `self += a * b`, each lane on its own.
    #[inline(always)]
    pub fn add_product(&mut self, a: &Self, b: &Self) {
        vectorize_inside();
        for i in 0..LANES {
            self.0[i] += a.0[i] * b.0[i];
        }
    }

    /// `self += a * b` with one `a` for all lanes.
    #[inline(always)]
    pub fn add_scaled(&mut self, a: f32, b: &Self) {
        vectorize_inside();
        for i in 0..LANES {
            self.0[i] += a * b.0[i];
        }
    }

    /// The sum over the lanes, halves first.
    #[inline(always)]
    pub fn sum(mut self) -> f32 {
        vectorize_inside();
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                self.0[i] += self.0[i + half];
            }
            half /= 2;
        }
        self.0[0]
    }

    /// The greater of `self` and `other`, each lane on its own.
    #[inline(always)]
    pub fn keep_greater(&mut self, other: &Self) {
        vectorize_inside();
        for i in 0..LANES {
            self.0[i] = self.0[i].max(other.0[i]);
        }
    }
}

/// Zeros that start on a cache line. The system's own zeroed pages, taken up only when they are written.
pub struct Buffer {
    /// A few more numbers than asked for, from the first of which on a cache line the buffer begins.
    numbers: Vec<f32>,
    lanes: usize,
}

impl Buffer {
    /// `None` where there is no memory for it.
    pub fn zeros(lanes: usize) -> Option<Self> {
        let len = lanes.checked_add(1)?.checked_mul(LANES)?;
        let numbers = bytemuck::try_zeroed_vec(len).ok()?;
        Some(Self { numbers, lanes })
    }

    pub fn lanes(&self) -> &[Lanes] {
        &bytemuck::pod_align_to(&self.numbers).1[..self.lanes]
    }

    pub fn lanes_mut(&mut self) -> &mut [Lanes] {
        &mut bytemuck::pod_align_to_mut(&mut self.numbers).1[..self.lanes]
    }
}

/// Rows of numbers, each padded with zeros to whole [`Lanes`].
pub struct Matrix {
    buffer: Buffer,
    /// Numbers in a row.
    len: usize,
}

impl Matrix {
    /// `None` where there is no memory for it.
    pub fn zeros(len: usize, rows: usize) -> Option<Self> {
        let buffer = Buffer::zeros(len.div_ceil(LANES).checked_mul(rows)?)?;
        Some(Self { buffer, len })
    }

    /// Numbers between the starts of two rows.
    fn stride(&self) -> usize {
        self.len.div_ceil(LANES) * LANES
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &bytemuck::cast_slice(self.row_lanes(row))[..self.len]
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let (start, len) = (row * self.stride(), self.len);
        &mut self.numbers_mut()[start..start + len]
    }

    /// The row with its padding.
    pub fn row_lanes(&self, row: usize) -> &[Lanes] {
        let stride = self.len.div_ceil(LANES);
        &self.buffer.lanes()[row * stride..][..stride]
    }

    /// The matrix for several workers to write to.
    pub fn share(&mut self) -> SharedMatrix<'_> {
        let stride = self.stride();
        SharedMatrix::new(self.numbers_mut(), stride)
    }

    /// All rows with their padding.
    fn numbers_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.buffer.lanes_mut())
    }
}

/// Defines functions that are compiled for AVX-512, AVX2 and the target's baseline, each the same Rust; which one
/// runs is found out at run time.
macro_rules! vectorized {
    ($($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name($($argument: $type),*) {
            #[inline(always)]
            fn baseline($($argument: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($argument: $type),*) {
                    baseline($($argument),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) {
                    baseline($($argument),*)
                }

                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has every feature that the function is compiled for.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    return unsafe { avx2($($argument),*) };
                }
            }
            baseline($($argument),*)
        }
    )*};
}

pub(super) use vectorized;

/// The vector instructions that `vectorized!` picks here.
pub fn vector_instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx512 {
            return "AVX-512";
        }
        if is_x86_feature_detected!("avx2") {
            return "AVX2";
        }
        "SSE2"
    }
    #[cfg(not(target_arch = "x86_64"))]
    "the baseline vector instructions"
}

//! Vector arithmetic that gives the same bits on every machine and for every vector width.
//!
//! Kernels are plain Rust over [`Lanes`], sixteen numbers that are computed side by side; sums run in sixteen
//! partial sums, reduced in a fixed order. Products and sums round on their own (rustc fuses nothing), so a wider
//! register changes the speed and nothing else. [`vectorized!`] compiles a kernel for several widths and picks one
//! when it is called.

use std::ops::Range;

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

    /// The greatest of the lanes.
    #[inline(always)]
    pub fn max(mut self) -> f32 {
        vectorize_inside();
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                self.0[i] = self.0[i].max(self.0[i + half]);
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
#[derive(Default)]
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

    #[inline(always)]
    pub fn lanes(&self) -> &[Lanes] {
        &bytemuck::pod_align_to(&self.numbers).1[..self.lanes]
    }

    pub fn lanes_mut(&mut self) -> &mut [Lanes] {
        &mut bytemuck::pod_align_to_mut(&mut self.numbers).1[..self.lanes]
    }
}

/// Rows of numbers, each padded with zeros to whole [`Lanes`].
#[derive(Default)]
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

    /// Numbers in a row.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Makes rows `len` long, no longer than they were made. Numbers of `rows` are kept where they had that length, and
    /// their padding is zeros.
    pub fn reshape(&mut self, len: usize, rows: Range<usize>) {
        self.len = len;
        if !len.is_multiple_of(LANES) {
            let stride = self.stride();
            for row in rows {
                self.numbers_mut()[row * stride + len..(row + 1) * stride].fill(0.0);
            }
        }
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
    #[inline(always)]
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
    ($($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $output:ty)? $body:block)*) => {$(
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name($($argument: $type),*) $(-> $output)? {
            #[inline(always)]
            fn baseline($($argument: $type),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($argument: $type),*) $(-> $output)? {
                    baseline($($argument),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $output)? {
                    baseline($($argument),*)
                }

                use $crate::cpu::simd::VectorInstructions;

                match VectorInstructions::available() {
                    // SAFETY: the processor has every feature that the function is compiled for.
                    VectorInstructions::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: the processor has AVX2.
                    VectorInstructions::Avx2 => return unsafe { avx2($($argument),*) },
                    VectorInstructions::Baseline => {}
                }
            }
            baseline($($argument),*)
        }
    )*};
}

pub(super) use vectorized;

/// What [`vectorized!`] compiles for, the narrowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum VectorInstructions {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl VectorInstructions {
    /// The widest that this processor has.
    #[inline]
    fn detected() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// What kernels run on.
    #[inline]
    pub fn available() -> Self {
        #[cfg(test)]
        return Self::detected().min(tests::LIMIT.get());
        #[cfg(not(test))]
        Self::detected()
    }

    /// Of [`Lanes`], as many sums as registers hold beside what is added to them.
    #[inline]
    pub fn sums_in_registers(self) -> usize {
        match self {
            Self::Baseline => 4,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 4,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline vector instructions",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::cell::Cell;

    use super::VectorInstructions;

    thread_local! {
        /// Kernels that this thread calls use no wider instructions than these.
        pub static LIMIT: Cell<VectorInstructions> = Cell::new(VectorInstructions::detected());
    }

    /// Asserts that `compute` gives the same bits with all the instructions that this processor has.
    #[track_caller]
    pub fn assert_same_bits(name: &str, compute: impl Fn() -> Vec<f32>) {
        let bits = |limit: VectorInstructions| {
            LIMIT.set(limit);
            let bits: Vec<u32> = compute().into_iter().map(f32::to_bits).collect();
            LIMIT.set(VectorInstructions::detected());
            bits
        };
        let baseline = bits(VectorInstructions::Baseline);
        #[cfg(target_arch = "x86_64")]
        for wider in [VectorInstructions::Avx2, VectorInstructions::Avx512] {
            assert!(bits(wider) == baseline, "{name}: {wider:?}");
        }
        assert!(!baseline.is_empty());
    }

    /// Numbers from -1 to 1 without a pattern.
    pub fn noise(len: usize) -> Vec<f32> {
        (0..len as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
            .collect()
    }
}

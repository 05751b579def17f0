//! What products in integers take of an instruction set, and which one this processor has.

#[cfg(target_arch = "aarch64")]
use super::neon::{Neon, NeonI8mm};
use super::{activations::Block8, panel::RowBlock, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::{
    avx2::{Avx2, AvxVnni},
    avx512::Avx512Vnni,
};
use crate::{
    cpu::simd::Lanes,
    quant::{MOST_VALUES, Quantized, Reader},
};

/// Rows of a panel, and lanes of [`Instructions::Sums`].
pub const ROWS: usize = 16;

/// Codes that one lane of a dot product takes.
pub const AT_ONCE: usize = 4;

/// 256 codes of a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct RowCodes(pub [i8; MOST_VALUES]);

/// Four codes of each of a panel's rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct PanelCodes(pub [[i8; AT_ONCE]; ROWS]);

/// An instruction set. A value of such a type exists only where the processor has it. `Q` is the format of the weights; codes of
/// activations are from -127 to 127.
pub trait Instructions: Reader {
    /// Sixteen integers.
    type Sums: Copy;
    /// Sixteen numbers.
    type Floats: Copy;

    /// Tokens whose sums, beside a panel's codes, fit into the registers.
    const TOKENS: usize;

    /// Calls `work` where the compiler may use these instructions.
    fn run<W: Work>(self, work: W) -> W::Output;

    /// Asks for the cache line at an address, which need not be valid, into the second-level cache: the first can wait for too
    /// few at a time to keep memory busy.
    fn prefetch(self, _address: *const u8) {}

    /// Adds to the sum at each group's place what the group adds, as [`Self::add_scaled`] does, and [`Self::subtract_product`]
    /// where there are minimums. The places behind the last group are for smaller ones.
    fn add_block<Q: Quantized>(self, weights: &RowBlock, x: &Block8, places: &mut Lanes);

    /// The sums of the products of a group of a panel, whose rows have the codes `codes`, and that of each token: the one with
    /// the number `group`.
    fn panel_sums<Q: Quantized, const T: usize>(
        self,
        codes: &[PanelCodes],
        tokens: [&Block8; T],
        group: usize,
    ) -> [Self::Sums; T];

    fn splat(self, number: f32) -> Self::Floats;

    fn load(self, numbers: &[f32; ROWS]) -> Self::Floats;

    fn store(self, numbers: Self::Floats) -> [f32; ROWS];

    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// `to + (sums * scales) * x_scales`, the second product and the sum rounded once.
    fn add_scaled(
        self,
        to: Self::Floats,
        sums: Self::Sums,
        scales: Self::Floats,
        x_scales: Self::Floats,
    ) -> Self::Floats;

    /// `from - mins * x_sums`, rounded once.
    fn subtract_product(
        self,
        from: Self::Floats,
        mins: Self::Floats,
        x_sums: Self::Floats,
    ) -> Self::Floats;
}

/// Work that is generic over an instruction set.
pub trait Work {
    type Output;

    /// Always inlined, so that it is compiled for the instruction set.
    fn run<I: Instructions>(self, instructions: I) -> Self::Output;
}

/// The instruction set that this processor computes products in integers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detected {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    NeonI8mm(NeonI8mm),
}

impl Detected {
    /// All that this processor has, the fastest first.
    pub fn all() -> impl Iterator<Item = Self> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            Avx512Vnni::detect().map(Self::Avx512Vnni),
            #[cfg(target_arch = "x86_64")]
            AvxVnni::detect().map(Self::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "aarch64")]
            NeonI8mm::detect().map(Self::NeonI8mm),
            #[cfg(target_arch = "aarch64")]
            Neon::detect().map(Self::Neon),
            Some(Self::Portable(Portable)),
        ];
        all.into_iter().flatten()
    }

    /// The fastest.
    pub fn best() -> Self {
        Self::all().next().expect("the portable one is everywhere")
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(_) => "AVX-VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "AVX-512 VNNI",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "NEON dot products",
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(_) => "NEON products of matrices",
        }
    }

    #[inline(always)]
    pub fn run<W: Work>(self, work: W) -> W::Output {
        match self {
            Self::Portable(instructions) => instructions.run(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(instructions) => instructions.run(work),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(instructions) => instructions.run(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(instructions) => instructions.run(work),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(instructions) => instructions.run(work),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(instructions) => instructions.run(work),
        }
    }
}

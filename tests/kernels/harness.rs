//! What every test takes: random numbers, what it found, memory with a guard behind it, and a kernel's run.

use std::{
    collections::BTreeMap,
    env,
    f64::consts::PI,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, Result, ensure};
use bytemuck::{AnyBitPattern, NoUninit};
use half::f16;
use sharpi::{
    cuda::{
        Device,
        device::{DeviceBuffer, Launch},
    },
    model::decoder::Activation,
};

use crate::{
    common::{
        gguf_writer::Random,
        gpu::{self, TestResult},
    },
    matrices::Sum,
};

pub const CHUNK_LENS: [usize; 12] = [1, 2, 3, 31, 32, 33, 64, 65, 127, 128, 129, 300];

pub const EPSILON: f32 = 1e-6;

/// Half a unit in the last place of float16, and float32's share.
pub const HALF_ROUNDING: f64 = 1.01 / 2048.0;

pub fn seed() -> u64 {
    let given = env::var("SHARPI_TEST_SEED").ok();
    given.and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Random numbers of one test.
pub fn random(test: u64) -> Random {
    Random(seed().wrapping_mul(1000).wrapping_add(test))
}

pub fn floats(random: &mut Random, len: usize, std: f32) -> Vec<f32> {
    (0..len).map(|_| random.centered(std)).collect()
}

/// Norm weights: around 1.
pub fn norm_weights(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|_| 1.0 + random.centered(0.2)).collect()
}

/// What a test found: the largest error of each kind, and all that is wrong.
#[derive(Default)]
pub struct Findings {
    worst: BTreeMap<&'static str, f64>,
    wrong: Vec<String>,
}

impl Findings {
    /// NaN is over every bound.
    pub fn error(&mut self, kind: &'static str, case: &str, error: f64, bound: f64) {
        let worst = self.worst.entry(kind).or_default();
        if error > *worst || error.is_nan() {
            *worst = error;
        }
        self.holds(error <= bound, || {
            format!("{case}: {kind}: error {error:.2e} is over {bound:.1e}")
        });
    }

    pub fn holds(&mut self, holds: bool, message: impl Fn() -> String) {
        if !holds {
            self.wrong.push(message());
        }
    }

    /// Sums, relative to what they would be on average. Few of them may be far from the average error.
    pub fn sums(
        &mut self,
        kind: &'static str,
        case: &str,
        reference: &[Sum],
        ours: &[f32],
        bound: f64,
    ) {
        assert_eq!(reference.len(), ours.len());
        let pairs = reference.iter().zip(ours);
        let difference: f64 = pairs.map(|(r, &o)| (r.value - f64::from(o)).powi(2)).sum();
        let norm: f64 = reference.iter().map(|r| r.spread).sum();
        let bound = bound * (1.0 + 2.0 / (ours.len() as f64).sqrt());
        self.error(kind, case, (difference / norm).sqrt(), bound);
    }

    /// ‖ours − reference‖ / ‖reference‖
    pub fn relative(
        &mut self,
        kind: &'static str,
        case: &str,
        reference: &[f64],
        ours: impl Iterator<Item = f64>,
        bound: f64,
    ) {
        let mut count = 0;
        let mut difference = 0.0;
        for (r, o) in reference.iter().zip(ours) {
            difference += (r - o).powi(2);
            count += 1;
        }
        assert_eq!(count, reference.len());
        let norm: f64 = reference.iter().map(|r| r * r).sum();
        self.error(kind, case, (difference / norm).sqrt(), bound);
    }

    /// Float16 values that are the reference rounded; `slack` is what float32 arithmetic may add.
    pub fn rounded(
        &mut self,
        kind: &'static str,
        case: &str,
        reference: &[f64],
        ours: &[f16],
        slack: f64,
    ) {
        assert_eq!(reference.len(), ours.len());
        let pairs = reference.iter().zip(ours);
        let errors = pairs.map(|(r, o)| {
            let error = (r - o.to_f64()).abs() / (r.abs() * HALF_ROUNDING + slack);
            if error.is_nan() { f64::INFINITY } else { error }
        });
        let worst = errors.fold(0.0, f64::max);
        self.error(kind, case, worst, 1.0);
    }

    pub fn verdict(self) -> TestResult {
        for (kind, worst) in &self.worst {
            eprintln!("{kind}: largest error {worst:.1e}");
        }
        let count = self.wrong.len();
        let first: Vec<String> = self.wrong.into_iter().take(20).collect();
        gpu::check(
            count == 0,
            format!("{count} are wrong:\n{}", first.join("\n")),
        )
    }
}

pub fn device() -> Result<&'static Arc<Device>> {
    static DEVICE: OnceLock<Arc<Device>> = OnceLock::new();
    if DEVICE.get().is_none() {
        let _ = DEVICE.set(Device::open(0)?);
    }
    DEVICE.get().context("the device was just set")
}

/// Runs a kernel and waits for it.
///
/// # Safety
/// As for [`Device::launch`].
pub unsafe fn run(launch: &Launch) -> Result<()> {
    // SAFETY: as the caller vouches.
    unsafe { device()?.launch(launch)? };
    device()?.synchronize()
}

/// Device memory with a guard behind it.
pub struct Buffer {
    memory: DeviceBuffer,
    bytes: usize,
}

pub const GUARD: [u8; 256] = [0xff; 256];

impl Buffer {
    pub fn new<T: NoUninit>(values: &[T]) -> Result<Self> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = device()?.allocate(bytes.len() + GUARD.len())?;
        memory.upload(0, &[bytes, &GUARD].concat())?;
        Ok(Self {
            memory,
            bytes: bytes.len(),
        })
    }

    pub fn poisoned(bytes: usize) -> Result<Self> {
        Self::new(&vec![0xffu8; bytes])
    }

    pub fn zeroed(bytes: usize) -> Result<Self> {
        Self::new(&vec![0u8; bytes])
    }

    pub fn address(&self) -> u64 {
        self.memory.at(0)
    }

    /// The contents, behind which nothing may have been written.
    pub fn read<T: NoUninit + AnyBitPattern>(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.bytes / size_of::<T>()];
        let mut guard = [0; GUARD.len()];
        self.memory
            .download(0, bytemuck::cast_slice_mut(&mut values))?;
        self.memory.download(self.bytes, &mut guard)?;
        ensure!(guard == GUARD, "something was written behind a buffer");
        Ok(values)
    }
}

/// Bits of float values, for comparison.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn widened(values: &[f16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// The functions of gates.
pub fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / PI).sqrt() * (x + 0.044_715 * x.powi(3));
            x / 2.0 * (1.0 + inner.tanh())
        }
    }
}

/// One of the functions of gates, in turn.
pub fn activation_of(case: usize) -> Activation {
    [Activation::Silu, Activation::GeluTanh][case % 2]
}

pub fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum()
}

pub fn squares_by_group(values: &[f32]) -> Vec<f64> {
    values.chunks(32).map(sum_of_squares).collect()
}

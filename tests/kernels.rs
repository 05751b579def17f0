//! Each kernel alone against float64 arithmetic on the values that the file's own blocks stand for.
//!
//! Inputs are random, by a seed that is printed and that SHARPI_TEST_SEED sets. Outputs begin as 0xff bytes (NaN), and what
//! lies behind every buffer must stay so.

mod common;

use std::{
    collections::BTreeMap,
    env,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, Result, ensure};
use bytemuck::{AnyBitPattern, NoUninit};
use common::{
    gguf_writer::{Format, Random},
    gpu::{self, Test, TestResult},
};
use half::f16;
use rayon::prelude::*;
use sharpi::{
    cuda::{
        Device, Matrix, UNIT,
        chunk_kernels::{self, Chunk, FlashParams, GATE_SCALE, RopeParams},
        chunk_products::{self, Epilogue, Meeting, matmul},
        device::{Arguments, DeviceBuffer, Launch},
        kernels::{self, Activation, AttentionParams, Normed, Product},
    },
    quant::TensorType::{self, *},
};

const TYPES: [TensorType; 11] = [
    Q4_K, Q6_K, Q5_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, F16, BF16, F32,
];

/// Those that a chunk's products read as they are.
const CHUNK_TYPES: [TensorType; 9] = [Q4_K, Q6_K, Q5_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, F16];

/// Rows and columns of matrices; columns are rounded up to the type's blocks. The longest rows are the longest that the
/// kernels take; 2,080 values end in a slice of half a unit.
const SHAPES: [(usize, usize); 9] = [
    (1, 4864),
    (7, 576),
    (33, 1536),
    (577, 896),
    (2, 256),
    (577, 512),
    (130, 2080),
    (9, 12_288),
    (3, 28_672),
];

const CHUNK_SHAPES: [(usize, usize); 6] = [
    (577, 576),
    (33, 1536),
    (7, 896),
    (1, 512),
    (130, 2080),
    (40, 4864),
];

const CHUNK_LENS: [usize; 12] = [1, 2, 3, 31, 32, 33, 64, 65, 127, 128, 129, 300];
const POSITIONS: [usize; 6] = [0, 1, 127, 128, 500, 1023];
const HEAD_DIMS: [usize; 3] = [64, 128, 256];
const EPSILON: f32 = 1e-6;

/// Float32 sums of a few thousand terms.
const DECODE_BOUND: f64 = 2e-5;

/// Half a unit in the last place of float16, and float32's share.
const HALF_ROUNDING: f64 = 1.01 / 2048.0;

fn main() {
    eprintln!("SHARPI_TEST_SEED={}", seed());
    let tests: [Test; 12] = [
        ("embed_gives_the_files_values", embed_gives_the_files_values),
        (
            "product_store_multiplies_and_adds_bias",
            product_store_multiplies_and_adds_bias,
        ),
        (
            "product_add_adds_to_the_residual_and_prepares_the_norm",
            product_add_adds_to_the_residual_and_prepares_the_norm,
        ),
        (
            "product_swiglu_gates_and_quantizes",
            product_swiglu_gates_and_quantizes,
        ),
        (
            "attention_is_softmax_over_the_cache",
            attention_is_softmax_over_the_cache,
        ),
        ("norm_tokens_normalizes", norm_tokens_normalizes),
        (
            "rope_tokens_turns_and_fills_the_cache",
            rope_tokens_turns_and_fills_the_cache,
        ),
        (
            "flash_attention_is_causal_softmax_over_the_cache",
            flash_attention_is_causal_softmax_over_the_cache,
        ),
        (
            "chunk_products_store_add_and_gate",
            chunk_products_store_add_and_gate,
        ),
        (
            "more_rows_than_blocks_take_at_once_are_multiplied",
            more_rows_than_blocks_take_at_once_are_multiplied,
        ),
        (
            "float_to_half_rounds_to_nearest",
            float_to_half_rounds_to_nearest,
        ),
        (
            "gate_tokens_gates_and_stays_finite",
            gate_tokens_gates_and_stays_finite,
        ),
    ];
    gpu::run(&tests, &[])
}

fn seed() -> u64 {
    let given = env::var("SHARPI_TEST_SEED").ok();
    given.and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Random numbers of one test.
fn random(test: u64) -> Random {
    Random(seed().wrapping_mul(1000).wrapping_add(test))
}

fn floats(random: &mut Random, len: usize, std: f32) -> Vec<f32> {
    (0..len).map(|_| random.centered(std)).collect()
}

/// Norm weights: around 1.
fn norm_weights(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|_| 1.0 + random.centered(0.2)).collect()
}

/// What a test found: the largest error of each kind, and all that is wrong.
#[derive(Default)]
struct Findings {
    worst: BTreeMap<&'static str, f64>,
    wrong: Vec<String>,
}

impl Findings {
    /// NaN is over every bound.
    fn error(&mut self, kind: &'static str, case: &str, error: f64, bound: f64) {
        let worst = self.worst.entry(kind).or_default();
        if error > *worst || error.is_nan() {
            *worst = error;
        }
        self.holds(error <= bound, || {
            format!("{case}: {kind}: error {error:.2e} is over {bound:.1e}")
        });
    }

    fn holds(&mut self, holds: bool, message: impl Fn() -> String) {
        if !holds {
            self.wrong.push(message());
        }
    }

    /// Sums, relative to what they would be on average. Few of them may be far from the average error.
    fn sums(
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
    fn relative(
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
    fn rounded(
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

    fn verdict(self) -> TestResult {
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

fn device() -> Result<&'static Arc<Device>> {
    static DEVICE: OnceLock<Arc<Device>> = OnceLock::new();
    if DEVICE.get().is_none() {
        let _ = DEVICE.set(Device::open(0)?);
    }
    let device = DEVICE.get().context("the device was just set")?;
    device.bind()?;
    Ok(device)
}

/// Runs a kernel and waits for it.
///
/// # Safety
/// As for [`Device::launch`].
unsafe fn run(launch: &Launch) -> Result<()> {
    // SAFETY: as the caller vouches.
    unsafe { device()?.launch(launch)? };
    device()?.synchronize()
}

/// Device memory with a guard behind it.
struct Buffer {
    memory: DeviceBuffer,
    bytes: usize,
}

const GUARD: [u8; 256] = [0xff; 256];

impl Buffer {
    fn new<T: NoUninit>(values: &[T]) -> Result<Self> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = device()?.allocate(bytes.len() + GUARD.len())?;
        memory.upload(0, &[bytes, &GUARD].concat())?;
        device()?.synchronize()?;
        Ok(Self {
            memory,
            bytes: bytes.len(),
        })
    }

    fn poisoned(bytes: usize) -> Result<Self> {
        Self::new(&vec![0xffu8; bytes])
    }

    fn zeroed(bytes: usize) -> Result<Self> {
        Self::new(&vec![0u8; bytes])
    }

    fn address(&self) -> u64 {
        self.memory.at(0)
    }

    /// The contents, behind which nothing may have been written.
    fn read<T: NoUninit + AnyBitPattern>(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.bytes / size_of::<T>()];
        let mut guard = [0; GUARD.len()];
        // SAFETY: neither target is touched before the wait.
        unsafe {
            let target = bytemuck::cast_slice_mut(&mut values);
            self.memory.download_later(0, target)?;
            self.memory.download_later(self.bytes, &mut guard)?;
        }
        device()?.synchronize()?;
        ensure!(guard == GUARD, "something was written behind a buffer");
        Ok(values)
    }
}

/// A random matrix on the device, and the values that its blocks stand for.
struct Weights {
    matrix: Matrix,
    tensor_type: TensorType,
    values: Vec<f32>,
    _memory: Buffer,
}

impl Weights {
    /// Columns are rounded up to whole blocks. Every block has a scale of its own.
    fn new(
        random: &mut Random,
        tensor_type: TensorType,
        (rows, columns): (usize, usize),
    ) -> Result<Self> {
        let Format {
            id,
            block_len,
            block_bytes,
            ..
        } = Format::of(tensor_type);
        let columns = columns.next_multiple_of(block_len);
        let std = (columns as f32).sqrt().recip();
        let piece = block_len.max(32);
        let bytes: Vec<u8> = (0..rows * columns / piece)
            .flat_map(|_| {
                let std = std * (0.5 + random.below(1000) as f32 / 1000.0);
                random.blocks(tensor_type, piece, std)
            })
            .collect();
        let mut values = vec![0.0; rows * columns];
        tensor_type.dequantize(&bytes, &mut values);

        let file = Buffer::new(&bytes)?;
        let memory = Buffer::zeroed(device_bytes(tensor_type, rows, columns))?;
        let row_bytes = columns / block_len * block_bytes;
        let threads_a_row = match two_unit_bytes(tensor_type) {
            None => columns,
            Some(_) => columns.div_ceil(UNIT),
        };
        // Pieces of an odd count of rows, the last first: any order will do.
        const PIECE: usize = 101;
        for begin in (0..rows).step_by(PIECE).rev() {
            let count = PIECE.min(rows - begin);
            let launch = Launch {
                function: device()?.function("repack", "repack")?,
                grid: [((count + 1) * threads_a_row).div_ceil(256) as u32, 1, 1],
                block: [256, 1],
                shared_bytes: 0,
                arguments: Arguments::default()
                    .with(file.address() + (begin * row_bytes) as u64)
                    .with(memory.address())
                    .with(id as i32)
                    .with(rows as i32)
                    .with(columns as i32)
                    .with(begin as i32)
                    .with(count as i32),
                dependent: false,
            };
            // SAFETY: the arguments are those of `repack`, as kernels/README.md has them.
            unsafe { run(&launch)? };
        }
        let matrix = Matrix {
            address: memory.address(),
            kind: id as i32,
            rows,
            columns,
            bytes: bytes.len(),
        };
        // The guard.
        memory.read::<u8>()?;
        Ok(Self {
            matrix,
            tensor_type,
            values,
            _memory: memory,
        })
    }

    /// W a of each row.
    fn times(&self, a: &[f64]) -> Vec<Sum> {
        let rows = self.values.par_chunks_exact(self.matrix.columns);
        rows.map(|row| Sum::of(row, a)).collect()
    }

    fn shape(&self) -> String {
        let Matrix { rows, columns, .. } = self.matrix;
        format!("{} {rows} x {columns}", self.tensor_type.name())
    }
}

/// Bytes of two units of 64 values in the kernels' layout (kernels/README.md); none for float types.
fn two_unit_bytes(tensor_type: TensorType) -> Option<usize> {
    match tensor_type {
        Q4_0 | Q4_K => Some(72),
        Q4_1 => Some(80),
        Q5_0 | Q5_K => Some(88),
        Q5_1 => Some(96),
        Q8_0 => Some(136),
        Q6_K => Some(105),
        _ => None,
    }
}

fn device_bytes(tensor_type: TensorType, rows: usize, columns: usize) -> usize {
    let Some(two_units) = two_unit_bytes(tensor_type) else {
        return rows * (columns * tensor_type.block_bytes()).next_multiple_of(16);
    };
    let units = columns.div_ceil(UNIT);
    let tile = |units: usize| (units * two_units).next_multiple_of(16);
    rows.div_ceil(2) * (units / 32 * tile(32) + tile(units % 32))
}

/// A value, and the square that it would have on average if the signs of its terms were random: what its error is measured
/// against, since a sum may be small by chance.
#[derive(Clone, Copy)]
struct Sum {
    value: f64,
    spread: f64,
}

impl Sum {
    fn of(row: &[f32], a: &[f64]) -> Self {
        let (mut value, mut spread) = (0.0, 0.0);
        for (&w, a) in row.iter().zip(a) {
            let term = f64::from(w) * a;
            value += term;
            spread += term * term;
        }
        Self { value, spread }
    }

    /// `factor * self + offset`
    fn affine(self, factor: f64, offset: f64) -> Self {
        Self {
            value: self.value * factor + offset,
            spread: self.spread * factor * factor,
        }
    }

    /// `silu(gate) * up`; the spread is what the two's errors make of it.
    fn gated(gate: Self, up: Self) -> Self {
        let silu = silu(gate.value);
        Self {
            value: silu * up.value,
            spread: up.value.powi(2) * gate.spread + silu.powi(2) * up.spread,
        }
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum()
}

fn squares_by_group(values: &[f32]) -> Vec<f64> {
    values.chunks(32).map(sum_of_squares).collect()
}

/// A quantized vector that a product reads, `x * norm weights`.
struct Input {
    quantized: Buffer,
    scale: Buffer,
    value: Buffer,
    squares: Buffer,
    /// What float weights meet.
    exact: Vec<f64>,
    /// What quantized weights meet.
    rounded: Vec<f64>,
    /// Of x.
    rms: f64,
}

impl Input {
    fn new(random: &mut Random, columns: usize) -> Result<Self> {
        let x = floats(random, columns, 1.5);
        let norm = norm_weights(random, columns);
        let mut value: Vec<f32> = x.iter().zip(&norm).map(|(x, w)| x * w).collect();
        let exact = value.iter().map(|&v| f64::from(v)).collect();
        value.resize(columns.next_multiple_of(UNIT), 0.0);
        let (mut quantized, mut scale) = (Vec::new(), Vec::new());
        for group in value.chunks(32) {
            let largest = group.iter().fold(0.0, |l: f32, v| l.max(v.abs()));
            let per_value = 127.0 / largest.max(1e-30);
            scale.push(largest / 127.0);
            quantized.extend(
                group
                    .iter()
                    .map(|v| (v * per_value).round_ties_even() as i8),
            );
        }
        let rounded = quantized
            .iter()
            .zip(scale.iter().flat_map(|s| [s; 32]))
            .map(|(&q, &s)| f64::from(q) * f64::from(s))
            .take(columns)
            .collect();
        let squares: Vec<f32> = squares_by_group(&x).iter().map(|&s| s as f32).collect();
        Ok(Self {
            quantized: Buffer::new(&quantized)?,
            scale: Buffer::new(&scale)?,
            value: Buffer::new(&value)?,
            squares: Buffer::new(&squares)?,
            exact,
            rounded,
            rms: (sum_of_squares(&x) / columns as f64 + f64::from(EPSILON)).sqrt(),
        })
    }

    fn activation(&self) -> Activation {
        Activation {
            quantized: self.quantized.address(),
            scale: self.scale.address(),
            value: self.value.address(),
        }
    }

    fn normed(&self) -> Normed {
        Normed {
            activation: self.activation(),
            squares: self.squares.address(),
        }
    }

    /// As weights of this type meet it.
    fn met_by(&self, tensor_type: TensorType) -> &[f64] {
        match two_unit_bytes(tensor_type) {
            None => &self.exact,
            Some(_) => &self.rounded,
        }
    }

    /// W rms_norm(x)
    fn product(&self, weights: &Weights) -> Vec<Sum> {
        let sums = weights.times(self.met_by(weights.tensor_type));
        let divided = sums.into_iter().map(|sum| sum.affine(1.0 / self.rms, 0.0));
        divided.collect()
    }
}

/// A quantized vector that a kernel writes, and the sums of squares beside it.
struct Output {
    quantized: Buffer,
    scale: Buffer,
    value: Buffer,
    squares: Buffer,
    len: usize,
}

impl Output {
    /// Zero past the vector's groups, as a product expects it.
    fn new(len: usize) -> Result<Self> {
        let groups = len.div_ceil(32);
        let padded = (groups * 32).next_multiple_of(UNIT);
        let buffer = |poisoned: usize, bytes: usize| {
            let mut initial = vec![0xffu8; bytes];
            initial[poisoned..].fill(0);
            Buffer::new(&initial)
        };
        Ok(Self {
            quantized: buffer(groups * 32, padded)?,
            scale: buffer(groups * 4, padded / 32 * 4)?,
            value: buffer(groups * 32 * 4, padded * 4)?,
            squares: Buffer::poisoned(groups * 4)?,
            len,
        })
    }

    fn normed(&self) -> Normed {
        Normed {
            activation: Activation {
                quantized: self.quantized.address(),
                scale: self.scale.address(),
                value: self.value.address(),
            },
            squares: self.squares.address(),
        }
    }

    /// The values, with which the integers and scales must agree, and past which there must be zeros.
    fn read(&self, findings: &mut Findings, case: &str) -> Result<Vec<f32>> {
        let mut value: Vec<f32> = self.value.read()?;
        let quantized: Vec<i8> = self.quantized.read()?;
        let scale: Vec<f32> = self.scale.read()?;
        for (g, &scale) in scale.iter().enumerate() {
            let range = g * 32..g * 32 + 32;
            let group = &value[range.clone()];
            let largest = group.iter().fold(0.0, |l: f32, v| l.max(v.abs()));
            let right_scale = f64::from(scale - largest / 127.0).abs() <= 1e-6 * f64::from(scale);
            let right_integers = group.iter().zip(&quantized[range]).all(|(&v, &q)| {
                let exact = f64::from(v) * 127.0 / f64::from(largest.max(1e-30));
                (exact - f64::from(q)).abs() <= 0.5 + 1e-4
            });
            findings.holds(right_scale && right_integers, || {
                format!("{case}: group {g} is not its values quantized")
            });
        }
        let past = &value[self.len..];
        findings.holds(past.iter().all(|&v| v == 0.0), || {
            format!("{case}: values past the vector's end")
        });
        value.truncate(self.len);
        Ok(value)
    }

    fn check_squares(&self, findings: &mut Findings, case: &str, x: &[f32]) -> Result<()> {
        let squares: Vec<f32> = self.squares.read()?;
        findings.relative(
            "sums of squares",
            case,
            &squares_by_group(x),
            squares.into_iter().map(f64::from),
            1e-6,
        );
        Ok(())
    }

    fn bits(&self) -> Result<[Vec<u8>; 3]> {
        Ok([
            self.quantized.read()?,
            self.scale.read()?,
            self.value.read()?,
        ])
    }
}

fn embed_gives_the_files_values() -> TestResult {
    let (mut random, mut findings) = (random(1), Findings::default());
    for tensor_type in TYPES {
        for shape in SHAPES {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            let (case, Matrix { rows, columns, .. }) = (weights.shape(), weights.matrix);
            let chunk = Chunk { tokens: rows };
            let tokens: Vec<i32> = (0..rows as i32).rev().collect();
            let tokens = Buffer::new(&tokens)?;
            let x = Buffer::poisoned(rows * columns * 4)?;
            let launch = chunk_kernels::embed_chunk(
                device()?,
                weights.matrix,
                tokens.address(),
                x.address(),
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let reversed = weights.values.chunks_exact(columns).rev().flatten();
            let reference: Vec<f64> = reversed.map(|&v| f64::from(v)).collect();
            let ours: Vec<f32> = x.read()?;
            let ours = ours.into_iter().map(f64::from);
            findings.relative("values of a chunk", &case, &reference, ours, 1e-6);

            // One token, for the norm of the first layer.
            let x = Buffer::poisoned(columns * 4)?;
            let norm = norm_weights(&mut random, columns);
            let norm_buffer = Buffer::new(&norm)?;
            let next = Output::new(columns)?;
            let launch = kernels::embed(
                device()?,
                weights.matrix,
                tokens.address(),
                x.address(),
                norm_buffer.address(),
                next.normed(),
            )?;
            // SAFETY: as above.
            unsafe { run(&launch)? };
            let x: Vec<f32> = x.read()?;
            let ours = x.iter().map(|&v| f64::from(v));
            let reference = &reference[..columns];
            findings.relative("values of a token", &case, reference, ours, 1e-6);
            let values = next.read(&mut findings, &case)?;
            check_normed(&mut findings, &case, &values, &x, &norm);
            next.check_squares(&mut findings, &case, &x)?;
        }
    }
    findings.verdict()
}

/// `values = x * norm`
fn check_normed(findings: &mut Findings, case: &str, values: &[f32], x: &[f32], norm: &[f32]) {
    let pairs = x.iter().zip(norm);
    let reference: Vec<f64> = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).collect();
    let ours = values.iter().map(|&v| f64::from(v));
    findings.relative("values times the norm", case, &reference, ours, 1e-6);
}

fn product_store_multiplies_and_adds_bias() -> TestResult {
    let (mut random, mut findings) = (random(2), Findings::default());
    let check = |random: &mut Random, findings: &mut Findings, weights: &[Weights], bias: bool| {
        let input = Input::new(random, weights[0].matrix.columns)?;
        let mut products = Vec::new();
        let mut buffers = Vec::new();
        for weights in weights {
            let rows = weights.matrix.rows;
            let bias = if bias {
                floats(random, rows, 1.0)
            } else {
                Vec::new()
            };
            let (bias_buffer, out) = (Buffer::new(&bias)?, Buffer::poisoned(rows * 4)?);
            products.push(Product {
                weights: weights.matrix,
                bias: if bias.is_empty() {
                    0
                } else {
                    bias_buffer.address()
                },
                out: out.address(),
            });
            buffers.push((bias, bias_buffer, out));
        }
        let launch = kernels::product_store(device()?, &products, input.normed(), EPSILON)?;
        // SAFETY: the launch is that of these buffers, which outlive it.
        unsafe { run(&launch)? };
        for (weights, (bias, _, out)) in weights.iter().zip(&buffers) {
            let mut reference = input.product(weights);
            for (sum, &bias) in reference.iter_mut().zip(bias) {
                *sum = sum.affine(1.0, bias.into());
            }
            let case = format!("{}, {} matrices", weights.shape(), buffers.len());
            findings.sums("products", &case, &reference, &out.read()?, DECODE_BOUND);
        }
        anyhow::Ok(())
    };
    for tensor_type in TYPES {
        let any = (1 + random.below(700), 32 * (3 + random.below(80)));
        for shape in SHAPES.into_iter().chain([any]) {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            check(&mut random, &mut findings, &[weights], shape.0 % 2 == 0)?;
        }
    }
    for types in [
        [Q4_K, Q4_K, Q6_K],
        [Q4_K, Q4_K, Q4_K],
        [F16, Q8_0, F32],
        [Q5_0, BF16, Q4_1],
        [Q5_K, Q5_1, Q4_0],
    ] {
        for (rows, columns) in [
            ([577, 33, 7], 1536),
            ([1, 577, 33], 4864),
            ([512, 128, 128], 512),
        ] {
            for bias in [false, true] {
                let mut weights = Vec::new();
                for (tensor_type, rows) in types.into_iter().zip(rows) {
                    weights.push(Weights::new(&mut random, tensor_type, (rows, columns))?);
                }
                check(&mut random, &mut findings, &weights, bias)?;
            }
        }
    }
    findings.verdict()
}

fn product_add_adds_to_the_residual_and_prepares_the_norm() -> TestResult {
    let (mut random, mut findings) = (random(3), Findings::default());
    for tensor_type in TYPES {
        let any = (1 + random.below(700), 32 * (3 + random.below(80)));
        for shape in SHAPES.into_iter().chain([any]) {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            let (case, Matrix { rows, columns, .. }) = (weights.shape(), weights.matrix);
            let input = Input::new(&mut random, columns)?;
            let old = floats(&mut random, rows, 1.0);
            let norm = norm_weights(&mut random, rows);
            let (x, norm_buffer) = (Buffer::new(&old)?, Buffer::new(&norm)?);
            let next = Output::new(rows)?;
            let launch = kernels::product_add(
                device()?,
                weights.matrix,
                input.activation(),
                x.address(),
                norm_buffer.address(),
                next.normed(),
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let sums = weights.times(input.met_by(tensor_type)).into_iter();
            let sums = sums
                .zip(&old)
                .map(|(sum, &old)| sum.affine(1.0, old.into()));
            let reference: Vec<Sum> = sums.collect();
            let x: Vec<f32> = x.read()?;
            findings.sums("residuals", &case, &reference, &x, DECODE_BOUND);
            let values = next.read(&mut findings, &case)?;
            check_normed(&mut findings, &case, &values, &x, &norm);
            next.check_squares(&mut findings, &case, &x)?;
        }
    }
    findings.verdict()
}

fn product_swiglu_gates_and_quantizes() -> TestResult {
    let (mut random, mut findings) = (random(4), Findings::default());
    let same = TYPES.map(|tensor_type| (tensor_type, tensor_type));
    let mixed = [(Q4_K, Q6_K), (F16, Q4_0), (Q8_0, F32), (BF16, F16)];
    for (gate_type, up_type) in same.into_iter().chain(mixed) {
        for (rows, columns) in SHAPES {
            let block_len = gate_type.block_len().max(up_type.block_len());
            let shape = (rows, columns.next_multiple_of(block_len));
            let gate = Weights::new(&mut random, gate_type, shape)?;
            let up = Weights::new(&mut random, up_type, shape)?;
            let input = Input::new(&mut random, shape.1)?;
            let out = Output::new(rows)?;
            let launch = kernels::product_swiglu(
                device()?,
                gate.matrix,
                up.matrix,
                input.normed(),
                EPSILON,
                out.normed().activation,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let pairs = input.product(&gate).into_iter().zip(input.product(&up));
            let reference: Vec<Sum> = pairs.map(|(g, u)| Sum::gated(g, u)).collect();
            let case = format!("{} and {}", gate.shape(), up.shape());
            let values = out.read(&mut findings, &case)?;
            findings.sums("gated values", &case, &reference, &values, DECODE_BOUND);
        }
    }
    findings.verdict()
}

/// How heads are normalized and turned.
struct Turn {
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    /// Radians a position.
    frequencies: Vec<f32>,
    interleaved: bool,
}

impl Turn {
    fn new(random: &mut Random, head_dim: usize) -> Self {
        let choices = random.u64() >> 32;
        let mut norm = || (choices & 1 == 1).then(|| norm_weights(random, head_dim));
        let (q_norm, k_norm) = (norm(), norm());
        let rope_dims = if choices & 2 == 2 {
            head_dim
        } else {
            head_dim * 3 / 4
        };
        let frequency = |i: usize| 10_000f64.powf(-2.0 * i as f64 / rope_dims as f64) as f32;
        Self {
            q_norm,
            k_norm,
            frequencies: (0..rope_dims / 2).map(frequency).collect(),
            interleaved: choices & 4 == 4,
        }
    }

    fn rope_dims(&self) -> usize {
        2 * self.frequencies.len()
    }

    fn apply(&self, head: &[f32], norm: Option<&Vec<f32>>, position: usize) -> Vec<f64> {
        let mut values: Vec<f64> = head.iter().map(|&v| f64::from(v)).collect();
        if let Some(norm) = norm {
            let mean = sum_of_squares(head) / head.len() as f64;
            let scale = (mean + f64::from(EPSILON)).sqrt().recip();
            for (v, &w) in values.iter_mut().zip(norm) {
                *v *= scale * f64::from(w);
            }
        }
        let half = self.frequencies.len();
        for (i, &frequency) in self.frequencies.iter().enumerate() {
            let (first, second) = match self.interleaved {
                true => (2 * i, 2 * i + 1),
                false => (i, i + half),
            };
            let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
            let (a, b) = (values[first], values[second]);
            values[first] = a * cos - b * sin;
            values[second] = a * sin + b * cos;
        }
        values
    }

    fn name(&self) -> String {
        format!(
            "norm {}, {} dimensions turn, interleaved {}",
            self.q_norm.is_some(),
            self.rope_dims(),
            self.interleaved
        )
    }
}

/// The address of an optional vector.
fn optional(values: &Option<Vec<f32>>) -> Result<(Option<Buffer>, u64)> {
    let buffer = values.as_deref().map(Buffer::new).transpose()?;
    let address = buffer.as_ref().map_or(0, Buffer::address);
    Ok((buffer, address))
}

/// What scores are multiplied with, so that powers of two give the softmax.
fn query_scale(head_dim: usize) -> f64 {
    std::f64::consts::LOG2_E / (head_dim as f64).sqrt()
}

/// Random keys or values (head_dim, context, head_count_kv), NaN from token `filled` on.
fn random_cache(
    random: &mut Random,
    head_dim: usize,
    context: usize,
    head_count_kv: usize,
    filled: usize,
) -> Vec<f16> {
    let mut cache = vec![f16::from_bits(0xffff); head_dim * context * head_count_kv];
    for plane in cache.chunks_exact_mut(head_dim * context) {
        for value in &mut plane[..filled * head_dim] {
            *value = f16::from_f32(random.centered(1.0));
        }
    }
    cache
}

fn widened(values: &[f16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// Attention of a query, scaled, to the first `visible` tokens of a key/value head.
fn attend(query: &[f64], keys: &[f32], values: &[f32], visible: usize) -> Vec<f64> {
    let head_dim = query.len();
    let keys = keys.chunks_exact(head_dim).take(visible);
    let scores: Vec<f64> = keys.map(|key| Sum::of(key, query).value).collect();
    let top = scores.iter().copied().fold(f64::MIN, f64::max);
    let (mut out, mut all) = (vec![0.0; head_dim], 0.0);
    for (score, value) in scores.iter().zip(values.chunks_exact(head_dim)) {
        let weight = (score - top).exp2();
        all += weight;
        for (out, &v) in out.iter_mut().zip(value) {
            *out += weight * f64::from(v);
        }
    }
    out.iter().map(|v| v / all).collect()
}

/// Whether two caches are the same bits but for `tokens`.
fn same_but_for(
    before: &[f16],
    after: &[f16],
    head_dim: usize,
    context: usize,
    tokens: std::ops::Range<usize>,
) -> bool {
    let rows = before
        .chunks_exact(head_dim)
        .zip(after.chunks_exact(head_dim));
    rows.enumerate()
        .filter(|(row, _)| !tokens.contains(&(row % context)))
        .all(|(_, (a, b))| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()))
}

fn attention_is_softmax_over_the_cache() -> TestResult {
    let (mut random, mut findings) = (random(5), Findings::default());
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for group in [1, 3, 4, 7, 8, 12] {
            for position in POSITIONS {
                count += 1;
                let head_count_kv = 1 + count % 3;
                // The last place of the cache, or one before it.
                let context = position + 1 + count % 2;
                let head_count = group * head_count_kv;
                let turn = Turn::new(&mut random, head_dim);
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, position {position} of {context}, {}",
                    turn.name()
                );
                let mut cache =
                    || random_cache(&mut random, head_dim, context, head_count_kv, position);
                let (keys, values) = (cache(), cache());
                let q = floats(&mut random, head_count * head_dim, 1.0);
                let k = floats(&mut random, head_count_kv * head_dim, 1.0);
                let v = floats(&mut random, head_count_kv * head_dim, 1.0);
                let inputs = [Buffer::new(&q)?, Buffer::new(&k)?, Buffer::new(&v)?];
                let (_q_norm, q_norm) = optional(&turn.q_norm)?;
                let (_k_norm, k_norm) = optional(&turn.k_norm)?;
                let frequencies = Buffer::new(&turn.frequencies)?;
                let place = Buffer::new(&[position as i32])?;
                let splits = kernels::attention_splits(device()?, head_count_kv, group);
                let partial = Buffer::poisoned((head_dim + 2) * head_count * splits * 4)?;
                let counters = kernels::attention_counters(head_count_kv, group);
                let finished = Buffer::zeroed(counters * 4)?;

                let attend_on_device = || -> Result<(Output, Vec<f16>, Vec<f16>)> {
                    let (k_cache, v_cache) = (Buffer::new(&keys)?, Buffer::new(&values)?);
                    let out = Output::new(head_count * head_dim)?;
                    let params = AttentionParams {
                        q: inputs[0].address(),
                        k: inputs[1].address(),
                        v: inputs[2].address(),
                        q_norm,
                        k_norm,
                        frequencies: frequencies.address(),
                        k_cache: k_cache.address(),
                        v_cache: v_cache.address(),
                        position: place.address(),
                        partial: partial.address(),
                        finished: finished.address(),
                        out: out.normed().activation,
                        epsilon: EPSILON,
                        context: context as i32,
                        group: group as i32,
                        rope_dims: turn.rope_dims() as i32,
                        interleaved: i32::from(turn.interleaved),
                        unused: 0,
                    };
                    let launch =
                        kernels::attention(device()?, head_dim, head_count_kv, splits, params)?;
                    // SAFETY: the launch is that of these buffers, which outlive it.
                    unsafe { run(&launch)? };
                    partial.read::<f32>()?;
                    let left: Vec<u32> = finished.read()?;
                    ensure!(left.iter().all(|&count| count == 0), "counters are left");
                    Ok((out, k_cache.read()?, v_cache.read()?))
                };
                let (out, new_keys, new_values) = attend_on_device()?;

                for (old, new) in [(&keys, &new_keys), (&values, &new_values)] {
                    let newest = position..position + 1;
                    findings.holds(same_but_for(old, new, head_dim, context, newest), || {
                        format!("{case}: another token of the cache was changed")
                    });
                }
                let mut reference = Vec::new();
                for head in 0..head_count_kv {
                    let range = head * head_dim..(head + 1) * head_dim;
                    let at = (head * context + position) * head_dim;
                    let key = turn.apply(&k[range.clone()], turn.k_norm.as_ref(), position);
                    let newest = &new_keys[at..at + head_dim];
                    findings.rounded("new keys", &case, &key, newest, 1e-5);
                    let value: Vec<f64> = v[range].iter().map(|&v| f64::from(v)).collect();
                    let newest = &new_values[at..at + head_dim];
                    findings.rounded("new values", &case, &value, newest, 1e-7);
                }
                let (wide_keys, wide_values) = (widened(&new_keys), widened(&new_values));
                let plane = context * head_dim;
                let heads = q.par_chunks_exact(head_dim).enumerate();
                reference.par_extend(heads.flat_map(|(head, q)| {
                    let mut query = turn.apply(q, turn.q_norm.as_ref(), position);
                    query.iter_mut().for_each(|v| *v *= query_scale(head_dim));
                    let plane = head / group * plane..(head / group + 1) * plane;
                    let (keys, values) = (&wide_keys[plane.clone()], &wide_values[plane]);
                    attend(&query, keys, values, position + 1)
                }));
                let ours = out.read(&mut findings, &case)?.into_iter().map(f64::from);
                findings.relative("attention", &case, &reference, ours, 5e-5);

                let (again, again_keys, again_values) = attend_on_device()?;
                let bits =
                    |values: &[f16]| -> Vec<u16> { values.iter().map(|v| v.to_bits()).collect() };
                let same = again.bits()? == out.bits()?
                    && bits(&again_keys) == bits(&new_keys)
                    && bits(&again_values) == bits(&new_values);
                findings.holds(same, || format!("{case}: other bits the second time"));
            }
        }
    }
    findings.verdict()
}

/// Where value `column` of a token stands in activations for a chunk's products, by kernels/tiles.cuh: blocks of 64 columns
/// of all tokens, in them 16-byte pieces, in them the order in which a lane decodes weights.
fn tile_index(padded: usize, token: usize, column: usize) -> usize {
    let v = column % 128 / 4 * 4;
    let (odd, second) = (column % 2, column % 4 / 2);
    let lane = v / 64 * 2 + v / 16 % 2;
    let step = v / 4 % 4 * 2 + v / 32 % 2;
    let block = column / 128 * 2 + step / 4;
    let piece = (step % 4 * 2 + odd) ^ (token % 8);
    (block * padded + token) * 64 + piece * 8 + lane * 2 + second
}

/// Activations of a chunk as its products read them. Tokens past the chunk hold NaN.
fn tiles(values: &[f16], columns: usize, chunk: Chunk) -> Vec<f16> {
    let mut out = vec![f16::from_bits(0xffff); chunk.tile_bytes(columns) / 2];
    for (token, row) in values.chunks_exact(columns).enumerate() {
        for column in 0..columns.next_multiple_of(128) {
            let value = row.get(column).copied().unwrap_or(f16::ZERO);
            out[tile_index(chunk.padded(), token, column)] = value;
        }
    }
    out
}

/// What a kernel wrote as such activations, with zeros past the columns.
fn read_tiles(
    findings: &mut Findings,
    case: &str,
    out: &Buffer,
    columns: usize,
    chunk: Chunk,
) -> Result<Vec<f16>> {
    let stored: Vec<f16> = out.read()?;
    let at = |token, column| stored[tile_index(chunk.padded(), token, column)];
    let past = columns..columns.next_multiple_of(128);
    let zeros = (0..chunk.tokens).all(|t| past.clone().all(|c| at(t, c) == f16::ZERO));
    findings.holds(zeros, || format!("{case}: no zeros past the columns"));
    let values = (0..chunk.tokens).flat_map(|t| (0..columns).map(move |c| (t, c)));
    Ok(values.map(|(t, c)| at(t, c)).collect())
}

fn norm_tokens_normalizes() -> TestResult {
    let (mut random, mut findings) = (random(6), Findings::default());
    for columns in [256, 512, 576, 896, 1056, 4864] {
        for tokens in CHUNK_LENS {
            let (case, chunk) = (format!("{columns} x {tokens}"), Chunk { tokens });
            let x = floats(&mut random, columns * tokens, 1.5);
            let weight = norm_weights(&mut random, columns);
            let (x_buffer, weight_buffer) = (Buffer::new(&x)?, Buffer::new(&weight)?);
            let out = Buffer::poisoned(chunk.tile_bytes(columns))?;
            let launch = chunk_kernels::norm_tokens(
                device()?,
                x_buffer.address(),
                weight_buffer.address(),
                out.address(),
                EPSILON,
                columns,
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let rows = x.chunks_exact(columns);
            let reference: Vec<f64> = rows
                .flat_map(|row| {
                    let mean = sum_of_squares(row) / columns as f64;
                    let scale = (mean + f64::from(EPSILON)).sqrt().recip();
                    let pairs = row.iter().zip(&weight);
                    pairs.map(move |(&x, &w)| f64::from(x) * scale * f64::from(w))
                })
                .collect();
            let ours = read_tiles(&mut findings, &case, &out, columns, chunk)?;
            findings.rounded("norms", &case, &reference, &ours, 1e-6);
        }
    }
    findings.verdict()
}

fn rope_tokens_turns_and_fills_the_cache() -> TestResult {
    let (mut random, mut findings) = (random(7), Findings::default());
    let groups = [1, 3, 4, 7, 8];
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for tokens in CHUNK_LENS {
            for _ in 0..2 {
                count += 1;
                let (group, position) = (groups[count % 5], POSITIONS[count % 6]);
                let head_count_kv = 1 + count % 3;
                let head_count = group * head_count_kv;
                let context = position + tokens + count % 2;
                let turn = Turn::new(&mut random, head_dim);
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, {tokens} tokens at {position} of {context}, {}",
                    turn.name()
                );
                let mut cache =
                    || random_cache(&mut random, head_dim, context, head_count_kv, position);
                let (keys, values) = (cache(), cache());
                let (k_cache, v_cache) = (Buffer::new(&keys)?, Buffer::new(&values)?);
                let q = floats(&mut random, head_count * head_dim * tokens, 1.0);
                let k = floats(&mut random, head_count_kv * head_dim * tokens, 1.0);
                let v = floats(&mut random, head_count_kv * head_dim * tokens, 1.0);
                let inputs = [Buffer::new(&q)?, Buffer::new(&k)?, Buffer::new(&v)?];
                let (_q_norm, q_norm) = optional(&turn.q_norm)?;
                let (_k_norm, k_norm) = optional(&turn.k_norm)?;
                let frequencies = Buffer::new(&turn.frequencies)?;
                let place = Buffer::new(&[position as i32])?;
                let q_out = Buffer::poisoned(q.len() * 2)?;
                let params = RopeParams {
                    q: inputs[0].address(),
                    k: inputs[1].address(),
                    v: inputs[2].address(),
                    q_norm,
                    k_norm,
                    frequencies: frequencies.address(),
                    q_out: q_out.address(),
                    k_cache: k_cache.address(),
                    v_cache: v_cache.address(),
                    position: place.address(),
                    epsilon: EPSILON,
                    context: context as i32,
                    head_count: head_count as i32,
                    head_count_kv: head_count_kv as i32,
                    rope_dims: turn.rope_dims() as i32,
                    interleaved: i32::from(turn.interleaved),
                };
                let launch =
                    chunk_kernels::rope_tokens(device()?, head_dim, params, Chunk { tokens })?;
                // SAFETY: the launch is that of these buffers, which outlive it.
                unsafe { run(&launch)? };

                let (new_keys, new_values): (Vec<f16>, Vec<f16>) =
                    (k_cache.read()?, v_cache.read()?);
                for (old, new) in [(&keys, &new_keys), (&values, &new_values)] {
                    let range = position..position + tokens;
                    findings.holds(same_but_for(old, new, head_dim, context, range), || {
                        format!("{case}: another token of the cache was changed")
                    });
                }
                let turned: Vec<f64> = q
                    .par_chunks_exact(head_dim)
                    .enumerate()
                    .flat_map_iter(|(i, head)| {
                        let position = position + i / head_count;
                        let turned = turn.apply(head, turn.q_norm.as_ref(), position);
                        turned.into_iter().map(|v| v * query_scale(head_dim))
                    })
                    .collect();
                findings.rounded("queries", &case, &turned, &q_out.read::<f16>()?, 1e-5);
                let (mut turned, mut stored_keys) = (Vec::new(), Vec::new());
                let (mut exact, mut stored_values) = (Vec::new(), Vec::new());
                let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
                for (i, (k, v)) in heads.enumerate() {
                    let position = position + i / head_count_kv;
                    let at = (i % head_count_kv * context + position) * head_dim;
                    turned.extend(turn.apply(k, turn.k_norm.as_ref(), position));
                    stored_keys.extend_from_slice(&new_keys[at..at + head_dim]);
                    exact.extend(v.iter().map(|&v| f64::from(v)));
                    stored_values.extend_from_slice(&new_values[at..at + head_dim]);
                }
                findings.rounded("keys", &case, &turned, &stored_keys, 1e-5);
                findings.rounded("values", &case, &exact, &stored_values, 1e-7);
            }
        }
    }
    findings.verdict()
}

fn flash_attention_is_causal_softmax_over_the_cache() -> TestResult {
    let (mut random, mut findings) = (random(8), Findings::default());
    let groups = [1, 3, 4, 7, 8];
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for tokens in CHUNK_LENS {
            for _ in 0..2 {
                count += 1;
                let (group, position) = (groups[count % 5], POSITIONS[count % 6]);
                let head_count_kv = if tokens > 33 { 1 } else { 1 + count % 3 };
                let head_count = group * head_count_kv;
                let (chunk, end) = (Chunk { tokens }, position + tokens);
                let context = end + count % 2;
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, {tokens} tokens at {position}"
                );
                let mut cache = || random_cache(&mut random, head_dim, context, head_count_kv, end);
                let (keys, values) = (cache(), cache());
                let scale = query_scale(head_dim) as f32;
                let q: Vec<f16> = floats(&mut random, head_count * head_dim * tokens, scale)
                    .into_iter()
                    .map(f16::from_f32)
                    .collect();
                let inputs = [&q, &keys, &values].map(|values| Buffer::new(values));
                let [q_buffer, k_cache, v_cache] = inputs;
                let (q_buffer, k_cache, v_cache) = (q_buffer?, k_cache?, v_cache?);
                let place = Buffer::new(&[position as i32])?;
                let tiles = chunk_kernels::attention_tiles(tokens, group)?;
                let partial =
                    chunk_kernels::attention_partial_len(device()?, head_dim, tiles, head_count_kv);
                let partial = Buffer::poisoned(partial * 4)?;
                let finished = Buffer::zeroed(tiles * head_count_kv * 4)?;
                let width = head_count * head_dim;

                let attend_on_device = || -> Result<Buffer> {
                    let out = Buffer::poisoned(chunk.tile_bytes(width))?;
                    let params = FlashParams {
                        q: q_buffer.address(),
                        k_cache: k_cache.address(),
                        v_cache: v_cache.address(),
                        out: out.address(),
                        position: place.address(),
                        partial: partial.address(),
                        finished: finished.address(),
                        tokens: tokens as i32,
                        padded_tokens: chunk.padded() as i32,
                        context: context as i32,
                        group: group as i32,
                    };
                    let launch = chunk_kernels::flash_attention(
                        device()?,
                        head_dim,
                        head_count_kv,
                        end,
                        params,
                    )?;
                    // SAFETY: the launch is that of these buffers, which outlive it.
                    unsafe { run(&launch)? };
                    let left: Vec<u32> = finished.read()?;
                    ensure!(left.iter().all(|&count| count == 0), "counters are left");
                    Ok(out)
                };
                let out = attend_on_device()?;
                let (wide_keys, wide_values) = (widened(&keys), widened(&values));
                let plane = context * head_dim;
                let heads = q.par_chunks_exact(head_dim).enumerate();
                let reference: Vec<f64> = heads
                    .flat_map_iter(|(i, q)| {
                        let (token, head_kv) = (i / head_count, i % head_count / group);
                        let query: Vec<f64> = q.iter().map(|v| v.to_f64()).collect();
                        let plane = head_kv * plane..(head_kv + 1) * plane;
                        let (keys, values) = (&wide_keys[plane.clone()], &wide_values[plane]);
                        attend(&query, keys, values, position + token + 1)
                    })
                    .collect();
                let ours = read_tiles(&mut findings, &case, &out, width, chunk)?;
                let same =
                    |a: &[f16], b: &[f16]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                let values = ours.iter().map(|v| v.to_f64());
                findings.relative("attention", &case, &reference, values, 1e-3);
                let again = attend_on_device()?;
                let again = read_tiles(&mut findings, &case, &again, width, chunk)?;
                findings.holds(same(&ours, &again), || {
                    format!("{case}: other bits the second time")
                });
            }
        }
    }
    findings.verdict()
}

/// Where the blocks of chunk products meet.
struct MeetingBuffers {
    partial: Buffer,
    finished: Buffer,
}

impl MeetingBuffers {
    fn new() -> Result<Self> {
        Ok(Self {
            partial: Buffer::poisoned(chunk_products::partial_len(device()?) * 4)?,
            finished: Buffer::zeroed(chunk_products::counters(device()?) * 4)?,
        })
    }

    fn addresses(&self) -> Meeting {
        Meeting {
            partial: self.partial.address(),
            finished: self.finished.address(),
        }
    }

    /// Counters must be left at zero.
    fn check(&self) -> Result<()> {
        let left: Vec<u32> = self.finished.read()?;
        ensure!(left.iter().all(|&count| count == 0), "counters are left");
        Ok(())
    }
}

/// Random activations of a chunk.
struct ChunkInput {
    buffer: Buffer,
    values: Vec<f64>,
    columns: usize,
    chunk: Chunk,
}

impl ChunkInput {
    fn new(random: &mut Random, columns: usize, chunk: Chunk) -> Result<Self> {
        let values: Vec<f16> = floats(random, columns * chunk.tokens, 1.0)
            .into_iter()
            .map(f16::from_f32)
            .collect();
        Ok(Self {
            buffer: Buffer::new(&tiles(&values, columns, chunk))?,
            values: values.iter().map(|v| v.to_f64()).collect(),
            columns,
            chunk,
        })
    }

    /// (rows, tokens)
    fn product(&self, weights: &Weights) -> Vec<Sum> {
        let tokens = self.values.chunks_exact(self.columns);
        tokens.flat_map(|x| weights.times(x)).collect()
    }

    /// Runs Store into fresh memory of each matrix.
    fn store(&self, matrices: &[(Matrix, u64)], meeting: &MeetingBuffers) -> Result<Vec<Vec<f32>>> {
        let (mut products, mut outputs) = (Vec::new(), Vec::new());
        for &(weights, bias) in matrices {
            let out = Buffer::poisoned(weights.rows * self.chunk.tokens * 4)?;
            products.push(Product {
                weights,
                bias,
                out: out.address(),
            });
            outputs.push(out);
        }
        self.multiply(&products, 0, Epilogue::Store, meeting)?;
        outputs.iter().map(Buffer::read).collect()
    }

    fn multiply(
        &self,
        products: &[Product],
        gated: u64,
        epilogue: Epilogue,
        meeting: &MeetingBuffers,
    ) -> Result<()> {
        let launch = matmul(
            device()?,
            products,
            self.buffer.address(),
            gated,
            epilogue,
            meeting.addresses(),
            self.chunk,
        )?;
        // SAFETY: the launch is that of buffers which the caller holds until this returns.
        unsafe { run(&launch)? };
        meeting.check()
    }
}

/// Bits of float values, for comparison.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn chunk_products_store_add_and_gate() -> TestResult {
    let (mut random, mut findings) = (random(9), Findings::default());
    let meeting = MeetingBuffers::new()?;
    for (t, tensor_type) in CHUNK_TYPES.into_iter().enumerate() {
        // Float16 weights and activations are exact; others are rounded to float16 once or twice.
        let bound = if tensor_type == F16 { 1e-4 } else { 1e-3 };
        for (s, (rows, columns)) in CHUNK_SHAPES.into_iter().enumerate() {
            let gate = Weights::new(&mut random, tensor_type, (rows, columns))?;
            let up = Weights::new(&mut random, tensor_type, (rows, columns))?;
            let third = Weights::new(&mut random, tensor_type, (33, columns))?;
            for (l, tokens) in CHUNK_LENS.into_iter().enumerate() {
                // Every length meets a third of the shapes, every length all types.
                if (t + s + l) % 3 != 0 {
                    continue;
                }
                let case = format!("{}, {tokens} tokens", gate.shape());
                let chunk = Chunk { tokens };
                let input = ChunkInput::new(&mut random, gate.matrix.columns, chunk)?;
                let (gates, ups) = (input.product(&gate), input.product(&up));

                let bias = floats(&mut random, rows, 1.0);
                let bias_buffer = Buffer::new(&bias)?;
                let matrices = [
                    (gate.matrix, bias_buffer.address()),
                    (third.matrix, 0),
                    (up.matrix, 0),
                ];
                let stored = input.store(&matrices, &meeting)?;
                let biased = gates.iter().zip(bias.iter().cycle());
                let biased: Vec<Sum> = biased
                    .map(|(sum, &bias)| sum.affine(1.0, bias.into()))
                    .collect();
                let references = [&biased, &input.product(&third), &ups];
                for (reference, ours) in references.into_iter().zip(&stored) {
                    findings.sums("stored", &case, reference, ours, bound);
                }
                let again = input.store(&matrices, &meeting)?;
                let same = stored.iter().zip(&again).all(|(a, b)| bits(a) == bits(b));
                findings.holds(same, || format!("{case}: other bits the second time"));
                // One matrix alone is cut up differently.
                let alone = input.store(&matrices[2..], &meeting)?;
                findings.sums("stored alone", &case, &ups, &alone[0], bound);

                let factor = 16.0;
                let old = floats(&mut random, rows * tokens, 1.0);
                let x = Buffer::new(&old)?;
                let product = Product {
                    weights: gate.matrix,
                    bias: 0,
                    out: x.address(),
                };
                input.multiply(&[product], 0, Epilogue::Add { factor }, &meeting)?;
                let sums = gates.iter().zip(&old);
                let sums: Vec<Sum> = sums
                    .map(|(sum, &old)| sum.affine(factor.into(), old.into()))
                    .collect();
                findings.sums("added", &case, &sums, &x.read()?, bound);

                let products = [&gate, &up].map(|weights| Product {
                    weights: weights.matrix,
                    bias: 0,
                    out: 0,
                });
                let gated = Buffer::poisoned(chunk.tile_bytes(rows))?;
                input.multiply(&products, gated.address(), Epilogue::Gate, &meeting)?;
                let pairs = gates.iter().zip(&ups);
                let scale = 1.0 / f64::from(GATE_SCALE);
                let reference: Vec<Sum> = pairs
                    .map(|(&g, &u)| Sum::gated(g, u).affine(scale, 0.0))
                    .collect();
                let ours = read_tiles(&mut findings, &case, &gated, rows, chunk)?;
                // The result is float16.
                findings.sums("gated", &case, &reference, &widened(&ours), bound + 5e-4);
            }
        }
    }
    findings.verdict()
}

/// And what it wrote is what a product with float16 weights reads.
fn more_rows_than_blocks_take_at_once_are_multiplied() -> TestResult {
    let (mut random, mut findings) = (random(12), Findings::default());
    let meeting = MeetingBuffers::new()?;
    // 16 rows a warp, at most 15 warps a block.
    let rows = 16 * 15 * device()?.multiprocessors() + 1000;
    let weights = Weights::new(&mut random, Q4_K, (rows, 512))?;
    for tokens in [3, 40, 70] {
        let case = format!("{}, {tokens} tokens", weights.shape());
        let input = ChunkInput::new(&mut random, weights.matrix.columns, Chunk { tokens })?;
        let stored = input.store(&[(weights.matrix, 0)], &meeting)?;
        findings.sums("stored", &case, &input.product(&weights), &stored[0], 1e-3);
    }
    findings.verdict()
}

fn float_to_half_rounds_to_nearest() -> TestResult {
    let (mut random, mut findings) = (random(10), Findings::default());
    let meeting = MeetingBuffers::new()?;
    for tensor_type in [F32, BF16] {
        for shape in [(1, 512), (7, 96), (33, 4864), (577, 576)] {
            let mut weights = Weights::new(&mut random, tensor_type, shape)?;
            let (case, (rows, columns)) = (weights.shape(), shape);
            let out = Buffer::poisoned(chunk_kernels::half_bytes(rows, columns))?;
            let launch = chunk_kernels::float_to_half(device()?, weights.matrix, out.address())?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let halves: Vec<f16> = weights.values.iter().map(|&v| f16::from_f32(v)).collect();
            // Columns are multiples of 8, so that rows need no filling up.
            let ours: Vec<f16> = out.read()?;
            let same = ours.len() == halves.len()
                && ours
                    .iter()
                    .zip(&halves)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
            findings.holds(same, || format!("{case}: not the nearest float16"));

            weights.values = widened(&halves);
            let matrix = Matrix {
                address: out.address(),
                kind: Format::of(F16).id as i32,
                ..weights.matrix
            };
            let input = ChunkInput::new(&mut random, columns, Chunk { tokens: 33 })?;
            let stored = input.store(&[(matrix, 0)], &meeting)?;
            let reference = input.product(&weights);
            findings.sums("stored", &case, &reference, &stored[0], 1e-4);
        }
    }
    findings.verdict()
}

fn gate_tokens_gates_and_stays_finite() -> TestResult {
    let (mut random, mut findings) = (random(11), Findings::default());
    for columns in [256, 576, 896, 1056, 4864] {
        for tokens in CHUNK_LENS {
            let (case, chunk) = (format!("{columns} x {tokens}"), Chunk { tokens });
            let mut gate = floats(&mut random, columns * tokens, 3.0);
            let mut up = floats(&mut random, columns * tokens, 3.0);
            // Past float16's range, on both sides, and where the exponential is infinite.
            (gate[0], up[0]) = (1e4, 1e4);
            (gate[1], up[1]) = (1e4, -1e4);
            (gate[2], up[2]) = (-1e4, 1e4);
            let inputs = (Buffer::new(&gate)?, Buffer::new(&up)?);
            let out = Buffer::poisoned(chunk.tile_bytes(columns))?;
            let launch = chunk_kernels::gate_tokens(
                device()?,
                inputs.0.address(),
                inputs.1.address(),
                out.address(),
                columns,
                chunk,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let largest = f16::MAX.to_f64();
            let pairs = gate.iter().zip(&up);
            let reference: Vec<f64> = pairs
                .map(|(&g, &u)| silu(g.into()) * f64::from(u) / f64::from(GATE_SCALE))
                .map(|v| v.clamp(-largest, largest))
                .collect();
            let ours = read_tiles(&mut findings, &case, &out, columns, chunk)?;
            findings.rounded("gated values", &case, &reference, &ours, 1e-6);
        }
    }
    findings.verdict()
}

//! Products with a chunk of tokens.

use anyhow::{Result, ensure};
use half::f16;
use sharpi::{
    cuda::{
        Matrix,
        launches::{self, Chunk, Epilogue, GATE_SCALE, Linear, SplitKWorkspace},
    },
    quant::TensorType::{self, *},
};

use crate::{
    common::{gguf_writer::Random, gpu::TestResult},
    harness::{
        Buffer, CHUNK_LENS, Findings, activation_of, bits, device, floats, random, run, widened,
    },
    matrices::{Sum, Weights},
    tiles::{read_tiles, tiles},
};

/// Those that GEMMs read as they are.
const CHUNK_TYPES: [TensorType; 17] = [
    Q4_K, Q6_K, Q5_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q3_K, Q2_K, IQ4_NL, IQ4_XS, MXFP4, IQ3_S,
    IQ3_XXS, IQ2_S, F16,
];

const CHUNK_SHAPES: [(usize, usize); 6] = [
    (577, 576),
    (33, 1536),
    (7, 896),
    (1, 512),
    (130, 2080),
    (40, 4864),
];

/// The memory of a split-K workspace.
pub struct WorkspaceBuffers {
    partial: Buffer,
    finished: Buffer,
}

impl WorkspaceBuffers {
    pub fn new() -> Result<Self> {
        Ok(Self {
            partial: Buffer::poisoned(launches::gemm_partial_len(device()?) * 4)?,
            finished: Buffer::zeroed(launches::gemm_counters(device()?) * 4)?,
        })
    }

    pub fn addresses(&self) -> SplitKWorkspace {
        SplitKWorkspace {
            partial: self.partial.address(),
            finished: self.finished.address(),
        }
    }

    /// Counters must be left at zero.
    pub fn check(&self) -> Result<()> {
        let left: Vec<u32> = self.finished.read()?;
        ensure!(left.iter().all(|&count| count == 0), "counters are left");
        Ok(())
    }
}

/// Random activations of a chunk.
pub struct ChunkInput {
    buffer: Buffer,
    values: Vec<f64>,
    columns: usize,
    chunk: Chunk,
}

impl ChunkInput {
    pub fn new(random: &mut Random, columns: usize, chunk: Chunk) -> Result<Self> {
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
    pub fn product(&self, weights: &Weights) -> Vec<Sum> {
        let tokens = self.values.chunks_exact(self.columns);
        tokens.flat_map(|x| weights.times(x)).collect()
    }

    /// Runs Store into fresh memory of each matrix.
    pub fn store(
        &self,
        matrices: &[(Matrix, u64)],
        workspace: &WorkspaceBuffers,
    ) -> Result<Vec<Vec<f32>>> {
        let (mut linears, mut outputs) = (Vec::new(), Vec::new());
        for &(weights, bias) in matrices {
            let out = Buffer::poisoned(weights.rows * self.chunk.tokens * 4)?;
            linears.push(Linear {
                weights,
                bias,
                out: out.address(),
            });
            outputs.push(out);
        }
        self.multiply(&linears, 0, Epilogue::Store, workspace)?;
        outputs.iter().map(Buffer::read).collect()
    }

    pub fn multiply(
        &self,
        linears: &[Linear],
        gated: u64,
        epilogue: Epilogue,
        workspace: &WorkspaceBuffers,
    ) -> Result<()> {
        let launch = launches::gemm(
            device()?,
            linears,
            self.buffer.address(),
            gated,
            epilogue,
            workspace.addresses(),
            self.chunk,
        )?;
        // SAFETY: the launch is that of buffers which the caller holds until this returns.
        unsafe { run(&launch)? };
        workspace.check()
    }
}

pub fn gemm_stores_add_and_gate() -> TestResult {
    let (mut random, mut findings) = (random(9), Findings::default());
    let workspace = WorkspaceBuffers::new()?;
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
                let stored = input.store(&matrices, &workspace)?;
                let biased = gates.iter().zip(bias.iter().cycle());
                let biased: Vec<Sum> = biased
                    .map(|(sum, &bias)| sum.affine(1.0, bias.into()))
                    .collect();
                let references = [&biased, &input.product(&third), &ups];
                for (reference, ours) in references.into_iter().zip(&stored) {
                    findings.sums("stored", &case, reference, ours, bound);
                }
                let again = input.store(&matrices, &workspace)?;
                let same = stored.iter().zip(&again).all(|(a, b)| bits(a) == bits(b));
                findings.holds(same, || format!("{case}: other bits the second time"));
                // One matrix alone is cut up differently.
                let alone = input.store(&matrices[2..], &workspace)?;
                findings.sums("stored alone", &case, &ups, &alone[0], bound);

                let factor = 16.0;
                let old = floats(&mut random, rows * tokens, 1.0);
                let x = Buffer::new(&old)?;
                let linear = Linear {
                    weights: gate.matrix,
                    bias: 0,
                    out: x.address(),
                };
                input.multiply(&[linear], 0, Epilogue::Add { factor }, &workspace)?;
                let sums = gates.iter().zip(&old);
                let sums: Vec<Sum> = sums
                    .map(|(sum, &old)| sum.affine(factor.into(), old.into()))
                    .collect();
                findings.sums("added", &case, &sums, &x.read()?, bound);

                let linears = [&gate, &up].map(|weights| Linear {
                    weights: weights.matrix,
                    bias: 0,
                    out: 0,
                });
                let gated = Buffer::poisoned(chunk.tile_bytes(rows))?;
                let activation = activation_of(chunk.tokens + rows / 16);
                let epilogue = Epilogue::Gate { activation };
                input.multiply(&linears, gated.address(), epilogue, &workspace)?;
                let pairs = gates.iter().zip(&ups);
                let scale = 1.0 / f64::from(GATE_SCALE);
                let reference: Vec<Sum> = pairs
                    .map(|(&g, &u)| Sum::gated(activation, g, u).affine(scale, 0.0))
                    .collect();
                let ours = read_tiles(&mut findings, &case, &gated, rows, chunk)?;
                // The result is float16.
                findings.sums("gated", &case, &reference, &widened(&ours), bound + 5e-4);
            }
        }
    }
    findings.verdict()
}

pub fn more_rows_than_blocks_take_at_once_are_multiplied() -> TestResult {
    let (mut random, mut findings) = (random(12), Findings::default());
    let workspace = WorkspaceBuffers::new()?;
    // 16 rows a warp, at most 15 warps a block.
    let rows = 16 * 15 * device()?.multiprocessors() + 1000;
    let weights = Weights::new(&mut random, Q4_K, (rows, 512))?;
    for tokens in [3, 40, 70] {
        let case = format!("{}, {tokens} tokens", weights.shape());
        let input = ChunkInput::new(&mut random, weights.matrix.columns, Chunk { tokens })?;
        let stored = input.store(&[(weights.matrix, 0)], &workspace)?;
        findings.sums("stored", &case, &input.product(&weights), &stored[0], 1e-3);
    }
    findings.verdict()
}

//! A whole decode step as one kernel: its stages, each block's share of them, and what they take of its shared memory.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{BranchSum, GROUP, WARP, decode_attention_splits, for_head_dim, gelu};
use crate::{
    backend::Tiles,
    cuda::{
        device::{Device, Launch, Parameter},
        params::{
            AttentionLayer, HEAD_KINDS, KvTiles, StepAttention, StepHeads, StepMatrix, StepParams,
            StepProduct,
        },
        tensor_types::{KernelType, UNIT},
        weights::Matrix,
    },
    model::decoder::{Activation, Attention},
};

/// A stage of the step kernel, in the order in which they run.
pub enum StepStage {
    /// `x = E[token] * factor`, and x times the norm's weights, f32 (columns).
    Embed {
        table: Matrix,
        factor: f32,
        norm: CUdeviceptr,
    },
    /// `W rms_norm(x) + bias` of queries, and where the layer has its own of keys and values.
    Qkv {
        /// Of queries, keys and values; without the last, values are what keys are before their norm.
        matrices: Vec<StepLinear>,
        epsilon: f32,
    },
    Attend {
        /// Of those that [`step`] is given.
        heads: usize,
        /// Packets of the newest token's key and value, and how many stages ago they were written, where layers share them.
        newest: Option<(CUdeviceptr, usize)>,
        layer: AttentionLayer,
        /// Where tokens that are far behind are, if they are kept in tiles; else zeros.
        tiles: KvTiles,
        values_are_keys: bool,
    },
    /// `x = (x + rms_norm(W a)) * scale`, and x times the norm's weights, f32 (rows), or 0: as it is.
    Add {
        matrix: Matrix,
        /// Whether `a` is what [`StepStage::GateInputs`] has written.
        plain: bool,
        /// What becomes of the product.
        sum: BranchSum,
        norm: CUdeviceptr,
    },
    /// `activation(gate rms_norm(x)) * (up rms_norm(x))`
    Gate {
        gate: Matrix,
        up: Matrix,
        activation: Activation,
        epsilon: f32,
    },
    /// `activation(gate x) * inputs`, f32 (rows), which the next stage reads as plain values.
    GateInputs {
        gate: Matrix,
        inputs: CUdeviceptr,
        activation: Activation,
    },
    /// `W rms_norm(x) + bias`
    Logits { linear: StepLinear, epsilon: f32 },
}

/// A matrix and its bias, f32 (rows), or 0.
#[derive(Clone, Copy)]
pub struct StepLinear {
    pub weights: Matrix,
    pub bias: CUdeviceptr,
}

/// Bytes of a stage as a block reads it.
pub const STEP_STAGE_BYTES: usize = size_of::<StepProduct>();
const _: () = assert!(size_of::<StepAttention>() == STEP_STAGE_BYTES);

/// `StepKind` of `kernels/step/product.cuh`.
mod kind {
    pub const EMBED: i32 = 0;
    pub const QKV: i32 = 1;
    pub const ATTEND: i32 = 2;
    pub const ADD: i32 = 3;
    pub const GATE: i32 = 4;
    pub const GATE_INPUTS: i32 = 5;
    pub const LOGITS: i32 = 6;
}

/// Threads of a block: one warp more than `CONSUMERS` of `kernels/step/ring.cuh`.
const THREADS: usize = 13 * WARP;

/// `RING_AT`, `SLOT_BYTES`, `MAX_SLOTS` and `SHARES` of `kernels/step/ring.cuh`.
const RING_AT: usize = 1792;
const SLOT_BYTES: usize = 10_112;
const MAX_SLOTS: usize = 24;
const SHARES: usize = 8;

/// Of a vector in shared memory: two groups' integers and their scales.
const UNIT_BYTES: usize = UNIT + 2 * 4;

/// Entries of the ring that are asked for at a time: more do not come sooner, and activations wait behind them.
const IN_FLIGHT: usize = 4;

/// Entries of the ring from one that a warp waits for to the next, at most: it takes every 12th tile, at least 2 of which
/// make an entry, and up to 3 matrices begin a new one; of floats, every 12th row or a piece of it; or what is cached of every
/// 8th 16 tokens (of heads of 512, every 4th), keys and values together or keys before values; of tiles every 8th piece, and the
/// last one.
const fn stride(head_dim: usize) -> usize {
    if head_dim > 128 { 15 } else { 8 }
}

impl StepStage {
    /// Whether only the kernel for large heads does it: `GEMMA` of `kernels/step.cu`.
    fn is_gemmas(&self) -> bool {
        match self {
            Self::Add { sum, .. } => sum.norm != 0 || sum.scale != 1.0,
            Self::Gate { activation, .. } => *activation != Activation::Silu,
            Self::GateInputs { .. } => true,
            _ => false,
        }
    }

    /// The stage as a block does it.
    fn of_block(&self, block: Block) -> Result<StepProduct> {
        let mut product = StepProduct::zeroed();
        let mut matrices = Vec::new();
        let mut has_floats = false;
        let mut matrix = |linear: &StepLinear, pairs| {
            has_floats |= linear.weights.tensor_type.is_float();
            step_matrix(linear, pairs)
        };
        match *self {
            Self::Embed {
                table,
                factor,
                norm,
            } => {
                let columns = block.owned(table.columns);
                product.kind = kind::EMBED;
                product.columns = table.columns as i32;
                product.factor = factor;
                product.norm = norm;
                matrices.push(StepMatrix {
                    weights: table.address,
                    tensor_type: KernelType::of(table.tensor_type)?.id,
                    rows: columns.len() as i32,
                    first_row: columns.start as i32,
                    ..StepMatrix::zeroed()
                });
            }
            Self::Qkv {
                matrices: ref qkv,
                epsilon,
            } => {
                product.kind = kind::QKV;
                product.columns = qkv[0].weights.columns as i32;
                product.factor = epsilon;
                let shares = block.byte_shares(qkv)?;
                let mut before = 0;
                for (linear, pairs) in qkv.iter().zip(shares) {
                    let mut matrix = matrix(linear, pairs)?;
                    matrix.first_row += before;
                    before += linear.weights.rows as i32;
                    matrices.push(matrix);
                }
            }
            Self::Attend {
                heads,
                newest,
                layer,
                tiles,
                values_are_keys,
            } => {
                let (newest, newest_age) = newest.unwrap_or_default();
                return Ok(bytemuck::cast(StepAttention {
                    kind: kind::ATTEND,
                    values_are_keys: i32::from(values_are_keys),
                    layer,
                    newest,
                    newest_age: newest_age as i32,
                    heads: heads as i32,
                    tiles,
                    padding: [0; 13],
                }));
            }
            Self::Add {
                matrix: weights,
                plain,
                sum,
                norm,
            } => {
                product.kind = kind::ADD;
                product.plain = i32::from(plain);
                product.columns = weights.columns as i32;
                product.norm = norm;
                product.branch_norm = sum.norm;
                product.branch_epsilon = sum.epsilon;
                product.all_rows = weights.rows as i32;
                product.scale = sum.scale;
                let pairs = block.row_share(weights.rows);
                // A warp that waits for all blocks' squares has no other group to give any of.
                ensure!(
                    sum.norm == 0 || 2 * pairs.len() + GROUP <= THREADS - WARP,
                    "{} multiprocessors are too few for the norm of a branch of {} values",
                    block.count,
                    weights.rows
                );
                matrices.push(matrix(&weights.into(), pairs)?);
            }
            Self::Gate {
                gate,
                up,
                activation,
                epsilon,
            } => {
                product.gelu = gelu(activation);
                product.kind = kind::GATE;
                product.columns = gate.columns as i32;
                product.factor = epsilon;
                product.all_rows = gate.rows as i32;
                let pairs = block.row_share(gate.rows);
                for weights in [gate, up] {
                    matrices.push(matrix(&weights.into(), pairs.clone())?);
                }
            }
            Self::GateInputs {
                gate,
                inputs,
                activation,
            } => {
                product.kind = kind::GATE_INPUTS;
                product.columns = gate.columns as i32;
                product.gelu = gelu(activation);
                product.inputs = inputs;
                let linear = gate.into();
                for pairs in block.byte_shares(&[linear])? {
                    matrices.push(matrix(&linear, pairs)?);
                }
            }
            Self::Logits { linear, epsilon } => {
                product.kind = kind::LOGITS;
                product.columns = linear.weights.columns as i32;
                product.factor = epsilon;
                for pairs in block.byte_shares(&[linear])? {
                    matrices.push(matrix(&linear, pairs)?);
                }
            }
        }
        let slices = (product.columns as usize).div_ceil(WARP * UNIT);
        product.slices = slices as i32;
        product.slices_inverse = inverse(slices);
        product.rows = matrices.iter().map(|matrix| 2 * matrix.pairs).sum();
        product.floats = i32::from(has_floats);
        product.matrices = matrices.len() as i32;
        product.matrix[..matrices.len()].copy_from_slice(&matrices);
        Ok(product)
    }
}

impl From<Matrix> for StepLinear {
    fn from(weights: Matrix) -> Self {
        Self { weights, bias: 0 }
    }
}

/// 2^32 / `count`, rounded up: the kernel divides by it. Nothing is divided by 1.
fn inverse(count: usize) -> u32 {
    (u32::MAX / count as u32).wrapping_add(1)
}

/// A block of the step kernel.
#[derive(Clone, Copy)]
struct Block {
    index: usize,
    count: usize,
    /// Whether two blocks may have rows of a group.
    splits_groups: bool,
}

impl Block {
    /// Its part of `things` that are shared out evenly.
    fn part(self, things: usize) -> Range<usize> {
        things * self.index / self.count..things * (self.index + 1) / self.count
    }

    /// The rows of the groups that it owns, of what is quantized in groups: those of which the first row is among its part.
    fn owned(self, rows: usize) -> Range<usize> {
        let Range { start, end } = self.part(rows.div_ceil(2));
        let boundary = |pair: usize| (2 * pair).next_multiple_of(GROUP).min(rows);
        boundary(start)..boundary(end)
    }

    /// Its row pairs of a matrix whose product is then quantized in groups: as many as any other block has, or where groups may
    /// not be split those of the groups that it owns.
    fn row_share(self, rows: usize) -> Range<usize> {
        if self.splits_groups {
            return self.part(rows.div_ceil(2));
        }
        let Range { start, end } = self.owned(rows);
        start / 2..end.div_ceil(2)
    }

    /// Its row pairs of each of several matrices: of all of them together it has as many bytes as any other.
    fn byte_shares(self, linears: &[StepLinear]) -> Result<Vec<Range<usize>>> {
        let mut sizes = Vec::new();
        for StepLinear { weights, .. } in linears {
            let pair_bytes = KernelType::of(weights.tensor_type)?.pair_bytes(weights.columns);
            sizes.push((weights.rows.div_ceil(2), pair_bytes));
        }
        let bytes = self.part(sizes.iter().map(|(pairs, bytes)| pairs * bytes).sum());
        let mut before = 0;
        let shares = sizes.iter().map(|&(pairs, pair_bytes)| {
            let boundary = |at: usize| {
                let at = at.saturating_sub(before);
                at.div_ceil(pair_bytes).min(pairs)
            };
            let share = boundary(bytes.start)..boundary(bytes.end);
            before += pairs * pair_bytes;
            share
        });
        Ok(shares.collect())
    }
}

/// What a block's share of a matrix takes of the ring.
struct Entry {
    /// Of all of it
    bytes: usize,
    /// In an entry: of floats, which are in rows, 0 where a row takes several
    tiles: usize,
    tile_bytes: usize,
    /// What the last tile of a row pair has less than the first one, in bytes
    lacking: usize,
}

/// The row pairs `pairs` of a matrix.
fn step_matrix(linear: &StepLinear, pairs: Range<usize>) -> Result<StepMatrix> {
    let StepLinear { weights, bias } = *linear;
    let kernel_type = KernelType::of(weights.tensor_type)?;
    let pair_bytes = kernel_type.pair_bytes(weights.columns);
    let first_row = 2 * pairs.start;
    let slice = WARP * UNIT;
    let rows = (2 * pairs.end).min(weights.rows).saturating_sub(first_row);
    let entry = match kernel_type.tile_bytes(weights.columns) {
        Some(tile_bytes) => Entry {
            bytes: pairs.len() * pair_bytes,
            tiles: (SLOT_BYTES / kernel_type.pair_bytes(slice)).min(SHARES),
            tile_bytes,
            lacking: weights.columns.div_ceil(slice) * tile_bytes - pair_bytes,
        },
        None => Entry {
            bytes: rows * pair_bytes / 2,
            tiles: match SLOT_BYTES / pair_bytes {
                0 => 0,
                _ => (2 * SLOT_BYTES / pair_bytes).min(SHARES),
            },
            tile_bytes: pair_bytes / 2,
            lacking: 0,
        },
    };
    Ok(StepMatrix {
        weights: weights.address + (pairs.start * pair_bytes) as u64,
        bias: match bias {
            0 => 0,
            bias => bias + (first_row * size_of::<f32>()) as u64,
        },
        tensor_type: kernel_type.id,
        pairs: pairs.len() as i32,
        rows: rows as i32,
        first_row: first_row as i32,
        bytes: entry.bytes as i32,
        entry_tiles: entry.tiles as i32,
        entry_bytes: (entry.tiles.max(1) * entry.tile_bytes) as i32,
        lacking: entry.lacking as i32,
    })
}

/// The step kernel's launch for layers whose heads are those of `attentions`, and what is to lie at `params.stages`: the
/// stages of each block, (stages, blocks). Of `params` it fills in what follows from the stages and the heads. `tiles`: how all
/// layers keep tokens that are far behind, if so.
///
/// # Errors
/// Heads that it does not do, or what the device lacks.
pub fn step(
    device: &Device,
    attentions: &[&Attention],
    tiles: Option<Tiles>,
    stages: &[StepStage],
    params: StepParams,
) -> Result<(Launch, Vec<StepProduct>)> {
    let (major, minor) = device.compute_capability();
    ensure!(
        major >= 9,
        "it takes compute capability 9.0, and {} has {major}.{minor}",
        device.name()
    );
    let (heads, head_dim) = heads(device, attentions)?;
    let for_gemma = head_dim > 128;
    let name = for_head_dim("step", head_dim)?;
    let function = match tiles {
        None => device.function("step", &name)?,
        Some(tiles) => {
            ensure!(
                !for_gemma,
                "heads of more than 128 values in a KV cache of type {tiles}"
            );
            device.function("step_tiles", &format!("{name}_{tiles}"))?
        }
    };
    ensure!(
        for_gemma || !stages.iter().any(StepStage::is_gemmas),
        "heads of {head_dim} values beside norms of branches, GELU or what a token gives to layers"
    );
    let blocks = device.multiprocessors();
    let mut of_blocks = Vec::with_capacity(blocks * stages.len());
    for index in 0..blocks {
        let block = Block {
            index,
            count: blocks,
            splits_groups: for_gemma,
        };
        for stage in stages {
            of_blocks.push(stage.of_block(block)?);
        }
    }
    let of_attention = attentions
        .iter()
        .map(|attention| attention_bytes(attention.head_dim, attention.group()));
    let needs = SharedNeeds::new(&mut of_blocks, of_attention.max().unwrap_or(0));
    let most = device.shared_bytes_per_block() - function.static_shared_bytes;
    let slots = (most.saturating_sub(RING_AT + needs.bytes()) / SLOT_BYTES).min(MAX_SLOTS);
    let least_slots = stride(head_dim) + IN_FLIGHT;
    ensure!(
        slots >= least_slots,
        "it takes {} bytes of shared memory, and a block of {} may have {most}",
        RING_AT + least_slots * SLOT_BYTES + needs.bytes(),
        device.name()
    );
    let ring_end = RING_AT + slots * SLOT_BYTES;
    let params = StepParams {
        stage_count: stages.len() as i32,
        slots: slots as i32,
        slots_inverse: inverse(slots),
        in_flight: IN_FLIGHT as i32,
        heads,
        ..needs.place(ring_end, &mut of_blocks, params)
    };
    let launch = Launch {
        function,
        grid: [blocks as u32, 1, 1],
        block: [THREADS as u32, 1],
        shared_bytes: (ring_end + needs.bytes()) as u32,
        parameter: Parameter::new(params),
        dependent: false,
        cooperative: true,
    };
    Ok((launch, of_blocks))
}

/// The kinds of heads as the kernel takes them, and the size in the name of the one that does them: that for heads of 256
/// values does heads of 512, too.
fn heads(device: &Device, attentions: &[&Attention]) -> Result<([StepHeads; HEAD_KINDS], usize)> {
    ensure!(
        attentions.len() <= HEAD_KINDS,
        "the layers' heads are of {} kinds, and the kernel does {HEAD_KINDS}",
        attentions.len()
    );
    let mut heads = [StepHeads::zeroed(); HEAD_KINDS];
    for (heads, attention) in heads.iter_mut().zip(attentions) {
        let (head_count_kv, group) = (attention.head_count_kv, attention.group());
        *heads = StepHeads {
            head_dim: attention.head_dim as i32,
            head_count_kv: head_count_kv as i32,
            group: group as i32,
            splits: decode_attention_splits(device, head_count_kv, group) as i32,
            window: attention.window.unwrap_or(0) as i32,
        };
    }
    let mut kernels = attentions
        .iter()
        .map(|attention| attention.head_dim.min(256));
    let head_dim = kernels.next().context("there are no layers")?;
    ensure!(
        kernels.all(|other| other == head_dim),
        "the layers' heads differ in size"
    );
    Ok((heads, head_dim))
}

/// What a block takes of shared memory behind the ring, in bytes: the most of any stage and block.
struct SharedNeeds {
    hidden: usize,
    /// What a product's end reads, while the next stage's vector may come
    row_sums: usize,
    /// Attention, or a product
    stage: usize,
}

impl SharedNeeds {
    /// Places each product's parts, as seen from behind the residual stream.
    fn new(stages: &mut [StepProduct], attention: usize) -> Self {
        let row_sums = |stage: &StepProduct| {
            let sums = stage.rows as usize * stage.slices as usize * size_of::<f32>();
            sums.next_multiple_of(16)
        };
        let inner =
            |stage: &&StepProduct| !matches!(stage.kind, kind::EMBED | kind::ATTEND | kind::LOGITS);
        let of_inner = stages.iter().filter(inner).map(row_sums);
        let mut needs = Self {
            hidden: 0,
            row_sums: of_inner.max().unwrap_or(0),
            stage: attention,
        };
        for stage in stages {
            let columns = stage.columns as usize;
            match stage.kind {
                kind::EMBED => {
                    let hidden = stage.matrix[0].rows as usize * size_of::<f32>();
                    needs.hidden = needs.hidden.max(hidden.next_multiple_of(16));
                }
                kind::ATTEND => {}
                _ => {
                    let units = columns.div_ceil(UNIT);
                    let mut end = needs.row_sums;
                    let mut part = |bytes: usize| {
                        let at = end;
                        end += bytes.next_multiple_of(16);
                        at as i32
                    };
                    part(units * UNIT_BYTES);
                    stage.squares = part(units * 2 * 3 * size_of::<f32>());
                    stage.unquantized = part(match stage.floats {
                        0 => 0,
                        _ => columns * size_of::<f32>(),
                    });
                    if stage.kind == kind::LOGITS {
                        // No stage follows, and they are many.
                        stage.row_sums = part(row_sums(stage));
                    }
                    needs.stage = needs.stage.max(end);
                }
            }
        }
        needs
    }

    fn bytes(&self) -> usize {
        self.hidden + self.stage
    }

    /// Places everything from `at` on.
    fn place(&self, at: usize, stages: &mut [StepProduct], params: StepParams) -> StepParams {
        let behind = (at + self.hidden) as i32;
        for stage in stages {
            if !matches!(stage.kind, kind::EMBED | kind::ATTEND) {
                stage.squares += behind;
                stage.unquantized += behind;
                stage.row_sums += behind;
            }
        }
        StepParams {
            hidden: at as i32,
            attention: behind,
            vector: behind + self.row_sums as i32,
            ..params
        }
    }
}

/// `AttentionMemory` of `kernels/step/attention.cuh`.
fn attention_bytes(head_dim: usize, group: usize) -> usize {
    /// `WARPS` and `HEADS` of `kernels/decode_attention.cuh`.
    const WARPS: usize = 8;
    const HEADS: usize = 8;
    // `JOINED_HEADS` of `kernels/step/attention.cuh`.
    let joined = match head_dim {
        ..=128 => group.min(HEADS),
        _ => group.min(2),
    };
    let (query, newest) = (32 * head_dim, 2 * 2 * head_dim);
    let sums = (2 * WARPS + 2) * HEADS * size_of::<f32>() + size_of::<CUdeviceptr>();
    let sums = sums.next_multiple_of(16);
    let rows = (group.min(HEADS) + 1) * head_dim * size_of::<f32>();
    let (teams, exchange) = match head_dim {
        512 => (WARPS / 2, 2 * WARPS * WARP * 4 * size_of::<f32>()),
        _ => (WARPS, 0),
    };
    let joining = teams * joined * (head_dim + 2) * size_of::<f32>();
    query + newest + sums + rows.max(joining).max(exchange)
}

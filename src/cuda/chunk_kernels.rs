//! The kernels that read a chunk of a prompt as typed launches: `kernels/PREFILL.md` says what each computes and how its grid
//! is chosen.

use anyhow::{Result, anyhow, ensure};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{ARCHS, Arguments, Device, Launch},
    kernels::Normed,
    weights::Matrix,
};
use crate::quant::TensorType;

/// Values of a row that lie together in a tile of activations.
const STEP: usize = 128;

/// Tokens of an attention tile times query heads that share a key/value head, at most.
const ATTENTION_ROWS: usize = 128;

/// What the gated product is divided by, and the product behind it multiplied with: it can pass float16's range.
pub const GATE_SCALE: f32 = 16.0;

/// Tokens that pass through the layers together.
#[derive(Clone, Copy)]
pub struct Chunk {
    pub tokens: usize,
}

impl Chunk {
    /// Tokens that activations have room for.
    pub fn padded(self) -> usize {
        self.tokens.next_multiple_of(8)
    }

    /// Bytes of float16 activations (columns, tokens), as the products read them.
    pub fn tile_bytes(self, columns: usize) -> usize {
        columns.next_multiple_of(STEP) * self.padded() * 2
    }
}

/// One matrix of a product, its results being f32 (out_stride, tokens).
#[derive(Clone, Copy)]
pub struct Product {
    pub weights: Matrix,
    /// f32 (rows), or 0
    pub bias: CUdeviceptr,
    pub out: CUdeviceptr,
}

/// What a product does with its sums.
#[derive(Clone, Copy, PartialEq)]
pub enum Epilogue {
    /// `out = W x + bias`
    Store,
    /// `out += factor * W x`
    Add { factor: f32 },
    /// `gated = silu(G x) * (U x) / GATE_SCALE`, float16
    Gate,
}

/// Where blocks that share a tile meet; for all products.
#[derive(Clone, Copy)]
pub struct Meeting {
    /// f32
    pub partial: CUdeviceptr,
    /// u32, zero between launches
    pub finished: CUdeviceptr,
}

/// `struct Matrix` of `kernels/matmul.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MatrixParams {
    weights: CUdeviceptr,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    rows: i32,
    out_stride: i32,
}

/// `struct ProductParams` of `kernels/matmul.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProductParams {
    matrix: [MatrixParams; 3],
    x: CUdeviceptr,
    gated: CUdeviceptr,
    partial: CUdeviceptr,
    finished: CUdeviceptr,
    factor: f32,
    matrices: i32,
    epilogue: i32,
    tokens: i32,
    padded_tokens: i32,
    columns: i32,
    stages: i32,
    unused: i32,
}

/// `struct RopeParams` of `kernels/chunk.cu`, which says what each field is.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct RopeParams {
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub q_norm: CUdeviceptr,
    pub k_norm: CUdeviceptr,
    pub frequencies: CUdeviceptr,
    pub q_out: CUdeviceptr,
    pub k_cache: CUdeviceptr,
    pub v_cache: CUdeviceptr,
    pub position: CUdeviceptr,
    pub epsilon: f32,
    pub context: i32,
    pub head_count: i32,
    pub head_count_kv: i32,
    pub rope_dims: i32,
    pub interleaved: i32,
}

/// `struct FlashParams` of `kernels/flash_attention.cu`, which says what each field is.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct FlashParams {
    pub q: CUdeviceptr,
    pub k_cache: CUdeviceptr,
    pub v_cache: CUdeviceptr,
    pub out: CUdeviceptr,
    pub position: CUdeviceptr,
    pub partial: CUdeviceptr,
    pub finished: CUdeviceptr,
    pub tokens: i32,
    pub padded_tokens: i32,
    pub context: i32,
    pub group: i32,
}

/// `x[token] = E[tokens[token]]`, f32 (hidden_size, tokens).
pub fn embed_chunk(
    device: &Device,
    embedding: Matrix,
    tokens: CUdeviceptr,
    x: CUdeviceptr,
    chunk: Chunk,
) -> Result<Launch> {
    let no_norm = Normed::zeroed();
    let mut launch = super::kernels::embed(device, embedding, tokens, x, 0, no_norm)?;
    launch.grid[1] = chunk.tokens as u32;
    Ok(launch)
}

/// `out = rms_norm(x)` of each token as float16 activations. `x` is f32 (columns, tokens), `weight` f32 (columns).
pub fn norm_tokens(
    device: &Device,
    x: CUdeviceptr,
    weight: CUdeviceptr,
    out: CUdeviceptr,
    epsilon: f32,
    columns: usize,
    chunk: Chunk,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("chunk", "norm_tokens")?,
        grid: [chunk.tokens as u32, 1, 1],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(x)
            .with(weight)
            .with(out)
            .with(epsilon)
            .with(columns as i32)
            .with(chunk.padded() as i32),
        dependent: true,
    })
}

/// Queries and keys normalized and rotated, keys and values written to the cache.
pub fn rope_tokens(
    device: &Device,
    head_dim: usize,
    params: RopeParams,
    chunk: Chunk,
) -> Result<Launch> {
    let name = by_head_dim(
        head_dim,
        ["rope_tokens_d64", "rope_tokens_d128", "rope_tokens_d256"],
    )?;
    let blocks_a_token = if chunk.tokens < 64 { 6 } else { 2 };
    Ok(Launch {
        function: device.function("chunk", name)?,
        grid: [chunk.tokens as u32, blocks_a_token, 1],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default().with(params),
        dependent: true,
    })
}

/// Causal attention of the chunk, whose last position is below `context_end`, over the cache.
pub fn flash_attention(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    context_end: usize,
    params: FlashParams,
) -> Result<Launch> {
    let names = [
        "flash_attention_d64",
        "flash_attention_d128",
        "flash_attention_d256",
    ];
    let name = by_head_dim(head_dim, names)?;
    let tiles = attention_tiles(params.tokens as usize, params.group as usize)?;
    let splits = (device.multiprocessors() / (tiles * head_count_kv))
        .min(context_end.div_ceil(256))
        .max(1);
    let shared_bytes = match head_dim {
        64 | 128 if has_warpgroup_products(device) => 1280 * head_dim,
        64 => 32_768,
        _ => 65_536,
    };
    Ok(Launch {
        function: device.function("flash_attention", name)?,
        grid: [tiles as u32, head_count_kv as u32, splits as u32],
        block: [384, 1],
        shared_bytes: shared_bytes as u32,
        arguments: Arguments::default().with(params),
        dependent: true,
    })
}

/// Tiles of attention for `tokens` tokens.
pub fn attention_tiles(tokens: usize, group: usize) -> Result<usize> {
    ensure!(
        group <= ATTENTION_ROWS,
        "{group} query heads share a key/value head, and the CUDA kernels take {ATTENTION_ROWS}: use --device cpu"
    );
    Ok(tokens.div_ceil(ATTENTION_ROWS / group))
}

/// f32 values that attention's blocks need to meet.
pub fn attention_partial_len(
    device: &Device,
    head_dim: usize,
    tiles: usize,
    head_count_kv: usize,
) -> usize {
    (tiles * head_count_kv).max(device.multiprocessors()) * ATTENTION_ROWS * (head_dim + 2)
}

/// f32 values that a product's blocks need to meet: two tiles for each block.
pub fn product_partial_len(device: &Device) -> usize {
    2 * 2 * device.multiprocessors() * 131_072 / size_of::<f32>()
}

/// Counters that a product's blocks share: two blocks a multiprocessor at most.
pub fn product_counters(device: &Device) -> usize {
    2 * device.multiprocessors()
}

/// A float matrix in float16, which [`matmul`] reads. `out` has room for [`half_bytes`].
pub fn float_to_half(device: &Device, weights: Matrix, out: CUdeviceptr) -> Result<Launch> {
    Ok(Launch {
        function: device.function("chunk", "float_to_half")?,
        grid: [
            weights.columns.div_ceil(2048) as u32,
            weights.rows as u32,
            1,
        ],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(weights.address)
            .with(weights.kind)
            .with(weights.columns as i32)
            .with(out),
        dependent: true,
    })
}

/// Bytes of a matrix in float16.
pub fn half_bytes(rows: usize, columns: usize) -> usize {
    rows * (columns * 2).next_multiple_of(16)
}

/// `out = silu(gate) * up / GATE_SCALE` as float16 activations; `gate` and `up` are f32 (columns, tokens).
pub fn gate_tokens(
    device: &Device,
    gate: CUdeviceptr,
    up: CUdeviceptr,
    out: CUdeviceptr,
    columns: usize,
    chunk: Chunk,
) -> Result<Launch> {
    Ok(Launch {
        function: device.function("chunk", "gate_tokens")?,
        grid: [
            columns.next_multiple_of(STEP).div_ceil(1024) as u32,
            chunk.tokens as u32,
            1,
        ],
        block: [256, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(gate)
            .with(up)
            .with(out)
            .with(1.0 / GATE_SCALE)
            .with(columns as i32)
            .with(chunk.padded() as i32),
        dependent: true,
    })
}

/// One to three matrices of one type and one count of columns (with [`Epilogue::Gate`]: gate and up) times a chunk.
/// `x` and `gated` are float16 activations.
pub fn matmul(
    device: &Device,
    products: &[Product],
    x: CUdeviceptr,
    gated: CUdeviceptr,
    epilogue: Epilogue,
    meeting: Meeting,
    chunk: Chunk,
) -> Result<Launch> {
    let Matrix { columns, kind, .. } = products[0].weights;
    let tensor_type = TensorType::from_ggml_id(kind as u32)
        .ok_or_else(|| anyhow!("no kernel multiplies weights of type {kind}"))?;
    let rows: usize = products.iter().map(|product| product.weights.rows).sum();
    let tile = Tile::choose(device, rows, epilogue, chunk);
    let function = device.function("matmul", kernel_name(tensor_type, tile.tokens)?)?;
    let (stages, shared_bytes) =
        tile.shared_memory(device, tensor_type, function.static_shared_bytes)?;
    let mut matrix = [MatrixParams::zeroed(); 3];
    for (matrix, product) in matrix.iter_mut().zip(products) {
        *matrix = MatrixParams {
            weights: product.weights.address,
            bias: product.bias,
            out: product.out,
            rows: product.weights.rows as i32,
            out_stride: product.weights.rows as i32,
        };
    }
    let (number, factor) = match epilogue {
        Epilogue::Store => (0, 1.0),
        Epilogue::Add { factor } => (1, factor),
        Epilogue::Gate => (2, 1.0 / GATE_SCALE),
    };
    Ok(Launch {
        function,
        grid: [tile.blocks as u32, 1, 1],
        block: [tile.threads as u32, 1],
        shared_bytes: shared_bytes as u32,
        arguments: Arguments::default().with(ProductParams {
            matrix,
            x,
            gated,
            partial: meeting.partial,
            finished: meeting.finished,
            factor,
            matrices: products.len() as i32,
            epilogue: number,
            tokens: chunk.tokens as i32,
            padded_tokens: chunk.padded() as i32,
            columns: columns as i32,
            stages: stages as i32,
            unused: 0,
        }),
        dependent: true,
    })
}

/// How a product is cut up.
struct Tile {
    /// 32, 64 or 128
    tokens: usize,
    threads: usize,
    blocks: usize,
    blocks_a_multiprocessor: usize,
}

impl Tile {
    /// By what was measured on Qwen3-8B's shapes: small tiles while the weights' bytes set the pace, large ones once the
    /// matrix units do. Multiples of 32 blocks cut the rows evenly.
    fn choose(device: &Device, rows: usize, epilogue: Epilogue, chunk: Chunk) -> Self {
        let all = device.multiprocessors();
        let even = |blocks: usize| (blocks / 32 * 32).max(1);
        let narrow = |tokens, blocks_a_multiprocessor| Self {
            tokens,
            threads: 288,
            blocks: match blocks_a_multiprocessor * all {
                blocks if blocks >= 32 => even(blocks),
                blocks => blocks,
            },
            blocks_a_multiprocessor,
        };
        let wide = |blocks| Self {
            tokens: 128,
            threads: 384,
            blocks,
            blocks_a_multiprocessor: 1,
        };
        let gate = epilogue == Epilogue::Gate;
        match chunk.tokens {
            // The sums of few rows are added up from fewer, larger tiles.
            0..=32 if matches!(epilogue, Epilogue::Add { .. }) => narrow(64, 1),
            0..=32 => narrow(32, 2),
            33..=64 => narrow(64, 1),
            65..=256 if gate => wide(all.min(rows.div_ceil(256) * chunk.tokens.div_ceil(128))),
            65..=256 => narrow(64, 1),
            _ => wide(all),
        }
    }

    /// Stages of token tiles, and dynamic shared memory in bytes.
    fn shared_memory(
        &self,
        device: &Device,
        tensor_type: TensorType,
        static_bytes: usize,
    ) -> Result<(usize, usize)> {
        const STAGES: std::ops::RangeInclusive<usize> = 2..=8;
        /// What the driver keeps of each block's shared memory.
        const RESERVED: usize = 1024;
        let wide_weights = self.tokens == 128 && has_warpgroup_products(device);
        let run = run_bytes(tensor_type, wide_weights)?;
        let weights = if wide_weights { 32 * run } else { 16 * run };
        let stage = 256 * self.tokens;
        let limit = match self.blocks_a_multiprocessor {
            1 => device.shared_bytes_per_block(),
            n => device
                .shared_bytes_per_block()
                .min(device.shared_bytes_per_multiprocessor() / n - RESERVED),
        };
        let stages = limit.saturating_sub(static_bytes + weights) / stage;
        ensure!(
            stages >= *STAGES.start(),
            "{} has too little shared memory for products of {} weights: use --device cpu",
            device.name(),
            tensor_type.name()
        );
        let stages = stages.min(*STAGES.end());
        Ok((stages, weights + stages * stage))
    }
}

/// Bytes of `Run<TYPE, MT>` in `kernels/matmul.cu`; MT is 2 for wide weights, else 1.
fn run_bytes(tensor_type: TensorType, wide_weights: bool) -> Result<usize> {
    Ok(match (tensor_type, wide_weights) {
        (TensorType::Q4_K | TensorType::Q4_0, false) => 4608,
        (TensorType::Q4_K | TensorType::Q4_0, true) => 2304,
        (TensorType::Q4_1, false) => 5120,
        (TensorType::Q4_1, true) => 2560,
        (TensorType::Q6_K, _) => 3392,
        (TensorType::Q5_K | TensorType::Q5_0, _) => 2816,
        (TensorType::Q5_1, _) => 3072,
        (TensorType::Q8_0, _) => 4352,
        (TensorType::F16, _) => 4096,
        _ => anyhow::bail!(
            "no kernel multiplies {} weights with a chunk",
            tensor_type.name()
        ),
    })
}

fn kernel_name(tensor_type: TensorType, tile_tokens: usize) -> Result<&'static str> {
    macro_rules! names {
        ($($type:ident $name:literal),*) => {
            match (tensor_type, tile_tokens) {
                $(
                    (TensorType::$type, 32) => concat!("matmul_", $name, "_n32"),
                    (TensorType::$type, 64) => concat!("matmul_", $name, "_n64"),
                    (TensorType::$type, _) => concat!("matmul_", $name, "_n128"),
                )*
                _ => anyhow::bail!("no kernel multiplies {} weights with a chunk", tensor_type.name()),
            }
        };
    }
    Ok(names!(
        Q4_K "q4_k", Q6_K "q6_k", Q5_K "q5_k", Q8_0 "q8_0", Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0", Q5_1 "q5_1", F16 "f16"
    ))
}

fn by_head_dim(head_dim: usize, names: [&'static str; 3]) -> Result<&'static str> {
    match head_dim {
        64 => Ok(names[0]),
        128 => Ok(names[1]),
        256 => Ok(names[2]),
        _ => Err(anyhow!(
            "heads of {head_dim} values have no CUDA kernel: use --device cpu"
        )),
    }
}

/// Whether the kernels that this device runs are those with Hopper's own matrix instructions.
fn has_warpgroup_products(device: &Device) -> bool {
    device.compute_capability() == (9, 0) && ARCHS.split(',').any(|arch| arch == "90a")
}

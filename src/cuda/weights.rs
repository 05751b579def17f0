//! The model's weights in device memory, in the layout of `kernels/formats.cuh`.

use std::{borrow::Cow, sync::Arc};

use anyhow::{Result, bail};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Arguments, Device, DeviceBuffer, Launch},
    upload::{Piece, SLOT_BYTES, upload},
};
use crate::{
    model::{Model, Tensor},
    quant::TensorType,
};

/// Where every tensor begins: enough for every vector load and asynchronous copy.
const ALIGNMENT: usize = 256;

/// Values that one lane of a product reads.
pub const UNIT: usize = 64;

/// A matrix in device memory: (columns, rows), columns contiguous.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub address: CUdeviceptr,
    /// ggml's number of the type.
    pub kind: i32,
    pub rows: usize,
    pub columns: usize,
    /// Bytes that a product reads.
    pub bytes: usize,
}

impl Matrix {
    fn new(tensor: &Tensor, address: CUdeviceptr) -> Self {
        Self {
            address,
            kind: ggml_id(tensor.tensor_type()),
            rows: tensor.rows(),
            columns: tensor.row_len(),
            bytes: tensor.bytes().len(),
        }
    }
}

/// All weights. Vectors are float32; shapes as in [`crate::model::Weights`].
pub struct DeviceWeights {
    /// Owns what the addresses below point to.
    memory: DeviceBuffer,
    pub token_embd: Matrix,
    pub layers: Vec<LayerWeights>,
    pub output_norm: CUdeviceptr,
    pub output: Matrix,
    /// Radians a position.
    pub rope_frequencies: CUdeviceptr,
}

/// The weights of one layer; 0 stands for a vector that the architecture does not have.
pub struct LayerWeights {
    pub attn_norm: CUdeviceptr,
    pub attn_q: Matrix,
    pub attn_k: Matrix,
    pub attn_v: Matrix,
    pub attn_q_bias: CUdeviceptr,
    pub attn_k_bias: CUdeviceptr,
    pub attn_v_bias: CUdeviceptr,
    pub attn_q_norm: CUdeviceptr,
    pub attn_k_norm: CUdeviceptr,
    pub attn_output: Matrix,
    pub ffn_norm: CUdeviceptr,
    pub ffn_gate: Matrix,
    pub ffn_up: Matrix,
    pub ffn_down: Matrix,
}

impl DeviceWeights {
    /// Bytes that the weights of `model` take on a device.
    ///
    /// # Errors
    /// A tensor of a type that no kernel reads.
    pub fn bytes(model: &Model) -> Result<usize> {
        Ok(Layout::new(model)?.bytes)
    }

    /// Takes the memory and fills it. `progress` hears the bytes done and their total.
    pub fn upload(
        device: &Arc<Device>,
        model: &Model,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let layout = Layout::new(model)?;
        let memory = device.allocate(layout.bytes)?;
        // Padding is part of what a product reads.
        memory.clear()?;
        let base = memory.at(0);
        let repack = device.function("repack", "repack")?;
        let mut pieces = Vec::new();
        for (source, offset) in &layout.matrices {
            let rows_a_piece = (SLOT_BYTES / source.row_bytes()).clamp(1, source.rows());
            let (columns, rows, out) = (source.row_len(), source.rows(), base + *offset as u64);
            let kind = ggml_id(source.tensor_type());
            for (i, bytes) in source
                .bytes()
                .chunks(rows_a_piece * source.row_bytes())
                .enumerate()
            {
                let count = bytes.len() / source.row_bytes();
                // A row more: its pair may begin before the piece.
                let threads = (count + 1) * threads_a_row(source.tensor_type(), columns);
                let place = move |staged: CUdeviceptr| Launch {
                    function: repack,
                    grid: [threads.div_ceil(256) as u32, 1, 1],
                    block: [256, 1],
                    shared_bytes: 0,
                    arguments: Arguments::default()
                        .with(staged)
                        .with(out)
                        .with(kind)
                        .with(rows as i32)
                        .with(columns as i32)
                        .with((i * rows_a_piece) as i32)
                        .with(count as i32),
                    dependent: false,
                };
                pieces.push(Piece {
                    source: bytes,
                    place: Box::new(place),
                });
            }
        }
        // SAFETY: the arguments are those of `repack`; its input is the slot and its output a matrix inside `memory`.
        unsafe {
            upload(device, &pieces, &mut |done| {
                progress(done, layout.source_bytes)
            })?
        };
        for (values, offset) in &layout.vectors {
            memory.upload(*offset, bytemuck::cast_slice::<f32, u8>(values))?;
        }
        device.synchronize()?;
        Ok(layout.finish(model, memory))
    }

    /// Bytes of device memory.
    pub fn device_bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// Where everything goes.
struct Layout<'a> {
    matrices: Vec<(&'a Tensor, usize)>,
    vectors: Vec<(Cow<'a, [f32]>, usize)>,
    bytes: usize,
    source_bytes: usize,
}

impl<'a> Layout<'a> {
    fn new(model: &'a Model) -> Result<Self> {
        let mut layout = Self {
            matrices: Vec::new(),
            vectors: Vec::new(),
            bytes: 0,
            source_bytes: 0,
        };
        let weights = &model.weights;
        layout.matrix(&weights.token_embd)?;
        for layer in &weights.layers {
            for matrix in layer.matrices() {
                layout.matrix(matrix)?;
            }
            layout.vector(&*layer.attn_norm);
            layout.vector(&*layer.ffn_norm);
            for vector in [
                &layer.attn_q_bias,
                &layer.attn_k_bias,
                &layer.attn_v_bias,
                &layer.attn_q_norm,
                &layer.attn_k_norm,
            ] {
                layout.vector(vector.as_deref().unwrap_or_default());
            }
        }
        if !is_tied(model) {
            layout.matrix(&weights.output)?;
        }
        layout.vector(&*weights.output_norm);
        let frequencies = weights.rope_frequencies.iter().map(|&f| f as f32);
        layout.vector(frequencies.collect::<Vec<f32>>());
        Ok(layout)
    }

    fn matrix(&mut self, tensor: &'a Tensor) -> Result<()> {
        let bytes = matrix_bytes(tensor)?;
        self.source_bytes += tensor.bytes().len();
        let offset = self.take(bytes);
        self.matrices.push((tensor, offset));
        Ok(())
    }

    fn vector(&mut self, values: impl Into<Cow<'a, [f32]>>) {
        let values = values.into();
        if !values.is_empty() {
            let offset = self.take(size_of_val(&*values));
            self.vectors.push((values, offset));
        }
    }

    fn take(&mut self, bytes: usize) -> usize {
        let offset = self.bytes;
        self.bytes = (offset + bytes).next_multiple_of(ALIGNMENT);
        offset
    }

    /// Turns offsets into addresses, in the order in which they were taken.
    fn finish(self, model: &Model, memory: DeviceBuffer) -> DeviceWeights {
        let matrices = self.matrices.iter();
        let mut matrices = matrices.map(|(tensor, offset)| Matrix::new(tensor, memory.at(*offset)));
        let mut matrix = || matrices.next().expect("the layout holds every matrix");
        let mut vectors = self.vectors.iter().map(|(_, offset)| memory.at(*offset));
        let mut vector = || vectors.next().expect("the layout holds every vector");
        let token_embd = matrix();
        let layers = model.weights.layers.iter().map(|layer| {
            let [attn_q, attn_k, attn_v, attn_output] = std::array::from_fn(|_| matrix());
            let [ffn_gate, ffn_up, ffn_down] = std::array::from_fn(|_| matrix());
            let [attn_norm, ffn_norm] = std::array::from_fn(|_| vector());
            let mut optional = |vector_of: &Option<Vec<f32>>| match vector_of {
                Some(_) => vector(),
                None => 0,
            };
            LayerWeights {
                attn_norm,
                attn_q,
                attn_k,
                attn_v,
                attn_q_bias: optional(&layer.attn_q_bias),
                attn_k_bias: optional(&layer.attn_k_bias),
                attn_v_bias: optional(&layer.attn_v_bias),
                attn_q_norm: optional(&layer.attn_q_norm),
                attn_k_norm: optional(&layer.attn_k_norm),
                attn_output,
                ffn_norm,
                ffn_gate,
                ffn_up,
                ffn_down,
            }
        });
        let layers = layers.collect();
        let output = if is_tied(model) { token_embd } else { matrix() };
        let (output_norm, rope_frequencies) = (vector(), vector());
        DeviceWeights {
            token_embd,
            layers,
            output_norm,
            output,
            rope_frequencies,
            memory,
        }
    }
}

/// Whether the embedding is the output matrix as well.
fn is_tied(model: &Model) -> bool {
    model.weights.output.name() == model.weights.token_embd.name()
}

/// ggml's number of a type, which is how kernels name it.
pub fn ggml_id(tensor_type: TensorType) -> i32 {
    (0..=u8::MAX)
        .find(|&id| TensorType::from_ggml_id(id.into()) == Some(tensor_type))
        .map_or(-1, i32::from)
}

fn is_float(tensor_type: TensorType) -> bool {
    matches!(
        tensor_type,
        TensorType::F32 | TensorType::F16 | TensorType::BF16
    )
}

/// Threads of the kernel `repack` that share a row.
fn threads_a_row(tensor_type: TensorType, columns: usize) -> usize {
    match is_float(tensor_type) {
        true => columns,
        false => columns.div_ceil(UNIT),
    }
}

/// Bytes of a matrix on the device, by `kernels/formats.cuh`.
fn matrix_bytes(tensor: &Tensor) -> Result<usize> {
    let (rows, columns) = (tensor.rows(), tensor.row_len());
    let units = columns.div_ceil(UNIT);
    // `Format::pair_bytes`: tiles of two rows and up to 32 units, each a multiple of 16 bytes.
    let tiles = |bytes_of_two_units: usize| {
        let tile = |units: usize| (units * bytes_of_two_units).next_multiple_of(16);
        rows.div_ceil(2) * (units / 32 * tile(32) + tile(units % 32))
    };
    Ok(match tensor.tensor_type() {
        TensorType::F32 => rows * (columns * 4).next_multiple_of(16),
        TensorType::F16 | TensorType::BF16 => rows * (columns * 2).next_multiple_of(16),
        TensorType::Q4_0 => tiles(72),
        TensorType::Q4_1 => tiles(80),
        TensorType::Q5_0 => tiles(88),
        TensorType::Q5_1 => tiles(96),
        TensorType::Q8_0 => tiles(136),
        TensorType::Q4_K => tiles(72),
        TensorType::Q5_K => tiles(88),
        TensorType::Q6_K => tiles(105),
        TensorType::Q2_K | TensorType::Q3_K => bail!(
            "tensor {} is {}, which sharpi reads on the CPU only: run it with --device cpu, or use a file with other types",
            tensor.name(),
            tensor.tensor_type().name()
        ),
    })
}

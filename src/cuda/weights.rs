//! The model's weights in device memory, in the layout of `kernels/types/type.cuh`.

use std::{borrow::Cow, sync::Arc};

use anyhow::{Context, Result};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Device, DeviceBuffer},
    tensor_types::KernelType,
    upload::{Piece, SLOT_BYTES, upload},
};
use crate::{
    model::{Model, Tensor},
    quant::TensorType,
};

/// Where every tensor begins: enough for every vector load and asynchronous copy.
const ALIGNMENT: usize = 256;

/// A matrix in device memory: (columns, rows), columns contiguous.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub address: CUdeviceptr,
    pub tensor_type: TensorType,
    pub rows: usize,
    pub columns: usize,
    /// Bytes that a product reads.
    pub bytes: usize,
}

impl Matrix {
    fn new(tensor: &Tensor, address: CUdeviceptr) -> Self {
        Self {
            address,
            tensor_type: tensor.tensor_type(),
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
        let mut pieces = Vec::new();
        for (source, offset) in &layout.matrices {
            let rows_per_piece = (SLOT_BYTES / source.row_bytes()).clamp(1, source.rows());
            let matrix = Matrix::new(source, memory.at(*offset));
            let mut begin = 0;
            for bytes in source.bytes().chunks(rows_per_piece * source.row_bytes()) {
                let end = begin + bytes.len() / source.row_bytes();
                pieces.push(Piece {
                    source: bytes,
                    rows: begin..end,
                    matrix,
                });
                begin = end;
            }
        }
        // SAFETY: sources are rows of the tensors, and each matrix lies inside `memory`.
        unsafe {
            upload(device, &pieces, &mut |done| {
                progress(done, layout.source_bytes)
            })?
        };
        for (values, offset) in &layout.vectors {
            memory.upload(*offset, bytemuck::cast_slice::<f32, u8>(values))?;
        }
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

/// Bytes of a matrix on the device.
fn matrix_bytes(tensor: &Tensor) -> Result<usize> {
    let kernel_type = KernelType::of(tensor.tensor_type())
        .with_context(|| format!("laying out tensor {} for the GPU", tensor.name()))?;
    Ok(kernel_type.matrix_bytes(tensor.rows(), tensor.row_len()))
}

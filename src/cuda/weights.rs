//! The model's weights in device memory, in the layout of `kernels/types/`: all that its operations name, each once.
//!
//! Tables of which a token reads one row need not lie there: where device memory is short, they lie in the host's, which the
//! device reads over the bus.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use anyhow::{Context, Result};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    device::{Device, DeviceBuffer, PinnedBuffer},
    launches::Linear,
    lowering::KeyValueProducts,
    tensor_types::KernelType,
    transfer::SLOT_BYTES,
    upload::{Piece, upload},
};
use crate::{
    model::{
        Decoder, Tensor,
        decoder::{self, Rope, Vector},
        ops::Op,
    },
    quant::TensorType,
};

/// Where every tensor begins: enough for every vector load and asynchronous copy.
const ALIGNMENT: usize = 256;

/// A matrix where the device can read it: (columns, rows), columns contiguous.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub address: CUdeviceptr,
    pub tensor_type: TensorType,
    pub rows: usize,
    pub columns: usize,
    /// Bytes that a product reads.
    pub bytes: usize,
}

/// All weights.
pub struct DeviceWeights {
    /// Own what the addresses below point to.
    memory: DeviceBuffer,
    _tables: Option<PinnedBuffer>,
    /// By the tensor's name.
    matrices: HashMap<String, Matrix>,
    vectors: HashMap<VectorKey, CUdeviceptr>,
}

impl DeviceWeights {
    /// Bytes that the weights of `decoder` take, and of these the tables of which a token reads one row.
    ///
    /// # Errors
    /// A tensor of a type that no kernel reads.
    pub fn bytes(decoder: &Decoder) -> Result<(usize, usize)> {
        let apart = Layout::new(decoder, TablesIn::Host)?;
        Ok((apart.device_bytes + apart.table_bytes, apart.table_bytes))
    }

    /// Takes the memory and fills it. `progress` hears the bytes done and their total.
    pub fn upload(
        device: &Arc<Device>,
        decoder: &Decoder,
        tables_in: TablesIn,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let layout = Layout::new(decoder, tables_in)?;
        let memory = device.allocate(layout.device_bytes)?;
        // Padding is part of what a product reads.
        memory.clear()?;
        let tables = match layout.table_bytes {
            0 => None,
            bytes => Some(device.allocate_pinned(bytes)?),
        };
        let tables_at = tables.as_ref().map_or(0, PinnedBuffer::device_address);
        let address = |place: Place| match place {
            Place::Device(offset) => memory.at(offset),
            Place::Table(offset) => tables_at + offset as u64,
        };
        let mut matrices = HashMap::new();
        let mut pieces = Vec::new();
        for (tensor, place) in &layout.matrices {
            let matrix = Matrix {
                address: address(*place),
                tensor_type: tensor.tensor_type(),
                rows: tensor.rows(),
                columns: tensor.row_len(),
                bytes: tensor.bytes().len(),
            };
            let rows_per_piece = (SLOT_BYTES / tensor.row_bytes()).clamp(1, tensor.rows());
            let mut begin = 0;
            for bytes in tensor.bytes().chunks(rows_per_piece * tensor.row_bytes()) {
                let end = begin + bytes.len() / tensor.row_bytes();
                pieces.push(Piece {
                    source: bytes,
                    rows: begin..end,
                    matrix,
                });
                begin = end;
            }
            matrices.insert(tensor.name().to_owned(), matrix);
        }
        // SAFETY: sources are rows of the tensors, and each matrix lies inside `memory` or `tables`.
        unsafe {
            upload(device, &pieces, &mut |done| {
                progress(done, layout.source_bytes)
            })?
        };
        let mut vectors = HashMap::new();
        for (key, bytes, offset) in &layout.vectors {
            memory.upload(*offset, bytes)?;
            vectors.insert(*key, memory.at(*offset));
        }
        Ok(Self {
            memory,
            _tables: tables,
            matrices,
            vectors,
        })
    }

    /// Bytes of device memory.
    pub fn device_bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// A matrix of the decoder that was uploaded.
    pub fn matrix(&self, tensor: &Tensor) -> Matrix {
        self.matrices[tensor.name()]
    }

    /// `out = W x`
    pub fn product(&self, weights: &Tensor, out: CUdeviceptr) -> Linear {
        Linear {
            weights: self.matrix(weights),
            bias: 0,
            out,
        }
    }

    /// `out = W x + bias`
    pub fn linear(&self, linear: &decoder::Linear, out: CUdeviceptr) -> Linear {
        Linear {
            bias: self.vector(linear.bias.as_ref()),
            ..self.product(&linear.weights, out)
        }
    }

    /// The products of queries, keys and values to `q`, `k` and `v`, as far as the layer has them.
    pub fn qkv(
        &self,
        queries: &decoder::Linear,
        kv: Option<&KeyValueProducts>,
        [q, k, v]: [CUdeviceptr; 3],
    ) -> Vec<Linear> {
        let mut products = vec![self.linear(queries, q)];
        if let Some(kv) = kv {
            products.push(self.linear(kv.k, k));
            products.extend(kv.v.map(|values| self.linear(values, v)));
        }
        products
    }

    /// A vector of the decoder that was uploaded, f32; 0 where there is none.
    pub fn vector(&self, vector: Option<&Vector>) -> CUdeviceptr {
        vector.map_or(0, |vector| self.vectors[&VectorKey::of(vector)])
    }

    /// Ids of tokens of the decoder that were uploaded, i32; 0 where there are none.
    pub fn tokens(&self, tokens: Option<&Arc<[u32]>>) -> CUdeviceptr {
        tokens.map_or(0, |tokens| self.vectors[&VectorKey::of(tokens)])
    }

    /// Radians a position, f64 (dimensions / 2), of a rotation of the decoder that was uploaded.
    pub fn frequencies(&self, rope: &Arc<Rope>) -> CUdeviceptr {
        self.vectors[&VectorKey::of(rope)]
    }
}

/// Which vector: where the host has it, as long as the decoder lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct VectorKey(usize);

impl VectorKey {
    fn of<T: ?Sized>(shared: &Arc<T>) -> Self {
        Self(Arc::as_ptr(shared).cast::<u8>() as usize)
    }
}

fn floats(vector: &Vector) -> Cow<'_, [u8]> {
    Cow::Borrowed(bytemuck::cast_slice(vector))
}

/// Where tables of which a token reads one row lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TablesIn {
    Device,
    Host,
}

/// Where something begins: in device memory, or in what the host holds of tables.
#[derive(Clone, Copy)]
enum Place {
    Device(usize),
    Table(usize),
}

/// Where everything goes.
#[derive(Default)]
struct Layout<'a> {
    matrices: Vec<(&'a Tensor, Place)>,
    /// Their bytes.
    vectors: Vec<(VectorKey, Cow<'a, [u8]>, usize)>,
    device_bytes: usize,
    /// Of tables in the host's memory.
    table_bytes: usize,
    source_bytes: usize,
}

impl<'a> Layout<'a> {
    fn new(decoder: &'a Decoder, tables_in: TablesIn) -> Result<Self> {
        let mut layout = Self::default();
        let is_multiplied = |table: &Tensor| {
            let mut multiplied = decoder.ops.iter().filter_map(Op::weights);
            multiplied.any(|weights| weights.name() == table.name())
        };
        for op in &decoder.ops {
            match op {
                Op::Embed { table, .. } => {
                    let on_host = tables_in == TablesIn::Host && !is_multiplied(table);
                    layout.matrix(table, on_host)?;
                }
                Op::Linear { linear, .. } => {
                    layout.matrix(&linear.weights, false)?;
                    if let Some(bias) = &linear.bias {
                        layout.vector(VectorKey::of(bias), || floats(bias));
                    }
                }
                Op::Norm { norm, .. } | Op::HeadNorm { norm, .. } => {
                    layout.vector(VectorKey::of(&norm.weight), || floats(&norm.weight));
                }
                Op::Suppress { tokens } => layout.vector(VectorKey::of(tokens), || {
                    Cow::Borrowed(bytemuck::cast_slice(tokens))
                }),
                Op::Rope { rope, .. } => layout.vector(VectorKey::of(rope), || {
                    bytemuck::cast_slice(&rope.frequencies()).to_vec().into()
                }),
                Op::Store { .. }
                | Op::Attend { .. }
                | Op::Gate { .. }
                | Op::Copy { .. }
                | Op::Add { .. }
                | Op::Scale { .. }
                | Op::Softcap { .. }
                | Op::Select => {}
            }
        }
        Ok(layout)
    }

    fn matrix(&mut self, tensor: &'a Tensor, on_host: bool) -> Result<()> {
        if self
            .matrices
            .iter()
            .any(|(other, _)| other.name() == tensor.name())
        {
            return Ok(());
        }
        let kernel_type = KernelType::of(tensor.tensor_type())
            .with_context(|| format!("laying out tensor {} for the GPU", tensor.name()))?;
        let bytes = kernel_type.matrix_bytes(tensor.rows(), tensor.row_len());
        self.source_bytes += tensor.bytes().len();
        let place = match on_host {
            true => Place::Table(take(&mut self.table_bytes, bytes)),
            false => Place::Device(take(&mut self.device_bytes, bytes)),
        };
        self.matrices.push((tensor, place));
        Ok(())
    }

    fn vector(&mut self, key: VectorKey, bytes: impl FnOnce() -> Cow<'a, [u8]>) {
        if self.vectors.iter().all(|(other, ..)| *other != key) {
            let bytes = bytes();
            let offset = take(&mut self.device_bytes, bytes.len());
            self.vectors.push((key, bytes, offset));
        }
    }
}

/// The next `bytes` behind `end`.
fn take(end: &mut usize, bytes: usize) -> usize {
    let offset = *end;
    *end = (offset + bytes).next_multiple_of(ALIGNMENT);
    offset
}

//! Keys and values of all tokens so far in device memory. `kernels/kv_cache.cuh` reads and writes them.

use std::sync::Arc;

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;
use half::f16;

use super::device::{Device, DeviceBuffer};
use crate::backend::KvLayout;

/// For each layer that has its own: keys, then values, each f16 (head_dim, capacity, head_count_kv), head_dim contiguous.
pub struct KvCache {
    memory: DeviceBuffer,
    layout: KvLayout,
    /// Of each layer, where the keys that it reads begin, in bytes.
    offsets: Vec<usize>,
}

impl KvCache {
    pub fn new(device: &Arc<Device>, layout: KvLayout) -> Result<Self> {
        let mut offsets: Vec<usize> = Vec::new();
        let mut bytes = 0;
        for (index, layer) in layout.layers.iter().enumerate() {
            if layer.owner == index {
                offsets.push(bytes);
                bytes += 2 * layout.plane_bytes(index);
            } else {
                offsets.push(offsets[layer.owner]);
            }
        }
        let memory = device.allocate(bytes)?;
        memory.clear()?;
        Ok(Self {
            memory,
            layout,
            offsets,
        })
    }

    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Tokens that a layer has room for.
    pub fn capacity(&self, layer: usize) -> usize {
        self.layout.layers[layer].capacity
    }

    /// Where the keys begin that a layer reads.
    pub fn keys(&self, layer: usize) -> CUdeviceptr {
        self.memory.at(self.offsets[layer])
    }

    /// Where the values begin that a layer reads.
    pub fn values(&self, layer: usize) -> CUdeviceptr {
        self.memory
            .at(self.offsets[layer] + self.layout.plane_bytes(layer))
    }

    /// All keys and values, as they lie on the device.
    pub fn download(&self) -> Result<Vec<f16>> {
        let mut values = vec![f16::ZERO; self.memory.bytes() / size_of::<f16>()];
        self.memory
            .download(0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

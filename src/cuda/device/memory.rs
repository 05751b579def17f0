//! Memory of the device, page-locked memory of the host, and copies between them.
//!
//! Device memory is taken with `cuMemAlloc`, not from cudarc's stream-ordered pool: what is taken must show in the free
//! memory at once, since sizes are chosen by it. Page-locked memory is not cudarc's either, which would record and
//! await an event for each copy of every token.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, atomic::Ordering},
};

use anyhow::{Context, Result, bail};
use cudarc::driver::{result, sys::CUdeviceptr};

use super::{Device, explain};

impl Device {
    /// Free and total bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(explain)
    }

    /// How often memory was taken from the device or page-locked on the host: must not grow once generation has begun.
    pub fn allocations(&self) -> usize {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Takes `bytes` of device memory, not initialised.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<DeviceBuffer> {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the context is current. A zero-byte request is an error of the driver's, so ask for at least one.
        let address = self
            .call(|| unsafe { result::malloc_sync(bytes.max(1)) })
            .with_context(|| format!("taking {bytes} bytes of memory on {}", self.name))?;
        Ok(DeviceBuffer {
            device: self.clone(),
            address,
            bytes,
        })
    }

    /// Takes `bytes` of page-locked host memory, zeroed.
    pub fn allocate_pinned(self: &Arc<Self>, bytes: usize) -> Result<PinnedBuffer> {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the context is current; at least one byte, as above.
        let address = self
            .call(|| unsafe { result::malloc_host(bytes.max(1), 0) })
            .with_context(|| format!("page-locking {bytes} bytes of host memory"))?
            .cast::<u8>();
        // SAFETY: the driver just gave these bytes.
        unsafe { address.write_bytes(0, bytes) };
        Ok(PinnedBuffer {
            device: self.clone(),
            address,
            bytes,
        })
    }
}

/// Device memory, given back when dropped, once the stream has passed all that is queued.
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// The device address of byte `offset`.
    pub fn at(&self, offset: usize) -> CUdeviceptr {
        debug_assert!(offset <= self.bytes);
        self.address + offset as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `source` to byte `offset`, behind all that is queued, and waits for it.
    pub fn upload(&self, offset: usize, source: &[u8]) -> Result<()> {
        // SAFETY: the source is borrowed until the wait has ended.
        unsafe { self.upload_later(offset, source)? };
        self.device.synchronize()
    }

    /// Copies from byte `offset` on to `target`, behind all that is queued, and waits for it.
    pub fn download(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        // SAFETY: the target is borrowed until the wait has ended.
        unsafe { self.download_later(offset, target)? };
        self.device.synchronize()
    }

    /// Queues a copy of `source` to byte `offset`. It runs beside the host where the source is page-locked; from other
    /// memory the driver may make the host wait for the stream and for the copy, and promises neither.
    ///
    /// # Safety
    /// The source must not be written, and its memory not given back, before the stream has passed the copy. (A
    /// [`PinnedBuffer`] waits for that when dropped.)
    pub unsafe fn upload_later(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.check(offset, source.len())?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: the range lies in this buffer; the caller leaves the source alone.
        self.device
            .call(|| unsafe { result::memcpy_htod_async(self.at(offset), source, stream) })
            .context("copying to the GPU")
    }

    /// Queues a copy from byte `offset` on to `target`, which runs beside the host as one to the device does.
    ///
    /// # Safety
    /// The target must not be read or written, and its memory not given back, before the stream has passed the copy. (A
    /// [`PinnedBuffer`] waits for that when dropped.)
    pub unsafe fn download_later(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        self.check(offset, target.len())?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: the range lies in this buffer; the caller leaves the target alone.
        self.device
            .call(|| unsafe { result::memcpy_dtoh_async(target, self.at(offset), stream) })
            .context("copying from the GPU")
    }

    /// Queues setting every byte to zero.
    pub fn clear(&self) -> Result<()> {
        let stream = self.device.stream.cu_stream();
        // SAFETY: the range is this buffer, which is not given back before the stream has passed.
        self.device
            .call(|| unsafe { result::memset_d8_async(self.address, 0, self.bytes, stream) })
            .context("clearing memory of the GPU")
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.bytes) {
            bail!(
                "{len} bytes at {offset} do not lie in a buffer of {}",
                self.bytes
            );
        }
        Ok(())
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // Queued work may use the memory. Where the wait fails, the device is lost, and the memory with it.
        if self.device.synchronize().is_ok() {
            // SAFETY: allocated once, freed once, and the stream has passed every use.
            let _ = self
                .device
                .call(|| unsafe { result::free_sync(self.address) });
        }
    }
}

/// Page-locked host memory: copies to and from it run beside the host. Given back when dropped, once the stream has
/// passed all that is queued.
pub struct PinnedBuffer {
    device: Arc<Device>,
    address: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is owned, and reached through `&self` and `&mut self` only.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// Where kernels find the first byte: with unified addressing, which every 64-bit device has, where the host does.
    pub fn device_address(&self) -> CUdeviceptr {
        self.address as CUdeviceptr
    }

    /// The `index`th i32, while kernels may be writing others.
    pub fn read_i32(&self, index: usize) -> i32 {
        assert!((index + 1) * size_of::<i32>() <= self.bytes);
        // SAFETY: it lies in the buffer, which is page-aligned; no reference to it is formed.
        unsafe { self.address.cast::<i32>().add(index).read_volatile() }
    }
}

impl Deref for PinnedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the driver gave these bytes, and they were zeroed.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }
}

impl DerefMut for PinnedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // A queued copy may use the memory. Where the wait fails, the device is lost, and the memory stays page-locked.
        if self.device.synchronize().is_ok() {
            let address = self.address.cast();
            // SAFETY: allocated once, freed once, and the stream has passed every copy.
            let _ = self.device.call(|| unsafe { result::free_host(address) });
        }
    }
}

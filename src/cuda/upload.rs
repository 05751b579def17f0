//! Weights on their way from the mapped file into device memory.
//!
//! Several threads copy pieces of the file into page-locked slots (which also reads them from the disk, if need be); from
//! there the copy engine takes them to a slot on the device, and a kernel writes them to their place in the layout that the
//! products read. All slots are in flight at once, so the slowest of the three sets the pace.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::{Context, Result, anyhow};
use cudarc::driver::{CudaEvent, sys::CUdeviceptr};

use super::device::{Device, DeviceBuffer, Launch, PinnedBuffer, explain};

/// A piece of the file and the kernel that puts it in its place, given where on the device the piece lies for now.
pub struct Piece<'a> {
    /// At most [`SLOT_BYTES`].
    pub source: &'a [u8],
    pub place: Box<dyn Fn(CUdeviceptr) -> Launch + Send + Sync + 'a>,
}

/// The largest piece.
pub const SLOT_BYTES: usize = 8 << 20;

/// Pieces in flight: what keeps the copy engine busy while the host reads the next ones.
const SLOTS: usize = 8;

/// Threads that read the file: enough to outrun the bus, few enough for a small machine.
const READERS: usize = 6;

struct Slot {
    host: PinnedBuffer,
    device: DeviceBuffer,
    /// Recorded behind the kernel that last read the device's side.
    done: CudaEvent,
}

/// Brings every piece to its place and waits until all are there. `progress` hears the bytes done so far.
///
/// # Safety
/// Each piece's launch must be as [`Device::launch`] asks for.
pub unsafe fn upload(
    device: &Arc<Device>,
    pieces: &[Piece],
    progress: &mut dyn FnMut(usize),
) -> Result<()> {
    let (to_readers, free) = mpsc::channel::<Slot>();
    let (to_device, filled) = mpsc::channel::<(Slot, &Piece)>();
    let free = Mutex::new(free);
    let next = AtomicUsize::new(0);
    let largest = pieces
        .iter()
        .map(|piece| piece.source.len())
        .max()
        .unwrap_or(0);
    for _ in 0..SLOTS.min(pieces.len()) {
        to_readers
            .send(Slot {
                host: device.allocate_pinned(largest)?,
                device: device.allocate(largest)?,
                done: device.new_event()?,
            })
            .map_err(|_| anyhow!("no thread reads the file"))?;
    }
    thread::scope(|scope| {
        for _ in 0..READERS.min(pieces.len()) {
            let (free, next, to_device) = (&free, &next, to_device.clone());
            scope.spawn(move || {
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Both ends close only where the other side met an error, which it reports.
                    let Ok(mut slot) = free.lock().expect("no holder panics").recv() else {
                        return;
                    };
                    if slot.done.synchronize().is_err() {
                        return;
                    }
                    slot.host[..piece.source.len()].copy_from_slice(piece.source);
                    if to_device.send((slot, piece)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(to_device);
        // Owned here, so that an early return hangs up on the readers.
        let to_readers = to_readers;
        let mut done = 0;
        for _ in pieces {
            let (slot, piece) = filled
                .recv()
                .context("a thread that reads the file gave up")?;
            slot.device.upload(0, &slot.host[..piece.source.len()])?;
            // SAFETY: as the caller vouches; the slot lives until the device has passed it.
            unsafe { device.launch(&(piece.place)(slot.device.at(0)))? };
            slot.done
                .record(device.stream())
                .map_err(explain)
                .context("recording an event")?;
            done += piece.source.len();
            progress(done);
            // With no reader left, the slot stays in the channel until the wait below has ended.
            let _ = to_readers.send(slot);
        }
        device.synchronize().context("uploading the weights")
    })
}

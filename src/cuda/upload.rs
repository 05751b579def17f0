//! Weights on their way from the mapped file into device memory.
//!
//! Several threads copy pieces of the file into page-locked slots (which also reads them from the disk, if need be);
//! from there the copy engine takes them to a slot on the device, and a kernel writes them to their place in the layout
//! that the other kernels read. All slots are in flight at once, so the slowest of the three sets the pace.

use std::{ops::Range, sync::Arc, thread};

use anyhow::{Context, Result};
use crossbeam_channel::unbounded;
use cudarc::driver::CudaEvent;

use super::{
    device::{Device, DeviceBuffer, PinnedBuffer, explain},
    launches::repack,
    weights::Matrix,
};

/// Rows of a matrix in the file.
pub struct Piece<'a> {
    /// At most [`SLOT_BYTES`], or one row.
    pub source: &'a [u8],
    pub rows: Range<usize>,
    /// Where the whole matrix is to lie.
    pub matrix: Matrix,
}

/// The largest piece.
pub const SLOT_BYTES: usize = 8 << 20;

/// Pieces in flight: what keeps the copy engine busy while the host reads the next ones.
const SLOTS: usize = 8;

/// Threads that read the file: enough to outrun the bus, few enough for a small machine.
const READERS: usize = 6;

/// Where a piece is on its way. Dropped, it waits for the device, so nothing queued outlives the memory.
struct Slot {
    host: PinnedBuffer,
    device: DeviceBuffer,
    /// Recorded behind the kernel that last read the device's side.
    done: CudaEvent,
}

/// Brings every piece to its place and waits until all are there. `progress` hears the bytes done so far.
///
/// # Safety
/// Each source must be the blocks of its rows, and the memory of each matrix must stay valid until this returns.
pub unsafe fn upload(
    device: &Arc<Device>,
    pieces: &[Piece],
    progress: &mut dyn FnMut(usize),
) -> Result<()> {
    // Outside the scope, so that slots which come back when no reader is left stay until the wait has ended.
    let (to_readers, free) = unbounded::<Slot>();
    let (to_device, filled) = unbounded::<Result<(Slot, &Piece)>>();
    let (to_read, unread) = unbounded::<&Piece>();
    let lengths = pieces.iter().map(|piece| piece.source.len());
    let largest = lengths.max().unwrap_or(0);
    // Neither send can fail: both receivers are here.
    for _ in 0..SLOTS.min(pieces.len()) {
        let _ = to_readers.send(Slot {
            host: device.allocate_pinned(largest)?,
            device: device.allocate(largest)?,
            done: device.new_event()?,
        });
    }
    for piece in pieces {
        let _ = to_read.send(piece);
    }
    drop(to_read);
    thread::scope(|scope| {
        for _ in 0..READERS.min(pieces.len()) {
            let (free, unread, to_device) = (&free, &unread, to_device.clone());
            scope.spawn(move || {
                // Until no piece is left, or the other side hangs up because of an error, which it reports.
                for (piece, slot) in unread.iter().zip(free) {
                    let filled = fill(slot, piece);
                    let failed = filled.is_err();
                    if to_device.send(filled).is_err() || failed {
                        return;
                    }
                }
            });
        }
        drop(to_device);
        // Owned here, so that an early return hangs up on the readers.
        let (to_readers, filled) = (to_readers, filled);
        let mut done = 0;
        for _ in pieces {
            let (slot, piece) = filled
                .recv()
                .context("the threads that read the weights have ended early")??;
            // SAFETY: a reader writes to the slot when `done`, recorded below, has passed; where it is not recorded,
            // none gets the slot, and dropping it waits.
            unsafe {
                slot.device
                    .upload_later(0, &slot.host[..piece.source.len()])?;
            }
            let launch = repack(device, slot.device.at(0), piece.rows.clone(), piece.matrix)?;
            // SAFETY: as the caller vouches; the slot is used again or dropped only when the device has passed this.
            unsafe { device.launch(&launch)? };
            slot.done
                .record(device.stream())
                .map_err(explain)
                .context("recording an event")?;
            done += piece.source.len();
            progress(done);
            let _ = to_readers.send(slot);
        }
        device.synchronize().context("uploading the weights")
    })
}

/// Copies a piece of the file to a slot, when the device has passed what was in it.
fn fill<'a, 'p>(mut slot: Slot, piece: &'a Piece<'p>) -> Result<(Slot, &'a Piece<'p>)> {
    slot.done
        .synchronize()
        .map_err(explain)
        .context("waiting for the GPU to take weights")?;
    slot.host[..piece.source.len()].copy_from_slice(piece.source);
    Ok((slot, piece))
}

//! Large copies between the host's memory, such as a mapped file, and the device's, through page-locked slots.
//!
//! To the device, several threads fill slots (which also reads a mapped file from the disk, if need be), and the copy engine
//! takes them from there. All slots are in flight at once, so the slower of the two sets the pace.

use std::{ops::Range, sync::Arc, thread};

use anyhow::{Context, Result};
use crossbeam_channel::unbounded;
use cudarc::driver::CudaEvent;

use super::device::{Device, DeviceBuffer, PinnedBuffer, explain};

/// A good size for pieces.
pub const SLOT_BYTES: usize = 8 << 20;

/// Pieces in flight: what keeps the copy engine busy while the host reads the next ones.
pub const SLOTS: usize = 8;

/// Threads that fill slots: enough to outrun the bus, few enough for a small machine.
const READERS: usize = 6;

/// Page-locked memory. Dropped, it waits for the device, so nothing queued outlives it.
struct Slot {
    index: usize,
    host: PinnedBuffer,
    /// Recorded behind what last used the memory.
    done: CudaEvent,
}

impl Slot {
    fn new(device: &Arc<Device>, index: usize, bytes: usize) -> Result<Self> {
        Ok(Self {
            index,
            host: device.allocate_pinned(bytes)?,
            done: device.new_event()?,
        })
    }

    /// Marks the end of what is queued to use the memory.
    fn record(&self, device: &Device) -> Result<()> {
        self.done
            .record(device.stream())
            .map_err(explain)
            .context("recording an event")
    }

    /// Waits until the device has passed that.
    fn wait(&self) -> Result<()> {
        self.done
            .synchronize()
            .map_err(explain)
            .context("waiting for the GPU to copy")
    }
}

/// What is ready for the device.
pub struct Staged<'a> {
    /// Which of the sources it is.
    pub source: usize,
    /// Which of [`SLOTS`] it is in.
    pub slot: usize,
    pub bytes: &'a [u8],
}

/// Brings all sources to page-locked memory, in any order, and waits until the device has taken them. `queue` queues what takes
/// one: until the stream has passed that, its bytes stay as they are, and its slot is not used again.
///
/// # Errors
/// What `queue` and the driver meet.
pub fn upload(
    device: &Arc<Device>,
    sources: &[&[u8]],
    queue: &mut dyn FnMut(Staged) -> Result<()>,
) -> Result<()> {
    // Outside the scope, so that slots which come back when no reader is left stay until the wait has ended.
    let (to_readers, free) = unbounded::<Slot>();
    let (to_device, filled) = unbounded::<Result<(Slot, usize)>>();
    let (to_read, unread) = unbounded::<usize>();
    let largest = sources.iter().map(|source| source.len()).max().unwrap_or(0);
    // Neither send can fail: both receivers are here.
    for index in 0..SLOTS.min(sources.len()) {
        let _ = to_readers.send(Slot::new(device, index, largest)?);
    }
    for piece in 0..sources.len() {
        let _ = to_read.send(piece);
    }
    drop(to_read);
    thread::scope(|scope| {
        for _ in 0..READERS.min(sources.len()) {
            let (free, unread, to_device) = (&free, &unread, to_device.clone());
            scope.spawn(move || {
                // Until no piece is left, or the other side hangs up because of an error, which it reports.
                for (piece, slot) in unread.iter().zip(free) {
                    let filled = fill(slot, sources[piece]).map(|slot| (slot, piece));
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
        for _ in sources {
            let (slot, piece) = filled
                .recv()
                .context("the threads that read the file have ended early")??;
            // A reader writes to the slot when `done`, recorded behind it, has passed; where it is not recorded, none gets
            // the slot, and dropping it waits.
            queue(Staged {
                source: piece,
                slot: slot.index,
                bytes: &slot.host[..sources[piece].len()],
            })?;
            slot.record(device)?;
            let _ = to_readers.send(slot);
        }
        device.synchronize()
    })
}

/// Copies a source to a slot, when the device has passed what was in it.
fn fill(mut slot: Slot, source: &[u8]) -> Result<Slot> {
    slot.wait()?;
    slot.host[..source.len()].copy_from_slice(source);
    Ok(slot)
}

/// Hands `take` what lies in `pieces` of `memory`, one after another: the next one is on its way meanwhile.
///
/// # Errors
/// What `take` and the driver meet.
pub fn download(
    device: &Arc<Device>,
    memory: &DeviceBuffer,
    pieces: &[Range<usize>],
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let largest = pieces.iter().map(Range::len).max().unwrap_or(0);
    let [mut here, mut coming] = [
        Slot::new(device, 0, largest)?,
        Slot::new(device, 1, largest)?,
    ];
    let begin = |slot: &mut Slot, piece: &Range<usize>| {
        // SAFETY: the slot is read when the stream has passed `done`; dropped before, it waits.
        unsafe { memory.download_later(piece.start, &mut slot.host[..piece.len()])? };
        slot.record(device)
    };
    if let Some(first) = pieces.first() {
        begin(&mut coming, first)?;
    }
    for (i, piece) in pieces.iter().enumerate() {
        std::mem::swap(&mut here, &mut coming);
        if let Some(next) = pieces.get(i + 1) {
            begin(&mut coming, next)?;
        }
        here.wait()?;
        take(&here.host[..piece.len()])?;
    }
    Ok(())
}

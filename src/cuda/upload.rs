//! Weights on their way from the mapped file into device memory: from page-locked slots the copy engine takes them to a slot
//! on the device, and a kernel writes them to their place in the layout that the other kernels read.

use std::{ops::Range, sync::Arc};

use anyhow::{Context, Result};

use super::{
    device::{Device, DeviceBuffer},
    launches::repack,
    transfer::{self, SLOTS},
    weights::Matrix,
};

/// Rows of a matrix in the file.
pub struct Piece<'a> {
    /// At most [`transfer::SLOT_BYTES`], or one row.
    pub source: &'a [u8],
    pub rows: Range<usize>,
    /// Where the whole matrix is to lie.
    pub matrix: Matrix,
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
    let sources: Vec<&[u8]> = pieces.iter().map(|piece| piece.source).collect();
    let largest = sources.iter().map(|source| source.len()).max().unwrap_or(0);
    // Dropped, they wait for the device, so nothing queued outlives them.
    let slots: Vec<DeviceBuffer> = (0..SLOTS.min(pieces.len()))
        .map(|_| device.allocate(largest))
        .collect::<Result<_>>()?;
    let mut done = 0;
    transfer::upload(device, &sources, &mut |staged| {
        let (piece, slot, bytes) = (&pieces[staged.source], &slots[staged.slot], staged.bytes);
        // SAFETY: the bytes, and with them the slot, are left alone until the stream has passed the kernel behind the copy.
        unsafe { slot.upload_later(0, bytes)? };
        let launch = repack(device, slot.at(0), piece.rows.clone(), piece.matrix)?;
        // SAFETY: as the caller vouches.
        unsafe { device.launch(&launch)? };
        done += bytes.len();
        progress(done);
        Ok(())
    })
    .context("uploading the weights")
}

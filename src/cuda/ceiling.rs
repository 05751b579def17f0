//! What the device's memory gives at best: the yardstick for every decode figure.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::device::{Arguments, Device, Launch, explain};

/// Read at a time: far more than any cache holds.
const BYTES: usize = 4 << 30;
const REPETITIONS: usize = 10;

/// Bytes per second that a kernel reads which does nothing else, the best of several passes over 4 GiB (or half of
/// what is free).
pub fn read_ceiling(device: &Arc<Device>) -> Result<f64> {
    let bytes = BYTES.min(device.memory()?.0 / 2) / 16 * 16;
    let memory = device.allocate(bytes)?;
    memory.clear()?;
    let launch = Launch {
        function: device.function("read_all")?,
        grid: [2 * device.multiprocessors() as u32, 1, 1],
        block: [1024, 1],
        shared_bytes: 0,
        arguments: Arguments::default()
            .with(memory.at(0))
            .with(bytes as u64 / 16)
            .with(memory.at(0)),
        dependent: false,
    };
    let mut best = 0f64;
    for _ in 0..REPETITIONS {
        let start = device.new_timer()?;
        let end = device.new_timer()?;
        start.record(device.stream()).map_err(explain)?;
        // SAFETY: the arguments are those of `read_all`; it reads `bytes` bytes and writes at most four.
        unsafe { device.launch(&launch)? };
        end.record(device.stream()).map_err(explain)?;
        let elapsed_ms = start
            .elapsed_ms(&end)
            .map_err(explain)
            .context("timing a kernel")?;
        best = best.max(bytes as f64 / (f64::from(elapsed_ms) / 1e3));
    }
    Ok(best)
}

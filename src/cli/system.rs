//! What the operating system says about this machine.

use std::{fs, thread};

/// The processor's own name, or its architecture where the system does not tell.
pub fn processor_name() -> String {
    proc_value("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Processors that this process may use.
pub fn processor_count() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Installed memory; `None` where the system does not tell.
pub fn total_memory_bytes() -> Option<u64> {
    memory_bytes("MemTotal")
}

/// Memory that can be used without swapping; `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    memory_bytes("MemAvailable")
}

/// A line of <https://docs.kernel.org/filesystems/proc.html#meminfo>, such as `MemTotal: 16330208 kB`.
fn memory_bytes(key: &str) -> Option<u64> {
    let value = proc_value("/proc/meminfo", key)?;
    let kibibytes: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The value of the first line `key: value`.
fn proc_value(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = pairs.find(|(name, _)| name.trim() == key)?;
    Some(value.trim().to_owned())
}

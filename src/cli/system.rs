//! What the operating system says about this machine's memory.

use std::fs;

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
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = pairs.find(|(name, _)| *name == key)?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

//! What the operating system says about this machine's memory.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Installed memory; `None` where the system does not tell.
pub fn total_memory_bytes() -> Option<u64> {
    known(memory().total_memory())
}

/// Memory that can be used without swapping; `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    known(memory().available_memory())
}

fn memory() -> System {
    let kind = MemoryRefreshKind::nothing().with_ram();
    System::new_with_specifics(RefreshKind::nothing().with_memory(kind))
}

/// sysinfo gives 0 for what it cannot find out.
fn known(bytes: u64) -> Option<u64> {
    (bytes > 0).then_some(bytes)
}

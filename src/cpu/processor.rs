//! What kernels run on, in words.

use std::env::consts::ARCH;

use sysinfo::{CpuRefreshKind, RefreshKind, System};

use super::{cores::default_threads, integer::Detected, simd::VectorInstructions};

/// The processor and some of its threads, such as `AMD EPYC, 2 threads`.
pub fn describe(threads: usize) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {threads} thread{plural}", name())
}

/// The processor with the threads that compute by default, and the vector instructions, such as `AMD EPYC, 2 threads, AVX-512, products in 8
/// bits: AVX-512 VNNI`.
pub fn describe_all() -> String {
    format!(
        "{}, {}, products in 8 bits: {}",
        describe(default_threads()),
        VectorInstructions::available().name(),
        Detected::best().name()
    )
}

/// The processor's own name, or its architecture where the system does not tell.
fn name() -> String {
    let system =
        System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let name = system.cpus().first().map_or("", |cpu| cpu.brand().trim());
    if name.is_empty() { ARCH } else { name }.to_owned()
}

//! What kernels run on, in words.

use std::{fs, thread};

use super::simd::VectorInstructions;

/// The processor and some of its threads, such as `AMD EPYC, 2 threads`.
pub fn describe(threads: usize) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {threads} thread{plural}", name())
}

/// Every thread that this process may use and the vector instructions, such as `AMD EPYC, 2 threads, AVX-512`.
pub fn describe_all() -> String {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{}, {}",
        describe(threads),
        VectorInstructions::available().name()
    )
}

/// The processor's own name, or its architecture where the system does not tell.
fn name() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut pairs = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    pairs
        .find(|(key, _)| key.trim() == "model name")
        .map_or(std::env::consts::ARCH, |(_, name)| name.trim())
        .to_owned()
}

//! Whether there is a standard output to write to.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};

/// Whether the process was started with standard output closed.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Refuses a standard output that was closed from the start, where all text would be lost without an error: Rust's
/// runtime opens `/dev/null` in its place, and what does so legitimately looks the same.
pub fn check() -> Result<()> {
    ensure!(
        !CLOSED.load(Ordering::Relaxed),
        "standard output is closed: send it to a file or a pipe, or to /dev/null where nobody is to read it"
    );
    Ok(())
}

/// Looks before the runtime has started.
// SAFETY: the C library calls each function in this section once, before `main` and on the only thread. This one makes
// one system call and stores a flag, and needs nothing of Rust's runtime for either.
#[cfg(target_os = "linux")]
#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = {
    extern "C" fn look() {
        // SAFETY: asks whether the descriptor is open, and changes nothing.
        let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
        CLOSED.store(flags == -1, Ordering::Relaxed);
    }
    look
};

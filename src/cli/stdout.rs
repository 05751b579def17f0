//! Whether there is a standard output to write to.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};

/// Whether the process was started with a standard output that takes no writes.
static UNWRITABLE: AtomicBool = AtomicBool::new(false);

/// Refuses a standard output that was closed, or open for reading alone, from the start. All text would be lost without
/// an error: Rust's runtime opens `/dev/null` in place of a closed one, which looks like one that was meant, and its
/// standard library takes the error of a write to the other for success.
pub fn check() -> Result<()> {
    ensure!(
        !UNWRITABLE.load(Ordering::Relaxed),
        "standard output is closed, or not open for writing: send it to a file or a pipe, or to /dev/null where nobody \
         is to read it"
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
        // SAFETY: asks how the descriptor is open, and changes nothing.
        let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFL) };
        let unwritable = flags == -1 || flags & libc::O_ACCMODE == libc::O_RDONLY;
        UNWRITABLE.store(unwritable, Ordering::Relaxed);
    }
    look
};

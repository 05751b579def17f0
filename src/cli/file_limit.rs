//! A limit on the size of files (`ulimit -f`): reaching it is an error of the write, as a full disk is, and not the end of the
//! process.

/// Ignores the signal that would end it.
pub fn survive() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

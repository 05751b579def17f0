//! A file that is cut short while it is mapped: one message and an exit code where the kernel sends SIGBUS.

use std::{ffi, io, mem, ptr, sync::OnceLock};

use anyhow::{Context, Result};

use super::{exit, progress};
use crate::model::gguf::mapped_file;

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Reports missing pages of mapped files from here on. A process does this once.
pub fn catch() -> Result<()> {
    // SAFETY: all-zero bytes are a valid value of this plain C struct.
    let mut before: libc::sigaction = unsafe { mem::zeroed() };
    let mut action = before;
    let handler: extern "C" fn(ffi::c_int, *mut libc::siginfo_t, *mut ffi::c_void) = page_is_gone;
    action.sa_sigaction = handler as libc::sighandler_t;
    // Rust gives its threads a signal stack, so that a handler finds room.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: asks for the current action, into a local.
    let asked = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) };
    BEFORE.get_or_init(|| before);
    // SAFETY: the handler has the signature that SA_SIGINFO promises, and does what is allowed in a handler only.
    let set = unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
    match (asked, set) {
        (0, 0) => Ok(()),
        _ => Err(io::Error::last_os_error()).context("installing the SIGBUS handler"),
    }
}

/// Runs on the thread that touched the page, at any point of the program: nothing here allocates, locks or unwinds.
extern "C" fn page_is_gone(
    signal: ffi::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut ffi::c_void,
) {
    // SAFETY: the kernel passes a valid structure, and with BUS_ADRERR the address that was touched.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let file = match code {
        libc::BUS_ADRERR => mapped_file(address),
        _ => None,
    };
    match file {
        Some(name) => {
            let end = ": its data is gone: the file was cut short while it was in use, or its disk fails\n";
            let clean = match progress::is_drawn() {
                true => progress::ERASE,
                false => "",
            };
            for part in [clean, "error: ", name, end] {
                // SAFETY: `write` may be called in a handler; the bytes are those of a string.
                unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
            }
            // SAFETY: `_exit` may be called in a handler.
            unsafe { libc::_exit(exit::FAILURE.into()) }
        }
        // No page of a file: the access is repeated, and meets what was there before.
        None => {
            if let Some(before) = BEFORE.get() {
                // SAFETY: `sigaction` may be called in a handler, and the action was the kernel's own.
                unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
            }
        }
    }
}

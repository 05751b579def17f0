//! The command line: flags in, text and messages out.

use std::process::ExitCode;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    todo!()
}

//! The `sharpi` command: parse, dispatch, and turn the outcome into one message and an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    sharpi::cli::main()
}

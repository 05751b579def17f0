//! `sharpi pull`: the newest revision of a model into the cache.

use std::io::{self, Write};

use anyhow::{Context, Result};

use super::{download::Download, exit::Outcome, interrupt::Interrupt, output::WRITING};

/// Prints where the model is, of a split one the first file.
pub fn run(download: &Download) -> Result<Outcome> {
    // Whose first Ctrl-C ends the process: what was downloaded by then is already in its file.
    let _interrupt = Interrupt::catch()?;
    let path = download.get_newest()?;
    let mut out = io::stdout().lock();
    out.write_all(path.as_os_str().as_encoded_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .context(WRITING)?;
    Ok(Outcome::Done)
}

//! Getting a model of the hub, while a person watches.

use std::path::PathBuf;

use anyhow::Result;
use indicatif::HumanBytes;

use super::{escape::escaped, progress::CountBar};
use crate::hub::{Hub, Observer, Reference};

/// A model of the hub, and how to get it.
pub struct Download {
    pub reference: Reference,
    pub offline: bool,
    pub show_progress: bool,
}

impl Download {
    /// The model's file, of a split one the first: that of the cache, else downloaded.
    pub fn get(&self) -> Result<PathBuf> {
        Hub::from_env(self.offline)?.get(&self.reference, &mut self.watch())
    }

    /// The same of the hub's newest revision.
    pub fn get_newest(&self) -> Result<PathBuf> {
        Hub::from_env(self.offline)?.pull(&self.reference, &mut self.watch())
    }

    fn watch(&self) -> Watch<'_> {
        Watch {
            reference: &self.reference,
            bar: CountBar::bytes(self.show_progress, "downloading"),
            started: false,
        }
    }
}

struct Watch<'a> {
    reference: &'a Reference,
    bar: CountBar,
    started: bool,
}

impl Observer for Watch<'_> {
    fn progress(&mut self, done: u64, total: u64) {
        if !self.started {
            let here = match done {
                0 => String::new(),
                _ => format!(", of which {} are here", HumanBytes(done)),
            };
            tracing::info!(
                "downloading {}: {}{here}",
                self.reference,
                HumanBytes(total)
            );
            self.started = true;
        }
        self.bar.update(done as usize, total as usize);
    }

    fn notice(&mut self, message: &str) {
        self.bar.clear();
        tracing::info!("{}", escaped(message));
    }
}

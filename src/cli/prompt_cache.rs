//! `--prompt-cache`: what an earlier run has read of the prompt, and what this one leaves for the next.

use std::{
    path::PathBuf,
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::{Context, Result, anyhow};

use super::{escape::escaped, exit::Outcome, interrupt::Interrupt, progress::Spinner};
use crate::engine::{Identity, PromptCache, Session};

/// What was asked for.
pub struct PromptCacheFile {
    pub path: PathBuf,
    /// Whether to leave the file as it is.
    pub read_only: bool,
}

/// A file that is being read, and checked, while the model loads.
pub struct Reading {
    file: PromptCacheFile,
    /// `None`: there is none.
    cache: Option<JoinHandle<Result<PromptCache>>>,
}

/// What is to be done once the text has ended.
pub struct Writing {
    path: PathBuf,
    identity: Identity,
}

impl PromptCacheFile {
    /// Begins to read the file.
    ///
    /// # Errors
    /// Something is there that is no such file, or it could not be written.
    pub fn read(self) -> Result<Reading> {
        let doing = || format!("--prompt-cache {}", self.path.display());
        let is_there = PromptCache::is_at(&self.path).with_context(doing)?;
        let path = self.path.clone();
        Ok(Reading {
            cache: is_there.then(|| thread::spawn(move || PromptCache::open(&path))),
            file: self,
        })
    }
}

impl Reading {
    /// Brings what the file has of `prompt` to the session, for the model of this id. Returns what is to be written behind the
    /// text, if anything.
    pub fn restore(self, session: &mut Session, model_id: &str, prompt: &[u32]) -> Option<Writing> {
        let PromptCacheFile { path, read_only } = self.file;
        let identity = Identity::new(model_id, session.backend());
        let name = escaped(&path.display().to_string());
        let is_whole = match self.cache {
            Some(cache) => {
                let restored = cache
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("reading it ended the thread that did it")))
                    .and_then(|cache| restore(&cache, session, &identity, prompt, &name));
                restored.unwrap_or_else(|error| {
                    let end = if read_only {
                        ""
                    } else {
                        "; it will be replaced"
                    };
                    let why = escaped(&format!("{error:#}"));
                    tracing::warn!("the prompt cache {name} is not used: {why}{end}");
                    false
                })
            }
            None if read_only => {
                tracing::warn!("there is no prompt cache {name} to read (--prompt-cache-ro)");
                false
            }
            None => false,
        };
        if read_only || is_whole {
            return None;
        }
        session.keep_prompts();
        Some(Writing { path, identity })
    }
}

/// Brings what `cache` has of `prompt` to the session, and returns whether that is all of it.
fn restore(
    cache: &PromptCache,
    session: &mut Session,
    identity: &Identity,
    prompt: &[u32],
    name: &str,
) -> Result<bool> {
    let start = Instant::now();
    let reusable = cache.reusable(prompt, identity, session.backend())?;
    if reusable > 0 {
        cache.restore(session)?;
    }
    let (of, time) = (prompt.len(), start.elapsed());
    tracing::debug!("prompt cache: {reusable} of {of} tokens from {name}, in {time:.1?}");
    if let Some(budget) = identity.kv_budget()
        && (1..of).contains(&reusable)
        && session.backend().written().evicted() > 0
    {
        tracing::info!(
            "the prompt goes on behind what --kv-budget {budget} kept of its first {reusable} tokens when {name} was written"
        );
    }
    Ok(reusable + 1 >= of && cache.tokens().starts_with(prompt))
}

impl Writing {
    /// Writes the prompt that the session has read to its end, if it has, unless Ctrl-C ends that.
    ///
    /// # Errors
    /// The file cannot be written; what was there before is still there.
    pub fn write(
        self,
        session: &mut Session,
        interrupt: &Interrupt,
        show_progress: bool,
    ) -> Result<Outcome> {
        let _spinner = Spinner::new(show_progress, "writing the prompt cache");
        let start = Instant::now();
        let name = self.path.display();
        // Another Ctrl-C than the one that may have ended the text.
        interrupt.generation_starts();
        let go_on = || !interrupt.requested();
        match PromptCache::write(&self.path, &self.identity, session, &go_on) {
            Ok(None) => Ok(Outcome::Done),
            Ok(Some(bytes)) => {
                let time = start.elapsed();
                let name = escaped(&name.to_string());
                tracing::debug!("prompt cache: {bytes} bytes written to {name}, in {time:.1?}");
                Ok(Outcome::Done)
            }
            Err(_) if interrupt.requested() => Ok(Outcome::Interrupted),
            Err(error) => {
                Err(error).with_context(|| format!("the prompt cache {name} was not written"))
            }
        }
    }
}

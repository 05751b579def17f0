//! Ctrl-C: a request to end the text early. Where no text is on its way, and the second time, it ends the process; that there is
//! a second time is said where the first takes long. Where the parent process has SIGINT ignored, as for a job in a script's
//! background, it stays ignored.

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{exit, progress};

/// Nothing to end in good order yet.
const PREPARING: u8 = 0;
const GENERATING: u8 = 1;
const REQUESTED: u8 = 2;
/// Nothing to end at all: a person types, or is about to.
const RESTING: u8 = 3;

/// Who has waited so long is told of a faster way.
const PATIENCE: Duration = Duration::from_millis(500);

/// The state that the signal handler shares with the generation.
pub struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// Catches Ctrl-C from here on, unless it is ignored. A process does this once.
    pub fn catch() -> Result<Self> {
        let state = Arc::new(AtomicU8::new(PREPARING));
        let shared = Arc::clone(&state);
        let caught = ctrlc::try_set_handler(move || {
            let asked = shared.compare_exchange(
                GENERATING,
                REQUESTED,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match asked {
                Ok(_) => {}
                Err(RESTING) => return,
                Err(_) => {
                    progress::end();
                    process::exit(exit::INTERRUPTED.into());
                }
            }
            // The next Ctrl-C comes to this thread.
            let state = Arc::clone(&shared);
            let say = thread::Builder::new().spawn(move || say_if_slow(&state));
            drop(say);
        });
        match caught {
            // Some disposition other than the default was inherited, and only ignoring is.
            Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(Self(state)),
            Err(error) => Err(error).context("installing the Ctrl-C handler"),
        }
    }

    /// From here on, the first Ctrl-C is a request.
    pub fn generation_starts(&self) {
        self.0.store(GENERATING, Ordering::Relaxed);
    }

    /// From here on, Ctrl-C ends the process again; one that was a request stays one.
    pub fn generation_ends(&self) {
        let _ =
            self.0
                .compare_exchange(GENERATING, PREPARING, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// From here on until a generation starts, Ctrl-C does nothing: one that comes too late for an answer must not end a
    /// conversation.
    pub fn rests(&self) {
        self.0.store(RESTING, Ordering::Relaxed);
    }

    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed) == REQUESTED
    }
}

fn say_if_slow(state: &AtomicU8) {
    thread::sleep(PATIENCE);
    if state.load(Ordering::Relaxed) == REQUESTED {
        tracing::info!("stopping; press Ctrl-C again to quit at once");
    }
}

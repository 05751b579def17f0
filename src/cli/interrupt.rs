//! Ctrl-C: a request to end the text early. Where no text is on its way, it ends the process, and so does the second one
//! where the first takes a while, which is said. Where the parent process has SIGINT ignored, as for a job in a script's
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
/// What comes now is the same press of a nervous finger.
const REQUESTED: u8 = 2;
/// Requested, and a person was told of a faster way.
const SLOW: u8 = 3;
/// Nothing to end at all: a person types, or is about to.
const RESTING: u8 = 4;

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
                Ok(_) => watch(&shared),
                Err(REQUESTED | RESTING) => {}
                Err(_) => {
                    progress::end();
                    process::exit(exit::INTERRUPTED.into());
                }
            }
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
        matches!(self.0.load(Ordering::Relaxed), REQUESTED | SLOW)
    }
}

/// Tells of a faster way in a while, on a thread of its own: the next Ctrl-C comes to this one.
fn watch(state: &Arc<AtomicU8>) {
    let shared = Arc::clone(state);
    let watching = thread::Builder::new().spawn(move || {
        thread::sleep(PATIENCE);
        if is_slow(&shared) {
            tracing::info!("stopping; press Ctrl-C again to quit at once");
        }
    });
    if watching.is_err() {
        is_slow(state);
    }
}

/// Lets the next Ctrl-C end the process, where a request has not had its effect yet.
fn is_slow(state: &AtomicU8) -> bool {
    state
        .compare_exchange(REQUESTED, SLOW, Ordering::Relaxed, Ordering::Relaxed)
        .is_ok()
}

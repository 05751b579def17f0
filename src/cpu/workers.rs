//! The threads that share a forward pass.
//!
//! A token is some hundred regions of parallel work, each a few microseconds to milliseconds long with next to nothing between
//! them. So a worker that has nothing to do looks for the next region for some microseconds before it goes to sleep, and
//! nobody waits for a worker that has not come: where others want the cores, those that are awake do the work.

use std::{
    any::Any,
    cell::UnsafeCell,
    hint,
    marker::PhantomData,
    ops::Range,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use super::cores::default_threads;

/// How often a thread looks before it lets others have its core, and how often it does that before it sleeps.
const SPINS: usize = 1000;
const YIELDS: usize = 16;
const PATIENCE: usize = SPINS + YIELDS;

/// The caller and further threads, each with memory `S` of its own.
pub struct Workers<S> {
    shared: Arc<Shared>,
    /// The caller's is the first.
    scratch: Vec<Mutex<S>>,
    threads: Vec<JoinHandle<()>>,
    /// One region at a time.
    region: Mutex<()>,
    /// The first task of each worker's share that nobody took.
    next: Vec<Next>,
}

/// In a cache line of its own: only who looks for work elsewhere writes another worker's.
#[derive(Default)]
#[repr(align(128))]
struct Next(AtomicUsize);

impl<S: Send> Workers<S> {
    /// `threads` workers (0: one for each core), each with what `scratch` makes.
    pub fn new(threads: usize, scratch: impl Fn() -> Result<S>) -> Result<Self> {
        let count = match threads {
            0 => default_threads(),
            threads => threads,
        };
        let scratch = (0..count).map(|_| scratch().map(Mutex::new));
        let mut workers = Self {
            shared: Arc::default(),
            scratch: scratch.collect::<Result<_>>()?,
            threads: Vec::new(),
            region: Mutex::default(),
            next: (0..count).map(|_| Next::default()).collect(),
        };
        for worker in 1..count {
            let shared = Arc::clone(&workers.shared);
            let thread = thread::Builder::new()
                .name(format!("cpu-{worker}"))
                .spawn(move || shared.work(worker))
                .with_context(|| format!("cannot start {count} threads"))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Calls `work` once for each number below `tasks`, with the memory of the worker it runs on. Each worker begins with a
    /// share of them that lie together, since memory is read faster from places that are far apart; one that is done takes
    /// from the others' shares, so that a slow core does less.
    pub fn run(&self, tasks: usize, work: impl Fn(usize, &mut S) + Sync) {
        let _region = lock(&self.region);
        if tasks <= 1 || self.threads.is_empty() {
            let mut scratch = lock(&self.scratch[0]);
            (0..tasks).for_each(|task| work(task, &mut scratch));
            return;
        }
        let workers = self.threads().min(tasks);
        let start = |worker: usize| worker * tasks / workers;
        for (worker, next) in self.next.iter().enumerate().take(workers) {
            next.0.store(start(worker), Ordering::Relaxed);
        }
        self.shared.run(workers, &|worker: usize| {
            let mut scratch = lock(&self.scratch[worker]);
            for i in 0..workers {
                let share = (worker + i) % workers;
                loop {
                    let task = self.next[share].0.fetch_add(1, Ordering::Relaxed);
                    if task >= start(share + 1) {
                        break;
                    }
                    work(task, &mut scratch);
                }
            }
        });
    }
}

impl<S> Drop for Workers<S> {
    fn drop(&mut self) {
        self.shared.state.fetch_or(STOP, Ordering::SeqCst);
        self.shared.wake();
        for thread in self.threads.drain(..) {
            // What it panicked with went to the caller of `run`.
            let _ = thread.join();
        }
    }
}

/// A poisoned lock means that a task panicked, and that panic goes on to the caller.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a region does on the worker with a number.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// What the caller shares with the other threads.
#[derive(Default)]
struct Shared {
    /// The number of the region in the upper half; below it [`OPEN`], [`STOP`], and how many threads are in it.
    state: AtomicU64,
    region: UnsafeCell<Region>,
    /// Threads that sleep, or are about to.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// What a worker panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Default)]
struct Region {
    work: Option<Work<'static>>,
    /// Workers above this number are not needed.
    workers: usize,
}

/// Workers may join the region.
const OPEN: u64 = 1 << 31;
/// They are to end.
const STOP: u64 = 1 << 30;
/// Counts those in the region.
const COUNT: u64 = STOP - 1;
const NEXT_REGION: u64 = 1 << 32;

// SAFETY: `region` is written while the state is neither open nor counts anybody, by the one thread that holds the lock of
// `Workers::region`, and read by those that the state counts; all else is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the work is `Sync`, and so may be called from any thread.
unsafe impl Send for Shared {}

impl Shared {
    /// Calls `work` on this thread, as worker 0, and on those that come before it is done.
    fn run(&self, workers: usize, work: Work) {
        // SAFETY: the lifetime is forgotten for as long as `Closing` lives, which waits for all who call it.
        let work_of_all = unsafe { std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        // SAFETY: the region is closed, and nobody is in it.
        unsafe {
            *self.region.get() = Region {
                work: Some(work_of_all),
                workers,
            };
        }
        // Of a region that ended with the caller's own.
        *lock(&self.panic) = None;
        let before = self.state.load(Ordering::Relaxed);
        self.state
            .store(before.wrapping_add(NEXT_REGION) | OPEN, Ordering::SeqCst);
        let closing = Closing(self);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        work(0);
        drop(closing);
        if let Some(panic) = lock(&self.panic).take() {
            panic::resume_unwind(panic);
        }
    }

    fn wake(&self) {
        drop(lock(&self.sleep));
        self.wake.notify_all();
    }

    /// Joins one region after another.
    fn work(&self, worker: usize) {
        let mut last = 0;
        while let Some(region) = self.join(&mut last) {
            if let Some(work) = region.work.filter(|_| worker < region.workers) {
                let result = panic::catch_unwind(AssertUnwindSafe(|| work(worker)));
                if let Err(panic) = result {
                    *lock(&self.panic) = Some(panic);
                }
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a region behind the one with the number `last`, and counts this thread in. `None` where there will be none.
    fn join(&self, last: &mut u64) -> Option<&Region> {
        let mut looks = 0;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if state & STOP != 0 {
                return None;
            }
            if state & OPEN != 0 && state / NEXT_REGION != *last {
                let joined = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    *last = state / NEXT_REGION;
                    // SAFETY: the state counts this thread, until it has made use of it.
                    return Some(unsafe { &*self.region.get() });
                }
                continue;
            }
            looks += 1;
            match looks {
                ..SPINS => hint::spin_loop(),
                SPINS..PATIENCE => thread::yield_now(),
                _ => self.sleep(state),
            }
        }
    }

    /// Sleeps as long as the state is this one, or a little shorter.
    fn sleep(&self, state: u64) {
        let guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Whoever changes the state from here on sees the sleeper, and has to wait for the lock before it wakes anybody.
        if self.state.load(Ordering::SeqCst) == state {
            drop(
                self.wake
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Closes a region, and waits until nobody is in it.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let state = &self.0.state;
        let mut looks = 0;
        let mut now = state.fetch_and(!OPEN, Ordering::AcqRel);
        while now & COUNT != 0 {
            looks += 1;
            match looks {
                ..SPINS => hint::spin_loop(),
                SPINS..PATIENCE => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(20)),
            }
            now = state.load(Ordering::Acquire);
        }
    }
}

/// A matrix of which several workers write different parts at once.
pub struct SharedMatrix<'a> {
    numbers: *mut f32,
    len: usize,
    /// Numbers between the starts of two rows.
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: it gives access through `part` alone, whose callers keep to parts of their own.
unsafe impl Sync for SharedMatrix<'_> {}

impl<'a> SharedMatrix<'a> {
    pub fn new(numbers: &'a mut [f32], stride: usize) -> Self {
        Self {
            numbers: numbers.as_mut_ptr(),
            len: numbers.len(),
            stride,
            lifetime: PhantomData,
        }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    ///
    /// No other part that exists at the same time may overlap this one.
    #[allow(clippy::mut_from_ref)] // the caller answers for what a mutable `self` would
    pub unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(columns.start <= columns.end && columns.end <= self.stride);
        assert!(row * self.stride + columns.end <= self.len);
        // SAFETY: inside the slice that is borrowed for 'a, and nobody else's by the caller's word.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.numbers.add(row * self.stride + columns.start),
                columns.len(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{self, AssertUnwindSafe},
        sync::atomic::{AtomicUsize, Ordering},
        thread,
        time::Duration,
    };

    use super::Workers;

    #[test]
    fn every_task_is_done_once_in_every_region() {
        for threads in [1, 2, 5] {
            let workers = Workers::new(threads, || Ok(())).unwrap();
            for region in 0..5000 {
                // Now and then all are asleep.
                if region % 1000 == 0 {
                    thread::sleep(Duration::from_millis(2));
                }
                let tasks: Vec<_> = (0..region % 13).map(|_| AtomicUsize::new(0)).collect();
                workers.run(tasks.len(), |task, ()| {
                    tasks[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(tasks.iter().all(|task| task.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_of_any_task_goes_on_to_the_caller() {
        let workers = Workers::new(3, || Ok(())).unwrap();
        for wrong in 0..30 {
            let run = || workers.run(30, |task, ()| assert_ne!(task, wrong, "as wanted"));
            assert!(panic::catch_unwind(AssertUnwindSafe(run)).is_err());
            workers.run(30, |_, ()| {});
        }
    }
}

//! The threads that share a forward pass.

use std::{
    marker::PhantomData,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// A pool of threads, each with memory `S` of its own.
pub struct Workers<S> {
    pool: ThreadPool,
    scratch: Vec<Mutex<S>>,
}

impl<S: Send> Workers<S> {
    /// Starts `threads` workers (0: one per core), each with what `scratch` makes.
    pub fn new(threads: usize, scratch: impl Fn() -> Result<S>) -> Result<Self> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("cpu-{index}"))
            .build()
            .with_context(|| format!("cannot start {threads} threads"))?;
        let scratch = (0..pool.current_num_threads())
            .map(|_| scratch().map(Mutex::new))
            .collect::<Result<_>>()?;
        Ok(Self { pool, scratch })
    }

    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Moves to a worker, from where [`Workers::run`] is cheap.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Calls `work` once for each number below `tasks`, with the memory of the worker it runs on. Workers take the
    /// next task when they are free, so that a slow core does less.
    pub fn run(&self, tasks: usize, work: impl Fn(usize, &mut S) + Sync) {
        let next = AtomicUsize::new(0);
        let take_tasks = || {
            let worker = self.pool.current_thread_index().unwrap_or(0);
            // A poisoned lock means that a task panicked, and that panic goes on to the caller.
            let mut scratch = self.scratch[worker]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(task, &mut scratch);
            }
        };
        self.pool
            .install(|| fan_out(tasks.min(self.scratch.len()), &take_tasks));
    }
}

/// Calls `work` on up to `workers` workers. Whoever is asleep is not waited for: its call comes back to the caller.
fn fan_out(workers: usize, work: &(impl Fn() + Sync)) {
    if workers <= 1 {
        work();
    } else {
        let half = workers / 2;
        rayon::join(|| fan_out(workers - half, work), || fan_out(half, work));
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

//! Files mapped into memory, and which of them an address belongs to.

use std::{
    fs::File,
    io,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use memmap2::Mmap;

/// A whole file, mapped read-only.
pub struct Mapping {
    bytes: Mmap,
    entry: &'static Entry,
}

/// Where a file is mapped. Entries are appended and never taken away, so that a signal handler can read them at any time.
struct Entry {
    start: usize,
    /// Behind the last byte; 0 once the file is no longer mapped.
    end: AtomicUsize,
    name: String,
    next: Slot,
}

type Slot = OnceLock<Box<Entry>>;

static FIRST: Slot = Slot::new();

impl Mapping {
    /// Maps `file`; `name` is what [`mapped_file`] is to call it.
    pub fn new(file: &File, name: String) -> io::Result<Self> {
        // SAFETY: the mapping is private and read-only. What is left is the limit that every mapping has: someone else
        // who changes the file meanwhile changes what is read, and where they truncate it, touching it raises SIGBUS.
        let bytes = unsafe { Mmap::map(file)? };
        // What is not in memory yet is read in large pages where the system has them: faster, and faster to compute with from
        // then on. A hint, which systems without such pages refuse.
        #[cfg(target_os = "linux")]
        let _ = bytes.advise(memmap2::Advice::HugePage);
        let start = bytes.as_ptr() as usize;
        let mut entry = Box::new(Entry {
            start,
            end: AtomicUsize::new(start + bytes.len()),
            name,
            next: Slot::new(),
        });
        let mut slot = &FIRST;
        loop {
            match slot.set(entry) {
                Ok(()) => break,
                Err(refused) => entry = refused,
            }
            slot = &slot.get().expect("it is full").next;
        }
        let entry = slot.get().expect("it was just filled");
        Ok(Self { bytes, entry })
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the memory becomes somebody else's: fields are dropped after this.
        self.entry.end.store(0, Ordering::Release);
    }
}

/// The mapped file that the byte at `address` belongs to, by its path, quoted. It takes no lock and no memory, and
/// may be called in a signal handler.
pub fn mapped_file(address: usize) -> Option<&'static str> {
    let mut slot = &FIRST;
    while let Some(entry) = slot.get() {
        if (entry.start..entry.end.load(Ordering::Acquire)).contains(&address) {
            return Some(&entry.name);
        }
        slot = &entry.next;
    }
    None
}

//! One file from the hub into the cache: a part that grows, is checked, and only then gets the file's name.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use sha2::{Digest, Sha256};
use ureq::{
    Body,
    http::{HeaderMap, Response, StatusCode, header},
};

use super::{
    Observer,
    cache::{self, RepoCache, UNFINISHED},
    http::{Failure, Http, Patience},
};

/// So many bytes make up for the failures before them.
const PROGRESS: u64 = 1 << 20;
const BUFFER_BYTES: usize = 1 << 18;

/// A file of a repository.
pub struct RemoteFile {
    pub name: String,
    pub size: u64,
    /// What the cache calls it by: a checksum.
    pub etag: String,
    /// Whether that is a SHA-256 of the file, which can be checked; else it is git's.
    pub is_sha256: bool,
}

/// One file's download, as one of several that make `total` bytes, with `before` of them done.
pub struct Download<'a> {
    pub http: &'a Http,
    pub cache: &'a RepoCache,
    pub file: &'a RemoteFile,
    pub url: String,
    pub repo: &'a str,
    pub observer: &'a mut dyn Observer,
    pub before: u64,
    pub total: u64,
}

impl Download<'_> {
    /// Sees to it that the snapshot of `revision` has the file.
    pub fn into_snapshot(mut self, revision: &str) -> Result<()> {
        let link = self.cache.snapshot(revision).join(&self.file.name);
        let blob = self.cache.blob(&self.file.etag);
        if self.is_whole(&link) {
            return Ok(());
        }
        // Until the end of this function.
        let _lock = self.lock()?;
        if !self.is_whole(&blob) {
            self.fill(&blob)?;
        }
        if !self.is_whole(&link) {
            self.link(&link)
                .with_context(|| format!("linking {} to {}", link.display(), blob.display()))?;
        }
        Ok(())
    }

    fn is_whole(&self, path: &Path) -> bool {
        cache::size(path) == Some(self.file.size)
    }

    /// Waits until nobody else writes the file. The lock ends with the process, however that ends.
    fn lock(&mut self) -> Result<File> {
        let path = self.cache.lock_path(&self.file.etag);
        let locking = || format!("locking {}", path.display());
        let lock = create(&path, OpenOptions::new().write(true)).with_context(locking)?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error).with_context(locking),
        }
        self.observer.notice(&format!(
            "another process is downloading {}: waiting for it",
            self.file.name
        ));
        lock.lock().with_context(locking)?;
        Ok(lock)
    }

    /// Downloads what is missing of `blob`. Where the whole is not what it should be, it is discarded, and once all of it
    /// downloaded anew: the damage may come from a part that an earlier process left.
    fn fill(&mut self, blob: &Path) -> Result<()> {
        let path = blob.with_extension(UNFINISHED);
        let mut part = Part::open(&path, self.file.size)?;
        for try_again in [true, false] {
            self.complete(&mut part)?;
            if !self.file.is_sha256 || part.sha256() == self.file.etag {
                return part.finish(blob);
            }
            part.restart()?;
            if try_again {
                self.observer.notice(&format!(
                    "what was downloaded of {} is damaged (its SHA-256 is wrong): downloading it again",
                    self.file.name
                ));
            }
        }
        part.discard();
        bail!(
            "its SHA-256 is not {}, as {} says, twice in a row: what was downloaded is damaged, and deleted",
            self.file.etag,
            self.http.host()
        )
    }

    /// Downloads until the part has the file's size.
    fn complete(&mut self, part: &mut Part) -> Result<()> {
        let mut patience = Patience::new();
        while part.len < self.file.size {
            let before = part.len;
            self.observer.progress(self.before + before, self.total);
            if let Err(failure) = self.receive(part) {
                if part.len >= before + PROGRESS {
                    patience = Patience::new();
                }
                patience.wait(failure, self.observer)?;
            }
        }
        self.observer.progress(self.before + part.len, self.total);
        Ok(())
    }

    /// Appends what one response has of the rest.
    fn receive(&mut self, part: &mut Part) -> Result<(), Failure> {
        let size = self.file.size;
        let response = self.http.get(self.url.clone(), part.len, self.repo)?;
        if part.len > 0 && response.status() == StatusCode::OK {
            // It does not know how to send a part.
            part.restart()?;
        }
        self.check_size(&response, part.len)?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            // Not as a cause: a broken connection is no pipe of ours.
            let read = body.read(&mut buffer);
            let read = read.map_err(|error| self.broken(part.len, &error.to_string()))?;
            if read == 0 {
                break;
            }
            if part.len + read as u64 > size {
                part.restart()?;
                return Err(self.lies(&format!("more than {size} bytes")).into());
            }
            part.append(&buffer[..read])?;
            self.observer.progress(self.before + part.len, self.total);
        }
        match part.len < size {
            true => Err(self.broken(part.len, "it ended")),
            false => Ok(()),
        }
    }

    /// Refuses a response, meant to go on from the byte `start`, that is not one of a file of this size.
    fn check_size(&self, response: &Response<Body>, start: u64) -> Result<()> {
        let size = self.file.size;
        let headers = response.headers();
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let expected = format!("bytes {start}-{}/{size}", size - 1);
            let range = text(headers, header::CONTENT_RANGE);
            ensure!(
                range == expected,
                self.lies(&format!("the range {range:?}, not {expected:?}"))
            );
        }
        let length = text(headers, header::CONTENT_LENGTH);
        let fits = length.is_empty() || length == (size - start).to_string();
        ensure!(
            fits,
            self.lies(&format!("{length} bytes from byte {start} on"))
        );
        Ok(())
    }

    fn lies(&self, sends: &str) -> anyhow::Error {
        anyhow!(
            "{} says that it has {} bytes, but sends {sends}: try again later, or tell those who run it",
            self.http.host(),
            self.file.size
        )
    }

    fn broken(&self, len: u64, how: &str) -> Failure {
        let error = anyhow!(
            "the connection broke after {len} of {} bytes: {how}",
            self.file.size
        );
        Failure::Passing(error, None)
    }

    /// Makes `link` stand for the blob.
    fn link(&self, link: &Path) -> io::Result<()> {
        if let Some(directory) = link.parent() {
            fs::create_dir_all(directory)?;
        }
        if link.symlink_metadata().is_ok() {
            fs::remove_file(link)?;
        }
        #[cfg(unix)]
        {
            // Out of the snapshot, and of the directories that the name has.
            let up = "../".repeat(2 + self.file.name.matches('/').count());
            std::os::unix::fs::symlink(format!("{up}blobs/{}", self.file.etag), link)?;
        }
        // Links take a privilege on Windows, and the tools that share the cache do without them, too.
        #[cfg(not(unix))]
        fs::rename(self.cache.blob(&self.file.etag), link)?;
        Ok(())
    }
}

/// The header `name`; empty where there is none.
fn text(headers: &HeaderMap, name: header::HeaderName) -> &str {
    let value = headers.get(name);
    value.and_then(|value| value.to_str().ok()).unwrap_or("")
}

/// The first bytes of a file, and what their checksum has come to.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Sha256,
}

impl Part {
    /// What an earlier process may have left at `path` of a file of `size` bytes.
    fn open(path: &Path, size: u64) -> Result<Self> {
        let opening = || format!("opening {}", path.display());
        let file =
            create(path, OpenOptions::new().read(true).append(true)).with_context(opening)?;
        let mut part = Self {
            path: path.to_owned(),
            file,
            len: 0,
            hash: Sha256::new(),
        };
        part.len = part.file.metadata().with_context(opening)?.len();
        if part.len > size {
            part.restart()?;
        }
        let mut rest = (&part.file).take(part.len);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let read = rest.read(&mut buffer).with_context(opening)?;
            if read == 0 {
                return Ok(part);
            }
            part.hash.update(&buffer[..read]);
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| {
            format!(
                "writing {}: what is there stays, and the next try goes on from it",
                self.path.display()
            )
        })?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        let cut = self.file.set_len(0);
        cut.with_context(|| format!("emptying {}", self.path.display()))?;
        self.len = 0;
        self.hash = Sha256::new();
        Ok(())
    }

    fn discard(self) {
        // Empty as it is, it does no harm.
        let _ = fs::remove_file(&self.path);
    }

    /// Of all bytes, in hexadecimal digits.
    fn sha256(&self) -> String {
        let digest = self.hash.clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Gives it the name of the whole, once the disk has all of it.
    fn finish(self, blob: &Path) -> Result<()> {
        let written = self.file.sync_all();
        written
            .and_then(|()| fs::rename(&self.path, blob))
            .with_context(|| format!("finishing {}", blob.display()))
    }
}

/// Opens a file, made with the directory that it is in where they are not there.
fn create(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    options.create(true).open(path)
}

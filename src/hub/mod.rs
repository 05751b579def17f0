//! Models of a Hugging Face hub: which one a reference means, and its files in the cache that all of Hugging Face's tools
//! share, downloaded where they are not there yet.
//!
//! `hf-hub` knows how that cache is laid out. It downloads, too, but checks neither sizes nor checksums, appends to a
//! part whatever the server sends, and hands the token to the host that it is redirected to; `fetch` and `http` do that.

mod cache;
mod fetch;
mod http;
mod names;
mod reference;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use self::{
    cache::Cache,
    fetch::RemoteFile,
    http::{Http, Patience},
    names::ModelFiles,
};

pub use cache::{CachedModel, Contents, Unfinished};
pub use reference::Reference;

/// Who watches a download.
pub trait Observer {
    /// `done` bytes of `total` are here.
    fn progress(&mut self, done: u64, total: u64);

    /// Something holds the download up, in words for people.
    fn notice(&mut self, message: &str);
}

/// The hub and the cache that the environment names (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`,
/// `HF_HUB_OFFLINE`).
pub struct Hub {
    http: Http,
    cache: Cache,
    offline: bool,
}

impl Hub {
    /// With `offline`, or where the environment says so, no connection is ever made.
    ///
    /// # Errors
    /// Variables whose values mean nothing, and a machine without a home directory.
    pub fn from_env(offline: bool) -> Result<Self> {
        Ok(Self {
            http: Http::from_env()?,
            cache: Cache::from_env()?,
            offline: offline || cache::is_set("HF_HUB_OFFLINE"),
        })
    }

    /// The file, of a split model the first, of the model that `reference` means: from the cache without asking, else
    /// downloaded.
    ///
    /// # Errors
    /// As those of [`pull`](Self::pull).
    pub fn get(&self, reference: &Reference, observer: &mut dyn Observer) -> Result<PathBuf> {
        if let Some(path) = self.cache.find(reference)? {
            tracing::debug!("{reference}: {} is in the cache", path.display());
            return Ok(path);
        }
        self.pull(reference, observer)
    }

    /// The same of the hub's newest revision. Offline, what the cache has.
    ///
    /// # Errors
    /// A reference that means no model, or more than one; whatever keeps the hub from answering, or the cache from
    /// taking its files; files that are not what the hub says of them.
    pub fn pull(&self, reference: &Reference, observer: &mut dyn Observer) -> Result<PathBuf> {
        if self.offline {
            let found = self.cache.find(reference)?;
            return found.with_context(|| {
                format!(
                    "{reference} is not in the cache ({}), and --offline or HF_HUB_OFFLINE forbids to fetch it: without \
                     these, `sharpi pull {reference}` does",
                    self.cache.path().display()
                )
            });
        }
        let repo = self.ask(&reference.repo, observer)?;
        let models = ModelFiles::among(repo.siblings.iter().map(|file| &file.rfilename[..]));
        let Some(model) = reference.choose(&models)? else {
            bail!("{}", reference.lacking(&models));
        };
        let files = model.parts.iter().map(|name| repo.file(name));
        let files = files
            .collect::<Result<Vec<_>>>()
            .with_context(|| format!("cannot fetch {reference}"))?;
        let cached = self.cache.repo(&reference.repo);
        let total = files
            .iter()
            .fold(0, |sum: u64, f| sum.saturating_add(f.size));
        let mut before = 0;
        for file in &files {
            let download = fetch::Download {
                http: &self.http,
                cache: &cached,
                file,
                url: self.http.file_url(&reference.repo, &repo.sha, &file.name),
                repo: &reference.repo,
                observer,
                before,
                total,
            };
            download
                .into_snapshot(&repo.sha)
                .with_context(|| format!("cannot fetch {}", file.name))?;
            before += file.size;
        }
        cached.set_main(&repo.sha)?;
        Ok(cached.snapshot(&repo.sha).join(&files[0].name))
    }

    /// What the cache holds.
    ///
    /// # Errors
    /// A cache that cannot be read. One that is not there holds nothing.
    pub fn contents(&self) -> Result<Contents> {
        self.cache.contents()
    }

    /// Where the cache is.
    pub fn cache_path(&self) -> &PathBuf {
        self.cache.path()
    }

    /// The files of `repo`, and the revision they are of.
    fn ask(&self, repo: &str, observer: &mut dyn Observer) -> Result<RepoInfo> {
        let mut patience = Patience::new();
        let info: RepoInfo = loop {
            match self.http.repo_info(repo) {
                Ok(info) => break info,
                Err(failure) => patience.wait(failure, observer)?,
            }
        };
        ensure!(
            is_hex(&info.sha, 40),
            "{} gives no revision of {repo}, but {:?}",
            self.http.host(),
            info.sha
        );
        Ok(info)
    }
}

/// A repository, as the hub describes it. Names are as the hub has them: any.
#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl RepoInfo {
    /// The file called `name`, one of those that there are.
    fn file(&self, name: &str) -> Result<RemoteFile> {
        let file = self.siblings.iter().find(|file| file.rfilename == name);
        let file = file.with_context(|| format!("there is no {name}"))?;
        let (etag, size, digits) = match &file.lfs {
            Some(lfs) => (Some(&lfs.sha256), Some(lfs.size), 64),
            None => (file.blob_id.as_ref(), file.size, 40),
        };
        let (Some(etag), Some(size)) = (etag, size) else {
            bail!("the hub does not say how large {name} is, and what is in it");
        };
        ensure!(
            is_hex(etag, digits),
            "the hub gives {etag:?} for the checksum of {name}"
        );
        Ok(RemoteFile {
            name: name.to_owned(),
            size,
            etag: etag.clone(),
            is_sha256: file.lfs.is_some(),
        })
    }
}

/// Whether `text` is `digits` hexadecimal digits: it becomes a part of a path.
fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

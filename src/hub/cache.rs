//! The cache that Hugging Face's tools share: what is in it, and where things go.
//!
//! `models--OWNER--REPO/` of it has `blobs/`, files called by their checksum; `snapshots/REVISION/`, links to these by
//! name; and `refs/main`, the newest revision that somebody asked for. A blob that is not whole yet ends in `.incomplete`.

use std::{
    cmp::Reverse,
    env,
    fs::{self, File},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, Result};
use hf_hub::{CacheRepo, Repo};

use super::{Reference, names::ModelFiles};

pub const UNFINISHED: &str = "incomplete";

/// A variable of the environment, unless it is empty or no text.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether a variable says yes, as Hugging Face's tools read it.
pub fn is_set(name: &str) -> bool {
    let yes = |value: String| ["1", "on", "yes", "true"].contains(&&value.to_lowercase()[..]);
    variable(name).is_some_and(yes)
}

/// Where Hugging Face's tools keep what they keep.
pub fn home() -> Option<PathBuf> {
    let path = |name| variable(name).map(PathBuf::from);
    let of_caches = || path("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")));
    path("HF_HOME").or_else(|| Some(of_caches()?.join("huggingface")))
}

/// All models of the cache, and what is on its way there.
#[derive(Default)]
pub struct Contents {
    pub models: Vec<CachedModel>,
    pub unfinished: Vec<Unfinished>,
}

/// A model that is whole.
pub struct CachedModel {
    /// What means it.
    pub reference: Reference,
    /// As its name says.
    pub quantization: Option<String>,
    /// Of all parts together.
    pub bytes: u64,
    /// Of the first part.
    pub path: PathBuf,
}

/// A GGUF file whose download was broken off, or is going on.
pub struct Unfinished {
    /// Owner and name.
    pub repo: String,
    /// That are there.
    pub bytes: u64,
    pub path: PathBuf,
}

pub struct Cache(hf_hub::Cache);

impl Cache {
    pub fn from_env() -> Result<Self> {
        let path = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        let path = match path {
            Some(path) => PathBuf::from(path),
            None => home()
                .context("there is no home directory for Hugging Face's cache: set HF_HOME")?
                .join("hub"),
        };
        // hf-hub's own choice would not know all of these variables, and panic without a home directory.
        Ok(Self(hf_hub::Cache::new(path)))
    }

    pub fn path(&self) -> &PathBuf {
        self.0.path()
    }

    pub fn repo(&self, repo: &str) -> RepoCache {
        let repo = Repo::model(repo.to_owned());
        let folder = repo.folder_name();
        RepoCache {
            path: self.path().join(&folder),
            locks: self.path().join(".locks").join(folder),
            layout: self.0.repo(repo),
        }
    }

    /// The model that `reference` means among those that are there.
    pub fn find(&self, reference: &Reference) -> Result<Option<PathBuf>> {
        for snapshot in self.repo(&reference.repo).snapshots() {
            let names = file_names(&snapshot);
            let models = ModelFiles::among(names.iter().map(String::as_str));
            if let Some(model) = reference.choose(&models)? {
                return Ok(Some(snapshot.join(&model.parts[0])));
            }
        }
        Ok(None)
    }

    /// Sorted by what means them.
    pub fn contents(&self) -> Result<Contents> {
        let mut contents = Contents::default();
        let directories = match fs::read_dir(self.path()) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(contents),
            directories => {
                directories.with_context(|| format!("reading {}", self.path().display()))?
            }
        };
        let names = directories.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        for name in names {
            let Some((owner, repo)) = name
                .strip_prefix("models--")
                .and_then(|name| name.split_once("--"))
            else {
                continue;
            };
            self.repo(&format!("{owner}/{repo}"))
                .add_to(&mut contents, &format!("{owner}/{repo}"));
        }
        contents
            .models
            .sort_by_cached_key(|model| model.reference.to_string());
        contents
            .unfinished
            .sort_by_cached_key(|file| (file.repo.clone(), file.path.clone()));
        Ok(contents)
    }
}

/// What the cache has of one repository.
pub struct RepoCache {
    path: PathBuf,
    locks: PathBuf,
    layout: CacheRepo,
}

impl RepoCache {
    /// The file whose checksum is `etag`.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    pub fn snapshot(&self, revision: &str) -> PathBuf {
        self.layout.pointer_path(revision)
    }

    /// The lock that Hugging Face's own tools take, too, before they write that file.
    pub fn lock_path(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// Makes `revision` the newest one.
    pub fn set_main(&self, revision: &str) -> Result<()> {
        let written = self.layout.create_ref(revision);
        written.with_context(|| format!("writing refs/main in {}", self.path.display()))
    }

    /// All snapshots: that of the newest revision, then the others, the latest first.
    fn snapshots(&self) -> Vec<PathBuf> {
        let main = fs::read_to_string(self.path.join("refs/main")).ok();
        let main = main.map(|revision| self.snapshot(revision.trim()));
        let changed = |path: &PathBuf| {
            let time = fs::metadata(path).and_then(|data| data.modified());
            time.unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let mut paths: Vec<_> = entries(&self.path.join("snapshots"))
            .map(|entry| entry.path())
            .collect();
        paths.sort_by_cached_key(|path| (Some(path) != main.as_ref(), Reverse(changed(path))));
        paths
    }

    fn add_to(&self, contents: &mut Contents, repo: &str) {
        let mut found: Vec<(ModelFiles, PathBuf)> = Vec::new();
        for snapshot in self.snapshots() {
            let names = file_names(&snapshot);
            for model in ModelFiles::among(names.iter().map(String::as_str)) {
                if !found.iter().any(|(newer, _)| newer.parts == model.parts) {
                    found.push((model, snapshot.clone()));
                }
            }
        }
        let (models, snapshots): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let references = Reference::to_all(repo, &models);
        for ((model, snapshot), reference) in models.into_iter().zip(snapshots).zip(references) {
            let sizes = model
                .parts
                .iter()
                .map(|part| size(&snapshot.join(part)).unwrap_or(0));
            contents.models.push(CachedModel {
                reference,
                bytes: sizes.sum(),
                path: snapshot.join(&model.parts[0]),
                quantization: model.quant,
            });
        }
        let blobs = entries(&self.path.join("blobs")).map(|entry| entry.path());
        let unfinished =
            blobs.filter(|path| path.extension().is_some_and(|e| e == UNFINISHED) && is_gguf(path));
        contents
            .unfinished
            .extend(unfinished.map(|path| Unfinished {
                repo: repo.to_owned(),
                bytes: size(&path).unwrap_or(0),
                path,
            }));
    }
}

/// The size of the file at `path`, where there is one.
pub fn size(path: &Path) -> Option<u64> {
    let data = fs::metadata(path).ok()?;
    data.is_file().then_some(data.len())
}

/// Whether what there is of a file begins as a GGUF file does.
fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && &magic == b"GGUF"
}

/// The files below `directory`, by their paths from there, with slashes. Links that lead nowhere are none.
fn file_names(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in entries(directory) {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let below = file_names(&entry.path()).into_iter();
            names.extend(below.map(|file| format!("{name}/{file}")));
        } else if size(&entry.path()).is_some() {
            names.push(name);
        }
    }
    names
}

/// What is in `directory`; nothing where it cannot be read.
fn entries(directory: &Path) -> impl Iterator<Item = fs::DirEntry> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(io::Result::ok)
}

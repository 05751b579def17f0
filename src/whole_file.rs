//! Files that are there as a whole or not at all.

use std::{
    fs::{self, File},
    path::Path,
};

use anyhow::{Result, ensure};

/// Has `write` write a file that takes the place of the one at `path` once all of it is on the disk, with its permissions, or
/// readable for its owner alone where there was none. Where `path` is a link, what it leads to is replaced.
///
/// # Errors
/// What `write` and the file system meet, and an old file that must not be written. It stays.
pub fn replace<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut file = tempfile::Builder::new()
        .prefix(".sharpi-")
        .tempfile_in(directory_of(&target))?;
    if let Ok(old) = fs::metadata(&target) {
        let permissions = old.permissions();
        ensure!(!permissions.readonly(), "it is write-protected");
        file.as_file().set_permissions(permissions)?;
    }
    let written = write(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(&target)?;
    Ok(written)
}

/// The directory that the file at `path` is in.
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if directory != "" => directory,
        _ => Path::new("."),
    }
}

//! Which file it is, told from others without reading all of it.

use xxhash_rust::xxh3::Xxh3;

use super::Gguf;

/// Bytes that are read of a tensor in each of three places.
const SAMPLE_BYTES: usize = 4096;

impl Gguf {
    /// A hash (XXH3) of the length of the file, all that it says before its tensors' data, and of each tensor the beginning, the
    /// middle and the end. Files whose weights differ nowhere else have the same one.
    pub fn fingerprint(&self) -> u128 {
        let mut hash = Xxh3::new();
        hash.update(&self.file_bytes.to_le_bytes());
        for (bytes, header_len) in &self.parts {
            hash.update(&bytes.as_ref()[..*header_len]);
        }
        for tensor in self.tensors() {
            let bytes = tensor.bytes();
            let last = bytes.len().saturating_sub(SAMPLE_BYTES);
            for start in [0, last / 2, last] {
                let end = bytes.len().min(start + SAMPLE_BYTES);
                hash.update(&bytes[start..end]);
            }
        }
        hash.digest128()
    }
}

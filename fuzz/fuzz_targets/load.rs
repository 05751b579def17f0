//! Any bytes as a model file: loading must end in a model or an error, never in a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sharpi::model::{Gguf, Model};

fuzz_target!(|bytes: &[u8]| {
    let _ = Gguf::from_bytes("fuzz.gguf", bytes.to_vec()).and_then(Model::from_gguf);
});

//! `sharpi` runs GGUF language models from the command line. `docs/architecture.md` shows the whole on one page.
//!
//! The modules depend on each other in one direction only, each on those to its right:
//!
//! ```text
//!       ┌→ engine ────┐
//! cli ──┤             ├→ backend → model → quant
//!       ├→ cpu, cuda ─┘            ↑
//!       └→ hub ────────────────────┘
//! ```
//!
//! * [`cli`] reads flags, writes output and holds no arithmetic.
//! * [`engine`] turns a prompt into tokens: sessions, the generation loop, sampling.
//! * [`cpu`] computes logits on the host; it is the reference that every other backend is held to.
//! * [`cuda`] computes them on a GPU, with the kernels in `kernels/`.
//! * [`backend`] says what a backend is, and how its KV cache is laid out.
//! * [`model`] reads a GGUF file into a decoder as data, a tokenizer and a chat template. It never sees a device.
//! * [`hub`] finds models in Hugging Face's cache, and downloads them into it.
//! * [`quant`] knows the ggml block formats.

pub mod backend;
pub mod cli;
pub mod cpu;
pub mod cuda;
pub mod engine;
pub mod hub;
mod math;
pub mod model;
pub mod quant;
mod whole_file;

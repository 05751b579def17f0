//! `sharpi` runs GGUF language models from the command line.
//!
//! The modules depend on each other in one direction only:
//!
//! ```text
//! cli → engine → cpu, cuda (backends) → model → quant
//! ```
//!
//! * [`cli`] reads flags, writes output and holds no arithmetic.
//! * [`engine`] turns a prompt into tokens: sessions, the generation loop, sampling.
//! * [`cpu`] computes logits on the host; it is the reference that every other backend is held to.
//! * [`cuda`] computes them on a GPU, with the kernels in `kernels/`.
//! * [`model`] reads a GGUF file into typed hyper-parameters, weights, a tokenizer and a chat
//!   template. It never sees a device.
//! * [`quant`] knows the ggml block formats.

pub mod cli;
pub mod cpu;
pub mod cuda;
pub mod engine;
mod math;
pub mod model;
pub mod quant;

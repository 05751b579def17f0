//! The CUDA backend.

mod device;
mod graph;
mod upload;
mod weights;

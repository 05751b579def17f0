//! A step kernel one of whose blocks is lost ends in an error that says so. In a process of its own: the GPU gives up all
//! that the process had.

mod common;

use common::gpu::{self, Test, TestResult, check};
use sharpi::{
    backend::{Backend, Batch},
    cuda::{Options, StepKernel},
    model::Model,
};

fn main() {
    let tests: [Test; 1] = [("a_lost_block_is_named", a_lost_block_is_named)];
    gpu::run(&tests, &[])
}

fn a_lost_block_is_named() -> TestResult {
    let model = Model::demo()?;
    let options = Options {
        step_kernel: StepKernel::Always,
        ..Options::default()
    };
    let mut backend = gpu::open(&model, &options)?;
    backend.compute(Batch::decode(&1, 0))?;
    backend.set_graph(Some("a captured launch keeps its blocks".into()));
    backend.device_handle().set_extra_blocks(-1);
    let Err(error) = backend.compute(Batch::decode(&2, 1)) else {
        return Err("a step without one of its blocks ended".into());
    };
    let message = format!("{error:#}");
    check(
        message.contains("of the step kernel waited in vain for what")
            && message.contains("--no-step-kernel"),
        message,
    )
}

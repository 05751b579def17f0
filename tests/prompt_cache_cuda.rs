//! Prompts that are kept in files, on a GPU.

mod common;

use common::{
    gpu::{self, Test, TestResult},
    prompt_cache::{goes_on, model, ways},
};
use sharpi::{
    cuda::{Options, StepKernel},
    engine::Session,
};

/// Rings are as short as on the CPU, and the prompt comes in several pieces.
const CHUNK_LEN: usize = 128;

fn main() {
    let tests: [Test; 1] = [(
        "a_restored_session_goes_on_as_the_one_that_read_the_prompt",
        a_restored_session_goes_on,
    )];
    gpu::run(&tests, &[]);
}

fn a_restored_session_goes_on() -> TestResult {
    for (window, kv) in ways() {
        let model = model(window);
        for step_kernel in [StepKernel::Always, StepKernel::Never("a test".into())] {
            let open = |context_len: usize| {
                let options = Options {
                    context_len: Some(context_len),
                    chunk_len: Some(CHUNK_LEN),
                    step_kernel: step_kernel.clone(),
                    kv,
                    ..Options::default()
                };
                Ok(Session::new(Box::new(gpu::open(&model, &options)?)))
            };
            goes_on(&model, &open).map_err(|error| {
                format!("window {window:?}, {kv:?}, {step_kernel:?}: {error:#}")
            })?;
        }
    }
    Ok(())
}

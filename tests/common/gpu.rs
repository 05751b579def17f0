//! How tests that need a GPU are run.

use std::env;

use libtest_mimic::{Arguments, Failed, Trial};
use sharpi::{
    cuda::{self, CudaBackend, Device, Gpus, Options},
    model::Model,
    quant::TensorType,
};

pub type TestResult = Result<(), Failed>;
pub type Test = (&'static str, fn() -> TestResult);

/// The tensor types that have kernels.
pub const TYPES: [TensorType; 19] = {
    use TensorType::*;
    [
        Q4_K, Q6_K, Q4_0, Q4_1, Q5_0, Q5_1, Q5_K, Q8_0, Q3_K, Q2_K, IQ4_NL, IQ4_XS, MXFP4, IQ3_S,
        IQ3_XXS, IQ2_S, F16, BF16, F32,
    ]
};

/// Runs the tests and ends the process; see [`trials`].
pub fn run(tests: &[Test], lacking: &[&str]) -> ! {
    run_trials(trials(tests, lacking))
}

/// Where there is no GPU, every test is reported as ignored; with SHARPI_REQUIRE_CUDA=1 that is a failure. Those named in
/// `lacking` are ignored in any case: a file that they need is not here.
pub fn trials(tests: &[Test], lacking: &[&str]) -> Vec<Trial> {
    let missing = match cuda::list() {
        Ok(Gpus::Here(_)) => None,
        Ok(Gpus::Absent(reason)) => Some(reason.to_owned()),
        Err(error) => Some(format!("{error:#}")),
    };
    let required = env::var_os("SHARPI_REQUIRE_CUDA").is_some_and(|value| value == "1");
    if let Some(reason) = &missing {
        eprintln!("the tests that need a GPU do not run: {reason}");
    }
    let trial = |&(name, test): &Test| {
        let missing = missing.clone();
        let ignored = missing.is_some() && !required || lacking.contains(&name);
        Trial::test(name, move || match missing {
            Some(reason) => Err(format!("SHARPI_REQUIRE_CUDA=1, but {reason}").into()),
            None => test(),
        })
        .with_ignored_flag(ignored)
    };
    tests.iter().map(trial).collect()
}

/// One at a time: they share the GPU, and one watches its free memory.
pub fn run_trials(trials: Vec<Trial>) -> ! {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials).exit()
}

pub fn check(holds: bool, message: impl Into<String>) -> TestResult {
    if holds {
        Ok(())
    } else {
        Err(message.into().into())
    }
}

/// A backend on the first GPU.
pub fn open(model: &Model, options: &Options) -> anyhow::Result<CudaBackend> {
    CudaBackend::new(
        Device::open(0)?,
        model.decoder.clone(),
        options,
        &mut |_, _| {},
    )
}

//! How tests that need a GPU are run.

use std::env;

use libtest_mimic::{Arguments, Failed, Trial};
use sharpi::{
    backend::Backend,
    cuda::{self, CudaBackend, Device, Gpus, Options, StepKernel},
    engine::Trace,
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

/// Backends that compute by the step kernel and by separate kernels.
pub fn both_ways(model: &Model, options: &Options) -> anyhow::Result<[CudaBackend; 2]> {
    let open = |step_kernel: StepKernel| {
        let options = Options {
            step_kernel,
            ..options.clone()
        };
        open(model, &options)
    };
    let step = open(StepKernel::Always)?;
    let report = step.step_report().expect("CUDA has a report").clone();
    anyhow::ensure!(report.enabled, "no step kernel: {report:?}");
    Ok([step, open(StepKernel::Never("a test".into()))?])
}

/// Decodes `count` tokens behind each prompt both ways.
pub fn compare_both_ways(
    case: &str,
    model: &Model,
    options: &Options,
    prompts: &[Vec<u32>],
    count: usize,
) -> TestResult {
    let [mut step, mut separate] = both_ways(model, options)?;
    for prompt in prompts {
        let reference = Trace::record(&mut separate, prompt, count, None)?;
        let ours = Trace::record(&mut step, prompt, count, Some(&reference.tokens))?;
        let comparison = reference.compare(&ours);
        check(
            comparison.first_difference.is_none(),
            format!(
                "{case}, {} tokens before: logits differ first at token {:?}, by {}",
                prompt.len(),
                comparison.first_difference,
                comparison.max_difference
            ),
        )?;
    }
    let report = step.step_report().expect("CUDA has a report");
    check(report.enabled, format!("{report:?}"))
}

//! Where to compute: the backend that `--device` names, opened while the model file is being read.

use std::{sync::Arc, thread};

use anyhow::{Context, Result, anyhow};

use super::{
    args::Device,
    context,
    progress::{CountBar, Spinner},
    resolve::ModelSource,
};
use crate::{
    backend::{Backend, KvOptions},
    cpu::{self, Arithmetic, CpuBackend},
    cuda::{self, CudaBackend, DoesNotFit, Gpus, StepKernel},
    engine::Session,
    model::{Decoder, Vocabulary},
};

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Compute {
    pub device: Device,
    /// Worker threads on the CPU; 0: one for each core.
    pub threads: usize,
    /// Likewise.
    pub arithmetic: Arithmetic,
    /// The flag or variable that forbids the CUDA graph, as messages name it; `None`: decoding is captured.
    pub graph_disabled: Option<String>,
    /// [`StepKernel::Never`] with the flag or variable that forbids it.
    pub step_kernel: StepKernel,
    /// Tokens of a prompt that a GPU reads at once; `None`: the backend's own choice.
    pub ubatch: Option<usize>,
    /// Tokens of prompt and text; `None`: as many as are sensible.
    pub context_len: Option<usize>,
    pub kv: KvOptions,
    /// The flags of this command that decide about `context_len`, as messages name them.
    pub context_flags: &'static str,
    pub show_progress: bool,
}

/// A model on a device.
pub struct Loaded {
    pub decoder: Arc<Decoder>,
    pub session: Session,
    pub vocabulary: Vocabulary,
}

/// A device on its way: opening a GPU takes as long as reading a large vocabulary.
pub struct Opening {
    compute: Compute,
    /// `None`: the CPU.
    gpu: Option<thread::JoinHandle<Result<Arc<cuda::Device>>>>,
}

impl Compute {
    /// Brings `model` onto the device, and meanwhile has `read` take what else is wanted from its vocabulary, since a large one
    /// takes as long to read as the weights to a GPU.
    pub fn load<T: Send + 'static>(
        &self,
        model: &ModelSource,
        read: impl FnOnce(&Vocabulary) -> Result<T> + Send + 'static,
    ) -> Result<(Loaded, T)> {
        let opening = self.clone().open();
        let spinner = Spinner::loading(self.show_progress, &model.name());
        let gguf = model.open_gguf()?;
        let decoder = model.describe(&gguf, self.context_len)?;
        let reading = thread::spawn(move || {
            let vocabulary = Vocabulary::from_gguf(gguf)?;
            let read = read(&vocabulary)?;
            anyhow::Ok((vocabulary, read))
        });
        let backend = opening.load(&decoder);
        let read = reading.join();
        drop(spinner);
        let session = Session::new(backend?);
        let (vocabulary, read) =
            read.map_err(|_| anyhow!("reading the vocabulary ended the thread that did it"))??;
        let loaded = Loaded {
            decoder,
            session,
            vocabulary,
        };
        Ok((loaded, read))
    }

    /// Begins to open the device.
    pub fn open(self) -> Opening {
        let ordinal = match self.device {
            Device::Cpu => None,
            Device::Cuda(ordinal) => Some(ordinal),
            Device::Auto => first_gpu(),
        };
        Opening {
            compute: self,
            gpu: ordinal.map(|ordinal| thread::spawn(move || cuda::Device::open(ordinal))),
        }
    }
}

impl Opening {
    /// The GPU, if that is what was asked for.
    pub fn gpu(&mut self) -> Result<Option<Arc<cuda::Device>>> {
        let Some(opening) = self.gpu.take() else {
            return Ok(None);
        };
        let opened = opening
            .join()
            .map_err(|_| anyhow!("opening the GPU ended the thread that did it"))?;
        let gpu = opened.context("the GPU cannot be used (`sharpi devices` shows what can)")?;
        Ok(Some(gpu))
    }

    /// Brings the model onto the device. Where that was left to us, the CPU stands in for a GPU that fails or has no kernels
    /// for the model, but not for one that is full: a run a hundred times slower would not be what was meant.
    pub fn load(mut self, decoder: &Arc<Decoder>) -> Result<Box<dyn Backend>> {
        let on_gpu = match self.gpu() {
            Ok(None) => return on_cpu(&self.compute, decoder),
            Ok(Some(gpu)) => on_gpu(gpu, &self.compute, decoder),
            Err(error) => Err(error),
        };
        match on_gpu {
            Ok(backend) => Ok(Box::new(backend)),
            Err(error) if self.compute.device == Device::Auto && !error.is::<DoesNotFit>() => {
                tracing::warn!("running on the CPU, not on the GPU: {error:#}");
                on_cpu(&self.compute, decoder)
            }
            Err(error) => Err(error),
        }
    }
}

/// The first GPU. The CPU stands in where there is none, and, with a warning, where the driver fails.
fn first_gpu() -> Option<usize> {
    match cuda::list() {
        Ok(Gpus::Here(gpus)) => gpus.first().map(|gpu| gpu.ordinal),
        Ok(Gpus::Absent(why)) => {
            tracing::debug!("running on the CPU: {why}");
            None
        }
        Err(error) => {
            tracing::warn!("running on the CPU, because the GPU's driver fails: {error:#}");
            None
        }
    }
}

/// Brings the model onto a GPU.
pub fn on_gpu(
    gpu: Arc<cuda::Device>,
    compute: &Compute,
    decoder: &Arc<Decoder>,
) -> Result<CudaBackend> {
    let options = cuda::Options {
        context_len: compute.context_len,
        chunk_len: compute.ubatch,
        graph_disabled: compute.graph_disabled.clone(),
        step_kernel: compute.step_kernel.clone(),
        kv: compute.kv,
    };
    context::warn_if_untrained(compute, decoder);
    let mut bar = CountBar::bytes(compute.show_progress, "uploading the weights");
    CudaBackend::new(gpu, Arc::clone(decoder), &options, &mut |done, total| {
        bar.update(done, total)
    })
    .map_err(|mut error| {
        if let Some(does_not_fit) = error.downcast_mut::<DoesNotFit>() {
            does_not_fit.advice = Some(what_would_fit(does_not_fit, compute));
        }
        error.context("preparing the GPU")
    })
}

/// What a person can do about a GPU without room.
fn what_would_fit(does_not_fit: &DoesNotFit, compute: &Compute) -> String {
    let flags = compute.context_flags;
    let smaller = match (does_not_fit.longest, compute.ubatch) {
        (0, None) => "a smaller model, or memory freed on the GPU,".to_owned(),
        (0, Some(_)) => "a smaller --ubatch or model, or memory freed on the GPU,".to_owned(),
        (longest, None) => format!("up to {longest} tokens of context ({flags})"),
        (longest, Some(_)) => {
            format!("up to {longest} tokens of context ({flags}), more with a smaller --ubatch,")
        }
    };
    let compressed = does_not_fit.tiles;
    let compressed = compressed.map_or(String::new(), |tiles| format!("--kv-type {tiles}, or "));
    format!("{compressed}{smaller} would fit, or --device cpu")
}

/// Brings the model to the CPU.
pub fn on_cpu(compute: &Compute, decoder: &Arc<Decoder>) -> Result<Box<dyn Backend>> {
    let context_len = context::choose(compute, decoder)?;
    let options = cpu::Options {
        threads: compute.threads,
        kv: compute.kv,
        arithmetic: compute.arithmetic,
    };
    let backend = CpuBackend::with_options(Arc::clone(decoder), context_len, options);
    let backend = backend.with_context(|| {
        let flags = compute.context_flags;
        format!("preparing the CPU (context: {flags}, threads: --threads)")
    })?;
    Ok(Box::new(backend))
}

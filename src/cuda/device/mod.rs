//! One GPU: its context, the kernels loaded into it, and the stream that everything runs on; memory, launches and
//! captured graphs of it in the files beside. No other folder calls the driver for these.
//!
//! cudarc counts the references to a context and to each module: a context lives as long as its [`Device`] and whatever
//! was made in it, a module as long as the device and the [`Function`]s taken from it.

mod graph;
mod launch;
mod memory;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result, anyhow};
use cudarc::{
    driver::{
        CudaContext, CudaEvent, CudaModule, CudaStream, DriverError, result,
        sys::{self, CUdevice_attribute as Attribute},
    },
    nvrtc::Ptx,
};

pub use graph::Graph;
pub use launch::{Function, Launch, Parameter};
pub use memory::{DeviceBuffer, PinnedBuffer};

mod fatbins {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// The architectures that this executable holds kernels for, as nvcc names them; empty where it was built without CUDA.
pub const ARCHS: &str = fatbins::ARCHS;

/// A GPU that is ready to work. Everything runs in order on one stream.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    compute_capability: (i32, i32),
    multiprocessors: usize,
    shared_bytes_per_block: usize,
    /// By kernel file.
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// By kernel.
    functions: Mutex<HashMap<String, Function>>,
    allocations: AtomicUsize,
    dependent_launch: AtomicBool,
    failing_captures: AtomicBool,
    extra_blocks: AtomicI32,
}

impl Device {
    /// Opens GPU `ordinal` and loads the kernels into it.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let start = Instant::now();
        let doing = || format!("opening GPU {ordinal}");
        if let Some(lacking) = lacking() {
            return Err(anyhow!(lacking)).with_context(doing);
        }
        let context = CudaContext::new(ordinal)
            .map_err(explain)
            .with_context(doing)?;
        // SAFETY: all work is on one stream, so no slice needs events to order its uses; cudarc's would break a
        // capture.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(explain).with_context(doing)?;
        let name = context.name().map_err(explain)?;
        let compute_capability = context.compute_capability().map_err(explain)?;
        let attribute = |attribute| context.attribute(attribute).map_err(explain);
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_bytes_per_block =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let mut modules = HashMap::new();
        for &(file, image) in fatbins::FATBINS {
            let image = Ptx::from_binary(image.to_vec());
            let module = context.load_module(image).map_err(explain).with_context(|| {
                format!("loading the kernels (built for {ARCHS}) into {name}, compute capability {}.{}", compute_capability.0, compute_capability.1)
            })?;
            modules.insert(file, module);
        }
        tracing::debug!("opened {name} in {:.0?}", start.elapsed());
        Ok(Arc::new(Self {
            context,
            stream,
            name,
            compute_capability,
            multiprocessors,
            shared_bytes_per_block,
            modules,
            functions: Mutex::default(),
            allocations: AtomicUsize::new(0),
            dependent_launch: AtomicBool::new(compute_capability.0 >= 9),
            failing_captures: AtomicBool::new(false),
            extra_blocks: AtomicI32::new(0),
        }))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.compute_capability
    }

    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Whether a kernel may start before the one before it has ended.
    pub fn has_dependent_launch(&self) -> bool {
        self.dependent_launch.load(Ordering::Relaxed)
    }

    /// Lets kernels that allow it start before the one before has ended, as they do from the beginning where the device
    /// can, or makes each wait. For what is launched from now on; a captured graph keeps what it was captured with.
    pub fn set_dependent_launch(&self, allowed: bool) {
        let possible = self.compute_capability.0 >= 9;
        self.dependent_launch
            .store(allowed && possible, Ordering::Relaxed);
    }

    /// Sets whether every [`Graph::capture`] fails from now on, so that what happens then can be tested: one call is
    /// made inside it that the driver forbids there, which makes it refuse the rest.
    pub fn set_failing_captures(&self, failing: bool) {
        self.failing_captures.store(failing, Ordering::Relaxed);
    }

    /// Adds so many blocks to every cooperative launch from now on, so that what happens then can be tested: the driver
    /// refuses more than can run at once, and kernels wait in vain for one that lacks.
    pub fn set_extra_blocks(&self, blocks: i32) {
        self.extra_blocks.store(blocks, Ordering::Relaxed);
    }

    /// Calls the driver with this device's context current on the calling thread. Every call that takes the current
    /// context is made in here, or is one of cudarc's that do the same.
    fn call<T>(&self, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T> {
        self.context
            .bind_to_thread()
            .and_then(|()| call())
            .map_err(explain)
    }

    /// Whether the kernels that this device runs are those with Hopper's own matrix instructions.
    pub fn has_warpgroup_mma(&self) -> bool {
        self.compute_capability == (9, 0) && ARCHS.split(',').any(|arch| arch == "90a")
    }

    /// Shared memory of one block, in bytes, static and dynamic together.
    pub fn shared_bytes_per_block(&self) -> usize {
        self.shared_bytes_per_block
    }

    /// An event to record behind queued work; the host waits for it without spinning on the whole stream.
    pub fn new_event(&self) -> Result<CudaEvent> {
        self.context
            .new_event(None)
            .map_err(explain)
            .context("creating an event")
    }

    /// An event that also takes the time, on the device's clock.
    pub fn new_timer(&self) -> Result<CudaEvent> {
        self.context
            .new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
            .map_err(explain)
            .context("creating an event")
    }

    /// Waits until everything queued has run.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(explain)
    }
}

/// What a GPU is, for listings.
pub struct DeviceInfo {
    pub ordinal: usize,
    pub name: String,
    pub memory_bytes: usize,
    pub compute_capability: (i32, i32),
}

/// The GPUs of this machine.
pub enum Gpus {
    /// At least one.
    Here(Vec<DeviceInfo>),
    /// None, and why: no kernels in this executable, no driver, or a driver that shows no GPU.
    Absent(&'static str),
}

/// All GPUs that the driver shows.
///
/// # Errors
/// A driver that is there but fails.
pub fn list() -> Result<Gpus> {
    const NONE_SHOWN: Gpus = Gpus::Absent("the NVIDIA driver shows no GPU");
    if let Some(lacking) = lacking() {
        return Ok(Gpus::Absent(lacking));
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(NONE_SHOWN),
        started => started
            .map_err(explain)
            .context("starting the NVIDIA driver")?,
    }
    let gpus = describe_all().context("asking the NVIDIA driver for its GPUs")?;
    Ok(match gpus.is_empty() {
        true => NONE_SHOWN,
        false => Gpus::Here(gpus),
    })
}

fn describe_all() -> Result<Vec<DeviceInfo>> {
    (0..result::device::get_count().map_err(explain)?)
        .map(|ordinal| {
            let device = result::device::get(ordinal).map_err(explain)?;
            // SAFETY: the driver just named this device.
            let attribute =
                |a| unsafe { result::device::get_attribute(device, a) }.map_err(explain);
            Ok(DeviceInfo {
                ordinal: ordinal as usize,
                name: result::device::get_name(device).map_err(explain)?,
                // SAFETY: as above.
                memory_bytes: unsafe { result::device::total_mem(device) }.map_err(explain)?,
                compute_capability: (
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
            })
        })
        .collect()
}

/// What every use of a GPU lacks here; `None` where there is a driver to ask.
fn lacking() -> Option<&'static str> {
    if ARCHS.is_empty() {
        return Some(
            "this executable was built without CUDA, because the build found no nvcc: install the CUDA toolkit, or name \
             its compiler in NVCC, and build again",
        );
    }
    // SAFETY: loads the driver's library, which is what every CUDA program does.
    match unsafe { sys::is_culib_present() } {
        true => None,
        false => Some("no NVIDIA driver was found (libcuda.so.1): install it"),
    }
}

/// The driver's name for an error, and its text.
pub fn explain(error: DriverError) -> anyhow::Error {
    let text = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map(|t| t.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    anyhow!(
        "{} ({})",
        text(error.error_string()),
        text(error.error_name())
    )
}

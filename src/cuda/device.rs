//! One GPU: its context, the kernels loaded into it, the memory taken from it and the stream that everything runs on.
//!
//! This is the only file that allocates device memory or launches a kernel, and the place for the facts that make both sound.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result, anyhow, bail};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError, result,
    sys::{self, CUdevice_attribute as Attribute, CUdeviceptr, CUfunction, CUfunction_attribute},
};

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
    /// By kernel file. Loaded once, never unloaded: the context outlives every launch.
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: Mutex<HashMap<&'static str, Function>>,
    allocations: AtomicUsize,
}

// SAFETY: the raw module handles are used through the driver alone, which takes calls from any thread whose current
// context is theirs; every method binds the context first.
unsafe impl Send for Device {}
// SAFETY: as above; the function table is behind a mutex.
unsafe impl Sync for Device {}

/// A kernel, ready to be launched.
#[derive(Clone, Copy)]
pub struct Function {
    name: &'static str,
    handle: CUfunction,
    /// Shared memory of a block that the kernel itself declares.
    pub static_shared_bytes: usize,
}

// SAFETY: a function handle is a name for something in a module, which lives as long as the process.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// One kernel launch with fixed arguments: what the decode region is made of.
#[derive(Clone)]
pub struct Launch {
    pub function: Function,
    pub grid: [u32; 3],
    pub block: [u32; 2],
    pub shared_bytes: u32,
    pub arguments: Arguments,
    /// Start before the kernel before has ended; this kernel then waits for it itself.
    pub dependent: bool,
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([x, y, z], [threads_x, threads_y]) = (self.grid, self.block);
        write!(
            f,
            "{} <<<({x}, {y}, {z}), ({threads_x}, {threads_y}), {}>>>",
            self.function.name, self.shared_bytes
        )
    }
}

/// The arguments of a kernel: numbers, device addresses, and structs of them passed by value.
#[derive(Clone, Default)]
pub struct Arguments {
    /// Each argument begins in a word of its own.
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Arguments {
    /// Adds an argument, which must have the kernel's own layout of it.
    pub fn with(mut self, argument: impl bytemuck::NoUninit) -> Self {
        let bytes = bytemuck::bytes_of(&argument);
        self.starts.push(self.words.len());
        self.words
            .extend(bytes.chunks(size_of::<u64>()).map(|chunk| {
                let mut word = [0; size_of::<u64>()];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_ne_bytes(word)
            }));
        self
    }

    fn pointers(&self) -> Vec<*mut c_void> {
        let address = |&start: &usize| std::ptr::from_ref(&self.words[start]).cast_mut().cast();
        self.starts.iter().map(address).collect()
    }
}

impl Device {
    /// Opens GPU `ordinal` and loads the kernels into it.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let doing = || format!("opening GPU {ordinal}");
        if let Some(lacking) = lacking() {
            return Err(anyhow!(lacking)).with_context(doing);
        }
        let context = CudaContext::new(ordinal)
            .map_err(explain)
            .with_context(doing)?;
        // SAFETY: all work is on one stream, so no slice needs events to order its uses; cudarc's would break a capture.
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
            // SAFETY: the image is a fat binary that nvcc wrote; it carries its own length.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            let module = module.map_err(explain).with_context(|| {
                format!("loading the kernels (built for {ARCHS}) into {name}, compute capability {compute_capability:?}")
            })?;
            modules.insert(file, module);
        }
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
        self.compute_capability.0 >= 9
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(explain)
    }

    /// How often memory was taken from the device or page-locked on the host: must not grow once generation has begun.
    pub fn allocations(&self) -> usize {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Makes this device current on the calling thread.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(explain)
    }

    /// Whether the kernels that this device runs are those with Hopper's own matrix instructions.
    pub fn has_warpgroup_products(&self) -> bool {
        self.compute_capability == (9, 0) && ARCHS.split(',').any(|arch| arch == "90a")
    }

    /// Shared memory of one block, in bytes, static and dynamic together.
    pub fn shared_bytes_per_block(&self) -> usize {
        self.shared_bytes_per_block
    }

    /// The kernel called `name` of `kernels/<file>.cu`, allowed all the shared memory that a block can have.
    pub fn function(&self, file: &'static str, name: &'static str) -> Result<Function> {
        let mut functions = self.functions.lock().expect("no holder panics");
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let missing = || format!("this executable holds no kernel called {name} in {file}.cu");
        let &module = self.modules.get(file).with_context(missing)?;
        // SAFETY: the module was loaded and is never unloaded.
        let handle = unsafe { result::module::get_function(module, CString::new(name)?) }
            .map_err(explain)
            .with_context(missing)?;
        // SAFETY: the handle is of a loaded kernel.
        let fixed = unsafe {
            result::function::get_function_attribute(
                handle,
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            )
        }
        .map_err(explain)?;
        for (attribute, value) in [
            (
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.shared_bytes_per_block as i32 - fixed,
            ),
            // The same split for all kernels: a multiprocessor drains before it changes it.
            (
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                100,
            ),
        ] {
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(handle, attribute, value) }
                .map_err(explain)
                .with_context(|| format!("setting up the kernel {name}"))?;
        }
        let function = Function {
            name,
            handle,
            static_shared_bytes: fixed as usize,
        };
        functions.insert(name, function);
        Ok(function)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and every address among them must stay valid, for as many bytes as the
    /// kernel touches, until the stream has passed the launch (and as long as a graph that captured it exists).
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let mut arguments = launch.arguments.pointers();
        // SAFETY: all-zero bytes are a valid value of this plain C union.
        let mut value: sys::CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
        value.programmaticStreamSerializationAllowed = 1;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value,
        };
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(launch.dependent && self.has_dependent_launch()),
        };
        // SAFETY: every pointer is to a local that outlives the call, which copies what it needs; the caller vouches for
        // the arguments.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                launch.function.handle,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(explain)
        .with_context(|| format!("launching {}", launch.function.name))
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

    /// Takes `bytes` of device memory, not initialised.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<DeviceBuffer> {
        self.bind()?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the context is current. A zero-byte request is an error of the driver's, so ask for at least one.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }
            .map_err(explain)
            .with_context(|| format!("taking {bytes} bytes of memory on {}", self.name))?;
        Ok(DeviceBuffer {
            device: self.clone(),
            address,
            bytes,
        })
    }

    /// Takes `bytes` of page-locked host memory, zeroed.
    pub fn allocate_pinned(self: &Arc<Self>, bytes: usize) -> Result<PinnedBuffer> {
        self.bind()?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_host(bytes.max(1), 0) }
            .map_err(explain)
            .with_context(|| format!("page-locking {bytes} bytes of host memory"))?
            .cast::<u8>();
        // SAFETY: the driver just gave these bytes.
        unsafe { address.write_bytes(0, bytes) };
        Ok(PinnedBuffer {
            device: self.clone(),
            address,
            bytes,
        })
    }
}

/// Device memory, given back when dropped.
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// The device address of byte `offset`.
    pub fn at(&self, offset: usize) -> CUdeviceptr {
        debug_assert!(offset <= self.bytes);
        self.address + offset as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues a copy of `source` to byte `offset`. The source may be reused once the stream has passed it; from memory
    /// that is not page-locked, at once.
    pub fn upload(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.check(offset, source.len())?;
        // SAFETY: the range lies in this buffer.
        unsafe {
            result::memcpy_htod_async(self.at(offset), source, self.device.stream.cu_stream())
        }
        .map_err(explain)
        .context("copying to the GPU")
    }

    /// Queues a copy from byte `offset` on to `target`.
    ///
    /// # Safety
    /// The target must not be read or written before the stream has passed the copy.
    pub unsafe fn download_later(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        self.check(offset, target.len())?;
        // SAFETY: the range lies in this buffer; the caller leaves the target alone.
        unsafe {
            result::memcpy_dtoh_async(target, self.at(offset), self.device.stream.cu_stream())
        }
        .map_err(explain)
        .context("copying from the GPU")
    }

    /// Queues setting every byte to zero.
    pub fn clear(&self) -> Result<()> {
        // SAFETY: the range is this buffer.
        unsafe {
            result::memset_d8_async(self.address, 0, self.bytes, self.device.stream.cu_stream())
        }
        .map_err(explain)
        .context("clearing memory of the GPU")
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.bytes) {
            bail!(
                "{len} bytes at {offset} do not lie in a buffer of {}",
                self.bytes
            );
        }
        Ok(())
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: this address was allocated once and is freed once. An error means that the device is lost, and the
            // memory with it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory: copies to and from it run beside the host.
pub struct PinnedBuffer {
    device: Arc<Device>,
    address: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is owned, and reached through `&self` and `&mut self` only.
unsafe impl Send for PinnedBuffer {}

impl std::ops::Deref for PinnedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the driver gave these bytes, and they were zeroed.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }
}

impl std::ops::DerefMut for PinnedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated once, freed once.
            let _ = unsafe { result::free_host(self.address.cast()) };
        }
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

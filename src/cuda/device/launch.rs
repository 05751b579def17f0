//! Kernels and how they are queued.

use std::{
    ffi::c_void,
    fmt,
    sync::{Arc, atomic::Ordering},
};

use anyhow::{Context, Result};
use bytemuck::NoUninit;
use cudarc::driver::{
    CudaFunction,
    sys::{self, CUfunction_attribute as Attribute},
};

use super::{Device, explain};

/// A kernel, ready to be launched. Its module stays loaded as long as this exists.
#[derive(Clone)]
pub struct Function {
    name: Arc<str>,
    function: CudaFunction,
    /// Shared memory of a block that the kernel itself declares.
    pub static_shared_bytes: usize,
}

/// One kernel launch with a fixed parameter: what the decode region is made of.
#[derive(Clone)]
pub struct Launch {
    pub function: Function,
    pub grid: [u32; 3],
    pub block: [u32; 2],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    pub parameter: Parameter,
    /// Start before the kernel before has ended; this kernel then waits for it itself.
    pub dependent: bool,
    /// All blocks run at once, or none does.
    pub cooperative: bool,
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

/// The one parameter of a kernel: a struct that is passed by value.
#[derive(Clone)]
pub struct Parameter(Vec<u64>);

impl Parameter {
    /// `value` must have the kernel's own layout of it, as the structs of [`crate::cuda::params`] have.
    pub fn new<P: NoUninit>(value: P) -> Self {
        const { assert!(align_of::<P>() <= align_of::<u64>()) };
        Self(bytemuck::pod_collect_to_vec(&[value]))
    }
}

impl Device {
    /// The kernel called `name` of `kernels/<file>.cu`, allowed all the shared memory that a block can have.
    pub fn function(&self, file: &str, name: &str) -> Result<Function> {
        let mut functions = self.functions.lock().expect("no holder panics");
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let missing = || format!("this executable holds no kernel called {name} in {file}.cu");
        let module = self.modules.get(file).with_context(missing)?;
        let function = self
            .call(|| module.load_function(name))
            .with_context(missing)?;
        let fixed = function.shared_size_bytes().map_err(explain)?;
        for (attribute, value) in [
            (
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.shared_bytes_per_block as i32 - fixed,
            ),
            // The same split for all kernels: a multiprocessor drains before it changes it.
            (
                Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                100,
            ),
        ] {
            self.call(|| function.set_attribute(attribute, value))
                .with_context(|| format!("setting up the kernel {name}"))?;
        }
        let function = Function {
            name: name.into(),
            function,
            static_shared_bytes: fixed as usize,
        };
        functions.insert(name.to_owned(), function.clone());
        Ok(function)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The function must be this device's and the parameter the kernel's own, and every address in it must stay valid,
    /// for as many bytes as the kernel touches, until the stream has passed the launch (and as long as a graph that
    /// captured it exists).
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let mut parameters = [launch.parameter.0.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: all-zero bytes are a valid value of this plain C union.
        let no_value: sys::CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
        let mut attributes = [sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
            pad: [0; 4],
            value: no_value,
        }; 2];
        if launch.dependent && self.has_dependent_launch() {
            attributes[0].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[0].value.programmaticStreamSerializationAllowed = 1;
        }
        let [mut x, y, z] = launch.grid;
        if launch.cooperative {
            attributes[1].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            attributes[1].value.cooperative = 1;
            x = x.wrapping_add_signed(self.extra_blocks.load(Ordering::Relaxed));
        }
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // cudarc's own launch takes no attributes.
        self.call(|| {
            // SAFETY: every pointer is to a local that outlives the call, which copies what it needs; the caller
            // vouches for the function and the parameter.
            unsafe {
                sys::cuLaunchKernelEx(
                    &config,
                    launch.function.function.cu_function(),
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
            .result()
        })
        .with_context(|| format!("launching {}", launch.function.name))
    }
}

//! Compiles `kernels/*.cu` into fat binaries that `src/cuda/module.rs` embeds.
//!
//! Without `nvcc` the crate still builds: the list of modules is then empty, and the command says so when CUDA is asked for.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Real architectures in the executable; the last is also embedded as PTX, for GPUs that come after it.
const DEFAULT_ARCHS: &str = "80,86,89,90a,100,120";

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    for variable in [
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "PATH",
        "SHARPI_CUDA_ARCHS",
    ] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let archs = env::var("SHARPI_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    let archs: Vec<&str> = archs.split(',').map(str::trim).collect();

    let (modules, archs) = match find_nvcc() {
        Some(nvcc) => (compile_all(&nvcc, &archs, &out), archs.join(",")),
        None => {
            println!(
                "cargo:warning=nvcc was not found (NVCC, CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH): \
                 building without CUDA, for the CPU only"
            );
            (Vec::new(), String::new())
        }
    };
    let entries: String = modules
        .iter()
        .map(|path| {
            format!(
                "({:?}, include_bytes!({path:?})),\n",
                path.file_stem().expect("a file has a name")
            )
        })
        .collect();
    let source = format!(
        "/// Each file in `kernels` by name, and its fat binary.\n\
         pub static FATBINS: &[(&str, &[u8])] = &[{entries}];\n\
         /// The architectures in them, as nvcc names them: empty without CUDA.\n\
         pub const ARCHS: &str = {archs:?};\n"
    );
    fs::write(out.join("fatbins.rs"), source).expect("OUT_DIR is writable");
}

/// The compiler, where one of the usual places has it.
fn find_nvcc() -> Option<PathBuf> {
    let from_root = |root: PathBuf| root.join("bin/nvcc");
    let variable = |name| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let path = env::var_os("PATH").unwrap_or_default();
    [
        variable("NVCC"),
        variable("CUDA_HOME").map(from_root),
        variable("CUDA_PATH").map(from_root),
        Some(from_root("/usr/local/cuda".into())),
    ]
    .into_iter()
    .flatten()
    .chain(env::split_paths(&path).map(|folder| folder.join("nvcc")))
    .find(|candidate| candidate.is_file())
}

/// Compiles every kernel file, as many at a time as there are cores, and returns the fat binaries.
fn compile_all(nvcc: &Path, archs: &[&str], out: &Path) -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("the kernels folder is part of the crate")
        .map(|entry| entry.expect("the kernels folder can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    thread::scope(|scope| {
        let compilations: Vec<_> = sources
            .iter()
            .map(|source| scope.spawn(|| compile(nvcc, archs, source, out)))
            .collect();
        compilations
            .into_iter()
            .map(|compilation| compilation.join().expect("a kernel does not compile"))
            .collect()
    })
}

fn compile(nvcc: &Path, archs: &[&str], source: &Path, out: &Path) -> PathBuf {
    let name = source.file_name().expect("a file has a name");
    let fatbin = out.join(name).with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command
        .args(["-fatbin", "-O3", "-std=c++17", "-Werror", "all-warnings"])
        .args(["-Xcudafe", "--display_error_number"]);
    for arch in archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(last) = archs.last() {
        command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    }
    command.arg(source).arg("-o").arg(&fatbin);
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "{} could not compile {}:\n{}{}",
        nvcc.display(),
        source.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    fatbin
}

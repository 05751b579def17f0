//! Compiles `kernels/*.cu` into fat binaries that `src/cuda/device/mod.rs` embeds; again only where source or headers changed.
//!
//! Without `nvcc` the crate still builds: the list of modules is then empty, and the command says so when asked for CUDA.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Real architectures in the executable; the last is also embedded as PTX, for GPUs that come after it.
const DEFAULT_ARCHS: &str = "80,86,89,90a,100,120";

fn main() {
    let mut files = Vec::new();
    list_sources(Path::new("kernels"), &mut files);
    files.sort();
    // One by one, since of a folder cargo would watch the notes, too. PATH is not watched, which every shell sets in
    // another way, but the compiler that was found.
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "SHARPI_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let archs = env::var("SHARPI_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    let archs: Vec<&str> = archs.split(',').map(str::trim).collect();

    let (modules, archs) = match find_nvcc() {
        Some(nvcc) => {
            println!("cargo:rerun-if-changed={}", nvcc.display());
            (compile_all(&nvcc, &archs, &files, &out), archs.join(","))
        }
        None => {
            println!(
                "cargo:warning=nvcc was not found (NVCC, CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH): \
                 building without CUDA, for the CPU only; after installing it, run `cargo clean -p sharpi` once"
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

/// Every kernel and header below a folder.
fn list_sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the kernels folder is part of the crate") {
        let path = entry.expect("the kernels folder can be read").path();
        let extension = path.extension().and_then(OsStr::to_str);
        if path.is_dir() {
            list_sources(&path, files);
        } else if matches!(extension, Some("cu" | "cuh" | "h")) {
            files.push(path);
        }
    }
}

/// The compiler: the one that `NVCC` names, else the first that is there.
fn find_nvcc() -> Option<PathBuf> {
    let variable = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let path = env::var_os("PATH").unwrap_or_default();
    variable("NVCC").or_else(|| {
        [
            variable("CUDA_HOME"),
            variable("CUDA_PATH"),
            Some("/usr/local/cuda".into()),
        ]
        .into_iter()
        .flatten()
        .map(|root| root.join("bin"))
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("nvcc"))
        .find(|candidate| candidate.is_file())
    })
}

/// Compiles every `.cu` file, as many at a time as cargo may run jobs, and returns the fat binaries.
fn compile_all(nvcc: &Path, archs: &[&str], files: &[PathBuf], out: &Path) -> Vec<PathBuf> {
    let (sources, headers): (Vec<_>, Vec<_>) = files
        .iter()
        .partition(|path| path.extension() == Some(OsStr::new("cu")));
    // What every fat binary is made of besides its source.
    let mut shared = run(Command::new(nvcc).arg("--version"));
    for header in headers {
        shared.push_str(&read(header));
    }
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    // Most of those that take long stand late in the alphabet: begun last, one of them would be waited for alone.
    let queue: Vec<_> = sources.iter().rev().collect();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..jobs.unwrap_or(1) {
            scope.spawn(|| {
                while let Some(source) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compile(nvcc, archs, source, &fatbin(source, out), &shared);
                }
            });
        }
    });
    sources.iter().map(|source| fatbin(source, out)).collect()
}

fn fatbin(source: &Path, out: &Path) -> PathBuf {
    out.join(source.file_name().expect("a file has a name"))
        .with_extension("fatbin")
}

/// Compiles one file, unless the text of everything that goes into it is what it was when the fat binary was made.
fn compile(nvcc: &Path, archs: &[&str], source: &Path, fatbin: &Path, shared: &str) {
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
    command.arg(source).arg("-o").arg(fatbin);

    let inputs = format!("{command:?}\n{shared}{}", read(source));
    let record = fatbin.with_extension("inputs");
    if fs::read_to_string(&record).is_ok_and(|recorded| recorded == inputs) {
        return;
    }
    // Gone while the compiler writes: an interrupted one leaves half a fat binary behind.
    let _ = fs::remove_file(&record);
    run(&mut command);
    fs::write(&record, inputs).expect("OUT_DIR is writable");
}

fn read(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// What a command prints, once it has succeeded.
fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(
        output.status.success(),
        "{command:?} failed:\n{stdout}{stderr}"
    );
    stdout
}

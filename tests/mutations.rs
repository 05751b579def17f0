//! Thousands of damaged model files through the real loader. Each must end in a model or in one clear line, within a
//! second and with memory in proportion to the file.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fmt::Write,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use common::gguf_writer::{
    GgufFile, Random, RandomModel, Value, byte_vocabulary, piece_vocabulary,
};
use sharpi::{
    model::{Gguf, Message, Model, Prompt, TemplateOptions},
    quant::TensorType,
};

const BYTE_MUTATIONS: usize = 2_400;
const FIELD_MUTATIONS: usize = 800;
const FILES_ON_DISK: usize = 60;

const TIME_LIMIT: Duration = Duration::from_secs(1);

/// What loading may allocate at most: the compiled tokenizer and template, and a JSON value of 32 bytes for each
/// array element of at least 4.
fn allocation_limit(file_len: usize) -> usize {
    (4 << 20) + 8 * file_len
}

/// The system's allocator, counting.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(len: usize) {
    let now = ALLOCATED.fetch_add(len, Relaxed) + len;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: every call is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise is the one that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_len: usize) -> *mut u8 {
        grow(new_len);
        ALLOCATED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What came of one file: whether it loaded, or what was wrong.
type Outcome = Result<bool, String>;

/// Loads files on a thread of its own, so that one that takes too long is noticed.
struct Loader {
    files: Sender<Vec<u8>>,
    outcomes: Receiver<Outcome>,
}

impl Loader {
    fn start(load: impl Fn(Vec<u8>) -> anyhow::Result<Model> + Send + 'static) -> Self {
        let (files, files_in) = mpsc::channel::<Vec<u8>>();
        let (outcomes_out, outcomes) = mpsc::channel();
        thread::spawn(move || {
            for file in files_in {
                if outcomes_out.send(judge(file, &load)).is_err() {
                    return;
                }
            }
        });
        Self { files, outcomes }
    }

    /// Whether the file loaded.
    fn load(&self, mutation: &str, file: Vec<u8>) -> bool {
        self.files.send(file).expect("the loader runs");
        match self.outcomes.recv_timeout(TIME_LIMIT) {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(problem)) => panic!("{mutation}: {problem}"),
            Err(_) => panic!("{mutation}: not done after {TIME_LIMIT:?}"),
        }
    }
}

fn judge(file: Vec<u8>, load: impl Fn(Vec<u8>) -> anyhow::Result<Model>) -> Outcome {
    let limit = allocation_limit(file.len());
    let before = ALLOCATED.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = catch_unwind(AssertUnwindSafe(|| load(file).map(drop)));
    let allocated = PEAK.load(Relaxed).saturating_sub(before);
    if allocated > limit {
        return Err(format!("allocated {allocated} bytes, more than {limit}"));
    }
    match result {
        Err(_) => Err("panicked".to_owned()),
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) => {
            let message = format!("{error:#}");
            match message.contains("mutant.gguf")
                && !message.contains('\n')
                && message.len() < 1_000
            {
                true => Ok(false),
                false => Err(format!("unclear message {message:?}")),
            }
        }
    }
}

/// A file to damage. Most damage goes to the header, where the lies are.
struct Seed {
    name: &'static str,
    bytes: Vec<u8>,
    header_len: usize,
    /// Where a little-endian u64 stands that may be a length, count, dimension or offset.
    lengths: Vec<usize>,
}

impl Seed {
    fn new(name: &'static str, bytes: Vec<u8>, header_len: usize) -> Self {
        let lengths = (4..header_len - 8)
            .filter(|&at| {
                let number = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
                (1..1 << 24).contains(&number)
            })
            .collect();
        Self {
            name,
            bytes,
            header_len,
            lengths,
        }
    }

    fn all() -> Vec<Self> {
        let demo = include_bytes!("../assets/stories-10m-q4_k_m.gguf").to_vec();
        let last_tensor = b"output_norm.weight";
        let header_len = demo
            .windows(last_tensor.len())
            .rposition(|window| window == last_tensor);
        let demo = Self::new(
            "demo",
            demo,
            header_len.expect("a tensor of the demo model") + 32,
        );
        let random = random_models()
            .map(|(name, file)| Self::new(name, file.to_bytes(), file.header().len()));
        random.into_iter().chain([demo]).collect()
    }

    /// A damaged copy, and what was done to it.
    fn mutate(&self, random: &mut Random) -> (String, Vec<u8>) {
        let mut bytes = self.bytes.clone();
        let mut what = String::new();
        // Part of the lengths stand in the few dozen bytes that every file starts with.
        let header = match random.below(4) {
            0 => self.header_len.min(256),
            _ => self.header_len,
        };
        match random.below(6) {
            0 => {
                for _ in 0..=random.below(8) {
                    let at = random.below(header);
                    bytes[at] ^= 1 << random.below(8);
                    let _ = write!(what, " flip a bit of byte {at};");
                }
            }
            1 => {
                for _ in 0..=random.below(4) {
                    let at = random.below(header);
                    bytes[at] = random.u64() as u8;
                    let _ = write!(what, " byte {at} becomes {};", bytes[at]);
                }
            }
            2 => {
                let end = [self.header_len, self.bytes.len(), 64][random.below(3)];
                bytes.truncate(random.below(end));
                let _ = write!(what, " cut off after {} bytes", bytes.len());
            }
            3 => {
                for _ in 0..=random.below(2) {
                    let at = self.lengths[random.below(self.lengths.len())];
                    let length = random.length(self.bytes.len());
                    bytes[at..at + 8].copy_from_slice(&length.to_le_bytes());
                    let _ = write!(what, " u64 at byte {at} becomes {length};");
                }
            }
            4 => {
                let at = random.below(header - 4);
                let number = random.length(64) as u32;
                bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
                let _ = write!(what, " u32 at byte {at} becomes {number}");
            }
            _ => {
                let (from, to) = (random.below(header), random.below(header));
                let len = random.below(64).min(self.header_len - from);
                let piece = bytes[from..from + len].to_vec();
                let removed = random.below(2) * len.min(self.header_len - to);
                bytes.splice(to..to + removed, piece);
                let _ = write!(
                    what,
                    " bytes {from}..{} replace {removed} bytes at {to}",
                    from + len
                );
            }
        }
        (what, bytes)
    }
}

impl Random {
    /// A number that a length field might lie with.
    fn length(&mut self, near: usize) -> u64 {
        let near = near as u64;
        match self.below(4) {
            0 => [0, 1, near, near + 1, near / 2][self.below(5)],
            1 => self.u64() % (2 * near),
            2 => (1u64 << self.below(64)).wrapping_sub(self.u64() % 3),
            _ => self.u64() >> self.below(64),
        }
    }

    fn metadata_value(&mut self) -> Value {
        match self.below(10) {
            0 => Value::U8(self.u64() as u8),
            1 => Value::U16(self.u64() as u16),
            2 => Value::U32(self.length(1 << 12) as u32),
            3 => Value::I32(self.length(1 << 12) as i32),
            4 => Value::U64(self.length(1 << 12)),
            5 => Value::F32(f32::from_bits(self.u64() as u32)),
            6 => Value::Bool(self.below(2) == 1),
            7 => Value::String("{% for x in ".repeat(self.below(4))),
            8 => Value::I32s(vec![self.u64() as i32; self.below(300)]),
            _ => Value::Strings(vec!["Ġ t".to_owned(); self.below(300)]),
        }
    }
}

fn random_models() -> [(&'static str, GgufFile); 7] {
    [
        ("llama", TensorType::Q2_K, byte_vocabulary()),
        ("qwen2", TensorType::Q3_K, byte_vocabulary()),
        ("qwen3", TensorType::Q8_0, byte_vocabulary()),
        ("llama", TensorType::IQ3_XXS, piece_vocabulary("llama")),
        ("qwen3", TensorType::MXFP4, piece_vocabulary("gemma4")),
        ("llama", TensorType::IQ1_M, piece_vocabulary("gemma4")),
        ("qwen2", TensorType::TQ1_0, piece_vocabulary("llama")),
    ]
    .map(|(architecture, tensor_type, vocabulary)| {
        let model = RandomModel {
            layers: 1,
            tied: architecture == "qwen3",
            vocabulary,
            ..RandomModel::new(architecture, tensor_type)
        };
        (architecture, model.file())
    })
}

/// A well-formed file that says something wrong, and what.
fn mutate_field(file: &GgufFile, random: &mut Random) -> (String, GgufFile) {
    let mut file = file.clone();
    let entry = random.below(file.metadata.len());
    let at = random.below(file.tensors.len());
    let tensor = &mut file.tensors[at];
    let what = match random.below(8) {
        0 => format!("without key {}", file.metadata.remove(entry).0),
        1..=3 => {
            let (key, value) = &mut file.metadata[entry];
            *value = random.metadata_value();
            format!("{key} becomes {value:?}")
        }
        4 => format!("without tensor {}", file.tensors.remove(at).name),
        5 => {
            tensor.type_id = random.below(48) as u32;
            format!("type of {} becomes {}", tensor.name, tensor.type_id)
        }
        6 => {
            let dimension = random.below(tensor.shape.len());
            tensor.shape[dimension] = random.length(512);
            format!("shape of {} becomes {:?}", tensor.name, tensor.shape)
        }
        _ => {
            tensor.offset = Some(random.length(1 << 16) & !31);
            format!("offset of {} becomes {:?}", tensor.name, tensor.offset)
        }
    };
    (what, file)
}

/// One test, because the allocator counts for the whole process.
#[test]
fn a_damaged_file_ends_in_a_model_or_in_one_clear_line() {
    let mut random = Random(2);
    let (mut loaded, mut refused) = (0, 0);
    let mut count = |is_loaded| match is_loaded {
        true => loaded += 1,
        false => refused += 1,
    };

    let in_memory = Loader::start(|bytes| {
        let model = Model::from_gguf(Gguf::from_bytes("mutant.gguf", bytes)?)?;
        for tensor in model.gguf.tensors() {
            let mut row = vec![0.0; tensor.row_len()];
            let blocks = &tensor.bytes()[..tensor.row_bytes()];
            tensor.tensor_type().dequantize(blocks, &mut row);
        }
        let text = "The the<s>  the\n<|im_start|>12 na\u{ef}ve \u{1f98a}";
        let turn = Message::new("user", text);
        let template = model.chat_template.as_ref();
        // A template that fails is no fault of the model's.
        let rendered =
            template.map(|template| template.render(&[turn], &TemplateOptions::default()));
        for prompt in rendered.into_iter().flatten().chain([Prompt::raw(text)]) {
            for id in model.tokenizer.encode(&prompt) {
                model.tokenizer.token_bytes(id);
            }
        }
        Ok(model)
    });
    let seeds = Seed::all();
    for seed in &seeds {
        assert!(
            in_memory.load(seed.name, seed.bytes.clone()),
            "{} does not load undamaged",
            seed.name
        );
    }
    for round in 0..BYTE_MUTATIONS {
        let seed = &seeds[round % seeds.len()];
        let (what, bytes) = seed.mutate(&mut random);
        count(in_memory.load(&format!("round {round}, {}:{what}", seed.name), bytes));
    }
    let models = random_models();
    for round in 0..FIELD_MUTATIONS {
        let (name, file) = &models[round % models.len()];
        let (what, file) = mutate_field(file, &mut random);
        count(in_memory.load(&format!("round {round}, {name}: {what}"), file.to_bytes()));
    }

    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("mutant.gguf");
    let on_disk = Loader::start({
        let path = path.clone();
        move |_| Model::open(&path)
    });
    for round in 0..FILES_ON_DISK {
        let seed = &seeds[round % seeds.len()];
        let (what, bytes) = seed.mutate(&mut random);
        fs::write(&path, &bytes).expect("room for a file");
        count(on_disk.load(&format!("file {round}, {}:{what}", seed.name), bytes));
    }
    // Damage that is never noticed, or always fatal, would test one path only.
    assert!(
        loaded > 50 && refused > 1_000,
        "{loaded} loaded, {refused} refused"
    );
}

//! Writes small GGUF files, honest ones and lying ones. Block sizes and type ids are written down here a second time,
//! from ggml's own headers, so that a mistake in the library cannot hide in its tests.

use std::sync::Arc;

use half::{bf16, f16};
use sharpi::{
    model::{Gguf, Model},
    quant::TensorType,
};

/// A metadata value, in the types that the tests need.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    U16(u16),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    String(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Strings(Vec<String>),
}

macro_rules! value_from {
    ($($from:ty => $variant:ident),* $(,)?) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self {
                Self::$variant(value.into())
            }
        }
    )*};
}
value_from! {
    u8 => U8, u16 => U16, u32 => U32, i32 => I32, u64 => U64, f32 => F32, bool => Bool, &str => String, String => String,
    Vec<u32> => U32s, Vec<i32> => I32s, Vec<f32> => F32s,
    Vec<String> => Strings,
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, item_type: u32, len: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(item_type.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Self::U8(value) => tagged(out, 0, &value.to_le_bytes()),
            Self::U16(value) => tagged(out, 2, &value.to_le_bytes()),
            Self::U32(value) => tagged(out, 4, &value.to_le_bytes()),
            Self::I32(value) => tagged(out, 5, &value.to_le_bytes()),
            Self::F32(value) => tagged(out, 6, &value.to_le_bytes()),
            Self::Bool(value) => tagged(out, 7, &[u8::from(*value)]),
            Self::U64(value) => tagged(out, 10, &value.to_le_bytes()),
            Self::String(text) => {
                tagged(out, 8, &[]);
                string(out, text);
            }
            Self::U32s(values) => {
                array(out, 4, values.len());
                values
                    .iter()
                    .for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::I32s(values) => {
                array(out, 5, values.len());
                values
                    .iter()
                    .for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::F32s(values) => {
                array(out, 6, values.len());
                values
                    .iter()
                    .for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::Strings(texts) => {
                array(out, 8, texts.len());
                texts.iter().for_each(|text| string(out, text));
            }
        }
    }
}

fn tagged(out: &mut Vec<u8>, value_type: u32, bytes: &[u8]) {
    out.extend(value_type.to_le_bytes());
    out.extend(bytes);
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A tensor as a file describes it.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    pub name: String,
    /// Contiguous dimension first.
    pub shape: Vec<u64>,
    pub type_id: u32,
    /// Where the file says that the data starts, counted from the data section. `None`: where it does.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// A GGUF file before it is written. Tests lie by changing its fields.
#[derive(Clone, Debug)]
pub struct GgufFile {
    pub version: u32,
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<TensorEntry>,
}

impl Default for GgufFile {
    fn default() -> Self {
        Self {
            version: 3,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

impl GgufFile {
    /// Sets `key`, in place where it is there already.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        match self.metadata.iter_mut().find(|(other, _)| other == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    /// Removes `key`, which must be there.
    pub fn unset(&mut self, key: &str) -> &mut Self {
        let before = self.metadata.len();
        self.metadata.retain(|(other, _)| other != key);
        assert_eq!(self.metadata.len() + 1, before, "no metadata key {key}");
        self
    }

    /// The tensor called `name`, which must be there.
    pub fn tensor(&mut self, name: &str) -> &mut TensorEntry {
        self.tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Adds a tensor of `tensor_type`.
    pub fn push(
        &mut self,
        name: &str,
        shape: &[u64],
        tensor_type: TensorType,
        data: Vec<u8>,
    ) -> &mut Self {
        self.tensors.push(TensorEntry {
            name: name.to_owned(),
            shape: shape.to_vec(),
            type_id: Format::of(tensor_type).id,
            offset: None,
            data,
        });
        self
    }

    /// Where tensors start: at multiples of this. An alignment that no file has is written, but not followed.
    fn alignment(&self) -> usize {
        let alignment = self.metadata.iter().find_map(|(key, value)| match value {
            Value::U32(alignment) if key == "general.alignment" => Some(*alignment as usize),
            _ => None,
        });
        alignment
            .filter(|alignment| (1..=4096).contains(alignment))
            .unwrap_or(32)
    }

    /// The file, byte for byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        let alignment = self.alignment();
        out.resize(out.len().next_multiple_of(alignment), 0);
        for tensor in &self.tensors {
            out.extend(&tensor.data);
            out.resize(out.len().next_multiple_of(alignment), 0);
        }
        out
    }

    /// Everything before the padding of the data section.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor
                .shape
                .iter()
                .for_each(|dimension| out.extend(dimension.to_le_bytes()));
            out.extend(tensor.type_id.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(self.alignment()) as u64;
        }
        out
    }

    /// The file split into `count` parts as llama.cpp's gguf-split does it: metadata in the first, tensors in all.
    pub fn split(&self, count: usize) -> Vec<GgufFile> {
        let per_part = self.tensors.len().div_ceil(count);
        let mut tensors = self.tensors.iter().cloned();
        (0..count)
            .map(|no| {
                let mut part = GgufFile {
                    metadata: if no == 0 {
                        self.metadata.clone()
                    } else {
                        Vec::new()
                    },
                    tensors: tensors.by_ref().take(per_part).collect(),
                    ..*self
                };
                part.set("split.no", no as u16)
                    .set("split.count", count as u16)
                    .set("split.tensors.count", self.tensors.len() as i32);
                part
            })
            .collect()
    }
}

/// How ggml lays out a block, and how to scale a random one.
pub struct Format {
    pub id: u32,
    pub block_len: usize,
    pub block_bytes: usize,
    /// Where the scale stands and the standard deviation of random values when it is 1. `None` for plain floats.
    scale: Option<(Scale, f32)>,
    /// Where the f16 minimum stands and what to multiply the scale with so that random values have zero mean.
    min: Option<(usize, f32)>,
}

enum Scale {
    /// An f16 at this byte.
    F16(usize),
    /// The exponent of a power of two at this byte, 128 added.
    Exponent(usize),
    /// The quarters of an f16 in the highest bits of four little-endian words, the first at this byte.
    Quarters(usize),
}

impl Scale {
    /// Writes the scale into a block.
    fn set(&self, block: &mut [u8], scale: f32) {
        let half = f16::from_f32(scale);
        match *self {
            Self::F16(at) => block[at..at + 2].copy_from_slice(&half.to_le_bytes()),
            Self::Exponent(at) => block[at] = (scale.log2().round() + 128.0) as u8,
            Self::Quarters(at) => {
                for (i, word) in block[at..at + 8].chunks_exact_mut(2).enumerate() {
                    word[1] = word[1] & 15 | ((half.to_bits() >> (4 * i)) as u8) << 4;
                }
            }
        }
    }
}

impl Format {
    /// Sizes and field order: ggml-common.h and `enum ggml_type` of ggml.h.
    pub fn of(tensor_type: TensorType) -> Self {
        use Scale::*;
        let (id, block_len, block_bytes, scale, min) = match tensor_type {
            TensorType::F32 => (0, 1, 4, None, None),
            TensorType::F16 => (1, 1, 2, None, None),
            TensorType::BF16 => (30, 1, 2, None, None),
            TensorType::Q4_0 => (2, 32, 18, Some((F16(0), 4.6)), None),
            TensorType::Q4_1 => (3, 32, 20, Some((F16(0), 4.6)), Some((2, -7.5))),
            TensorType::Q5_0 => (6, 32, 22, Some((F16(0), 9.2)), None),
            TensorType::Q5_1 => (7, 32, 24, Some((F16(0), 9.2)), Some((2, -15.5))),
            TensorType::Q8_0 => (8, 32, 34, Some((F16(0), 74.0)), None),
            TensorType::Q2_K => (10, 256, 84, Some((F16(80), 13.0)), Some((82, 1.5))),
            TensorType::Q3_K => (11, 256, 110, Some((F16(108), 43.0)), None),
            TensorType::Q4_K => (12, 256, 144, Some((F16(0), 258.0)), Some((2, 7.5))),
            TensorType::Q5_K => (13, 256, 176, Some((F16(0), 525.0)), Some((2, 15.5))),
            TensorType::Q6_K => (14, 256, 210, Some((F16(208), 1370.0)), None),
            TensorType::IQ4_NL => (20, 32, 18, Some((F16(0), 67.0)), None),
            TensorType::IQ4_XS => (23, 256, 136, Some((F16(0), 1250.0)), None),
            TensorType::MXFP4 => (39, 32, 17, Some((Exponent(0), 5.85)), None),
            TensorType::IQ3_S => (21, 256, 110, Some((F16(0), 140.0)), None),
            TensorType::IQ3_XXS => (18, 256, 98, Some((F16(0), 142.0)), None),
            TensorType::IQ2_S => (22, 256, 82, Some((F16(0), 56.0)), None),
            TensorType::IQ2_XS => (17, 256, 74, Some((F16(0), 56.0)), None),
            TensorType::IQ2_XXS => (16, 256, 66, Some((F16(0), 53.6)), None),
            TensorType::IQ1_M => (29, 256, 56, Some((Quarters(48), 7.2)), None),
            TensorType::IQ1_S => (19, 256, 50, Some((F16(0), 7.2)), None),
            TensorType::TQ2_0 => (35, 256, 66, Some((F16(64), 0.71)), None),
            TensorType::TQ1_0 => (34, 256, 54, Some((F16(52), 0.82)), None),
        };
        Self {
            id,
            block_len,
            block_bytes,
            scale,
            min,
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): the same numbers on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end - 1`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.u64() % end as u64) as usize
    }

    /// Uniform with zero mean and this standard deviation.
    pub fn centered(&mut self, std: f32) -> f32 {
        let unit = (self.u64() >> 40) as f32 / (1u64 << 24) as f32;
        (unit - 0.5) * 12f32.sqrt() * std
    }

    /// Blocks of `values` random values with about zero mean and this standard deviation.
    pub fn blocks(&mut self, tensor_type: TensorType, values: usize, std: f32) -> Vec<u8> {
        let format = Format::of(tensor_type);
        let Some((scale_field, unit_std)) = format.scale else {
            return (0..values)
                .flat_map(|_| float_bytes(tensor_type, self.centered(std)))
                .collect();
        };
        let blocks = values / format.block_len;
        let mut out: Vec<u8> = (0..blocks * format.block_bytes)
            .map(|_| self.u64() as u8)
            .collect();
        if tensor_type == TensorType::TQ2_0 {
            // No quant of two bits is 3.
            for byte in &mut out {
                *byte &= !(*byte << 1 & 0xaa);
            }
        }
        for block in out.chunks_exact_mut(format.block_bytes) {
            let scale = std / unit_std;
            scale_field.set(block, scale);
            if let Some((min_at, ratio)) = format.min {
                block[min_at..min_at + 2]
                    .copy_from_slice(&f16::from_f32(scale * ratio).to_le_bytes());
            }
        }
        out
    }
}

fn float_bytes(tensor_type: TensorType, value: f32) -> Vec<u8> {
    match tensor_type {
        TensorType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        TensorType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

/// A model with random weights. Rows are 256 values long or a multiple of it, so every tensor type fits.
pub struct RandomModel {
    /// `llama`, `qwen2` or `qwen3`.
    pub architecture: &'static str,
    /// Of the matrices; vectors are F32 as in every real file.
    pub tensor_type: TensorType,
    /// `tokenizer.*` metadata: [`byte_vocabulary`] or [`qwen3_vocabulary`].
    pub vocabulary: Vec<(String, Value)>,
    pub layers: u64,
    pub hidden_size: u64,
    pub feed_forward_length: u64,
    pub head_count: u64,
    pub head_count_kv: u64,
    pub head_dim: u64,
    pub context_length: u32,
    /// No output matrix of its own.
    pub tied: bool,
    pub seed: u64,
}

impl RandomModel {
    /// Two layers over the tiny vocabulary.
    pub fn new(architecture: &'static str, tensor_type: TensorType) -> Self {
        Self {
            architecture,
            tensor_type,
            vocabulary: byte_vocabulary(),
            layers: 2,
            hidden_size: 256,
            feed_forward_length: 512,
            head_count: 4,
            head_count_kv: 2,
            head_dim: 64,
            context_length: 128,
            tied: true,
            seed: 1,
        }
    }

    pub fn model(&self) -> anyhow::Result<Arc<Model>> {
        let gguf = Gguf::from_bytes("a random model", self.file().to_bytes())?;
        Ok(Arc::new(Model::from_gguf(gguf)?))
    }

    pub fn file(&self) -> GgufFile {
        let mut file = GgufFile::default();
        file.set("general.architecture", self.architecture)
            .set("general.name", format!("random {}", self.architecture));
        for (key, value) in [
            ("context_length", Value::U32(self.context_length)),
            ("block_count", Value::U32(self.layers as u32)),
            ("embedding_length", Value::U32(self.hidden_size as u32)),
            (
                "feed_forward_length",
                Value::U32(self.feed_forward_length as u32),
            ),
            ("attention.head_count", Value::U32(self.head_count as u32)),
            (
                "attention.head_count_kv",
                Value::U32(self.head_count_kv as u32),
            ),
            ("attention.key_length", Value::U32(self.head_dim as u32)),
            ("attention.value_length", Value::U32(self.head_dim as u32)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
            ("rope.freq_base", Value::F32(10_000.0)),
        ] {
            file.set(&format!("{}.{key}", self.architecture), value);
        }
        file.metadata.extend(self.vocabulary.iter().cloned());

        let vocab_size = self
            .vocabulary
            .iter()
            .find_map(|(key, value)| match value {
                Value::Strings(tokens) if key == "tokenizer.ggml.tokens" => {
                    Some(tokens.len() as u64)
                }
                _ => None,
            })
            .expect("a vocabulary has tokens");
        let (hidden, ffn) = (self.hidden_size, self.feed_forward_length);
        let (q_dim, kv_dim) = (
            self.head_count * self.head_dim,
            self.head_count_kv * self.head_dim,
        );
        let mut random = Random(self.seed);
        let mut matrix = |file: &mut GgufFile, name: &str, shape: [u64; 2]| {
            let std = (shape[0] as f32).sqrt().recip();
            let data = random.blocks(self.tensor_type, (shape[0] * shape[1]) as usize, std);
            file.push(name, &shape, self.tensor_type, data);
        };
        let mut random = Random(!self.seed);
        let mut vector = |file: &mut GgufFile, name: &str, len: u64, mean: f32| {
            let values = (0..len)
                .flat_map(|_| (mean + random.centered(0.1)).to_le_bytes())
                .collect();
            file.push(name, &[len], TensorType::F32, values);
        };
        matrix(&mut file, "token_embd.weight", [hidden, vocab_size]);
        for layer in 0..self.layers {
            let name = |name: &str| format!("blk.{layer}.{name}");
            vector(&mut file, &name("attn_norm.weight"), hidden, 1.0);
            matrix(&mut file, &name("attn_q.weight"), [hidden, q_dim]);
            matrix(&mut file, &name("attn_k.weight"), [hidden, kv_dim]);
            matrix(&mut file, &name("attn_v.weight"), [hidden, kv_dim]);
            if self.architecture == "qwen2" {
                vector(&mut file, &name("attn_q.bias"), q_dim, 0.0);
                vector(&mut file, &name("attn_k.bias"), kv_dim, 0.0);
                vector(&mut file, &name("attn_v.bias"), kv_dim, 0.0);
            }
            if self.architecture == "qwen3" {
                vector(&mut file, &name("attn_q_norm.weight"), self.head_dim, 1.0);
                vector(&mut file, &name("attn_k_norm.weight"), self.head_dim, 1.0);
            }
            matrix(&mut file, &name("attn_output.weight"), [q_dim, hidden]);
            vector(&mut file, &name("ffn_norm.weight"), hidden, 1.0);
            matrix(&mut file, &name("ffn_gate.weight"), [hidden, ffn]);
            matrix(&mut file, &name("ffn_up.weight"), [hidden, ffn]);
            matrix(&mut file, &name("ffn_down.weight"), [ffn, hidden]);
        }
        vector(&mut file, "output_norm.weight", hidden, 1.0);
        if !self.tied {
            matrix(&mut file, "output.weight", [hidden, vocab_size]);
        }
        file
    }
}

/// A byte-level BPE vocabulary: the 256 bytes, a few merges and ChatML's control tokens.
pub fn byte_vocabulary() -> Vec<(String, Value)> {
    let merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a"];
    let controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut tokens: Vec<String> = (0..=u8::MAX)
        .map(|byte| gpt2_char(byte).to_string())
        .collect();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let normal = tokens.len();
    tokens.extend(controls.map(str::to_owned));
    let types: Vec<i32> = (0..tokens.len())
        .map(|id| if id < normal { 1 } else { 3 })
        .collect();
    let chat_template = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                         {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let entries: [(&str, Value); 8] = [
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "qwen2".into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", types.into()),
        (
            "tokenizer.ggml.merges",
            merges.map(str::to_owned).to_vec().into(),
        ),
        ("tokenizer.ggml.eos_token_id", (normal as u32 + 2).into()),
        ("tokenizer.ggml.add_bos_token", false.into()),
        ("tokenizer.chat_template", chat_template.into()),
    ];
    entries.map(|(key, value)| (key.to_owned(), value)).to_vec()
}

/// [`byte_vocabulary`] with `extra` tokens and their types behind its own, from 264 on.
pub fn byte_vocabulary_with(extra: &[(&str, i32)]) -> Vec<(String, Value)> {
    let mut vocabulary = byte_vocabulary();
    for (key, value) in &mut vocabulary {
        match value {
            Value::Strings(tokens) if key == "tokenizer.ggml.tokens" => {
                tokens.extend(extra.iter().map(|(text, _)| text.to_string()));
            }
            Value::I32s(types) => types.extend(extra.iter().map(|(_, token_type)| token_type)),
            _ => {}
        }
    }
    vocabulary
}

/// Gives the token `id` another type.
pub fn retype(vocabulary: &mut [(String, Value)], id: u32, token_type: i32) {
    for (_, value) in vocabulary {
        if let Value::I32s(types) = value {
            types[id as usize] = token_type;
        }
    }
}

/// A SentencePiece vocabulary: three special tokens, the bytes from 3 on, then `pieces` with their scores and types.
pub fn scored_vocabulary(pieces: &[(&str, f32, i32)]) -> Vec<(String, Value)> {
    let bytes: Vec<String> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    let all = ([("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)].into_iter())
        .chain(bytes.iter().map(|byte| (&byte[..], 0.0, 6)))
        .chain(pieces.iter().copied());
    let (mut tokens, mut scores, mut types) = (Vec::new(), Vec::new(), Vec::new());
    for (token, score, token_type) in all {
        tokens.push(token.to_owned());
        scores.push(score);
        types.push(token_type);
    }
    vec![
        ("tokenizer.ggml.model".into(), "llama".into()),
        ("tokenizer.ggml.tokens".into(), tokens.into()),
        ("tokenizer.ggml.scores".into(), scores.into()),
        ("tokenizer.ggml.token_type".into(), types.into()),
    ]
}

/// A small vocabulary of characters, blanks written U+2581: `model` "llama" merges by score, "gemma4" by rank.
pub fn piece_vocabulary(model: &str) -> Vec<(String, Value)> {
    let pieces = ["\u{2581}", "t", "h", "e", "he", "the", "\u{2581}the"];
    let scored: Vec<_> = (0..)
        .zip(pieces)
        .map(|(rank, piece)| (piece, -(rank as f32), 1))
        .collect();
    let mut vocabulary = scored_vocabulary(&scored);
    vocabulary[0].1 = model.into();
    let merges = ["h e", "t he", "\u{2581} the"].map(str::to_owned);
    vocabulary.push(("tokenizer.ggml.merges".into(), merges.to_vec().into()));
    vocabulary
}

/// The character that byte-level BPE writes for a byte (`bytes_to_unicode` of GPT-2): itself where it prints.
fn gpt2_char(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if prints(byte) {
        return byte.into();
    }
    let hidden_before = (0..byte).filter(|&other| !prints(other)).count() as u32;
    char::from_u32(256 + hidden_before).expect("256 to 323 are characters")
}

/// The real Qwen3 vocabulary, merges and chat template, padded to the 151,936 rows of its embedding.
pub fn qwen3_vocabulary() -> Vec<(String, Value)> {
    const VOCAB_SIZE: usize = 151_936;
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/qwen3-tokenizer.json.xz"
    );
    let packed = std::fs::read(path).expect("the vocabulary is part of the repository");
    let mut json = Vec::new();
    lzma_rs::xz_decompress(&mut packed.as_slice(), &mut json).expect("valid xz");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("valid JSON");
    let text = |key: &str| Value::String(json[key].as_str().expect(key).to_owned());
    let id = |key: &str| Value::U32(json[key].as_u64().expect(key) as u32);
    let texts = |key: &str| -> Vec<String> {
        let items = json[key].as_array().expect(key);
        items
            .iter()
            .map(|item| item.as_str().expect(key).to_owned())
            .collect()
    };
    let mut tokens = texts("tokens");
    let padding = VOCAB_SIZE - tokens.len();
    tokens.extend((0..padding).map(|i| format!("[PAD{i}]")));
    let mut types: Vec<i32> = json["types"]
        .as_array()
        .expect("types")
        .iter()
        .map(|id| id.as_i64().expect("types") as i32)
        .collect();
    types.resize(VOCAB_SIZE, 5); // unused
    let entries: [(&str, Value); 10] = [
        ("tokenizer.ggml.model", text("model")),
        ("tokenizer.ggml.pre", text("pre")),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", types.into()),
        ("tokenizer.ggml.merges", texts("merges").into()),
        ("tokenizer.ggml.eos_token_id", id("eos")),
        ("tokenizer.ggml.bos_token_id", id("bos")),
        ("tokenizer.ggml.padding_token_id", id("pad")),
        ("tokenizer.ggml.add_bos_token", false.into()),
        ("tokenizer.chat_template", text("chat_template")),
    ];
    entries.map(|(key, value)| (key.to_owned(), value)).to_vec()
}

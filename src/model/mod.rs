//! A model file, read and checked: the decoder as data, the tokenizer and the chat template.

pub mod arch;
pub mod chat_template;
pub mod decoder;
pub mod gguf;
mod jinja;
pub mod ops;
pub mod tokenizer;
mod transcript;

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result};

pub use arch::{Architecture, RopeOptions};
pub use chat_template::{ChatTemplate, Ignored, Message, Prompt, TemplateOptions};
pub use decoder::Decoder;
pub use gguf::{Gguf, Inspection, SplitName, Tensor};
pub use tokenizer::Tokenizer;
pub use transcript::Transcript;

/// The demo model that the executable carries: 10 million parameters that tell simple stories.
static DEMO: &[u8] = include_bytes!("../../assets/stories-10m-q4_k_m.gguf");

/// What a GGUF file says about text. Every file has it, with weights or without, whatever its architecture.
pub struct Vocabulary {
    pub gguf: Gguf,
    pub tokenizer: Tokenizer,
    /// `None` where the file carries no template; such a model takes raw prompts only.
    pub chat_template: Option<ChatTemplate>,
}

impl Vocabulary {
    /// Reads a parsed file.
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let name = gguf.name().to_owned();
        Self::read(gguf).with_context(|| format!("cannot load {name}"))
    }

    fn read(gguf: Gguf) -> Result<Self> {
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let chat_template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
        Ok(Self {
            gguf,
            tokenizer,
            chat_template,
        })
    }
}

/// The built-in demo model's file.
pub fn demo() -> Result<Gguf> {
    inspect_demo()?.into_gguf()
}

/// The same, to be looked at.
pub fn inspect_demo() -> Result<Inspection> {
    Inspection::from_bytes("the built-in demo model", DEMO)
}

/// Everything that a GGUF file says about a model.
pub struct Model {
    pub gguf: Gguf,
    pub decoder: Arc<Decoder>,
    pub tokenizer: Tokenizer,
    /// `None` where the file carries no template; such a model takes raw prompts only.
    pub chat_template: Option<ChatTemplate>,
}

impl Model {
    /// Opens the GGUF file at `path`, and with it the other parts of a split file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_gguf(Gguf::open(path)?)
    }

    /// The built-in demo model.
    pub fn demo() -> Result<Self> {
        Self::from_gguf(demo()?)
    }

    /// Reads a parsed file as a model.
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        Self::of_architectures(gguf, arch::ALL, &RopeOptions::default())
    }

    /// Reads a parsed file as a model of one of these architectures, with `rope` in place of the file's own.
    pub fn of_architectures(
        gguf: Gguf,
        architectures: &[Architecture],
        rope: &RopeOptions,
    ) -> Result<Self> {
        let name = gguf.name().to_owned();
        Self::read(gguf, architectures, rope).with_context(|| format!("cannot load {name}"))
    }

    fn read(gguf: Gguf, architectures: &[Architecture], rope: &RopeOptions) -> Result<Self> {
        let decoder = arch::describe(&gguf, architectures, rope)?;
        let Vocabulary {
            gguf,
            tokenizer,
            chat_template,
        } = Vocabulary::read(gguf)?;
        Ok(Self {
            gguf,
            decoder: decoder.into(),
            tokenizer,
            chat_template,
        })
    }
}

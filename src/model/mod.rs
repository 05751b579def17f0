//! A model file, read and checked: hyper-parameters, weights, tokenizer and chat template.

pub mod chat_template;
pub mod config;
pub mod gguf;
pub mod tokenizer;
pub mod weights;

use std::path::Path;

use anyhow::{Context, Result};

pub use chat_template::{ChatTemplate, Message, Prompt};
pub use config::Config;
pub use gguf::{Gguf, Tensor};
pub use tokenizer::Tokenizer;
pub use weights::Weights;

/// The demo model that the executable carries: 10 million parameters that tell simple stories.
static DEMO: &[u8] = include_bytes!("../../assets/stories-10m-q4_k_m.gguf");

/// Everything that a GGUF file says about a model.
pub struct Model {
    pub gguf: Gguf,
    pub config: Config,
    pub weights: Weights,
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
        Self::from_gguf(Gguf::from_bytes("the built-in demo model", DEMO)?)
    }

    /// Reads a parsed file as a model.
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let name = gguf.name().to_owned();
        Self::read(gguf).with_context(|| format!("cannot load {name}"))
    }

    fn read(gguf: Gguf) -> Result<Self> {
        let config = Config::from_gguf(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let weights = Weights::from_gguf(&gguf, &config)?;
        let chat_template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
        Ok(Self {
            gguf,
            config,
            weights,
            tokenizer,
            chat_template,
        })
    }
}

//! Where the model comes from.

use std::{mem, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};

use super::usage;
use crate::{
    cli::{
        args::{self, ModelArgs, RopeArgs, VerbosityArgs},
        download::Download,
        progress,
    },
    hub::Reference,
    model::{
        self, Decoder, Gguf, Inspection, Model, RopeOptions,
        arch::{self, RopeScalingType},
    },
};

/// Where the model comes from.
pub enum ModelSource {
    File(PathBuf, RopeOptions),
    Hub(Download, RopeOptions),
    Demo,
}

impl ModelSource {
    /// For a context of `context_len` tokens, where that many are asked for.
    pub fn open(&self, context_len: Option<usize>) -> Result<Model> {
        Model::of_architectures(self.open_gguf()?, arch::ALL, &self.rope(context_len))
    }

    /// What `gguf`, this file, computes, for a context likewise.
    pub fn describe(&self, gguf: &Gguf, context_len: Option<usize>) -> Result<Arc<Decoder>> {
        let decoder = arch::describe(gguf, arch::ALL, &self.rope(context_len))
            .with_context(|| format!("cannot load {}", gguf.name()))?;
        Ok(decoder.into())
    }

    /// The file alone, whether or not it is a model that can be run.
    pub fn open_gguf(&self) -> Result<Gguf> {
        self.inspect()?.into_gguf()
    }

    /// The same, as far as it can be read.
    pub fn inspect(&self) -> Result<Inspection> {
        match self {
            Self::File(path, _) => Inspection::open(path),
            Self::Hub(download, _) => Inspection::open(&download.get()?),
            Self::Demo => model::inspect_demo(),
        }
    }

    /// Downloads it, where it is to be and that was not done yet, so that opening it takes no longer than any file.
    pub fn download(&mut self) -> Result<()> {
        if let Self::Hub(download, rope) = self {
            *self = Self::File(download.get()?, mem::take(rope));
        }
        Ok(())
    }

    /// What takes the place of the file's own positions, for a context likewise.
    pub fn rope(&self, context_len: Option<usize>) -> RopeOptions {
        let rope = match self {
            Self::File(_, rope) | Self::Hub(_, rope) => rope.clone(),
            Self::Demo => RopeOptions::default(),
        };
        RopeOptions {
            context_len,
            ..rope
        }
    }

    /// What to call it while it is being loaded.
    pub fn name(&self) -> String {
        match self {
            Self::File(path, _) => path.display().to_string(),
            Self::Hub(download, _) => download.reference.to_string(),
            Self::Demo => "the demo model".to_owned(),
        }
    }
}

/// Asked last, so that what is said about it does not precede an error of usage.
pub fn model(
    args: ModelArgs,
    rope: Option<RopeArgs>,
    verbosity: &VerbosityArgs,
) -> Result<ModelSource> {
    let rope = rope.map(rope_options).unwrap_or_default();
    if let Some(path) = args.model.or(args.default) {
        let Some(name) = path.to_str().filter(|name| Reference::is_meant_by(name)) else {
            return Ok(ModelSource::File(path, rope));
        };
        let reference = name.parse();
        let download = Download {
            reference: reference.map_err(|error| usage(&format!("the model {name:?}: {error}")))?,
            offline: args.offline,
            show_progress: progress::wanted(verbosity),
        };
        return Ok(ModelSource::Hub(download, rope));
    }
    if rope != RopeOptions::default() {
        return Err(usage(
            "--rope-* and --yarn-* are for a model file: add --model FILE",
        ));
    }
    tracing::info!("no --model given: using the built-in demo model, which tells simple stories");
    Ok(ModelSource::Demo)
}

fn rope_options(args: RopeArgs) -> RopeOptions {
    RopeOptions {
        context_len: None,
        scaling: args.rope_scaling.map(|scaling| match scaling {
            args::RopeScaling::None => RopeScalingType::None,
            args::RopeScaling::Linear => RopeScalingType::Linear,
            args::RopeScaling::Yarn => RopeScalingType::Yarn,
        }),
        scale: args.rope_scale,
        freq_base: args.rope_freq_base,
        yarn_orig_ctx: args.yarn_orig_ctx,
        yarn_ext_factor: args.yarn_ext_factor,
        yarn_attn_factor: args.yarn_attn_factor,
        yarn_beta_fast: args.yarn_beta_fast,
        yarn_beta_slow: args.yarn_beta_slow,
    }
}

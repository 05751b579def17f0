//! `sharpi pull` and `models`.

use clap::Args;

use crate::hub::Reference;

const PULL_EXAMPLES: &str = "\
Examples:
  sharpi pull hf:Qwen/Qwen3-8B-GGUF
  sharpi pull hf:Qwen/Qwen3-8B-GGUF:Q8_0
  sharpi run -m hf:Qwen/Qwen3-8B-GGUF -p \"Why is the sky blue?\"

The path of the file goes to standard output. Files go to the cache of Hugging Face's own tools;
HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there.";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = PULL_EXAMPLES)]
pub struct PullArgs {
    /// hf:OWNER/REPO, with :QUANT behind it (default Q4_K_M) or :FILE.gguf; hf: may be left out
    #[arg(value_name = "MODEL")]
    pub reference: Reference,

    /// Download nothing: say where the cache has it (as HF_HUB_OFFLINE=1 does)
    #[arg(long, hide_short_help = true)]
    pub offline: bool,
}

const MODELS_EXAMPLES: &str = "\
Examples:
  sharpi models
  sharpi models --json | jq -r .path";

#[derive(Debug, Args)]
#[command(args_override_self = true, after_help = MODELS_EXAMPLES)]
pub struct ModelsArgs {
    /// Print one JSON object a line, as in docs/json.md
    #[arg(long)]
    pub json: bool,
}

//! What a schema costs: `cargo bench --bench constraint [-- model.gguf]`.
//!
//! Decodes the same number of tokens with and without a schema that never lets the document end, sampled alike, on the first
//! GPU where there is one, else on the CPU, in turn; prints the best rate of each, their ratio, and the time that finding the
//! allowed tokens takes by itself. Without a file, the built-in demo model.

use std::{
    env,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::json;
use sharpi::{
    backend::Backend,
    cpu::CpuBackend,
    cuda::{CudaBackend, Device, Options},
    engine::{
        Constraint, GenerateOptions, Grammar, Observer, SamplingParams, Session, TokenEvent,
        generate,
    },
    model::Model,
};

const TOKENS: usize = 256;
const ROUNDS: usize = 5;

/// Remembers the text's tokens.
#[derive(Default)]
struct Ids(Vec<u32>);

impl Observer for Ids {
    fn interrupted(&self) -> bool {
        false
    }

    fn prefill_progress(&mut self, _done: usize, _total: usize) {}

    fn token(&mut self, event: &TokenEvent) -> Result<()> {
        self.0.push(event.id);
        Ok(())
    }
}

fn main() -> Result<()> {
    let file = env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    let model = Arc::new(match &file {
        Some(path) => Model::open(Path::new(path))?,
        None => Model::demo()?,
    });
    let backend = open(&model)?;
    println!(
        "{}, {}",
        file.as_deref().unwrap_or("the demo model"),
        backend.device()
    );
    let mut session = Session::new(backend);
    // More documents than there is room for.
    let schema = json!({"type": "array", "minItems": TOKENS, "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["person", "place", "thing"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": false,
    }});
    let start = Instant::now();
    let constraint = Constraint::new(&Grammar::json_schema(&schema)?, &model.tokenizer)?;
    println!(
        "compiling the schema for {} tokens: {:.0?}",
        model.tokenizer.vocab_size(),
        start.elapsed()
    );

    let mut best = [Duration::MAX; 2];
    let mut text = Vec::new();
    for _ in 0..ROUNDS {
        for (best, constraint) in best.iter_mut().zip([None, Some(&constraint)]) {
            let (time, ids) = decode(&mut session, &model, constraint)?;
            *best = time.min(*best);
            text = ids;
        }
    }
    let [free, held] = best.map(|time| (TOKENS - 1) as f64 / time.as_secs_f64());
    println!("without: {free:.1} tokens/s");
    println!(
        "with:    {held:.1} tokens/s, {:.3} of that without",
        held / free
    );

    let mut guide = constraint.begin();
    let start = Instant::now();
    for &id in &text {
        guide.allowed()?;
        guide.accept(id)?;
    }
    let each = start.elapsed() / text.len() as u32;
    println!("finding the allowed tokens: {each:.1?} a token");
    Ok(())
}

/// How long the tokens behind the first take, and all of them.
fn decode(
    session: &mut Session,
    model: &Model,
    constraint: Option<&Constraint>,
) -> Result<(Duration, Vec<u32>)> {
    let options = GenerateOptions {
        max_tokens: Some(TOKENS),
        stop: vec![],
        ignore_eos: constraint.is_none(),
        logprobs: None,
        sampling: SamplingParams {
            temperature: 0.7,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 1,
        },
        constraint: constraint.cloned(),
    };
    let prompt = [1, 2, 3, 4];
    let mut ids = Ids::default();
    let generation = generate(session, &model.tokenizer, &prompt, &options, &mut ids)?;
    ensure!(
        generation.generated_tokens == TOKENS,
        "the text ended early"
    );
    Ok((generation.timings.decode, ids.0))
}

fn open(model: &Arc<Model>) -> Result<Box<dyn Backend>> {
    let context_len = Some(2 * TOKENS);
    if let Ok(device) = Device::open(0) {
        let options = Options {
            context_len,
            ..Options::default()
        };
        let decoder = model.decoder.clone();
        let backend = CudaBackend::new(device, decoder, &options, &mut |_, _| {})?;
        return Ok(Box::new(backend));
    }
    Ok(Box::new(CpuBackend::new(
        model.decoder.clone(),
        2 * TOKENS,
        0,
    )?))
}

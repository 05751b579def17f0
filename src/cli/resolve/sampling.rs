//! How tokens are chosen: flags, then what the file recommends, then the program's defaults.

use std::hash::{BuildHasher, Hasher, RandomState};

use anyhow::{Result, ensure};

use crate::{cli::args::SamplingArgs, engine::SamplingParams, model::Gguf};

/// Sampling as asked for; what was not asked for waits for the model file's recommendation.
pub struct SamplingFlags(pub SamplingArgs);

impl SamplingFlags {
    /// Fills in what the file recommends under llama.cpp's keys, else the program's defaults.
    pub fn resolve(&self, gguf: &Gguf, context_len: usize) -> Result<SamplingParams> {
        let Self(flags) = self;
        let not_negative = |x: f64| x >= 0.0;
        let probability = |x: f64| (0.0..=1.0).contains(&x);
        let number = |flag: Option<f32>, recommended: Recommended| match flag {
            Some(value) => Ok(value),
            None => recommended.read(gguf).map(|value| value as f32),
        };
        let last_n = Recommended("penalty_last_n", "--repeat-last-n", 64.0, |n| n >= -1.0);
        let repeat_last_n = flags
            .repeat_last_n
            .map_or_else(|| last_n.read(gguf).map(|n| n as i64), Ok)?;
        let top_k = Recommended("top_k", "--top-k", 40.0, not_negative);
        Ok(SamplingParams {
            temperature: number(flags.temp, Recommended("temp", "--temp", 0.7, not_negative))?,
            top_k: flags
                .top_k
                .map_or_else(|| top_k.read(gguf).map(|k| k as usize), Ok)?,
            top_p: number(
                flags.top_p,
                Recommended("top_p", "--top-p", 0.95, probability),
            )?,
            min_p: number(
                flags.min_p,
                Recommended("min_p", "--min-p", 0.05, probability),
            )?,
            repeat_penalty: number(
                flags.repeat_penalty,
                Recommended("penalty_repeat", "--repeat-penalty", 1.0, |x| x > 0.0),
            )?,
            // -1 is the whole context.
            repeat_last_n: usize::try_from(repeat_last_n).unwrap_or(context_len),
            presence_penalty: flags.presence_penalty.unwrap_or(0.0),
            frequency_penalty: flags.frequency_penalty.unwrap_or(0.0),
            seed: flags.seed.unwrap_or_else(draw_seed),
        })
    }
}

/// A key under `general.sampling.`, the flag that overrides it, the value where neither is given, and which values
/// make sense.
struct Recommended(&'static str, &'static str, f64, fn(f64) -> bool);

impl Recommended {
    fn read(&self, gguf: &Gguf) -> Result<f64> {
        let Self(key, flag, default, valid) = self;
        let key = format!("general.sampling.{key}");
        let value = gguf.f64(&key)?.unwrap_or(*default);
        ensure!(
            value.is_finite() && valid(value),
            "{}: {key} is {value}, which cannot be used: choose a value with {flag}",
            gguf.name()
        );
        Ok(value)
    }
}

/// A seed that is new each time. It stays below 2^32, so that every JSON reader takes it for what it is.
fn draw_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}

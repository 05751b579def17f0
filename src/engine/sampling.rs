//! Choosing the next token from logits.

use std::iter;

use anyhow::{Result, ensure};
use rand_chacha::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};

use crate::{
    backend::{SamplingParams, not_finite},
    math::exp,
};

/// Chooses tokens, one after another, reproducibly for a seed. `kernels/choose.cu` does the same with the same roundings.
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha12Rng,
    /// Tokens that are never chosen.
    banned: Vec<u32>,
    /// The prompt's tokens and all chosen since.
    history: Vec<u32>,
    /// The logits after penalties: (vocab_size)
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// A token and its logit as one number: greater for the likelier token, and for the first of equals, so that the order
/// does not depend on the sorting algorithm. As in `kernels/choose.cu`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate(u64);

impl Candidate {
    const SIGN: u32 = 1 << 31;

    fn new(id: u32, logit: f32) -> Self {
        // 0 and -0 are equals.
        let bits = (logit + 0.0).to_bits();
        let ordered = match bits & Self::SIGN {
            0 => bits | Self::SIGN,
            _ => !bits,
        };
        Self(u64::from(ordered) << 32 | u64::from(!id))
    }

    fn id(self) -> u32 {
        !(self.0 as u32)
    }

    fn logit(self) -> f32 {
        let ordered = (self.0 >> 32) as u32;
        f32::from_bits(match ordered & Self::SIGN {
            0 => !ordered,
            _ => ordered & !Self::SIGN,
        })
    }
}

impl Sampler {
    /// `prompt`: what the penalties look back on at first. `banned`: tokens that must not be chosen.
    pub fn new(params: SamplingParams, prompt: &[u32], banned: Vec<u32>) -> Self {
        Self {
            rng: ChaCha12Rng::seed_from_u64(params.seed),
            params,
            banned,
            history: prompt.to_vec(),
            logits: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Chooses a token given the logits of all: (vocab_size).
    ///
    /// # Errors
    /// Logits that are not numbers.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        self.sample_among(logits, None)
    }

    /// Likewise, among the tokens whose bit is set in `allowed`, if not among all: bit `i % 32` of word `i / 32` for
    /// token `i`.
    ///
    /// # Errors
    /// Likewise, and where every allowed token is banned.
    pub fn sample_among(&mut self, logits: &[f32], allowed: Option<&[u32]>) -> Result<u32> {
        let largest_logit = largest_logit(logits)?;
        let adjusts = self.params.has_penalties() || !self.banned.is_empty() || allowed.is_some();
        // A vocabulary is copied only where something changes its logits.
        let (logits, max) = match adjusts {
            true => {
                self.adjust(logits);
                if let Some(allowed) = allowed {
                    restrict(&mut self.logits, allowed);
                }
                (&self.logits[..], largest(&self.logits))
            }
            false => (logits, largest_logit),
        };
        ensure!(
            max > f32::NEG_INFINITY,
            "every token that may follow is one that is never chosen"
        );
        let id = if self.params.temperature == 0.0 {
            first_equal(logits, max)
        } else {
            filter(&self.params, logits, max, &mut self.candidates);
            self.draw()
        };
        self.history.push(id);
        Ok(id)
    }

    /// The tokens that are never chosen.
    pub fn banned(&self) -> &[u32] {
        &self.banned
    }

    /// The numbers that decide the next `count` choices, for one who makes them in place of this sampler: those that it
    /// would draw itself.
    pub fn take_uniforms(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| uniform(&mut self.rng)).collect()
    }

    /// Leaves in `self.logits` the logits after penalties and bans.
    fn adjust(&mut self, logits: &[f32]) {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.penalize();
        for &id in &self.banned {
            self.logits[id as usize] = f32::NEG_INFINITY;
        }
    }

    fn penalize(&mut self) {
        let p = &self.params;
        let recent = self.history.len().saturating_sub(p.repeat_last_n);
        let mut recent = self.history[recent..].to_vec();
        recent.sort_unstable();
        for run in recent.chunk_by(|a, b| a == b) {
            let logit = &mut self.logits[run[0] as usize];
            if *logit > 0.0 {
                *logit /= p.repeat_penalty;
            } else {
                *logit *= p.repeat_penalty;
            }
            *logit -= p.presence_penalty + run.len() as f32 * p.frequency_penalty;
        }
    }

    /// Draws one of the candidates by their probabilities at the temperature.
    fn draw(&mut self) -> u32 {
        let max = self.candidates[0].logit();
        let temperature = self.params.temperature;
        let weight = |c: &Candidate| f64::from(exp((c.logit() - max) / temperature));
        let mut total = 0.0;
        for candidate in &self.candidates {
            total += weight(candidate);
        }
        let mut left = uniform(&mut self.rng) * total;
        for candidate in &self.candidates {
            left -= weight(candidate);
            if left < 0.0 {
                return candidate.id();
            }
        }
        self.candidates[self.candidates.len() - 1].id()
    }
}

/// Takes all chance from the tokens that are not allowed.
fn restrict(logits: &mut [f32], allowed: &[u32]) {
    let words = allowed.iter().chain(iter::repeat(&0));
    for (logits, word) in logits.chunks_mut(32).zip(words) {
        for (i, logit) in logits.iter_mut().enumerate() {
            if word >> i & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// 53 random bits: from 0 to below 1.
fn uniform(rng: &mut ChaCha12Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Leaves in `candidates`, sorted, the tokens that pass top-k, top-p and min-p. `max` is the largest of the logits.
fn filter(params: &SamplingParams, logits: &[f32], max: f32, candidates: &mut Vec<Candidate>) {
    /// Of a whole vocabulary so many are sorted at first, and so many times more where all of them pass: few do.
    const FIRST: usize = 256;
    const MORE: usize = 64;
    let weight = |c: &Candidate| exp(c.logit() - max);
    let (most, total) = match params.top_k {
        0 => (logits.len(), Some(sum_of_weights(logits, max) as f32)),
        k => (k.min(logits.len()), None),
    };
    let all_pass = params.top_p >= 1.0 && params.min_p <= 0.0;
    let mut keep = match total {
        Some(_) if !all_pass => FIRST.min(most),
        _ => most,
    };
    loop {
        collect_top(logits, keep, candidates);
        let total = total.unwrap_or_else(|| candidates.iter().fold(0.0, |sum, c| sum + weight(c)));
        let passing = passing(params, candidates.iter().map(weight), total);
        if passing < keep || keep == most {
            candidates.truncate(passing);
            return;
        }
        keep = most.min(MORE * keep);
    }
}

/// How many of the likeliest tokens pass top-p and min-p: one at least. `weights` are their probabilities times `total`, the
/// greatest, 1, first.
fn passing(params: &SamplingParams, weights: impl Iterator<Item = f32>, total: f32) -> usize {
    let (mut count, mut sum) = (0, 0.0);
    for weight in weights {
        if count > 0 && weight < params.min_p {
            break;
        }
        count += 1;
        sum += weight;
        if params.top_p < 1.0 && sum >= params.top_p * total {
            break;
        }
    }
    count
}

/// Values that the passes over a whole vocabulary take at a time, so that they become vector instructions.
const LANES: usize = 16;

/// The largest logit.
///
/// # Errors
/// A logit that is NaN or infinite.
pub(super) fn largest_logit(logits: &[f32]) -> Result<f32> {
    // 0 times a finite number is 0, times any other NaN.
    let mut zeros = [0.0; LANES];
    let mut largest = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            zeros[i] += chunk[i] * 0.0;
            largest[i] = if chunk[i] > largest[i] {
                chunk[i]
            } else {
                largest[i]
            };
        }
    }
    let finite = zeros.iter().all(|zero| *zero == 0.0) && rest.iter().all(|v| v.is_finite());
    if !finite {
        return Err(not_finite());
    }
    let largest = largest.iter().chain(rest).copied();
    Ok(largest.fold(f32::NEG_INFINITY, f32::max))
}

fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

/// The first token with this logit.
fn first_equal(logits: &[f32], logit: f32) -> u32 {
    logits.iter().position(|&l| l == logit).unwrap_or(0) as u32
}

/// Leaves the `keep` largest logits, sorted, in `out`.
///
/// One pass over a large vocabulary: only what beats the `keep`-th best so far is looked at twice.
fn collect_top(logits: &[f32], keep: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let mut least = f32::NEG_INFINITY;
    for (run, values) in logits.chunks(LANES).enumerate() {
        if !values
            .iter()
            .fold(false, |any, value| any | (*value > least))
        {
            continue;
        }
        for (i, &logit) in values.iter().enumerate() {
            if logit > least {
                let id = (run * LANES + i) as u32;
                out.push(Candidate::new(id, logit));
            }
        }
        if out.len() >= 2 * keep {
            out.select_nth_unstable_by(keep - 1, |a, b| b.cmp(a));
            out.truncate(keep);
            least = out[keep - 1].logit();
        }
    }
    out.sort_unstable_by(|a, b| b.cmp(a));
    out.truncate(keep);
}

/// The ids of the `count` largest logits, the largest first.
pub(super) fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let mut top = Vec::new();
    if count > 0 {
        collect_top(logits, count.min(logits.len()), &mut top);
    }
    top.iter().map(|candidate| candidate.id()).collect()
}

/// What turns a logit into a log-probability when subtracted from it: `ln Σ exp(logit)`.
pub fn log_softmax_denominator(logits: &[f32]) -> f64 {
    let max = largest(logits);
    f64::from(max) + sum_of_weights(logits, max).ln()
}

/// `Σ exp(logit - max)`
fn sum_of_weights(logits: &[f32], max: f32) -> f64 {
    /// Summed in single precision, so few that rounding stays at the terms' own.
    const RUN: usize = 16 * LANES;
    let sum = |run: &[f32]| {
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = run.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, logit) in lanes.iter_mut().zip(chunk) {
                *lane += exp(logit - max);
            }
        }
        let rest = rest.iter().map(|logit| exp(logit - max));
        f64::from(lanes.iter().copied().chain(rest).sum::<f32>())
    };
    logits.chunks(RUN).map(sum).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: SamplingParams = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        repeat_last_n: 64,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 1,
    };

    /// Logits of the probabilities 0.5, 0.25, 0.15, 0.1 in the order of the ids 2, 0, 3, 1.
    fn logits() -> Vec<f32> {
        [0.25f32, 0.1, 0.5, 0.15].iter().map(|p| p.ln()).collect()
    }

    /// How often each token comes up in 20,000 draws.
    fn frequencies(params: SamplingParams) -> Vec<f64> {
        let mut sampler = Sampler::new(params, &[], vec![]);
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            sampler.history.clear();
            counts[sampler.sample(&logits()).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts.to_vec()
    }

    /// Five standard deviations of a frequency over 20,000 draws are below 0.018.
    fn assert_close(found: &[f64], expected: [f64; 4]) {
        for (f, e) in found.iter().zip(expected) {
            assert!(
                (f - e).abs() < 0.018 && (e > 0.0 || *f == 0.0),
                "{found:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn tokens_come_up_as_often_as_their_probability_says() {
        assert_close(&frequencies(PARAMS), [0.25, 0.1, 0.5, 0.15]);
    }

    #[test]
    fn temperature_sharpens_the_distribution() {
        let temperature = 0.5; // squares the probabilities
        let total = 0.25 + 0.0625 + 0.0225 + 0.01;
        let expected = [0.0625 / total, 0.01 / total, 0.25 / total, 0.0225 / total];
        assert_close(
            &frequencies(SamplingParams {
                temperature,
                ..PARAMS
            }),
            expected,
        );
    }

    #[test]
    fn each_filter_drops_the_unlikely_tokens() {
        let two_left = [1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0];
        assert_close(
            &frequencies(SamplingParams { top_k: 2, ..PARAMS }),
            two_left,
        );
        // 0.5 is not enough, 0.5 + 0.25 is.
        assert_close(
            &frequencies(SamplingParams {
                top_p: 0.7,
                ..PARAMS
            }),
            two_left,
        );
        // At least 0.4 * 0.5.
        assert_close(
            &frequencies(SamplingParams {
                min_p: 0.4,
                ..PARAMS
            }),
            two_left,
        );
    }

    #[test]
    fn top_p_counts_within_what_top_k_left() {
        // After top-k 2 the likeliest token has 2/3 of the probability.
        let params = SamplingParams {
            top_k: 2,
            top_p: 0.6,
            ..PARAMS
        };
        assert_close(&frequencies(params), [0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_and_the_first_of_equals() {
        let greedy = SamplingParams {
            temperature: 0.0,
            ..PARAMS
        };
        let mut sampler = Sampler::new(greedy, &[], vec![]);
        assert_eq!(sampler.sample(&logits()).unwrap(), 2);
        assert_eq!(sampler.sample(&[1.0, 3.0, 3.0]).unwrap(), 1);
    }

    #[test]
    fn penalties_lower_what_was_said_before() {
        let mut params = SamplingParams {
            temperature: 0.0,
            repeat_penalty: 2.0,
            ..PARAMS
        };
        // 3.0 / 2 < 2.0, and -1.0 * 2 < -1.5
        let choose = |params: &SamplingParams, history: &[u32], logits: &[f32]| {
            let mut sampler = Sampler::new(params.clone(), history, vec![]);
            sampler.sample(logits).unwrap()
        };
        assert_eq!(choose(&params, &[0], &[3.0, 2.0]), 1);
        assert_eq!(choose(&params, &[0], &[-1.0, -1.5]), 1);
        params.repeat_last_n = 1;
        assert_eq!(choose(&params, &[0, 5], &[3.0, 2.0, 0., 0., 0., 0.]), 0);
        params = SamplingParams {
            temperature: 0.0,
            frequency_penalty: 0.4,
            presence_penalty: 0.3,
            ..PARAMS
        };
        assert_eq!(choose(&params, &[0], &[3.0, 2.2]), 0); // 3.0 - 0.7
        assert_eq!(choose(&params, &[0, 0], &[3.0, 2.2]), 1); // 3.0 - 1.1
    }

    #[test]
    fn a_banned_token_is_never_chosen() {
        let greedy = SamplingParams {
            temperature: 0.0,
            ..PARAMS
        };
        let mut sampler = Sampler::new(greedy, &[], vec![2]);
        assert_eq!(sampler.sample(&logits()).unwrap(), 0);
    }

    #[test]
    fn the_candidates_of_a_large_vocabulary_are_the_sorted_best() {
        let logits: Vec<f32> = (0..5_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) % 1_000) as f32)
            .collect();
        let mut sorted: Vec<u32> = (0..5_000).collect();
        sorted.sort_by(|&a, &b| {
            let (la, lb) = (logits[a as usize], logits[b as usize]);
            lb.total_cmp(&la).then(a.cmp(&b))
        });
        let mut top = Vec::new();
        for keep in [1, 7, 40, 5_000] {
            collect_top(&logits, keep, &mut top);
            let ids: Vec<u32> = top.iter().map(|c| c.id()).collect();
            assert_eq!(ids, sorted[..keep]);
        }
    }

    #[test]
    fn what_passes_of_a_whole_vocabulary_is_found_without_sorting_it() {
        for spread in [0.001, 0.5, 4.0, 20.0] {
            let logits: Vec<f32> = (0..5_000u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) % 4_999) as f32 / 4_999.0 * spread)
                .collect();
            let max = largest(&logits);
            for (top_p, min_p) in [(1.0, 0.0), (0.9, 0.0), (0.5, 0.02), (1.0, 0.3), (0.0, 0.0)] {
                let ids = |top_k| {
                    let params = SamplingParams {
                        top_k,
                        top_p,
                        min_p,
                        ..PARAMS
                    };
                    let mut candidates = Vec::new();
                    filter(&params, &logits, max, &mut candidates);
                    candidates.iter().map(|c| c.id()).collect::<Vec<u32>>()
                };
                let (all, sorted) = (ids(0), ids(5_000));
                // The sums of five thousand weights round differently, which may move the border by a token.
                let (len, expected) = (all.len(), sorted.len());
                assert!(len.abs_diff(expected) <= 1 && len > 0, "{len} {expected}");
                let common = len.min(expected);
                assert_eq!(all[..common], sorted[..common]);
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        let mut sampler = Sampler::new(PARAMS, &[], vec![]);
        assert!(sampler.sample(&[f32::NAN, f32::NAN]).is_err());
        assert!(sampler.sample(&[f32::INFINITY, 0.0]).is_err());
        let mut many = vec![0.0; 100];
        many[37] = f32::NAN;
        assert!(sampler.sample(&many).is_err());
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let logits = [1000.0f32, 999.0, 0.0];
        let denominator = log_softmax_denominator(&logits);
        let sum: f64 = logits
            .iter()
            .map(|&l| (f64::from(l) - denominator).exp())
            .sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }
}

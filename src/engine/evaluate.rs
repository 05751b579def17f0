//! How well a backend predicts a text, and how closely it follows another.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};

use super::sampling::{largest_logit, log_softmax_denominator};
use crate::backend::{Backend, Batch, Limits, Results, Want};

/// What a text's predictions came to. Natural logarithms throughout.
#[derive(Debug, Clone, Default)]
pub struct Evaluation {
    /// Windows that were read, and positions in them whose prediction was counted.
    pub windows: usize,
    pub positions: usize,
    nll_sum: f64,
    nll_square_sum: f64,
    /// Against the reference, one value a position, if there was one.
    pub divergence: Option<Divergence>,
}

/// How far a backend's predictions are from a reference's.
#[derive(Debug, Clone, Default)]
pub struct Divergence {
    /// The Kullback-Leibler divergence of each position: `Σ p ln(p / q)`, `p` being the reference.
    pub kl: Vec<f64>,
    /// Positions where both hold the same token for the likeliest.
    pub same_top: usize,
}

impl Evaluation {
    /// `exp` of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.mean_nll().exp()
    }

    /// The standard error of the perplexity.
    pub fn perplexity_error(&self) -> f64 {
        let n = self.positions as f64;
        let variance = self.nll_square_sum / n - self.mean_nll().powi(2);
        self.perplexity() * (variance.max(0.0) / (n - 1.0).max(1.0)).sqrt()
    }

    fn mean_nll(&self) -> f64 {
        self.nll_sum / self.positions as f64
    }

    fn count(&mut self, logits: &[f32], next: u32, reference: Option<&[f32]>) -> Result<()> {
        for logits in reference.into_iter().chain([logits]) {
            largest_logit(logits)?;
        }
        let denominator = log_softmax_denominator(logits);
        let nll = denominator - f64::from(logits[next as usize]);
        self.positions += 1;
        self.nll_sum += nll;
        self.nll_square_sum += nll * nll;
        if let (Some(divergence), Some(reference)) = (&mut self.divergence, reference) {
            divergence.push(logits, reference);
        }
        Ok(())
    }
}

impl Divergence {
    pub fn mean(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.kl.len() as f64
    }

    pub fn max(&self) -> f64 {
        self.kl.iter().copied().fold(0.0, f64::max)
    }

    /// The value that this fraction of the positions stays below.
    pub fn quantile(&self, fraction: f64) -> f64 {
        let mut sorted = self.kl.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        sorted
            .get((last as f64 * fraction).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// The fraction of positions where both hold the same token for the likeliest.
    pub fn same_top_fraction(&self) -> f64 {
        self.same_top as f64 / self.kl.len() as f64
    }

    /// Adds a position.
    pub fn push(&mut self, logits: &[f32], reference: &[f32]) {
        let denominator = log_softmax_denominator(logits);
        let reference_denominator = log_softmax_denominator(reference);
        let kl = reference.iter().zip(logits).map(|(&p, &q)| {
            let log_p = f64::from(p) - reference_denominator;
            log_p.exp() * (log_p - (f64::from(q) - denominator))
        });
        self.kl.push(kl.sum());
        self.same_top += usize::from(top(logits) == top(reference));
    }
}

/// The likeliest token, the first of equals.
pub(super) fn top(logits: &[f32]) -> Option<usize> {
    let order = |a: &usize, b: &usize| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a));
    (0..logits.len()).max_by(order)
}

/// Lets `backend` predict `tokens` in windows of `window` tokens, each read on its own, and counts the predictions of
/// the second half of each window, as llama.cpp's perplexity does; with `reference`, also how far the two are apart.
///
/// A backend that reads one token at a time decodes them, so that decoding can be evaluated as well. To one whose KV cache has
/// a budget, the first half of a window is a prompt.
///
/// `bos`, where the model wants one, takes the place of each window's first token. `progress` hears how many tokens of all
/// windows are done, and how many these have; where it breaks, what was counted so far is returned.
///
/// # Errors
/// A text shorter than a window, a window that the context cannot hold, logits that are no numbers, and whatever a
/// backend meets.
pub fn evaluate(
    backend: &mut dyn Backend,
    mut reference: Option<&mut dyn Backend>,
    tokens: &[u32],
    window: usize,
    bos: Option<u32>,
    progress: &mut (dyn FnMut(usize, usize) -> ControlFlow<()> + Send),
) -> Result<Evaluation> {
    ensure!(
        tokens.len() >= window,
        "the text is {} tokens long, and one window takes {window}",
        tokens.len()
    );
    let mut evaluation = Evaluation {
        divergence: reference.as_ref().map(|_| Divergence::default()),
        ..Evaluation::default()
    };
    let chunk_len = reference
        .as_ref()
        .map_or(usize::MAX, |reference| reference.limits().results_len)
        .min(backend.limits().results_len);
    let limits = Limits {
        chunk_len,
        ..backend.limits()
    };
    let prompt_len = backend.kv_layout().budget.map_or(0, |_| window / 2);
    let decode = backend.limits().chunk_len == 1;
    let all = tokens.len() / window * window;
    let ways = 1 + usize::from(reference.is_some());
    for (i, window_tokens) in tokens.chunks_exact(window).enumerate() {
        let mut inputs = window_tokens.to_vec();
        inputs[0] = bos.unwrap_or(inputs[0]);
        let mut rest = &inputs[..];
        while !rest.is_empty() {
            let start = window - rest.len();
            let prompt_left = prompt_len.saturating_sub(start);
            let chunk_len = match prompt_left {
                0 => chunk_len,
                left => limits.next_len(left),
            };
            let (chunk, behind) = rest.split_at(chunk_len.min(rest.len()));
            rest = behind;
            let read = Batch {
                ends_prompt: chunk.len() == prompt_left,
                ..Batch::prompt(chunk, start, Want::All)
            };
            let batch = match chunk {
                [token] if decode => Batch::decode(token, start),
                _ => read,
            };
            let mut watch = |way: usize, part: f64| {
                let work = (way as f64 + part) / ways as f64 * chunk.len() as f64;
                progress(i * window + start + work as usize, all)
            };
            if watch(0, 0.0).is_break() {
                return Ok(evaluation);
            }
            let computed = backend.compute_watched(batch, &mut |part| watch(0, part))?;
            let Some(Results { logits }) = computed else {
                return Ok(evaluation);
            };
            let reference = match &mut reference {
                Some(reference) => {
                    let computed = reference.compute_watched(read, &mut |part| watch(1, part))?;
                    let Some(Results { logits }) = computed else {
                        return Ok(evaluation);
                    };
                    Some(logits)
                }
                None => None,
            };
            let vocab_size = logits.len() / chunk.len();
            for (j, logits) in logits.chunks_exact(vocab_size).enumerate() {
                let position = start + j;
                if position >= window / 2 && position + 1 < window {
                    let row = j * vocab_size..(j + 1) * vocab_size;
                    evaluation.count(
                        logits,
                        window_tokens[position + 1],
                        reference.map(|r| &r[row]),
                    )?;
                }
            }
        }
        evaluation.windows += 1;
    }
    let _ = progress(all, all);
    Ok(evaluation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{KvFormat, KvLayout};

    /// Logits that depend on the last token and the position alone.
    struct Table {
        sharpness: f32,
        logits: Vec<f32>,
    }

    const VOCAB: usize = 5;

    impl Table {
        fn new(sharpness: f32) -> Self {
            Self {
                sharpness,
                logits: Vec::new(),
            }
        }

        fn row(&self, token: u32, position: usize) -> Vec<f32> {
            (0..VOCAB)
                .map(|i| self.sharpness * ((i * 7 + token as usize * 3 + position) % 11) as f32)
                .collect()
        }
    }

    impl Backend for Table {
        fn name(&self) -> &'static str {
            "table"
        }

        fn device(&self) -> &str {
            "table"
        }

        fn kv_layout(&self) -> &KvLayout {
            static NOTHING: KvLayout = KvLayout {
                format: KvFormat::F32,
                budget: None,
                layers: Vec::new(),
            };
            &NOTHING
        }

        fn limits(&self) -> Limits {
            Limits {
                context_len: 64,
                chunk_len: 3,
                results_len: 3,
                last_len: 1,
                vocab_size: VOCAB,
            }
        }

        fn bytes_per_token(&self, _position: usize) -> u64 {
            0
        }

        fn compute(&mut self, batch: Batch) -> Result<Results<'_>> {
            batch.check(self.limits(), true)?;
            assert_eq!(batch.want, Want::All, "an evaluation needs every position");
            let rows = batch.tokens.iter().enumerate();
            let row = |(i, &token)| self.row(token, batch.position + i);
            self.logits = rows.flat_map(row).collect();
            Ok(Results {
                logits: &self.logits,
            })
        }
    }

    fn probabilities(logits: &[f32]) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    }

    #[test]
    fn the_second_half_of_each_window_is_counted() {
        let (table, reference) = (Table::new(0.3), Table::new(0.31));
        let tokens: Vec<u32> = (0..19).map(|i| i * i % VOCAB as u32).collect();
        let (window, bos) = (8, 4);
        let (mut nll, mut kl, mut positions) = (0.0, 0.0, 0);
        for start in [0, 8] {
            for position in 4..7 {
                let token = tokens[start + position];
                let q = probabilities(&table.row(token, position));
                let p = probabilities(&reference.row(token, position));
                nll -= q[tokens[start + position + 1] as usize].ln();
                kl += p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
                positions += 1;
            }
        }
        let evaluation = evaluate(
            &mut Table::new(0.3),
            Some(&mut Table::new(0.31)),
            &tokens,
            window,
            Some(bos),
            &mut |_, _| ControlFlow::Continue(()),
        )
        .unwrap();
        assert_eq!(evaluation.positions, positions);
        let expected = (nll / f64::from(positions as u32)).exp();
        assert!((evaluation.perplexity() / expected - 1.0).abs() < 1e-6);
        let divergence = evaluation.divergence.unwrap();
        assert!((divergence.mean() - kl / 6.0).abs() < 1e-6);
        assert_eq!(divergence.same_top, 6);
    }

    #[test]
    fn a_text_shorter_than_a_window_is_an_error() {
        let error = evaluate(&mut Table::new(1.0), None, &[1, 2], 8, None, &mut |_, _| {
            ControlFlow::Continue(())
        });
        assert!(error.unwrap_err().to_string().contains("2 tokens"));
    }
}

//! The forward pass of a decoder a second time, in float64 and as plainly as it goes. Tensors come from the file by their
//! names; of the description it takes the numbers of each layer, not the order of operations.

use half::f16;
use sharpi::{
    backend::Tiles,
    model::{
        Model,
        decoder::{KeyValues, Rope, RopeScaling, RopeStyle},
    },
};

/// The logits after every token.
pub fn logits(model: &Model, tokens: &[u32]) -> Vec<f64> {
    logits_by(model, tokens, Cache::default())
}

/// What becomes of keys and values of layers without a window (docs/kv-cache.md).
#[derive(Clone, Copy, Default)]
pub struct Cache {
    /// How tokens that are far behind are kept.
    pub tiles: Option<Tiles>,
    /// So many tokens are a prompt, of which each head keeps so many. Not beside tiles.
    pub evict: Option<(usize, usize)>,
}

/// The logits after every token, with such a cache.
pub fn logits_by(model: &Model, tokens: &[u32], cache: Cache) -> Vec<f64> {
    let decoder = &model.decoder;
    let tensor = |name: &str| model.gguf.tensor(name).map(|t| widen(&t.to_f32()));
    let needed = |name: &str| tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let embedding = needed("token_embd.weight");
    let embed = |&token: &u32| {
        let start = token as usize * decoder.hidden_size;
        embedding[start..start + decoder.hidden_size].to_vec()
    };
    let mut hidden: Vec<Vec<f64>> = tokens.iter().map(embed).collect();
    let input_norm = decoder.layers[0].attention.norm.as_ref();
    let epsilon = f64::from(
        input_norm
            .expect("these models norm what they read")
            .epsilon,
    );
    // Of each layer: for each position its heads.
    let mut cached: Vec<[Vec<Vec<Vec<f64>>>; 2]> = Vec::new();
    for (index, layer) in decoder.layers.iter().enumerate() {
        let attention = &layer.attention;
        let weights = |name: &str| needed(&format!("blk.{index}.{name}.weight"));
        let optional = |name: &str| tensor(&format!("blk.{index}.{name}"));
        let project = |name: &str, rotated: bool| -> Vec<Vec<Vec<f64>>> {
            let (matrix, input_norm) = (weights(name), weights("attn_norm"));
            let bias = optional(&format!("{name}.bias"));
            let norm = optional(&format!("{name}_norm.weight"));
            let heads = |(position, x): (usize, &Vec<f64>)| {
                let mut out = product(&matrix, &rms_norm(x, &input_norm, epsilon));
                if let Some(bias) = &bias {
                    add(&mut out, bias);
                }
                let heads = out.chunks(attention.head_dim).map(|head| {
                    let head = match &norm {
                        Some(norm) => rms_norm(head, norm, epsilon),
                        None => head.to_vec(),
                    };
                    match rotated {
                        true => rotate(&attention.rope, &head, position),
                        false => head,
                    }
                });
                heads.collect()
            };
            hidden.iter().enumerate().map(heads).collect()
        };
        let queries = project("attn_q", true);
        cached.push(match attention.kv {
            KeyValues::Own(_) => [project("attn_k", true), project("attn_v", false)],
            KeyValues::SharedWith(owner) => cached[owner].clone(),
        });
        // The description has the magnitude of both sides in the scale.
        let scale = f64::from(attention.scale / attention.rope.score_factor(attention.head_dim));
        let [keys, values] = &cached[index];
        let tiles = cache.tiles.filter(|_| attention.window.is_none());
        let tiled = tiles.map(|tiles| {
            [
                Tiled::new(keys, tiles.key_bits, true),
                Tiled::new(values, tiles.value_bits, false),
            ]
        });
        let key = |seer: usize, seen: usize| match &tiled {
            Some([keys, _]) => keys.seen(seer, seen),
            None => &keys[seen],
        };
        let value = |seer: usize, seen: usize| match &tiled {
            Some([_, values]) => values.seen(seer, seen),
            None => &values[seen],
        };
        let [output, gate, up, down] =
            ["attn_output", "ffn_gate", "ffn_up", "ffn_down"].map(weights);
        let ffn_norm = weights("ffn_norm");
        let output_norms = ["post_attention_norm.weight", "post_ffw_norm.weight"].map(optional);
        // Of each head for keys and values, what tokens behind the prompt see of it.
        let evict = cache.evict.filter(|_| attention.window.is_none());
        let evicted = evict.map(|(prompt_len, budget)| {
            let heads_kv = 0..attention.head_count_kv;
            let kept = heads_kv.map(|head_kv| {
                let group = attention.head_count / attention.head_count_kv;
                let of_group = (head_kv * group..(head_kv + 1) * group).map(|head| {
                    let of_head = |heads: &[Vec<Vec<f64>>], head: usize| -> Vec<Vec<f64>> {
                        heads.iter().map(|heads| heads[head].clone()).collect()
                    };
                    let columns = head * attention.head_dim..(head + 1) * attention.head_dim;
                    let rows = output.chunks(attention.q_dim());
                    worth(
                        &of_head(&queries[..prompt_len], head),
                        &of_head(&keys[..prompt_len], head_kv),
                        &of_head(&values[..prompt_len], head_kv),
                        &rows.map(|row| &row[columns.clone()]).collect::<Vec<_>>(),
                        scale,
                    )
                });
                most_worth(&of_group.collect::<Vec<_>>(), budget)
            });
            (prompt_len, kept.collect::<Vec<_>>())
        });
        let add_branch = |x: &mut Vec<f64>, branch: Vec<f64>, norm: &Option<Vec<f64>>| match norm {
            Some(norm) => add(x, &rms_norm(&branch, norm, epsilon)),
            None => add(x, &branch),
        };
        for (position, x) in hidden.iter_mut().enumerate() {
            let first = attention
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            let mut attended = Vec::new();
            for (head, query) in queries[position].iter().enumerate() {
                let head_kv = head * attention.head_count_kv / attention.head_count;
                let seen: Vec<usize> = match &evicted {
                    Some((end, kept)) if position >= *end => kept[head_kv]
                        .iter()
                        .copied()
                        .chain(*end..=position)
                        .collect(),
                    _ => (first..=position).collect(),
                };
                let weight = |&p: &usize| (dot(query, &key(position, p)[head_kv]) * scale).exp();
                let weights: Vec<f64> = seen.iter().map(weight).collect();
                let sum: f64 = weights.iter().sum();
                attended.extend((0..attention.head_dim).map(|i| {
                    let seen = seen.iter().zip(&weights);
                    let products = seen.map(|(&p, weight)| weight * value(position, p)[head_kv][i]);
                    products.sum::<f64>() / sum
                }));
            }
            add_branch(x, product(&output, &attended), &output_norms[0]);
            let normed = rms_norm(x, &ffn_norm, epsilon);
            let pairs = product(&gate, &normed)
                .into_iter()
                .zip(product(&up, &normed));
            let gated: Vec<f64> = pairs
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            add_branch(x, product(&down, &gated), &output_norms[1]);
            let scale = f64::from(layer.output_scale.unwrap_or(1.0));
            x.iter_mut().for_each(|x| *x *= scale);
        }
    }
    let output = tensor("output.weight").unwrap_or(embedding);
    let norm = needed("output_norm.weight");
    let normed = hidden.iter().map(|x| rms_norm(x, &norm, epsilon));
    normed.flat_map(|x| product(&output, &x)).collect()
}

/// What each token of a prompt is worth to a query head: the most that one of the last 64 tokens gives it or one of the 7 before and
/// the 7 behind it, the mean over all tokens of what they are given at least, times the length of what its value adds to the
/// residual stream.
fn worth(
    queries: &[Vec<f64>],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    output: &[&[f64]],
    scale: f64,
) -> Vec<f64> {
    let len = queries.len();
    let mut most = vec![0.0; len];
    for last in len.saturating_sub(64)..len {
        let seen = keys[..=last].iter();
        let weights: Vec<f64> = seen
            .map(|key| (dot(&queries[last], key) * scale).exp())
            .collect();
        let sum: f64 = weights.iter().sum();
        for (most, weight) in most.iter_mut().zip(&weights) {
            *most = f64::max(*most, weight / sum);
        }
    }
    let mean = most.iter().sum::<f64>() / len as f64;
    let length = |value: &Vec<f64>| {
        let added: Vec<f64> = output.iter().map(|row| dot(row, value)).collect();
        dot(&added, &added).sqrt()
    };
    let worth = values.iter().enumerate().map(|(token, value)| {
        let near = most.iter().enumerate();
        let near = near.filter(|(other, _)| token.abs_diff(*other) <= 7);
        near.fold(mean, |greatest, (_, most)| greatest.max(*most)) * length(value)
    });
    worth.collect()
}

/// The first 4 tokens, the last 64, and of the others those that are worth most to one of the heads: `count` in all, in order.
fn most_worth(heads: &[Vec<f64>], count: usize) -> Vec<usize> {
    let len = heads[0].len();
    let worth = |token: usize| heads.iter().map(|head| head[token]).fold(0.0, f64::max);
    let mut others: Vec<usize> = (4..len - 64).collect();
    others.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)));
    others.truncate(count - 68);
    let mut kept: Vec<usize> = (0..4).chain(others).chain(len - 64..len).collect();
    kept.sort();
    kept
}

/// What a layer's keys, or values, become in tiles: for each position its heads.
struct Tiled {
    near: Vec<Vec<Vec<f64>>>,
    far: Vec<Vec<Vec<f64>>>,
}

impl Tiled {
    const TILE: usize = 128;
    const SINKS: usize = 4;
    /// Of keys, in each channel.
    const GROUP: usize = 64;

    fn new(heads: &[Vec<Vec<f64>>], bits: usize, by_channel: bool) -> Self {
        let stored = |head: &Vec<f64>| hadamard(head).into_iter().map(to_f16).collect();
        let stored: Vec<Vec<Vec<f64>>> = heads
            .iter()
            .map(|heads| heads.iter().map(stored).collect())
            .collect();
        let mut codes = stored.clone();
        let steps = f64::from((1 << bits) - 1);
        let group = |numbers: &[f64]| {
            let least = numbers.iter().copied().fold(f64::INFINITY, f64::min);
            let greatest = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            // The difference and its quotient are float32.
            let scale = to_f16(f64::from((greatest - least) as f32 / steps as f32));
            (scale, to_f16(least))
        };
        let nearest = |x: f64, (scale, zero): (f64, f64)| match scale {
            0.0 => zero,
            _ => ((x - zero) / scale).round_ties_even().clamp(0.0, steps) * scale + zero,
        };
        for (tile, stored) in stored.chunks_exact(Self::TILE).enumerate() {
            let first = if tile == 0 { Self::SINKS } else { 0 };
            let codes = &mut codes[tile * Self::TILE..];
            for head in 0..stored[0].len() {
                let dim = stored[0][head].len();
                for tokens in [first..Self::GROUP, Self::GROUP..Self::TILE] {
                    for channel in 0..if by_channel { dim } else { 0 } {
                        let of_group = stored[tokens.clone()].iter();
                        let of_group = of_group.map(|heads| heads[head][channel]);
                        let group = group(&of_group.collect::<Vec<f64>>());
                        for token in tokens.clone() {
                            let x = &mut codes[token][head][channel];
                            *x = nearest(*x, group);
                        }
                    }
                }
                for token in first..if by_channel { 0 } else { Self::TILE } {
                    let group = group(&stored[token][head]);
                    for x in &mut codes[token][head] {
                        *x = nearest(*x, group);
                    }
                }
            }
        }
        let back = |heads: Vec<Vec<f64>>| heads.iter().map(|head| hadamard(head)).collect();
        Self {
            near: stored.into_iter().map(back).collect(),
            far: codes.into_iter().map(back).collect(),
        }
    }

    /// What the token at `seer` sees of the one at `seen`.
    fn seen(&self, seer: usize, seen: usize) -> &Vec<Vec<f64>> {
        let is_far = seen >= Self::SINKS && seen / Self::TILE + 2 <= seer / Self::TILE;
        if is_far {
            &self.far[seen]
        } else {
            &self.near[seen]
        }
    }
}

fn to_f16(x: f64) -> f64 {
    f16::from_f64(x).to_f64()
}

fn hadamard(head: &[f64]) -> Vec<f64> {
    let block = 1 << head.len().trailing_zeros();
    let rotated = head.chunks(block).flat_map(|x| {
        let row = move |i: usize| {
            let sign = |j: usize| match (i & j).count_ones().is_multiple_of(2) {
                true => 1.0,
                false => -1.0,
            };
            x.iter().enumerate().map(|(j, x)| sign(j) * x).sum::<f64>() / (block as f64).sqrt()
        };
        (0..block).map(row)
    });
    rotated.collect()
}

/// The usual size of some values: their root mean square.
pub fn size(values: &[f64]) -> f64 {
    (dot(values, values) / values.len() as f64).sqrt()
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + epsilon).sqrt().recip();
    let pairs = x.iter().zip(weight);
    pairs.map(|(x, weight)| x * scale * weight).collect()
}

fn rotate(rope: &Rope, head: &[f64], position: usize) -> Vec<f64> {
    let count = rope.dimensions;
    let mut out = head.to_vec();
    for i in 0..count / 2 {
        let factor = rope.factors.as_ref().map_or(1.0, |factors| factors[i]);
        let exponent = -2.0 * i as f64 / count as f64;
        let unscaled = f64::from(rope.base).powf(exponent) / f64::from(factor);
        let frequency = match rope.scaling {
            RopeScaling::None => unscaled,
            RopeScaling::Linear(factor) => unscaled / f64::from(factor),
            // Held to transformers in tests/rope.rs.
            RopeScaling::Yarn(_) => rope.frequencies()[i],
        };
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = match rope.style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Neox => (i, i + count / 2),
        };
        let magnitude = f64::from(rope.magnitude());
        out[a] = (head[a] * cos - head[b] * sin) * magnitude;
        out[b] = (head[a] * sin + head[b] * cos) * magnitude;
    }
    out
}

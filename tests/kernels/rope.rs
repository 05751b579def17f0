//! A chunk's rotary embeddings and cache entries.

use half::f16;
use rayon::prelude::*;
use sharpi::cuda::{
    launches::{self, Chunk},
    params::RopeParams,
};

use crate::{
    common::gpu::TestResult,
    harness::{Buffer, CHUNK_LENS, EPSILON, Findings, device, floats, random, run},
    heads::{HEAD_DIMS, Rope, optional, query_scale, random_cache, same_but_for},
};

/// The last is so far out that frequencies rounded to float32 would give other angles.
const POSITIONS: [usize; 6] = [0, 1, 127, 500, 1023, 40_000];

pub fn rope_tokens_rotates_and_fills_the_cache() -> TestResult {
    let (mut random, mut findings) = (random(7), Findings::default());
    let groups = [1, 3, 4, 7, 8];
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for tokens in CHUNK_LENS {
            for _ in 0..2 {
                count += 1;
                let (group, position) = (groups[count % 5], POSITIONS[count % 6]);
                let head_count_kv = 1 + count % 3;
                let head_count = group * head_count_kv;
                // All tokens have room, or the latest.
                let context = match count % 5 {
                    0 => tokens + 40,
                    _ => position + tokens + count % 2,
                };
                let stores = count % 7 != 0;
                let rope = Rope::new(&mut random, head_dim);
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, {tokens} tokens at {position} of {context}, \
                     stores {stores}, {}",
                    rope.name()
                );
                let end = position.min(context);
                let filled = end.saturating_sub(1000)..end;
                let mut cache = || {
                    random_cache(
                        &mut random,
                        head_dim,
                        context,
                        head_count_kv,
                        filled.clone(),
                    )
                };
                let (keys, values) = (cache(), cache());
                let (k_cache, v_cache) = (Buffer::new(&keys)?, Buffer::new(&values)?);
                let q = floats(&mut random, head_count * head_dim * tokens, 1.0);
                let k = floats(&mut random, head_count_kv * head_dim * tokens, 1.0);
                let v = floats(&mut random, head_count_kv * head_dim * tokens, 1.0);
                let inputs = [Buffer::new(&q)?, Buffer::new(&k)?, Buffer::new(&v)?];
                let (_q_norm, q_norm) = optional(&rope.q_norm)?;
                let (_k_norm, k_norm) = optional(&rope.k_norm)?;
                let (_v_norm, v_norm) = optional(&rope.v_norm)?;
                let frequencies = Buffer::new(&rope.frequencies)?;
                let in_text = Buffer::new(&[(position + rope.evicted) as i32])?;
                let place = Buffer::new(&[position as i32])?;
                let q_out = Buffer::poisoned(q.len() * 2)?;
                let params = RopeParams {
                    q: inputs[0].address(),
                    k: if stores { inputs[1].address() } else { 0 },
                    v: if stores { inputs[2].address() } else { 0 },
                    q_norm,
                    k_norm,
                    v_norm,
                    frequencies: frequencies.address(),
                    q_out: q_out.address(),
                    k_cache: k_cache.address(),
                    v_cache: v_cache.address(),
                    position: in_text.address(),
                    place: place.address(),
                    epsilon: EPSILON,
                    context: context as i32,
                    head_count: head_count as i32,
                    head_count_kv: head_count_kv as i32,
                    rope_dims: rope.rope_dims() as i32,
                    interleaved: i32::from(rope.interleaved),
                    scale: query_scale(head_dim) as f32,
                    rope_factor: rope.factor,
                    stores: i32::from(stores),
                    compressed: 0,
                };
                let launch = launches::rope_tokens(device()?, head_dim, params, Chunk { tokens })?;
                // SAFETY: the launch is that of these buffers, which outlive it.
                unsafe { run(&launch)? };

                let (new_keys, new_values): (Vec<f16>, Vec<f16>) =
                    (k_cache.read()?, v_cache.read()?);
                for (old, new) in [(&keys, &new_keys), (&values, &new_values)] {
                    let range = position..position + if stores { tokens } else { 0 };
                    findings.holds(same_but_for(old, new, head_dim, context, range), || {
                        format!("{case}: another token of the cache was changed")
                    });
                }
                let rotated: Vec<f64> = q
                    .par_chunks_exact(head_dim)
                    .enumerate()
                    .flat_map_iter(|(i, head)| {
                        let position = position + i / head_count;
                        let rotated = rope.apply(head, rope.q_norm.as_ref(), position);
                        rotated.into_iter().map(|v| v * query_scale(head_dim))
                    })
                    .collect();
                findings.rounded("queries", &case, &rotated, &q_out.read::<f16>()?, 1e-5);
                if !stores {
                    continue;
                }
                let (mut rotated, mut stored_keys) = (Vec::new(), Vec::new());
                let (mut exact, mut stored_values) = (Vec::new(), Vec::new());
                let mut slack = 0.0;
                let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
                for (i, (k, v)) in heads.enumerate() {
                    let position = position + i / head_count_kv;
                    let at = (i % head_count_kv * context + position % context) * head_dim;
                    rotated.extend(rope.apply(k, rope.k_norm.as_ref(), position));
                    stored_keys.extend_from_slice(&new_keys[at..at + head_dim]);
                    let value = rope.value(v);
                    exact.extend(value.0);
                    slack = value.1;
                    stored_values.extend_from_slice(&new_values[at..at + head_dim]);
                }
                findings.rounded("keys", &case, &rotated, &stored_keys, 1e-5);
                findings.rounded("values", &case, &exact, &stored_values, slack);
            }
        }
    }
    findings.verdict()
}

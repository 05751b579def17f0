//! Attention of a decoded token and of a chunk, and the cache entries that the former writes.

use anyhow::{Result, ensure};
use bytemuck::Zeroable;
use half::f16;
use rayon::prelude::*;
use sharpi::cuda::{
    launches::{self, Chunk},
    params::{AttentionLayer, DecodeAttentionParams, FlashAttentionParams},
};

use crate::{
    common::gpu::TestResult,
    harness::{Buffer, CHUNK_LENS, EPSILON, Findings, device, floats, random, run, widened},
    heads::{
        HEAD_DIMS, Limits, POSITIONS, Rope, attend, in_ring, optional, query_scale, random_cache,
        same_bits, same_but_for,
    },
    quantized::Output,
    tiles::read_tiles,
};

pub fn decode_attention_is_softmax_over_the_cache() -> TestResult {
    let (mut random, mut findings) = (random(5), Findings::default());
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for group in [1, 3, 4, 7, 8, 12, 16] {
            for position in POSITIONS {
                count += 1;
                let head_count_kv = 1 + count % 3;
                // The last place of the cache, or one before it.
                let context = position + 1 + count % 2;
                let head_count = group * head_count_kv;
                let rope = Rope::new(&mut random, head_dim);
                let limits = Limits::of_case(count);
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, position {position} of {context}, {}, {}",
                    limits.name(),
                    rope.name()
                );
                let first_seen = limits.seen(position).start;
                let filled = first_seen..position;
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
                let q = floats(&mut random, head_count * head_dim, 1.0);
                let k = floats(&mut random, head_count_kv * head_dim, 1.0);
                let v = floats(&mut random, head_count_kv * head_dim, 1.0);
                let inputs = [Buffer::new(&q)?, Buffer::new(&k)?, Buffer::new(&v)?];
                let (_q_norm, q_norm) = optional(&rope.q_norm)?;
                let (_k_norm, k_norm) = optional(&rope.k_norm)?;
                let (_v_norm, v_norm) = optional(&rope.v_norm)?;
                let frequencies = Buffer::new(&rope.frequencies)?;
                let in_text = Buffer::new(&[(position + rope.evicted) as i32])?;
                let place = Buffer::new(&[position as i32])?;
                let splits = launches::decode_attention_splits(device()?, head_count_kv, group);
                let partial = launches::decode_attention_partial_len(head_dim, head_count, splits);
                let partial = Buffer::poisoned(partial * 4)?;
                let counters = launches::decode_attention_counters(head_count_kv, group);
                let finished = Buffer::zeroed(counters * 4)?;

                // The output, and what the cache of `capacity` tokens is then.
                let attend_on_device = |keys: &[f16],
                                        values: &[f16],
                                        capacity: usize,
                                        stores: bool|
                 -> Result<(Output, Vec<f16>, Vec<f16>)> {
                    let (k_cache, v_cache) = (Buffer::new(keys)?, Buffer::new(values)?);
                    let out = Output::new(head_count * head_dim)?;
                    let params = DecodeAttentionParams {
                        q: inputs[0].address(),
                        k: if stores { inputs[1].address() } else { 0 },
                        v: if stores { inputs[2].address() } else { 0 },
                        layer: AttentionLayer {
                            q_norm,
                            k_norm,
                            v_norm,
                            frequencies: frequencies.address(),
                            k_cache: k_cache.address(),
                            v_cache: v_cache.address(),
                            epsilon: EPSILON,
                            context: capacity as i32,
                            group: group as i32,
                            rope_dims: rope.rope_dims() as i32,
                            interleaved: i32::from(rope.interleaved),
                            scale: query_scale(head_dim) as f32,
                            rope_factor: rope.factor,
                            window: limits.window as i32,
                            softcap: limits.softcap,
                            stores: i32::from(stores),
                        },
                        position: in_text.address(),
                        place: place.address(),
                        partial: partial.address(),
                        finished: finished.address(),
                        out: out.normed().activation,
                        ..Zeroable::zeroed()
                    };
                    let launch = launches::decode_attention(
                        device()?,
                        head_dim,
                        head_count_kv,
                        splits,
                        None,
                        params,
                    )?;
                    // SAFETY: the launch is that of these buffers, which outlive it.
                    unsafe { run(&launch)? };
                    partial.read::<f32>()?;
                    let left: Vec<u32> = finished.read()?;
                    ensure!(left.iter().all(|&count| count == 0), "counters are left");
                    Ok((out, k_cache.read()?, v_cache.read()?))
                };
                let (out, new_keys, new_values) = attend_on_device(&keys, &values, context, true)?;

                for (old, new) in [(&keys, &new_keys), (&values, &new_values)] {
                    let newest = position..position + 1;
                    findings.holds(same_but_for(old, new, head_dim, context, newest), || {
                        format!("{case}: another token of the cache was changed")
                    });
                }
                let mut reference = Vec::new();
                for head in 0..head_count_kv {
                    let range = head * head_dim..(head + 1) * head_dim;
                    let at = (head * context + position) * head_dim;
                    let key = rope.apply(&k[range.clone()], rope.k_norm.as_ref(), position);
                    let newest = &new_keys[at..at + head_dim];
                    findings.rounded("new keys", &case, &key, newest, 1e-5);
                    let (value, slack) = rope.value(&v[range]);
                    let newest = &new_values[at..at + head_dim];
                    findings.rounded("new values", &case, &value, newest, slack);
                }
                let (wide_keys, wide_values) = (widened(&new_keys), widened(&new_values));
                let plane = context * head_dim;
                let heads = q.par_chunks_exact(head_dim).enumerate();
                reference.par_extend(heads.flat_map(|(head, q)| {
                    let mut query = rope.apply(q, rope.q_norm.as_ref(), position);
                    query.iter_mut().for_each(|v| *v *= query_scale(head_dim));
                    let plane = head / group * plane..(head / group + 1) * plane;
                    let (keys, values) = (&wide_keys[plane.clone()], &wide_values[plane]);
                    attend(&query, keys, values, position, limits)
                }));
                let ours = out.read(&mut findings, &case)?.into_iter().map(f64::from);
                findings.relative("attention", &case, &reference, ours, 5e-5);

                let bits = out.bits()?;
                let mut expect = |what: &str,
                                  got: (Output, Vec<f16>, Vec<f16>),
                                  keys: &[f16],
                                  values: &[f16]|
                 -> Result<()> {
                    let same = got.0.bits()? == bits
                        && same_bits(&got.1, keys)
                        && same_bits(&got.2, values);
                    findings.holds(same, || format!("{case}: other bits {what}"));
                    Ok(())
                };
                let again = attend_on_device(&keys, &values, context, true)?;
                expect("the second time", again, &new_keys, &new_values)?;
                let read = attend_on_device(&new_keys, &new_values, context, false)?;
                expect("where nothing is stored", read, &new_keys, &new_values)?;
                if limits.window > 0 {
                    let capacity = limits.ring_len(1);
                    let ring = |cache: &[f16], end: usize| {
                        in_ring(cache, head_dim, context, capacity, first_seen..end)
                    };
                    let (keys, values) = (ring(&keys, position), ring(&values, position));
                    let of_ring = attend_on_device(&keys, &values, capacity, true)?;
                    let (keys, values) = (
                        ring(&new_keys, position + 1),
                        ring(&new_values, position + 1),
                    );
                    expect("from a ring", of_ring, &keys, &values)?;
                }
            }
        }
    }
    findings.verdict()
}

pub fn flash_attention_is_causal_softmax_over_the_cache() -> TestResult {
    let (mut random, mut findings) = (random(8), Findings::default());
    let groups = [1, 2, 3, 4, 7, 8, 16];
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for tokens in CHUNK_LENS {
            for _ in 0..2 {
                count += 1;
                let (group, position) = (groups[count % 7], POSITIONS[count % 6]);
                let head_count_kv = if tokens > 33 { 1 } else { 1 + count % 3 };
                let head_count = group * head_count_kv;
                let (chunk, end) = (Chunk { tokens }, position + tokens);
                let context = end + count % 2;
                let limits = Limits::of_case(count);
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, {tokens} tokens at {position}, {}",
                    limits.name()
                );
                let seen = limits.seen(position).start..end;
                let mut cache =
                    || random_cache(&mut random, head_dim, context, head_count_kv, seen.clone());
                let (keys, values) = (cache(), cache());
                let scale = query_scale(head_dim) as f32;
                let q: Vec<f16> = floats(&mut random, head_count * head_dim * tokens, scale)
                    .into_iter()
                    .map(f16::from_f32)
                    .collect();
                let q_buffer = Buffer::new(&q)?;
                let place = Buffer::new(&[position as i32])?;
                let tiles = launches::flash_attention_tiles(head_dim, tokens, group)?;
                let partial = launches::flash_attention_partial_len(
                    device()?,
                    head_dim,
                    tiles,
                    head_count_kv,
                );
                let partial = Buffer::poisoned(partial * 4)?;
                let finished = Buffer::zeroed(tiles * head_count_kv * 4)?;
                let width = head_count * head_dim;

                let attend_on_device =
                    |keys: &[f16], values: &[f16], capacity: usize| -> Result<Buffer> {
                        let (k_cache, v_cache) = (Buffer::new(keys)?, Buffer::new(values)?);
                        let out = Buffer::poisoned(chunk.tile_bytes(width))?;
                        let params = FlashAttentionParams {
                            q: q_buffer.address(),
                            k_cache: k_cache.address(),
                            v_cache: v_cache.address(),
                            out: out.address(),
                            place: place.address(),
                            partial: partial.address(),
                            finished: finished.address(),
                            tokens: tokens as i32,
                            padded_tokens: chunk.padded() as i32,
                            context: capacity as i32,
                            group: group as i32,
                            window: limits.window as i32,
                            softcap: limits.softcap,
                            ..Zeroable::zeroed()
                        };
                        let launch = launches::flash_attention(
                            device()?,
                            head_dim,
                            head_count_kv,
                            end,
                            None,
                            params,
                        )?;
                        // SAFETY: the launch is that of these buffers, which outlive it.
                        unsafe { run(&launch)? };
                        let left: Vec<u32> = finished.read()?;
                        ensure!(left.iter().all(|&count| count == 0), "counters are left");
                        Ok(out)
                    };
                let out = attend_on_device(&keys, &values, context)?;
                let (wide_keys, wide_values) = (widened(&keys), widened(&values));
                let plane = context * head_dim;
                let heads = q.par_chunks_exact(head_dim).enumerate();
                let reference: Vec<f64> = heads
                    .flat_map_iter(|(i, q)| {
                        let (token, head_kv) = (i / head_count, i % head_count / group);
                        let query: Vec<f64> = q.iter().map(|v| v.to_f64()).collect();
                        let plane = head_kv * plane..(head_kv + 1) * plane;
                        let (keys, values) = (&wide_keys[plane.clone()], &wide_values[plane]);
                        attend(&query, keys, values, position + token, limits)
                    })
                    .collect();
                let ours = read_tiles(&mut findings, &case, &out, width, chunk)?;
                let as_f64 = ours.iter().map(|v| v.to_f64());
                findings.relative("attention", &case, &reference, as_f64, 1e-3);
                let again = attend_on_device(&keys, &values, context)?;
                let again = read_tiles(&mut findings, &case, &again, width, chunk)?;
                findings.holds(same_bits(&ours, &again), || {
                    format!("{case}: other bits the second time")
                });
                if limits.window > 0 {
                    let capacity = limits.ring_len(tokens);
                    let ring =
                        |cache: &[f16]| in_ring(cache, head_dim, context, capacity, seen.clone());
                    let of_ring = attend_on_device(&ring(&keys), &ring(&values), capacity)?;
                    let of_ring = read_tiles(&mut findings, &case, &of_ring, width, chunk)?;
                    findings.holds(same_bits(&ours, &of_ring), || {
                        format!("{case}: other bits from a ring")
                    });
                }
            }
        }
    }
    findings.verdict()
}

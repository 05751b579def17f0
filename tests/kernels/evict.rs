//! Which tokens stay where the KV cache has a budget, and how they are brought together.

use anyhow::Result;
use bytemuck::Zeroable;
use half::f16;
use rayon::prelude::*;
use sharpi::{
    backend::{MIN_BUDGET, NEWEST, SINKS, Tiles},
    cuda::{
        device::Launch,
        launches::{self, EvictHeads, EvictScratch},
        params::{CompressTilesParams, CompressedLayer, EvictParams, GatherKeptParams, KvTiles},
    },
    quant::kv_tile::{Group, KEY_GROUP, TILE},
};

use crate::{
    common::{gguf_writer::Random, gpu::TestResult},
    harness::{Buffer, Findings, device, floats, random, run},
    heads::{HEAD_DIMS, in_ring, query_scale, random_cache, same_bits},
};

const OBSERVERS: usize = 64;

/// The greatest importance of a place and of the 7 before and behind it, `floor` at least.
fn asked<T: PartialOrd + Copy>(importance: &[T], place: usize, floor: T) -> T {
    let near = importance.iter().enumerate();
    let near = near.filter(|(other, _)| place.abs_diff(*other) <= 7);
    near.fold(floor, |most, (_, &one)| if one > most { one } else { most })
}

const FORMATS: [Option<Tiles>; 4] = [
    None,
    Some(Tiles::ALL[0]),
    Some(Tiles::ALL[1]),
    Some(Tiles::ALL[2]),
];

fn name(tiles: Option<Tiles>) -> String {
    tiles.map_or("f16".to_owned(), |tiles| tiles.to_string())
}

/// A layer's cache: random tokens, of which those far behind are in tiles.
struct Cached {
    head_dim: usize,
    /// Keys, then values (head_dim, places, head_count_kv), as the next token reads them.
    read: [Vec<f16>; 2],
    /// (head_dim, capacity, head_count_kv)
    rings: [Buffer; 2],
    capacity: usize,
    tiles: KvTiles,
    _records: Buffer,
    _sinks: Buffer,
}

impl Cached {
    /// Without tiles there is room for `spare` places more.
    fn new(
        random: &mut Random,
        (head_dim, head_count_kv): (usize, usize),
        kept: Option<Tiles>,
        places: usize,
        spare: usize,
    ) -> Result<Self> {
        let context = match kept {
            None => places + spare,
            Some(_) => places.next_multiple_of(TILE),
        };
        let stored =
            [(); 2].map(|()| random_cache(random, head_dim, context, head_count_kv, 0..places));
        let mut read = stored.each_ref().map(|cache| {
            let planes = cache.chunks_exact(head_dim * context);
            planes
                .flat_map(|plane| plane[..head_dim * places].to_vec())
                .collect::<Vec<f16>>()
        });
        let whole = [Buffer::new(&stored[0])?, Buffer::new(&stored[1])?];
        let Some(bits) = kept else {
            return Ok(Self {
                head_dim,
                read,
                rings: whole,
                capacity: context,
                tiles: KvTiles::zeroed(),
                _records: Buffer::new::<u8>(&[])?,
                _sinks: Buffer::new::<u8>(&[])?,
            });
        };
        let of_tile = TILE * head_dim * (bits.key_bits + bits.value_bits) / 8
            + (TILE / KEY_GROUP * head_dim + TILE) * size_of::<Group>();
        let head_bytes = places / TILE * of_tile;
        let records = Buffer::poisoned(head_bytes * head_count_kv)?;
        let sinks = Buffer::poisoned(2 * SINKS * head_dim * size_of::<f16>() * head_count_kv)?;
        let tiles = KvTiles {
            records: records.address(),
            head_bytes: head_bytes as u64,
            sinks: sinks.address(),
        };
        let layer = Buffer::new(&[CompressedLayer {
            k_cache: whole[0].address(),
            v_cache: whole[1].address(),
            tiles,
            context: context as i32,
            unused: 0,
        }])?;
        let first = Buffer::new(&[0i32])?;
        let params = CompressTilesParams {
            layers: layer.address(),
            place: first.address(),
            tokens: places as i32,
            unused: 0,
        };
        let launch = launches::compress_tiles(device()?, head_dim, head_count_kv, 1, bits, params)?;
        // SAFETY: the launch is that of these buffers, which outlive it.
        unsafe { run(&launch)? };

        let tiled = Tiles::seen(places) * TILE;
        for keys in read[0].chunks_exact_mut(head_dim * places) {
            for first in (0..tiled).step_by(KEY_GROUP) {
                let tokens = first..first + KEY_GROUP;
                for channel in 0..head_dim {
                    let numbers = tokens.clone().skip(if first == 0 { SINKS } else { 0 });
                    let at: Vec<usize> = numbers.map(|token| token * head_dim + channel).collect();
                    compress(keys, &at, bits.key_bits);
                }
            }
        }
        for values in read[1].chunks_exact_mut(head_dim * places) {
            for token in SINKS.min(tiled)..tiled {
                let at: Vec<usize> = (token * head_dim..(token + 1) * head_dim).collect();
                compress(values, &at, bits.value_bits);
            }
        }
        // No more than the next token reads as it was stored.
        let capacity = 3 * TILE;
        let ring = |cache: &[f16]| {
            Buffer::new(&in_ring(cache, head_dim, context, capacity, tiled..places))
        };
        Ok(Self {
            head_dim,
            read,
            rings: [ring(&stored[0])?, ring(&stored[1])?],
            capacity,
            tiles,
            _records: records,
            _sinks: sinks,
        })
    }

    /// A token's key or value.
    fn token(&self, plane: usize, head: usize, places: usize, place: usize) -> &[f16] {
        &self.read[plane][(head * places + place) * self.head_dim..][..self.head_dim]
    }
}

/// What is read of numbers that share a scale and a zero.
fn compress(numbers: &mut [f16], at: &[usize], bits: usize) {
    let group = Group::of(at.iter().map(|&at| numbers[at].to_f32()), bits);
    for &at in at {
        let code = f64::from(group.code(numbers[at].to_f32(), bits));
        numbers[at] = rounded(code * group.scale.to_f64() + group.zero.to_f64());
    }
}

/// A number rounded once: by way of float32, to an odd one where it is none.
fn rounded(number: f64) -> f16 {
    let near = number as f32;
    let odd = |bits: u32| f16::from_f32(f32::from_bits(bits | 1));
    let (size, near_size) = (number.abs(), f64::from(near).abs());
    if near_size == size {
        f16::from_f32(near)
    } else if near_size < size {
        odd(near.to_bits())
    } else {
        odd(near.to_bits() - 1)
    }
}

/// What the kernels compute, in float64.
struct Reference {
    /// (places, head_count)
    importance: Vec<f64>,
    norms: Vec<f64>,
    /// (places, head_count_kv)
    scores: Vec<f64>,
}

struct Inputs {
    heads: EvictHeads,
    /// (head_dim, head_count, tokens)
    q: Vec<f16>,
    tokens: usize,
    places: usize,
    softcap: f32,
    /// (head_dim, head_dim, head_count)
    grams: Vec<f16>,
}

impl Inputs {
    fn reference(&self, cached: &Cached) -> Reference {
        let EvictHeads {
            head_dim,
            head_count,
            head_count_kv,
        } = self.heads;
        let (places, group) = (self.places, head_count / head_count_kv);
        let wide = |values: &[f16]| -> Vec<f64> { values.iter().map(|v| v.to_f64()).collect() };
        let [keys, values] = cached.read.each_ref().map(|cache| wide(cache));
        let of_head = |cache: &[f64], head: usize| {
            let plane = head_dim * places;
            cache[head / group * plane..][..plane].to_vec()
        };
        let observers = self.tokens.min(OBSERVERS);
        let heads: Vec<(Vec<f64>, Vec<f64>)> = (0..head_count)
            .into_par_iter()
            .map(|head| {
                let keys = of_head(&keys, head);
                let mut importance = vec![0f64; places];
                for token in self.tokens - observers..self.tokens {
                    let query = wide(&self.q[(token * head_count + head) * head_dim..][..head_dim]);
                    let seen = places - self.tokens + token + 1;
                    let keys = keys.chunks_exact(head_dim).take(seen);
                    let scores: Vec<f64> = keys
                        .map(|key| capped(dot(key, &query), self.softcap.into()))
                        .collect();
                    let top = scores.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - top).exp2()).sum();
                    for (importance, score) in importance.iter_mut().zip(scores) {
                        *importance = importance.max((score - top).exp2() / sum);
                    }
                }
                let gram = wide(&self.grams[head * head_dim * head_dim..][..head_dim * head_dim]);
                let values = of_head(&values, head);
                let norms = values.chunks_exact(head_dim).map(|value| {
                    let rows = gram.chunks_exact(head_dim).zip(value);
                    let square: f64 = rows.map(|(row, x)| x * dot(row, value)).sum();
                    square.max(0.0).sqrt()
                });
                (importance, norms.collect())
            })
            .collect();
        let mut scores = vec![0f64; places * head_count_kv];
        for (head, (importance, norms)) in heads.iter().enumerate() {
            let floor = importance.iter().sum::<f64>() / places as f64;
            let scores = &mut scores[head / group * places..][..places];
            for (place, (score, norm)) in scores.iter_mut().zip(norms).enumerate() {
                *score = score.max(asked(importance, place, floor) * norm);
            }
        }
        let (importance, norms): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
        Reference {
            importance: importance.concat(),
            norms: norms.concat(),
            scores,
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn capped(score: f64, softcap: f64) -> f64 {
    match softcap {
        0.0 => score,
        softcap => softcap * (score / softcap).tanh(),
    }
}

/// Random Gram matrices, (head_dim, head_dim, head_count): positive definite, but of some directions more than of others.
fn grams(random: &mut Random, head_dim: usize, head_count: usize) -> Vec<f16> {
    const ROWS: usize = 16;
    let mut grams = Vec::new();
    for _ in 0..head_count {
        let matrix = floats(random, ROWS * head_dim, (ROWS as f32).sqrt().recip());
        let column = |i: usize| matrix.iter().skip(i).step_by(head_dim);
        for i in 0..head_dim {
            grams.extend((0..head_dim).map(|j| {
                let sum: f32 = column(i).zip(column(j)).map(|(a, b)| a * b).sum();
                f16::from_f32(if i == j { sum + 0.25 } else { sum })
            }));
        }
    }
    grams
}

fn run_all(launches: &[Launch]) -> Result<()> {
    for launch in launches {
        // SAFETY: the launches are those of the caller's buffers, which outlive them.
        unsafe { device()?.launch(launch)? };
    }
    device()?.synchronize()
}

/// The places that scores leave, ascending.
fn select(scores: &[f32], budget: usize) -> Vec<i32> {
    let places = scores.len();
    let last = places - NEWEST;
    let mut ordinary: Vec<usize> = (SINKS..last).collect();
    ordinary.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    ordinary.truncate(budget - MIN_BUDGET);
    let mut kept: Vec<i32> = (0..SINKS)
        .chain(ordinary)
        .chain(last..places)
        .map(|place| place as i32)
        .collect();
    kept.sort_unstable();
    kept
}

/// Part of a scratch that begins at `base`.
fn array(scratch: &[f32], base: u64, at: u64, len: usize) -> &[f32] {
    &scratch[(at - base) as usize / size_of::<f32>()..][..len]
}

fn greatest_error(reference: &[f64], ours: &[f32]) -> f64 {
    assert_eq!(reference.len(), ours.len());
    let errors = reference.iter().zip(ours);
    let errors = errors.map(|(r, &o)| {
        let error = (r - f64::from(o)).abs() / (r.abs() + 1e-6);
        if error.is_nan() { f64::INFINITY } else { error }
    });
    errors.fold(0.0, f64::max)
}

pub fn eviction_keeps_what_observers_look_at() -> TestResult {
    let (mut random, mut findings) = (random(30), Findings::default());
    let mut count = 0;
    for head_dim in HEAD_DIMS {
        for tiles in FORMATS {
            for tokens in [1, 5, 64, 100] {
                count += 1;
                let places = [800, 203, 571, 300, 1025][count % 5];
                let group = [1, 4, 7][count % 3];
                let budget = [69, 130, 200][count / 3 % 3];
                let head_count_kv = 1 + count % 2;
                let heads = EvictHeads {
                    head_dim,
                    head_count: group * head_count_kv,
                    head_count_kv,
                };
                let softcap = if count % 4 == 0 { 2.0 } else { 0.0 };
                let case = format!(
                    "{head_count_kv} x {group} heads of {head_dim}, {}, {tokens} tokens of {places}, budget {budget}, \
                     softcap {softcap}",
                    name(tiles)
                );
                let cached = Cached::new(
                    &mut random,
                    (head_dim, head_count_kv),
                    tiles,
                    places,
                    count % 4,
                )?;
                let scale = query_scale(head_dim) as f32;
                let q = floats(&mut random, head_dim * heads.head_count * tokens, scale);
                let inputs = Inputs {
                    heads,
                    q: q.into_iter().map(f16::from_f32).collect(),
                    tokens,
                    places,
                    softcap,
                    grams: grams(&mut random, head_dim, heads.head_count),
                };
                let (q, gram) = (Buffer::new(&inputs.q)?, Buffer::new(&inputs.grams)?);
                let evict_on_device = || -> Result<(Buffer, Buffer)> {
                    let scratch = launches::evict_scratch_len(heads, places);
                    let scratch = Buffer::poisoned(scratch * size_of::<f32>())?;
                    let kept = Buffer::poisoned(budget * head_count_kv * size_of::<i32>())?;
                    let params = EvictParams {
                        q: q.address(),
                        k_cache: cached.rings[0].address(),
                        v_cache: cached.rings[1].address(),
                        tiles: cached.tiles,
                        grams: gram.address(),
                        kept: kept.address(),
                        tokens: tokens as i32,
                        places: places as i32,
                        context: cached.capacity as i32,
                        group: group as i32,
                        softcap,
                        budget: budget as i32,
                        ..Zeroable::zeroed()
                    };
                    let launches =
                        launches::evict(device()?, heads, tiles, scratch.address(), params)?;
                    run_all(&launches)?;
                    Ok((scratch, kept))
                };
                let (scratch, kept) = evict_on_device()?;
                let base = scratch.address();
                let at = EvictScratch::new(base, heads, places);
                let scratch: Vec<f32> = scratch.read()?;
                let by_head = places * heads.head_count;
                let importance = array(&scratch, base, at.importance, by_head);
                let norms = array(&scratch, base, at.norms, by_head);
                let scores = array(&scratch, base, at.scores, places * head_count_kv);

                let reference = inputs.reference(&cached);
                let error = greatest_error(&reference.importance, importance);
                findings.error("importance", &case, error, 2e-4);
                let error = greatest_error(&reference.norms, norms);
                findings.error("norms", &case, error, 2e-4);
                let error = greatest_error(&reference.scores, scores);
                findings.error("scores", &case, error, 4e-4);

                let kept: Vec<i32> = kept.read()?;
                for (head, kept) in kept.chunks_exact(budget).enumerate() {
                    let of_head = head * places..(head + 1) * places;
                    let expected = select(&scores[of_head.clone()], budget);
                    findings.holds(kept == expected, || {
                        format!("{case}: head {head} keeps {kept:?}, not {expected:?}")
                    });
                    let reference = &reference.scores[of_head];
                    let ordinary = SINKS..places - NEWEST;
                    let (inside, outside): (Vec<usize>, Vec<usize>) = ordinary
                        .partition(|&place| expected.binary_search(&(place as i32)).is_ok());
                    let score = |place: usize| reference[place];
                    let least = inside.into_iter().map(score).fold(f64::MAX, f64::min);
                    let greatest = outside.into_iter().map(score).fold(0.0, f64::max);
                    findings.holds(least >= greatest * (1.0 - 1e-3), || {
                        format!("{case}: head {head} keeps {least}, but not {greatest}")
                    });
                }
                let (scratch_again, kept_again) = evict_on_device()?;
                let scratch_again: Vec<u32> = scratch_again.read()?;
                let same = bytemuck::cast_slice::<f32, u32>(&scratch) == scratch_again
                    && kept == kept_again.read::<i32>()?;
                findings.holds(same, || format!("{case}: other bits the second time"));
            }
        }
    }
    findings.verdict()
}

/// Scores of all kinds, equal ones among them.
pub fn eviction_keeps_the_first_of_equal_scores() -> TestResult {
    type Draw = fn(&mut Random) -> f32;
    let draws: [(&str, Draw); 4] = [
        ("few", |random| random.below(8) as f32 / 64.0),
        ("equal", |_| 0.5),
        ("exponential", |random| {
            (random.centered(20.0) - 30.0).exp2()
        }),
        ("mostly none", |random| {
            let subnormal = f32::from_bits(random.below(1000) as u32);
            if random.below(50) == 0 {
                subnormal
            } else {
                0.0
            }
        }),
    ];
    let (mut random, mut findings) = (random(31), Findings::default());
    let mut count = 0;
    for places in [70, 129, 5003, 40_001] {
        for (draw_name, draw) in draws {
            count += 1;
            let group = [1, 4, 7][count % 3];
            let heads = EvictHeads {
                head_dim: 64,
                head_count: 2 * group,
                head_count_kv: 2,
            };
            let len = launches::evict_scratch_len(heads, places);
            let at = EvictScratch::new(0, heads, places);
            let mut scratch = vec![f32::NAN; len];
            let blocks = (at.scores - at.sums) as usize / size_of::<f32>() / heads.head_count;
            let mut fill = |at: u64, len: usize, draw: &mut dyn FnMut() -> f32| {
                let at = at as usize / size_of::<f32>();
                scratch[at..at + len].fill_with(draw);
                scratch[at..at + len].to_vec()
            };
            let by_head = places * heads.head_count;
            let importance = fill(at.importance, by_head, &mut || draw(&mut random));
            let norms = fill(at.norms, by_head, &mut || 1.0 + random.below(2) as f32);
            // Sums that are exact in any order; in some cases they give no floor.
            let has_floor = count % 2 == 0;
            let sums = fill(at.sums, blocks * heads.head_count, &mut || {
                f32::from(u8::from(has_floor)) * random.below(20) as f32
            });
            let mut scores = vec![0f32; places * heads.head_count_kv];
            for head in 0..heads.head_count {
                let sum: f32 = sums[head * blocks..][..blocks].iter().sum();
                let floor = sum / places as f32;
                let scores = &mut scores[head / group * places..][..places];
                let of_head = head * places..(head + 1) * places;
                let (importance, norms) = (&importance[of_head.clone()], &norms[of_head]);
                for (place, (score, norm)) in scores.iter_mut().zip(norms).enumerate() {
                    *score = score.max(asked(importance, place, floor) * norm);
                }
            }
            for budget in [MIN_BUDGET, (MIN_BUDGET + places) / 2, places - 1] {
                if budget < MIN_BUDGET || budget >= places {
                    continue;
                }
                let case = format!(
                    "{draw_name} scores of 2 x {group} heads, {budget} of {places}, floor {has_floor}"
                );
                let scratch = Buffer::new(&scratch)?;
                let kept = Buffer::poisoned(budget * heads.head_count_kv * size_of::<i32>())?;
                let params = EvictParams {
                    kept: kept.address(),
                    places: places as i32,
                    group: group as i32,
                    budget: budget as i32,
                    ..Zeroable::zeroed()
                };
                let launches = launches::evict(device()?, heads, None, scratch.address(), params)?;
                run_all(&launches[4..])?;
                scratch.read::<f32>()?;
                let kept: Vec<i32> = kept.read()?;
                let heads = kept.chunks_exact(budget).zip(scores.chunks_exact(places));
                for (head, (kept, scores)) in heads.enumerate() {
                    let expected = select(scores, budget);
                    let differs = kept.iter().zip(&expected).position(|(a, b)| a != b);
                    findings.holds(kept == expected, || {
                        format!("{case}: head {head} differs from place {differs:?} on")
                    });
                }
            }
        }
    }
    findings.verdict()
}

/// Ascending places, those among them that are always kept.
fn random_places(random: &mut Random, places: usize, budget: usize) -> Vec<i32> {
    let scores = floats(random, places, 1.0);
    select(&scores, budget)
}

pub fn kept_tokens_are_gathered_in_their_place() -> TestResult {
    let (mut random, mut findings) = (random(32), Findings::default());
    for head_dim in HEAD_DIMS {
        for (places, budget) in [(300, 100), (2501, 1024), (5003, 3001)] {
            let head_count_kv = 2;
            let case = format!("heads of {head_dim}, {budget} of {places}");
            let heads = (head_dim, head_count_kv);
            let cached = Cached::new(&mut random, heads, None, places, 3)?;
            let kept: Vec<i32> = (0..head_count_kv)
                .flat_map(|_| random_places(&mut random, places, budget))
                .collect();
            let kept_buffer = Buffer::new(&kept)?;
            let [k, v] = cached.rings.each_ref().map(Buffer::address);
            let mut expected: [Vec<f16>; 2] = [cached.rings[0].read()?, cached.rings[1].read()?];
            let params = GatherKeptParams {
                k_from: k,
                v_from: v,
                k_to: k,
                v_to: v,
                tiles: cached.tiles,
                kept: kept_buffer.address(),
                context: cached.capacity as i32,
                to_context: cached.capacity as i32,
                budget: budget as i32,
                places: places as i32,
                first: 0,
                count: budget as i32,
            };
            let launch = launches::evict_gather(device()?, head_dim, head_count_kv, None, params)?;
            run_all(&[launch])?;
            for (plane, expected) in expected.iter_mut().enumerate() {
                for (i, &place) in kept.iter().enumerate() {
                    let (head, slot) = (i / budget, i % budget);
                    let token = cached.token(plane, head, places, place as usize);
                    expected[(head * cached.capacity + slot) * head_dim..][..head_dim]
                        .copy_from_slice(token);
                }
                let ours: Vec<f16> = cached.rings[plane].read()?;
                findings.holds(same_bits(&ours, expected), || {
                    format!("{case}: other bits of {}", ["keys", "values"][plane])
                });
            }
        }
    }
    findings.verdict()
}

pub fn kept_tokens_are_gathered_into_a_ring() -> TestResult {
    /// Of the ring, and of what is gathered at a time.
    const CAPACITY: usize = 1664;
    const PIECE: usize = 1280;
    let (mut random, mut findings) = (random(33), Findings::default());
    for head_dim in HEAD_DIMS {
        for tiles in FORMATS {
            for (places, budget) in [(203, 100), (800, 500), (3100, 2700)] {
                let head_count_kv = 2;
                let case = format!("heads of {head_dim}, {}, {budget} of {places}", name(tiles));
                let heads = (head_dim, head_count_kv);
                let cached = Cached::new(&mut random, heads, tiles, places, 0)?;
                let kept: Vec<i32> = (0..head_count_kv)
                    .flat_map(|_| random_places(&mut random, places, budget))
                    .collect();
                let kept_buffer = Buffer::new(&kept)?;
                let len = head_dim * CAPACITY * head_count_kv;
                let rings = [
                    Buffer::poisoned(len * size_of::<f16>())?,
                    Buffer::poisoned(len * size_of::<f16>())?,
                ];
                let mut expected = [(); 2].map(|()| vec![f16::from_bits(0xffff); len]);
                for first in (0..budget).step_by(PIECE) {
                    let count = PIECE.min(budget - first);
                    let params = GatherKeptParams {
                        k_from: cached.rings[0].address(),
                        v_from: cached.rings[1].address(),
                        k_to: rings[0].address(),
                        v_to: rings[1].address(),
                        tiles: cached.tiles,
                        kept: kept_buffer.address(),
                        context: cached.capacity as i32,
                        to_context: CAPACITY as i32,
                        budget: budget as i32,
                        places: places as i32,
                        first: first as i32,
                        count: count as i32,
                    };
                    let launch =
                        launches::evict_gather(device()?, head_dim, head_count_kv, tiles, params)?;
                    run_all(&[launch])?;
                    for (plane, expected) in expected.iter_mut().enumerate() {
                        for head in 0..head_count_kv {
                            for new in first..first + count {
                                let place = kept[head * budget + new] as usize;
                                let token = cached.token(plane, head, places, place);
                                let slot = head * CAPACITY + new % CAPACITY;
                                expected[slot * head_dim..][..head_dim].copy_from_slice(token);
                            }
                        }
                        let ours: Vec<f16> = rings[plane].read()?;
                        findings.holds(same_bits(&ours, expected), || {
                            let plane = ["keys", "values"][plane];
                            format!("{case}: other bits of {plane} from {first} on")
                        });
                    }
                }
            }
        }
    }
    findings.verdict()
}

//! The choice of a token, against the host's sampler: the same token, whatever the logits.

use bytemuck::Zeroable;
use sharpi::{
    cuda::{launches, params::ChooseParams},
    engine::{Sampler, SamplingParams},
};

use crate::{
    common::{
        gguf_writer::Random,
        gpu::{TestResult, check},
    },
    harness::{Buffer, Findings, device, random, run},
};

const VOCABULARIES: [usize; 8] = [1, 5, 64, 1_023, 1_025, 70_000, 151_936, 262_144];

const GREEDY: SamplingParams = SamplingParams {
    temperature: 0.0,
    top_k: 40,
    top_p: 1.0,
    min_p: 0.0,
    repeat_penalty: 1.0,
    repeat_last_n: 0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    seed: 0,
};

/// Of the token whose logits these are, among those that are cached.
const PLACE: i32 = 1;

/// What the device chose and left behind.
struct Chosen {
    token: i32,
    inputs: Vec<i32>,
    counts: Vec<u32>,
}

/// Lets the device choose behind a text.
fn choose(
    params: &SamplingParams,
    logits: &[f32],
    text: &[u32],
    banned: &[u32],
    allowed: Option<&[u32]>,
    uniform: f64,
) -> anyhow::Result<Chosen> {
    let settings = launches::choice_settings(params, banned);
    let counts = launches::choice_counts(&settings, logits.len(), text, banned);
    let mut uniforms = vec![f64::NAN; text.len() + 1];
    uniforms[text.len()] = uniform;
    let mut places: Vec<i32> = text.iter().map(|&token| token as i32).collect();
    places.push(-7);
    let logits_buffer = Buffer::new(logits)?;
    let settings = Buffer::new(&[settings])?;
    let counts = Buffer::new(&counts)?;
    let lists = Buffer::poisoned(launches::choose_lists_len(logits.len()) * 8)?;
    let inputs = Buffer::new(&[0, text.len() as i32 - 1, PLACE])?;
    let uniforms = Buffer::new(&uniforms)?;
    let places = Buffer::new(&places)?;
    let allowed = allowed.map(Buffer::new).transpose()?;
    let params = ChooseParams {
        logits: logits_buffer.address(),
        settings: settings.address(),
        counts: counts.address(),
        lists: lists.address(),
        inputs: inputs.address(),
        uniforms: uniforms.address(),
        text: places.address(),
        allowed: allowed.as_ref().map_or(0, Buffer::address),
        vocabulary: logits.len() as i32,
        ..ChooseParams::zeroed()
    };
    for launch in launches::choose(device()?, params)? {
        // SAFETY: the launch is that of these buffers, which outlive it.
        unsafe { run(&launch)? };
    }
    let places: Vec<i32> = places.read()?;
    Ok(Chosen {
        token: places[text.len()],
        inputs: inputs.read()?,
        counts: counts.read()?,
    })
}

/// Logits of several kinds: spread, with many equals, with the best side by side, and all the same.
fn logits(random: &mut Random, vocab_size: usize, kind: usize) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..vocab_size)
        .map(|i| match kind {
            0 => random.centered(4.0),
            1 => random.centered(3.0).round(),
            2 if i / 90 == vocab_size / 180 => 9.0 + random.centered(1.0),
            2 => random.centered(1.0),
            _ => 0.5,
        })
        .collect();
    if kind == 1 {
        // Equals of which one is written otherwise.
        logits[0] = -0.0;
    }
    logits
}

pub fn the_device_chooses_as_the_host_does() -> TestResult {
    let (mut random, mut findings) = (random(12), Findings::default());
    let mut kept = 0;
    for vocab_size in VOCABULARIES {
        for case in 0..60 {
            let logits = logits(&mut random, vocab_size, case % 4);
            let pick = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
            let mut params = SamplingParams {
                temperature: pick(&mut random, &[0.0, 0.3, 0.7, 1.0, 1.7]),
                top_k: [1, 2, 20, 40, 64][random.below(5)],
                top_p: pick(&mut random, &[1.0, 0.95, 0.5, 0.0]),
                min_p: pick(&mut random, &[0.0, 0.05, 0.4, 1.0]),
                seed: random.u64(),
                ..GREEDY
            };
            if case % 3 == 0 {
                params.repeat_penalty = pick(&mut random, &[1.0, 1.1, 1.3]);
                params.presence_penalty = pick(&mut random, &[0.0, 0.4]);
                params.frequency_penalty = pick(&mut random, &[0.0, 0.3]);
                params.repeat_last_n = [0, 5, 64][random.below(3)];
            }
            // Tokens that would be chosen, so that it matters to have said them.
            let mut best: Vec<u32> = (0..vocab_size as u32).collect();
            best.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            best.truncate(10);
            let text: Vec<u32> = (0..30).map(|_| best[random.below(best.len())]).collect();
            let banned = match case % 5 {
                0 if vocab_size > 4 => vec![best[0], best[2]],
                _ => vec![],
            };
            // At times fewer than there can be candidates, and never none.
            let one_in = [1, 2, 50, 5_000][random.below(4)];
            let may = |random: &mut Random, token| {
                !banned.contains(&token)
                    && (token == best[3.min(vocab_size - 1)] || random.below(one_in) == 0)
            };
            let (mut allowed, mut excluded) = (vec![0; vocab_size.div_ceil(32)], banned.clone());
            for token in 0..vocab_size as u32 {
                match may(&mut random, token) {
                    true => allowed[token as usize / 32] |= 1 << (token % 32),
                    false => excluded.push(token),
                }
            }
            let allowed = (case % 2 == 0).then_some(&allowed[..]);
            let excluded = allowed.map_or(banned.clone(), |_| excluded);
            let uniform = Sampler::new(params.clone(), &text, vec![]).take_uniforms(1)[0];
            let mut sampler = Sampler::new(params.clone(), &text, excluded);
            let expected = sampler.sample(&logits)? as i32;
            let chosen = choose(&params, &logits, &text, &banned, allowed, uniform)?;
            let name = || format!("{vocab_size} tokens, case {case}, {params:?}");
            kept += usize::from(expected as u32 == best[0]);
            findings.holds(chosen.token == expected, || {
                format!("{}: {} for {expected}", name(), chosen.token)
            });
            findings.holds(
                chosen.inputs == [expected, text.len() as i32, PLACE + 1],
                || format!("{}: the next inputs are {:?}", name(), chosen.inputs),
            );
            // What a text one token longer would have been begun with.
            let longer = [&text[..], &[expected as u32]].concat();
            if params.has_penalties() && params.repeat_last_n > 0 {
                let settings = launches::choice_settings(&params, &banned);
                let counts = launches::choice_counts(&settings, vocab_size, &longer, &banned);
                findings.holds(chosen.counts == counts, || format!("{}: counts", name()));
            }
        }
    }
    // Neither always nor never the likeliest, or the cases would show little.
    findings.holds((60..420).contains(&kept), || {
        format!("{kept} of 480 choices are the likeliest token")
    });
    findings.verdict()
}

pub fn logits_that_are_no_numbers_are_reported() -> TestResult {
    let sampled = SamplingParams {
        temperature: 1.0,
        ..GREEDY
    };
    for params in [GREEDY, sampled] {
        for (bad, places) in [
            (f32::NAN, vec![0]),
            (f32::NAN, vec![4_999]),
            (f32::INFINITY, vec![1_024]),
            (f32::NEG_INFINITY, vec![17]),
            (f32::NAN, (0..200_000).collect()),
        ] {
            let mut logits = vec![0.25; 200_000];
            for &place in &places {
                logits[place] = bad;
            }
            let chosen = choose(&params, &logits, &[3], &[], None, 0.5)?;
            check(
                chosen.token == -1 && chosen.inputs == [0, 1, PLACE + 1],
                format!(
                    "{bad} at {} places: {} was chosen",
                    places.len(),
                    chosen.token
                ),
            )?;
        }
    }
    Ok(())
}

//! Which tokens stay where the KV cache has a budget: those to which the last tokens of the prompt attend, and that then say
//! much (`docs/kv-cache.md`, Eviction).

use std::cmp::Reverse;

use super::{
    kv_cache::KvCache,
    workers::{SharedMatrix, Workers},
};
use crate::{
    backend::{KvLayer, KvLayout, NEIGHBORS, NEWEST, SINKS, output_grams},
    model::Decoder,
};

/// What each layer keeps, and what is needed to choose it.
pub struct Eviction {
    /// As [`output_grams`] has them.
    grams: Vec<Option<Vec<f32>>>,
    /// (context_len, query heads): how much each token is asked for by them, and what it is worth to them
    asked: Vec<f32>,
    worth: Vec<f32>,
    context_len: usize,
    /// Of each layer that evicts: places, (tokens, head_count_kv), ascending
    kept: Vec<Vec<u32>>,
    /// (2 * head_dim, tokens): what a head keeps, on its way
    rows: Vec<f32>,
}

/// Of so many tokens in layers that evict, so many stay.
#[derive(Clone, Copy)]
pub struct Cut {
    pub places: usize,
    pub count: usize,
}

impl Eviction {
    /// For caches of up to `context_len` tokens that have a budget, or `None` where there is no memory for it.
    pub fn new(decoder: &Decoder, layout: &KvLayout, context_len: usize) -> Option<Self> {
        let attentions = || decoder.layers.iter().map(|layer| &layer.attention);
        let heads = attentions().map(|attention| attention.head_count).max()?;
        let widest = attentions().map(|attention| attention.head_dim).max()?;
        let most = layout.budget?.min(context_len);
        Some(Self {
            asked: bytemuck::try_zeroed_vec(heads.checked_mul(context_len)?).ok()?,
            worth: bytemuck::try_zeroed_vec(heads * context_len).ok()?,
            rows: bytemuck::try_zeroed_vec(most.checked_mul(2 * widest)?).ok()?,
            kept: vec![Vec::new(); decoder.layers.len()],
            grams: output_grams(decoder, layout),
            context_len,
        })
    }

    /// Whether the layer stores keys and values, and evicts.
    pub fn concerns(&self, layer: usize) -> bool {
        self.grams[layer].is_some()
    }

    /// Chooses which `count` of the first `places` tokens that `cache` has of a layer its heads keep, each for itself. `attend`
    /// calls back with what each of the last queries of a query head gives to the tokens from the first one on.
    pub fn choose<S: Send>(
        &mut self,
        workers: &Workers<S>,
        cache: &KvCache,
        layer: usize,
        Cut { places, count }: Cut,
        attend: impl Fn(usize, &mut S, &mut dyn FnMut(&[f32], f32)) + Sync,
    ) {
        let gram = self.grams[layer].as_ref().expect("a layer that evicts");
        let KvLayer {
            head_dim,
            head_count_kv,
            ..
        } = cache.layout().layers[layer];
        let heads = gram.len() / (head_dim * head_dim);
        let group = heads / head_count_kv;
        let [asked, worth] = [&mut self.asked, &mut self.worth]
            .map(|of_heads| SharedMatrix::new(of_heads, self.context_len));
        workers.run(heads, |head, scratch| {
            // SAFETY: no other task has this head.
            let [asked, worth] = unsafe { [&asked, &worth].map(|m| m.part(head, 0..places)) };
            asked.fill(0.0);
            attend(head, scratch, &mut |weights, scale| {
                for (asked, weight) in asked.iter_mut().zip(weights) {
                    *asked = asked.max(weight * scale);
                }
            });
            let floor = asked.iter().sum::<f32>() / places as f32;
            let gram = &gram[head * head_dim * head_dim..][..head_dim * head_dim];
            let mut worth = worth.iter_mut().enumerate();
            cache.for_each_value(layer, head / group, places, |value| {
                let (place, worth) = worth.next().expect("as many as values");
                let near = place.saturating_sub(NEIGHBORS)..places.min(place + NEIGHBORS + 1);
                let most = asked[near].iter().copied().fold(floor, f32::max);
                *worth = most * contribution(gram, value);
            });
        });
        let kept = &mut self.kept[layer];
        kept.clear();
        for heads in self
            .worth
            .chunks_exact(self.context_len * group)
            .take(head_count_kv)
        {
            let worth = |place: usize| {
                let of_heads = heads.iter().skip(place).step_by(self.context_len);
                of_heads.fold(0.0, |most: f32, &worth| most.max(worth))
            };
            keep_most(places, count, worth, kept);
        }
    }

    /// Brings what every layer keeps of the tokens before `position` together in `cache`.
    pub fn evict(&mut self, cache: &mut KvCache, position: usize, Cut { places, count }: Cut) {
        for (layer, kept) in self.kept.iter().enumerate() {
            if self.grams[layer].is_some() {
                cache.keep(layer, places, kept, &mut self.rows);
            }
        }
        cache.evict(position, count);
    }
}

/// The length of what a value adds to the residual stream.
fn contribution(gram: &[f32], value: &[f32]) -> f32 {
    let products = gram.chunks_exact(value.len()).zip(value).map(|(row, x)| {
        let products = row.iter().zip(value).map(|(a, b)| a * b);
        x * products.sum::<f32>()
    });
    products.sum::<f32>().max(0.0).sqrt()
}

/// Appends to `kept` the places of the first tokens, the last, and of the others those that are worth most, `count` in all,
/// ascending. Of equals the first stay.
fn keep_most(places: usize, count: usize, worth: impl Fn(usize) -> f32, kept: &mut Vec<u32>) {
    let start = kept.len();
    let mut others: Vec<(Reverse<u32>, usize)> = (SINKS..places - NEWEST)
        // Numbers that are not negative order as their bits do.
        .map(|place| (Reverse(worth(place).to_bits()), place))
        .collect();
    let chosen = count - SINKS - NEWEST;
    if chosen < others.len() {
        others.select_nth_unstable(chosen);
    }
    kept.extend(0..SINKS as u32);
    kept.extend(others[..chosen].iter().map(|&(_, place)| place as u32));
    kept[start..].sort_unstable();
    kept.extend((places - NEWEST) as u32..places as u32);
}

//! What both backends take for evicting tokens of a KV cache (`docs/kv-cache.md`, Eviction).

use std::{
    num::NonZero,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use super::{KvLayout, SINKS};
use crate::{
    model::{Decoder, Tensor, decoder::Layer},
    quant::kv_tile::rotate,
};

/// The last tokens of a prompt always stay, and what they attend to says which others do.
pub const NEWEST: usize = 64;

/// What is found is to be read on: a token is asked for as much as the one that is asked for most among those up to so many places
/// before and behind it.
pub const NEIGHBORS: usize = 7;

/// Of a budget: what always stays.
pub const MIN_BUDGET: usize = SINKS + NEWEST;

/// For each layer that stores and evicts, of each query head h the products `W_h^T W_h`, (head_dim, head_dim, head_count), where
/// W_h is what the output matrix multiplies its values with: `v^T W_h^T W_h v` is the square of what a value v adds to the
/// residual stream. Where the layer's values are cached rotated, so are these.
pub fn output_grams(decoder: &Decoder, layout: &KvLayout) -> Vec<Option<Vec<f32>>> {
    let gram = |index: usize| {
        let layer = &layout.layers[index];
        let evicts = layer.owner == index && layer.evicts;
        evicts.then(|| output_gram(&decoder.layers[index], layer.tiles.is_some()))
    };
    // Each takes the next layer when it is free.
    let next = AtomicUsize::new(0);
    let take_layers = || {
        let layers = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)));
        let layers = layers.take_while(|&index| index < decoder.layers.len());
        layers.map(|index| (index, gram(index))).collect::<Vec<_>>()
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let mut grams = vec![None; decoder.layers.len()];
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take_layers)).collect();
        let mut done = take_layers();
        for other in others {
            // A thread that panicked goes on to do so here.
            done.extend(
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        for (index, gram) in done {
            grams[index] = gram;
        }
    });
    grams
}

fn output_gram(layer: &Layer, rotated: bool) -> Vec<f32> {
    let dim = layer.attention.head_dim;
    let output: &Tensor = &layer.attention.output.weights;
    let mut grams = vec![0.0; dim * output.row_len()];
    let mut row = vec![0.0; output.row_len()];
    for bytes in output.bytes().chunks_exact(output.row_bytes()) {
        output.tensor_type().dequantize(bytes, &mut row);
        for (head, gram) in row
            .chunks_exact_mut(dim)
            .zip(grams.chunks_exact_mut(dim * dim))
        {
            if rotated {
                rotate(head);
            }
            // The lower half.
            for (i, sums) in gram.chunks_exact_mut(dim).enumerate() {
                let factor = head[i];
                for (sum, x) in sums[..=i].iter_mut().zip(&*head) {
                    *sum += factor * x;
                }
            }
        }
    }
    for gram in grams.chunks_exact_mut(dim * dim) {
        for i in 0..dim {
            for j in i + 1..dim {
                gram[i * dim + j] = gram[j * dim + i];
            }
        }
    }
    grams
}

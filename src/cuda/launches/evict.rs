//! Which tokens of a layer stay where the KV cache has a budget, and bringing these together.

use anyhow::Result;
use cudarc::driver::sys::CUdeviceptr;

use super::{WARP, dependent, for_head_dim};
use crate::{
    backend::{MIN_BUDGET, NEIGHBORS, NEWEST, Tiles},
    cuda::{
        device::{Device, Function, Launch, Parameter},
        params::{EvictParams, GatherKeptParams},
    },
};

/// `OBSERVERS` of `kernels/evict.cuh`.
const OBSERVERS: usize = 64;
// As is `RECENT` of `kernels/evict.cu`, whose `NEIGHBORS` is that of the host.
const _: () = assert!(NEWEST == OBSERVERS && NEIGHBORS == 7);

/// Threads of a block of all these kernels but two.
const THREADS: usize = 256;

/// The heads of a layer.
#[derive(Clone, Copy)]
pub struct EvictHeads {
    pub head_dim: usize,
    pub head_count: usize,
    pub head_count_kv: usize,
}

impl EvictHeads {
    /// Blocks that `places` are cut into: `Shape::block_places` of `kernels/evict.cuh`.
    fn blocks(self, places: usize) -> usize {
        let fragments = if self.head_dim <= 128 { 2 } else { 1 };
        places.div_ceil(THREADS / WARP * 16 * fragments)
    }
}

/// Where what is computed of a layer lies between its kernels: f32 arrays.
#[derive(Clone, Copy)]
pub struct EvictScratch {
    /// (2, observers, head_count, blocks)
    pub partial: CUdeviceptr,
    /// (observers, head_count)
    pub levels: CUdeviceptr,
    /// (places, head_count)
    pub importance: CUdeviceptr,
    /// (places, head_count)
    pub norms: CUdeviceptr,
    /// (blocks, head_count)
    pub sums: CUdeviceptr,
    /// (places, head_count_kv)
    pub scores: CUdeviceptr,
}

impl EvictScratch {
    /// That of a layer with so many places, in [`evict_scratch_len`] values from `base` on.
    pub fn new(base: CUdeviceptr, heads: EvictHeads, places: usize) -> Self {
        let mut next = base;
        let [partial, levels, importance, norms, sums, scores] =
            scratch_lens(heads, places).map(|len| {
                let array = next;
                next += (len * size_of::<f32>()) as u64;
                array
            });
        Self {
            partial,
            levels,
            importance,
            norms,
            sums,
            scores,
        }
    }
}

/// f32 values that a layer of `places` places, or fewer, takes as scratch. Layers may share them.
pub fn evict_scratch_len(heads: EvictHeads, places: usize) -> usize {
    scratch_lens(heads, places).iter().sum()
}

/// Of each array, so many that the next begins at 16 bytes.
fn scratch_lens(heads: EvictHeads, places: usize) -> [usize; 6] {
    let (head_count, blocks) = (heads.head_count, heads.blocks(places));
    [
        2 * OBSERVERS * head_count * blocks,
        OBSERVERS * head_count,
        places * head_count,
        places * head_count,
        blocks * head_count,
        places * heads.head_count_kv,
    ]
    .map(|len| len.next_multiple_of(4))
}

/// The places of each key/value head that stay behind a chunk, from its queries and all that is cached. `scratch` has
/// [`evict_scratch_len`] values; `params` need not say where in it what lies.
///
/// # Panics
/// A budget below [`MIN_BUDGET`], or one that all places fit into.
pub fn evict(
    device: &Device,
    heads: EvictHeads,
    tiles: Option<Tiles>,
    scratch: CUdeviceptr,
    params: EvictParams,
) -> Result<[Launch; 5]> {
    let (budget, places) = (params.budget as usize, params.places as usize);
    assert!((MIN_BUDGET..places).contains(&budget));
    let blocks = heads.blocks(places);
    let scratch = EvictScratch::new(scratch, heads, places);
    let params = EvictParams {
        partial: scratch.partial,
        levels: scratch.levels,
        importance: scratch.importance,
        norms: scratch.norms,
        sums: scratch.sums,
        scores: scratch.scores,
        blocks: blocks as i32,
        ..params
    };
    let over_places = |kernel| -> Result<Launch> {
        let function = of_format(device, kernel, heads.head_dim, tiles)?;
        let grid = [blocks, heads.head_count_kv, 1];
        Ok(dependent(function, grid, THREADS, Parameter::new(params)))
    };
    let over_heads = |kernel, count, threads| -> Result<Launch> {
        let function = device.function("evict", kernel)?;
        let grid = [count, 1, 1];
        Ok(dependent(function, grid, threads, Parameter::new(params)))
    };
    Ok([
        over_places("evict_observe")?,
        over_heads("evict_join", heads.head_count, THREADS)?,
        over_places("evict_weigh")?,
        over_places("evict_norms")?,
        over_heads("evict_select", heads.head_count_kv, 1024)?,
    ])
}

/// Kept tokens, from a layer's cache to a ring of tokens as they are then stored.
pub fn evict_gather(
    device: &Device,
    head_dim: usize,
    head_count_kv: usize,
    tiles: Option<Tiles>,
    params: GatherKeptParams,
) -> Result<Launch> {
    /// Of a block.
    const THREADS: usize = 512;
    /// Channels of a block.
    const CHANNELS: usize = 32;
    let function = of_format(device, "evict_gather", head_dim, tiles)?;
    // What a block copies at once.
    let places = match tiles {
        None => 1024,
        Some(_) => 256,
    };
    let in_place = params.k_from == params.k_to;
    let blocks = match in_place {
        true => 1,
        false => (params.count as usize).div_ceil(places),
    };
    let grid = [head_count_kv, 2 * head_dim / CHANNELS, blocks];
    Ok(dependent(function, grid, THREADS, Parameter::new(params)))
}

/// The kernel for heads of a size in a cache of a format.
fn of_format(
    device: &Device,
    kernel: &str,
    head_dim: usize,
    tiles: Option<Tiles>,
) -> Result<Function> {
    let name = for_head_dim(kernel, head_dim)?;
    match tiles {
        None => device.function("evict", &name),
        Some(tiles) => device.function("evict_tiles", &format!("{name}_{tiles}")),
    }
}

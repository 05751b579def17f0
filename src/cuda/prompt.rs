//! Reading a chunk of a prompt: a decoder's operations lowered to the launches between the tokens' ids and the KV cache, and
//! the logits where they are wanted. What the cache holds afterwards is what decoding the same tokens one by one leaves there,
//! up to the rounding of float16 activations here and of 8-bit ones there.

use anyhow::Result;
use bytemuck::Zeroable;
use cudarc::driver::sys::CUdeviceptr;

use super::{
    decode::{branch_sum, finishing, key_value_addresses, token_inputs_params},
    device::{Device, Launch},
    eviction::Eviction,
    kv_cache::KvCache,
    launches::{
        Chunk, Epilogue, GATE_SCALE, Gate, Linear, add_branch_tokens, embed_tokens,
        flash_attention, float_to_half, gate_tokens, gemm, norm_tokens, rope_tokens, token_inputs,
    },
    lowering::{Branch, Group, Heads, groups, norms_branches},
    params::{FlashAttentionParams, NormParams, RopeParams},
    scratch::{ChunkScratch, Scratch, Whereabouts},
    tensor_types::{COPY_TYPE, KernelType},
    weights::{DeviceWeights, Matrix},
};
use crate::{
    backend::Want,
    model::{
        Decoder,
        decoder::{Activation, RopeStyle},
        ops::{Op, Var},
    },
    quant::TensorType,
};

/// What a chunk is computed with.
pub struct Prompt<'a> {
    pub device: &'a Device,
    pub decoder: &'a Decoder,
    pub weights: &'a DeviceWeights,
    pub decode: &'a Scratch,
    pub scratch: &'a ChunkScratch,
    pub cache: &'a KvCache,
    /// Tokens that layers that evict have lost.
    pub evicted: usize,
    /// Where some are to be evicted behind the chunk: how many stay.
    pub eviction: Option<(&'a Eviction, usize)>,
}

/// Where launches go, one after another: they start while the next are still being put together.
type Queue<'a> = &'a mut dyn FnMut(Launch) -> Result<()>;

/// The tokens of a chunk that count, from one on to the last.
#[derive(Clone, Copy)]
struct Counted {
    chunk: Chunk,
    /// The first one's index in the whole chunk.
    first: usize,
    /// Where that one is.
    at: Whereabouts,
}

impl Counted {
    /// Where what they have begins in `all`, f32 (len, tokens of the whole chunk).
    fn part_of(&self, all: CUdeviceptr, len: usize) -> CUdeviceptr {
        all + (self.first * len * size_of::<f32>()) as u64
    }
}

impl Prompt<'_> {
    /// Hands `launch` every launch for `chunk.tokens` tokens, the first of which is at `position`. Their ids, and where the
    /// first one is and the first one wanted, lie in device memory.
    ///
    /// # Errors
    /// Operations for which there is no launch, and what `launch` meets.
    pub fn run(&self, chunk: Chunk, position: usize, want: Want, launch: Queue) -> Result<()> {
        let Self {
            device,
            decoder,
            weights,
            scratch,
            ..
        } = self;
        let end = position + chunk.tokens;
        let mut counted = Counted {
            chunk,
            first: 0,
            at: self.decode.whereabouts(),
        };
        for group in groups(decoder)? {
            match group {
                Group::Embed { table, scale } => {
                    let table = weights.matrix(table);
                    let (tokens, x) = (scratch.tokens, scratch.hidden);
                    launch(embed_tokens(device, table, scale, tokens, x, chunk)?)?;
                }
                Group::TokenInputs(inputs) => {
                    self.read_as_it_is(launch, inputs.norm.epsilon, counted)?;
                    let product = weights.product(inputs.projection, scratch.token_inputs);
                    self.store(launch, &[product], scratch.normed, chunk)?;
                    let params = token_inputs_params(
                        &inputs,
                        weights,
                        scratch.tokens,
                        scratch.token_inputs,
                        scratch.rms,
                    )?;
                    let layers = decoder.layers.len();
                    launch(token_inputs(device, layers, params, chunk)?)?;
                }
                Group::Norm(norm) => {
                    let weight = weights.vector(Some(&norm.weight));
                    self.norm(launch, weight, 0, norm.epsilon, counted)?;
                }
                Group::Attention { q, kv, heads } => {
                    let qkv = weights.qkv(q, kv.as_ref(), [scratch.q, scratch.k, scratch.v]);
                    self.store(launch, &qkv, scratch.normed, counted.chunk)?;
                    self.attention(launch, &heads, &qkv[1..], counted, end)?;
                }
                Group::Gate {
                    gate,
                    up,
                    activation,
                } => {
                    let (gate, up) = (weights.matrix(gate), weights.matrix(up));
                    self.gate(launch, gate, up, activation, counted.chunk)?;
                }
                Group::GateInputs {
                    gate,
                    part,
                    activation,
                } => {
                    // Any epsilon will do: what is divided by is multiplied with again.
                    self.read_as_it_is(launch, 1e-6, counted)?;
                    let product = weights.product(gate, scratch.gate);
                    self.store(launch, &[product], scratch.normed, counted.chunk)?;
                    let all = part.len() * decoder.layers.len();
                    let up = counted.part_of(scratch.token_inputs, all);
                    let gate = Gate {
                        gate: scratch.gate,
                        up: up + (part.start * size_of::<f32>()) as u64,
                        up_stride: all,
                        rms: scratch.rms,
                        columns: part.len(),
                        activation,
                    };
                    launch(gate_tokens(device, gate, scratch.gated, counted.chunk)?)?;
                }
                Group::AddAttended(branch) => {
                    self.add(launch, &branch, scratch.attended, 1.0, counted)?;
                }
                Group::AddGated(branch) => {
                    self.add(launch, &branch, scratch.gated, GATE_SCALE, counted)?;
                }
                Group::Select => {
                    let first = match want {
                        Want::Nothing => return Ok(()),
                        Want::Last => chunk.tokens - 1,
                        Want::All => 0,
                    };
                    counted = Counted {
                        chunk: Chunk {
                            tokens: chunk.tokens - first,
                        },
                        first,
                        at: self.decode.wanted_whereabouts(),
                    };
                }
                Group::Logits { linear, finish } => {
                    let logits = weights.linear(linear, self.decode.logits);
                    self.store(launch, &[logits], scratch.normed, counted.chunk)?;
                    let finish = finishing(device, weights, &finish, logits, counted.chunk)?;
                    finish.into_iter().try_for_each(&mut *launch)?;
                }
            }
        }
        Ok(())
    }

    /// The residual stream's norm as products read it. `rms` gets what was divided by, where it is not 0.
    fn norm(
        &self,
        launch: Queue,
        weight: CUdeviceptr,
        rms: CUdeviceptr,
        epsilon: f32,
        counted: Counted,
    ) -> Result<()> {
        let columns = self.decoder.hidden_size;
        let params = NormParams {
            x: counted.part_of(self.scratch.hidden, columns),
            weight,
            out: self.scratch.normed,
            rms,
            epsilon,
            columns: columns as i32,
            ..NormParams::zeroed()
        };
        launch(norm_tokens(self.device, params, counted.chunk)?)
    }

    /// The residual stream for a product without a norm in front: divided by its root mean square, with which the product is
    /// to be multiplied, since float16 might not hold it.
    fn read_as_it_is(&self, launch: Queue, epsilon: f32, counted: Counted) -> Result<()> {
        self.norm(launch, 0, self.scratch.rms, epsilon, counted)
    }

    /// One layer's attention behind its products, of which `kv` are those of keys and values.
    fn attention(
        &self,
        launch: Queue,
        heads: &Heads,
        kv: &[Linear],
        counted: Counted,
        end: usize,
    ) -> Result<()> {
        let Self {
            device,
            weights,
            scratch,
            cache,
            ..
        } = self;
        let layer = &cache.layout().layers[heads.layer];
        let attention = heads.attention;
        let (head_dim, head_count_kv) = (attention.head_dim, attention.head_count_kv);
        let Counted { chunk, at, .. } = counted;
        let place = at.place_in(layer);
        let [k, v] = key_value_addresses(kv);
        let kept = cache.kept(heads.layer);
        let here = cache.chunk(heads.layer);
        if kept.is_some() && heads.stores {
            launch(cache.bring(device, heads.layer, place)?)?;
        }
        let rope = RopeParams {
            q: scratch.q,
            k,
            v,
            q_norm: weights.vector(heads.q_norm),
            k_norm: weights.vector(heads.k_norm),
            v_norm: weights.vector(heads.v_norm),
            frequencies: weights.frequencies(heads.rope),
            q_out: scratch.rotated_q,
            k_cache: here.keys,
            v_cache: here.values,
            position: at.position,
            place,
            epsilon: heads.epsilon,
            context: here.capacity as i32,
            head_count: attention.head_count as i32,
            head_count_kv: head_count_kv as i32,
            rope_dims: heads.rope.dimensions as i32,
            interleaved: i32::from(heads.rope.style == RopeStyle::Interleaved),
            scale: heads.exponent_scale(),
            rope_factor: heads.rope.rotation_factor(head_dim),
            stores: i32::from(heads.stores),
            compressed: i32::from(kept.is_some()),
        };
        launch(rope_tokens(device, head_dim, rope, chunk)?)?;
        if kept.is_some() && heads.stores {
            // Its last tokens see tiles that its first ones end.
            launch(cache.make_tiles(device, heads.layer, place, chunk.tokens)?)?;
            launch(cache.keep_newest(device, heads.layer, place, chunk.tokens)?)?;
        }
        let params = FlashAttentionParams {
            q: scratch.rotated_q,
            k_cache: here.keys,
            v_cache: here.values,
            out: scratch.attended,
            place,
            partial: scratch.attention_workspace.partial,
            finished: scratch.attention_workspace.finished,
            tokens: chunk.tokens as i32,
            padded_tokens: chunk.padded() as i32,
            context: here.capacity as i32,
            group: attention.group() as i32,
            window: attention.window.unwrap_or(0) as i32,
            softcap: heads.exponent_softcap(),
            tiles: cache.tiles(heads.layer),
            tile_ring: 0,
            tile_depth: 0,
        };
        launch(flash_attention(
            device,
            head_dim,
            head_count_kv,
            layer.place(end, self.evicted),
            kept,
            params,
        )?)?;
        if let Some((eviction, count)) = self.eviction {
            let end = layer.place(end, self.evicted);
            let queries = scratch.rotated_q;
            let choose = eviction.choose(cache, heads, queries, chunk, end, count)?;
            choose.into_iter().try_for_each(&mut *launch)?;
        }
        Ok(())
    }

    /// `out = W x + bias` of each product, as few launches as their types allow.
    fn store(
        &self,
        launch: Queue,
        products: &[Linear],
        x: CUdeviceptr,
        chunk: Chunk,
    ) -> Result<()> {
        let together = |a: &Linear, b: &Linear| {
            a.weights.tensor_type == b.weights.tensor_type && !needs_copy(a.weights.tensor_type)
        };
        for products in products.chunk_by(together) {
            let products: Vec<Linear> = products
                .iter()
                .map(|product| {
                    let weights = self.multipliable(launch, product.weights)?;
                    Ok(Linear {
                        weights,
                        ..*product
                    })
                })
                .collect::<Result<_>>()?;
            self.gemm(launch, &products, x, Epilogue::Store, chunk)?;
        }
        Ok(())
    }

    /// Adds a branch, the product of `factor * x`, to the residual stream.
    fn add(
        &self,
        launch: Queue,
        branch: &Branch,
        x: CUdeviceptr,
        factor: f32,
        counted: Counted,
    ) -> Result<()> {
        let Self {
            device, scratch, ..
        } = self;
        let (columns, chunk) = (self.decoder.hidden_size, counted.chunk);
        let hidden = counted.part_of(scratch.hidden, columns);
        if !branch.is_plain() {
            let product = self.weights.product(branch.matrix, scratch.branch);
            self.store(launch, &[product], x, chunk)?;
            let sum = branch_sum(branch, self.weights);
            return launch(add_branch_tokens(
                device,
                hidden,
                scratch.branch,
                factor,
                sum,
                columns,
                chunk,
            )?);
        }
        let product = Linear {
            weights: self.multipliable(launch, self.weights.matrix(branch.matrix))?,
            bias: 0,
            out: hidden,
        };
        self.gemm(launch, &[product], x, Epilogue::Add { factor }, chunk)
    }

    /// The first half of the feed-forward.
    fn gate(
        &self,
        launch: Queue,
        gate: Matrix,
        up: Matrix,
        activation: Activation,
        chunk: Chunk,
    ) -> Result<()> {
        let scratch = self.scratch;
        let products = [(gate, scratch.gate), (up, scratch.up)].map(|(weights, out)| Linear {
            weights,
            bias: 0,
            out,
        });
        if are_one_product(gate.tensor_type, up.tensor_type) {
            let epilogue = Epilogue::Gate { activation };
            return self.gemm(launch, &products, scratch.normed, epilogue, chunk);
        }
        self.store(launch, &products, scratch.normed, chunk)?;
        let gate = Gate {
            gate: scratch.gate,
            up: scratch.up,
            up_stride: gate.rows,
            rms: 0,
            columns: gate.rows,
            activation,
        };
        launch(gate_tokens(self.device, gate, scratch.gated, chunk)?)
    }

    fn gemm(
        &self,
        launch: Queue,
        products: &[Linear],
        x: CUdeviceptr,
        epilogue: Epilogue,
        chunk: Chunk,
    ) -> Result<()> {
        let Self {
            device, scratch, ..
        } = self;
        let workspace = scratch.gemm_workspace;
        let mut product = gemm(
            device,
            products,
            x,
            scratch.gated,
            epilogue,
            workspace,
            chunk,
        )?;
        // A product fetches weights before it waits for the kernel before it, which must not be the one that writes them.
        product.dependent = products
            .iter()
            .all(|product| product.weights.address != scratch.half_weights);
        launch(product)
    }

    /// The matrix itself, or a float16 copy where its type has no kernel.
    fn multipliable(&self, launch: Queue, weights: Matrix) -> Result<Matrix> {
        if !needs_copy(weights.tensor_type) {
            return Ok(weights);
        }
        let address = self.scratch.half_weights;
        launch(float_to_half(self.device, weights, address)?)?;
        Ok(Matrix {
            address,
            tensor_type: COPY_TYPE,
            ..weights
        })
    }
}

/// Whether the gate and up matrices of some layer are two products.
pub fn has_separate_gate(decoder: &Decoder) -> bool {
    decoder.layers.iter().any(|layer| {
        let [gate, up] = [&layer.feed_forward.gate, &layer.feed_forward.up];
        !are_one_product(gate.weights.tensor_type(), up.weights.tensor_type())
    })
}

/// Whether any branch is normalized or scaled before it is added.
pub fn has_branch_sums(decoder: &Decoder) -> bool {
    let scales = |op: &Op| matches!(op, Op::Scale { x: Var::Hidden, .. });
    norms_branches(decoder) || decoder.ops.iter().any(scales)
}

/// Bytes of the largest float16 copy that the model needs.
pub fn half_weights_bytes(decoder: &Decoder) -> Result<usize> {
    let copy = KernelType::of(COPY_TYPE)?;
    let copied = decoder
        .ops
        .iter()
        .filter_map(Op::weights)
        .filter(|matrix| needs_copy(matrix.tensor_type()))
        .map(|matrix| copy.matrix_bytes(matrix.rows(), matrix.row_len()));
    Ok(copied.max().unwrap_or(0))
}

fn are_one_product(gate: TensorType, up: TensorType) -> bool {
    gate == up && !needs_copy(gate)
}

fn needs_copy(tensor_type: TensorType) -> bool {
    KernelType::of(tensor_type).is_ok_and(KernelType::needs_copy)
}

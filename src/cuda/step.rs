//! The decode region as one kernel: a decoder lowered to the stages that `kernels/step.cu` follows. What
//! [`decode`](super::decode) makes separate launches of, it computes to the same bits.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use cudarc::driver::sys::CUdeviceptr;

use super::{
    decode::{attention_layer, branch_sum, finishing, inputs_of_token, norm_behind},
    device::{Device, Launch, PinnedBuffer},
    kv_cache::KvCache,
    launches::{Chunk, STEP_STAGE_BYTES, StepLinear, StepStage, embed_token, step},
    lowering::{Group, KeyValueProducts, norms_branches, token_groups},
    params::{HEAD_KINDS, StepParams},
    scratch::{Scratch, StepScratch},
    weights::DeviceWeights,
};
use crate::{
    backend::Tiles,
    model::{
        Decoder,
        decoder::{Attention, Linear},
    },
};

/// The step kernel, ready to be launched.
pub struct Step {
    /// What the kernel takes of the token itself, the kernel, and what becomes of its logits.
    pub launches: Vec<Launch>,
    /// u64: where a block that waited in vain leaves its stage (from 1 on) and itself; see `kernels/step/packet.cuh`
    failure: PinnedBuffer,
    /// Of the stages, as messages name them.
    names: Vec<String>,
    /// Owns what the launch names.
    _scratch: StepScratch,
}

/// Bytes of weights of a block's share of a stage from which the step kernel is the faster way (docs/performance.md).
const FASTER_FROM: usize = 160_000;

impl Step {
    /// Lowers a decoder, and writes its stages to the device.
    ///
    /// # Errors
    /// What the kernel does not do, or the device cannot.
    pub fn new(
        device: &Arc<Device>,
        decoder: &Decoder,
        weights: &DeviceWeights,
        scratch: &Scratch,
        cache: &KvCache,
    ) -> Result<Self> {
        let step_scratch = StepScratch::new(device, decoder)?;
        let Lowered {
            before,
            attentions,
            tiles,
            names,
            stages,
            behind,
        } = lower(device, decoder, weights, scratch, cache, &step_scratch)?;
        let failure = device.allocate_pinned(size_of::<u64>())?;
        let params = StepParams {
            inputs: scratch.inputs,
            logits: scratch.logits,
            failure: failure.device_address(),
            ..step_scratch.params()
        };
        let (launch, stages) = step(device, &attentions, tiles.flatten(), &stages, params)?;
        step_scratch.upload_stages(bytemuck::cast_slice(&stages))?;
        Ok(Self {
            launches: before.into_iter().chain([launch]).chain(behind).collect(),
            failure,
            names,
            _scratch: step_scratch,
        })
    }

    /// What a block waited for in vain, if one did: then all that was queued has failed.
    pub fn failure(&self) -> Option<String> {
        let record = u64::from_le_bytes(self.failure[..].try_into().expect("it has eight bytes"));
        let (stage, block) = ((record >> 32) as usize, record as u32);
        let name = self.names.get(stage.checked_sub(1)?)?;
        Some(format!(
            "block {block} of the step kernel waited in vain for what {name} needs: another block was lost \
             (--no-step-kernel computes tokens by separate kernels)"
        ))
    }
}

/// Why separate kernels are faster, if they are: between two stages of the step kernel the memory idles for longer than it
/// takes to read what the ring holds, and for twice as long where a branch is normed.
pub fn slower(device: &Device, decoder: &Decoder) -> Option<String> {
    if norms_branches(decoder) {
        let reason = "its layers norm what they add, and there separate kernels are faster";
        return Some(reason.to_owned());
    }
    let stage_bytes = decoder.bytes_per_token() as usize / stage_count(device, decoder);
    (stage_bytes < FASTER_FROM).then(|| {
        format!(
            "its stages have {} kB of weights a multiprocessor, and below {} kB separate kernels are faster",
            stage_bytes / 1000,
            FASTER_FROM / 1000
        )
    })
}

/// Bytes of the stages of a decoder.
pub fn stages_bytes(device: &Device, decoder: &Decoder) -> usize {
    stage_count(device, decoder) * STEP_STAGE_BYTES
}

/// Stages of all blocks.
fn stage_count(device: &Device, decoder: &Decoder) -> usize {
    // Of each layer: queries, keys and values; attention; its output; gate and up; down; what the token gives to it, gated and
    // projected. Of the model: embedding, logits.
    let layers = decoder.layers.iter();
    let of_layers = layers.map(|layer| 5 + 2 * usize::from(layer.token_input.is_some()));
    (of_layers.sum::<usize>() + 2) * device.multiprocessors()
}

/// What a decoder is lowered to.
#[derive(Default)]
struct Lowered<'a> {
    /// Launches before the kernel, and behind it.
    before: Vec<Launch>,
    behind: Vec<Launch>,
    /// A layer of each kind of heads.
    attentions: Vec<&'a Attention>,
    /// How the layers so far keep tokens that are far behind.
    tiles: Option<Option<Tiles>>,
    /// What messages call the stages.
    names: Vec<String>,
    stages: Vec<StepStage>,
}

fn lower<'a>(
    device: &Device,
    decoder: &'a Decoder,
    weights: &DeviceWeights,
    scratch: &Scratch,
    cache: &KvCache,
    step_scratch: &StepScratch,
) -> Result<Lowered<'a>> {
    let linear = |linear: &Linear| StepLinear {
        weights: weights.matrix(&linear.weights),
        bias: weights.vector(linear.bias.as_ref()),
    };
    let groups = token_groups(decoder)?;
    let mut lowered = Lowered::default();
    // Of the norm that made what is read.
    let mut epsilon = 0.0;
    for (i, group) in groups.iter().enumerate() {
        // What is launched before the kernel writes nothing for a norm.
        let mut behind = groups[i + 1..].iter();
        let next = behind.find(|next| !matches!(next, Group::TokenInputs(_)));
        let norm = || norm_behind(next, weights);
        match group {
            Group::Embed { table, scale } => {
                let stage = StepStage::Embed {
                    table: weights.matrix(table),
                    factor: *scale,
                    norm: norm()?,
                };
                lowered.push(table.name(), stage);
                if let Some(Group::TokenInputs(inputs)) = groups.get(i + 1) {
                    let (x, normed) = (scratch.hidden, scratch.normed);
                    let (table, token) = (weights.matrix(table), scratch.inputs);
                    let embed = embed_token(device, table, *scale, token, x, 0, normed)?;
                    lowered.before.push(embed);
                    let launches = inputs_of_token(device, decoder, weights, scratch, inputs)?;
                    lowered.before.extend(launches);
                }
            }
            Group::TokenInputs(_) | Group::Select => {}
            Group::Norm(norm) => epsilon = norm.epsilon,
            Group::Attention { q, kv, heads } => {
                ensure!(
                    heads.attention.softcap.is_none(),
                    "layer {} caps scores",
                    heads.layer
                );
                let evicts = cache.layout().layers[heads.layer].evicts;
                ensure!(
                    evicts == heads.attention.window.is_none(),
                    "layer {} shares keys and values with layers of another window",
                    heads.layer
                );
                let mut matrices = vec![linear(q)];
                if let Some(KeyValueProducts { k, v }) = kv {
                    matrices.push(linear(k));
                    matrices.extend(v.map(linear));
                }
                let stage = StepStage::Qkv { matrices, epsilon };
                lowered.push(q.weights.name(), stage);
                let kept = cache.kept(heads.layer);
                ensure!(
                    *lowered.tiles.get_or_insert(kept) == kept,
                    "some layers keep tokens in tiles, and others do not"
                );
                let layer = attention_layer(weights, cache, heads);
                let newest = match heads.stores {
                    true => None,
                    false => Some(lowered.share(layer.k_cache, step_scratch)?),
                };
                let stage = StepStage::Attend {
                    heads: lowered.kind(heads.attention),
                    newest,
                    layer,
                    tiles: cache.tiles(heads.layer),
                    values_are_keys: kv.as_ref().is_some_and(|kv| kv.v.is_none()),
                };
                lowered.push(format!("attention of layer {}", heads.layer), stage);
            }
            Group::Gate {
                gate,
                up,
                activation,
            } => {
                let stage = StepStage::Gate {
                    gate: weights.matrix(gate),
                    up: weights.matrix(up),
                    activation: *activation,
                    epsilon,
                };
                lowered.push(gate.name(), stage);
            }
            Group::GateInputs {
                gate,
                part,
                activation,
            } => {
                let stage = StepStage::GateInputs {
                    gate: weights.matrix(gate),
                    inputs: scratch.inputs_of_layer(part),
                    activation: *activation,
                };
                lowered.push(gate.name(), stage);
            }
            Group::AddAttended(branch) | Group::AddGated(branch) => {
                let stage = StepStage::Add {
                    matrix: weights.matrix(branch.matrix),
                    plain: matches!(groups[..i].last(), Some(Group::GateInputs { .. })),
                    sum: branch_sum(branch, weights),
                    norm: norm()?,
                };
                lowered.push(branch.matrix.name(), stage);
            }
            Group::Logits {
                linear: output,
                finish,
            } => {
                let stage = StepStage::Logits {
                    linear: linear(output),
                    epsilon,
                };
                lowered.push(output.weights.name(), stage);
                let logits = weights.linear(output, scratch.logits);
                let one = Chunk { tokens: 1 };
                let finish = finishing(device, weights, finish, logits, one)?;
                lowered.behind.extend(finish);
            }
        }
    }
    // As behind separate kernels.
    let compress = cache.compress(device, scratch.whereabouts())?;
    lowered.behind.extend(compress);
    Ok(lowered)
}

impl<'a> Lowered<'a> {
    fn push(&mut self, name: impl Into<String>, stage: StepStage) {
        self.names.push(name.into());
        self.stages.push(stage);
    }

    /// Which of the kinds of heads these are.
    fn kind(&mut self, attention: &'a Attention) -> usize {
        let kind = |attention: &Attention| {
            let Attention {
                head_dim,
                head_count,
                head_count_kv,
                window,
                ..
            } = *attention;
            (head_dim, head_count, head_count_kv, window)
        };
        let mut known = self.attentions.iter();
        known
            .position(|known| kind(known) == kind(attention))
            .unwrap_or_else(|| {
                self.attentions.push(attention);
                self.attentions.len() - 1
            })
    }

    /// Where the next stage finds the newest key and value that the layer with `k_cache` stores, and how many stages before.
    fn share(
        &mut self,
        k_cache: CUdeviceptr,
        step_scratch: &StepScratch,
    ) -> Result<(CUdeviceptr, usize)> {
        let here = self.stages.len();
        let shares = |stage: &&StepStage| match stage {
            StepStage::Attend { layer, newest, .. } => layer.stores != 0 && newest.is_some(),
            _ => false,
        };
        let sharing = self.stages.iter().filter(shares).count();
        let mut stages = self.stages.iter_mut().enumerate();
        let found = stages.find_map(|(i, stage)| match stage {
            StepStage::Attend { layer, newest, .. }
                if layer.k_cache == k_cache && layer.stores != 0 =>
            {
                Some((i, newest))
            }
            _ => None,
        });
        let (source, newest) = found.context("a layer shares keys that none before it stores")?;
        let address = match newest {
            Some((address, _)) => *address,
            None => {
                ensure!(
                    sharing < HEAD_KINDS,
                    "layers share the keys and values of more than {HEAD_KINDS} others"
                );
                step_scratch.newest(sharing)
            }
        };
        *newest = Some((address, 0));
        Ok((address, here - source))
    }
}

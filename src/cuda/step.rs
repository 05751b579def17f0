//! The decode region as one kernel: a decoder lowered to the stages that `kernels/step.cu` follows. What
//! [`decode`](super::decode) makes separate launches of, it computes to the same bits.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::{
    decode::{attention_layer, branch_sum, norm_behind},
    device::{Device, Launch, PinnedBuffer},
    kv_cache::KvCache,
    launches::{STEP_STAGE_BYTES, StepLinear, StepStage, step},
    lowering::{Group, KeyValueProducts, token_groups},
    params::StepParams,
    scratch::{Scratch, StepScratch},
    weights::DeviceWeights,
};
use crate::model::{Decoder, decoder::Linear};

/// The step kernel, ready to be launched.
pub struct Step {
    pub launch: Launch,
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
        let mut attentions = decoder.layers.iter().map(|layer| &layer.attention);
        let attention = attentions.next().context("there are no layers")?;
        ensure!(
            attentions.all(|other| {
                (other.head_dim, other.head_count, other.head_count_kv)
                    == (
                        attention.head_dim,
                        attention.head_count,
                        attention.head_count_kv,
                    )
            }),
            "the layers' heads differ in size or number"
        );
        let windows = decoder
            .layers
            .iter()
            .filter_map(|layer| layer.attention.window);
        let mut windows: Vec<usize> = windows.collect();
        windows.dedup();
        ensure!(windows.len() <= 1, "the layers' windows differ");
        let (names, stages): (Vec<_>, Vec<_>) = lower(decoder, weights, cache)?.into_iter().unzip();
        let step_scratch = StepScratch::new(device, decoder)?;
        let failure = device.allocate_pinned(size_of::<u64>())?;
        let params = StepParams {
            inputs: scratch.inputs,
            logits: scratch.logits,
            failure: failure.device_address(),
            window: windows.first().map_or(0, |window| *window as i32),
            ..step_scratch.params()
        };
        let (launch, stages) = step(device, attention, &stages, params)?;
        step_scratch.upload_stages(bytemuck::cast_slice(&stages))?;
        Ok(Self {
            launch,
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
/// takes to read what the ring holds.
pub fn slower(device: &Device, decoder: &Decoder) -> Option<String> {
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
    // Of each layer: queries, keys and values; attention; its output; gate and up; down. Of the model: embedding, logits.
    (5 * decoder.layers.len() + 2) * device.multiprocessors()
}

/// The stages, and what messages call them.
fn lower(
    decoder: &Decoder,
    weights: &DeviceWeights,
    cache: &KvCache,
) -> Result<Vec<(String, StepStage)>> {
    let linear = |linear: &Linear| StepLinear {
        weights: weights.matrix(&linear.weights),
        bias: weights.vector(linear.bias.as_ref()),
    };
    let groups = token_groups(decoder)?;
    let mut stages = Vec::new();
    // Of the norm that made what is read.
    let mut epsilon = 0.0;
    for (i, group) in groups.iter().enumerate() {
        let norm = || norm_behind(groups.get(i + 1), weights);
        match group {
            Group::Embed { table, scale } => {
                let stage = StepStage::Embed {
                    table: weights.matrix(table),
                    factor: *scale,
                    norm: norm()?,
                };
                stages.push((table.name().to_owned(), stage));
            }
            Group::Norm(norm) => epsilon = norm.epsilon,
            Group::Attention { q, kv, heads } => {
                let Some(KeyValueProducts { k, v }) = kv else {
                    bail!("layer {} has no keys and values of its own", heads.layer);
                };
                let attention = heads.attention;
                ensure!(
                    attention.softcap.is_none(),
                    "layer {} caps scores",
                    heads.layer
                );
                let mut matrices = vec![linear(q), linear(k)];
                matrices.extend(v.map(linear));
                let stage = StepStage::Qkv { matrices, epsilon };
                stages.push((q.weights.name().to_owned(), stage));
                let stage = StepStage::Attend {
                    layer: attention_layer(weights, cache, heads),
                    values_are_keys: v.is_none(),
                };
                stages.push((format!("attention of layer {}", heads.layer), stage));
            }
            Group::Gate {
                gate,
                up,
                activation,
            } => {
                let name = gate.name().to_owned();
                let (gate, up) = (weights.matrix(gate), weights.matrix(up));
                let stage = StepStage::Gate {
                    gate,
                    up,
                    activation: *activation,
                    epsilon,
                };
                stages.push((name, stage));
            }
            Group::AddAttended(branch) | Group::AddGated(branch) => {
                let stage = StepStage::Add {
                    matrix: weights.matrix(branch.matrix),
                    sum: branch_sum(branch, weights),
                    norm: norm()?,
                };
                stages.push((branch.matrix.name().to_owned(), stage));
            }
            Group::TokenInputs(inputs) => {
                bail!(
                    "layers take inputs of the token itself, from {}",
                    inputs.table.name()
                )
            }
            Group::GateInputs { gate, .. } => {
                bail!("{} takes inputs of the token itself", gate.name())
            }
            Group::Select => {}
            Group::Logits {
                linear: output,
                finish,
            } => {
                ensure!(
                    finish.softcap.is_none() && finish.suppressed.is_none(),
                    "logits are capped, or some tokens have none"
                );
                let stage = StepStage::Logits {
                    linear: linear(output),
                    epsilon,
                };
                stages.push((output.weights.name().to_owned(), stage));
            }
        }
    }
    Ok(stages)
}

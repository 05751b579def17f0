//! From a decoder's operations to groups of them that the kernels do as one, for decoding and for prompts alike.

use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};

use crate::model::{
    Decoder, Tensor,
    decoder::{Activation, Attention, Linear, Norm, Rope, Vector},
    ops::{Op, Var},
};

/// Operations that the kernels do as one, on the residual stream and on what a norm makes of it.
pub enum Group<'a> {
    /// The residual stream is the row of a table, times `scale`.
    Embed {
        table: &'a Tensor,
        scale: f32,
    },
    /// What the groups behind read of the residual stream.
    Norm(&'a Norm),
    /// All of attention but its output projection.
    Attention {
        q: &'a Linear,
        k: &'a Linear,
        v: &'a Linear,
        heads: Heads<'a>,
    },
    /// `silu(gate x) * (up x)`
    Gate {
        gate: &'a Tensor,
        up: &'a Tensor,
    },
    /// A product of what the heads gathered is added to the residual stream.
    AddAttended(&'a Tensor),
    /// A product of what was gated is.
    AddGated(&'a Tensor),
    /// Only the tokens whose logits are wanted go on, to the last norm and the logits.
    Select,
    Logits(&'a Linear),
}

/// What lies between the products of queries, keys and values and what the heads gather.
pub struct Heads<'a> {
    pub layer: usize,
    pub attention: &'a Attention,
    pub q_norm: Option<&'a Vector>,
    pub k_norm: Option<&'a Vector>,
    /// Of both norms; 0 where there is none.
    pub epsilon: f32,
    pub rope: &'a Arc<Rope>,
}

/// All of a decoder's operations, in order.
///
/// # Errors
/// Operations that the kernels do not do, or not in this order.
pub fn groups(decoder: &Decoder) -> Result<Vec<Group<'_>>> {
    let mut groups = Vec::new();
    let mut ops = &decoder.ops[..];
    while !ops.is_empty() {
        let (group, rest) = match ops {
            [
                Op::Embed {
                    table,
                    out: Var::Hidden,
                },
                rest @ ..,
            ] => {
                let (scale, rest) = match rest {
                    [
                        Op::Scale {
                            x: Var::Hidden,
                            factor,
                        },
                        rest @ ..,
                    ] => (*factor, rest),
                    rest => (1.0, rest),
                };
                (Group::Embed { table, scale }, rest)
            }
            [
                Op::Norm {
                    x: Var::Hidden,
                    norm,
                    out: Var::Normed,
                },
                rest @ ..,
            ] => (Group::Norm(norm), rest),
            [
                Op::Linear {
                    x: Var::Normed,
                    linear: q,
                    out: Var::Query,
                },
                Op::Linear {
                    x: Var::Normed,
                    linear: k,
                    out: Var::Key,
                },
                Op::Linear {
                    x: Var::Normed,
                    linear: v,
                    out: Var::Value,
                },
                rest @ ..,
            ] => {
                let (heads, rest) = Heads::parse(decoder, rest)?;
                (Group::Attention { q, k, v, heads }, rest)
            }
            [
                Op::Linear {
                    x: Var::Normed,
                    linear: gate,
                    out: Var::Gate,
                },
                Op::Linear {
                    x: Var::Normed,
                    linear: up,
                    out: Var::Up,
                },
                Op::Gate {
                    gate: Var::Gate,
                    up: Var::Up,
                    activation: Activation::Silu,
                    out: Var::Gated,
                },
                rest @ ..,
            ] => {
                let (gate, up) = (unbiased(gate)?, unbiased(up)?);
                (Group::Gate { gate, up }, rest)
            }
            [
                Op::Linear {
                    x: x @ (Var::Attended | Var::Gated),
                    linear,
                    out: Var::Branch,
                },
                Op::Add {
                    x: Var::Branch,
                    to: Var::Hidden,
                },
                rest @ ..,
            ] => {
                let weights = unbiased(linear)?;
                let group = match x {
                    Var::Attended => Group::AddAttended(weights),
                    _ => Group::AddGated(weights),
                };
                (group, rest)
            }
            [
                Op::Select,
                Op::Norm { .. },
                Op::Linear {
                    out: Var::Logits, ..
                },
            ] => (Group::Select, &ops[1..]),
            [
                Op::Linear {
                    x: Var::Normed,
                    linear,
                    out: Var::Logits,
                },
                rest @ ..,
            ] => (Group::Logits(linear), rest),
            _ => return Err(unsupported(ops)),
        };
        groups.push(group);
        ops = rest;
    }
    Ok(groups)
}

/// The groups of a decoded token, whose logits are wanted.
///
/// # Errors
/// As [`groups`].
pub fn token_groups(decoder: &Decoder) -> Result<Vec<Group<'_>>> {
    let mut groups = groups(decoder)?;
    groups.retain(|group| !matches!(group, Group::Select));
    Ok(groups)
}

impl<'a> Heads<'a> {
    /// Reads the operations up to an [`Op::Attend`], and returns what they come to and those behind.
    fn parse(decoder: &'a Decoder, ops: &'a [Op]) -> Result<(Self, &'a [Op])> {
        let (mut q_norm, mut k_norm) = (None, None);
        let (mut q_rope, mut k_rope) = (None, None);
        let mut stored = None;
        for (i, op) in ops.iter().enumerate() {
            match op {
                Op::HeadNorm {
                    x: Var::Query,
                    norm,
                } if q_norm.is_none() && q_rope.is_none() => q_norm = Some(norm),
                Op::HeadNorm { x: Var::Key, norm } if k_norm.is_none() && k_rope.is_none() => {
                    k_norm = Some(norm);
                }
                Op::Rope {
                    x: Var::Query,
                    rope,
                    ..
                } if q_rope.is_none() => q_rope = Some(rope),
                Op::Rope {
                    x: Var::Key, rope, ..
                } if k_rope.is_none() => k_rope = Some(rope),
                Op::Store {
                    layer,
                    key: Var::Key,
                    value: Var::Value,
                } if stored.is_none() => stored = Some(*layer),
                Op::Attend {
                    layer,
                    query: Var::Query,
                    out: Var::Attended,
                } if stored == Some(*layer) => {
                    let (Some(rope), Some(other)) = (q_rope, k_rope) else {
                        return Err(unsupported(ops));
                    };
                    ensure!(
                        Arc::ptr_eq(rope, other),
                        "layer {layer} rotates queries and keys differently, for which CUDA has no kernel: use --device cpu"
                    );
                    let attention = &decoder.layers[*layer].attention;
                    ensure!(
                        attention.softcap.is_none(),
                        "layer {layer} caps its scores, for which CUDA has no kernel: use --device cpu"
                    );
                    if let Some(window) = attention.window {
                        return Err(anyhow!(
                            "layer {layer} attends over a window of {window} tokens, for which CUDA has no kernel: \
                             use --device cpu"
                        ));
                    }
                    let heads = Self {
                        layer: *layer,
                        attention,
                        q_norm: of_heads(q_norm, *layer, attention.head_dim)?,
                        k_norm: of_heads(k_norm, *layer, attention.head_dim)?,
                        epsilon: same_epsilon(q_norm, k_norm, *layer)?,
                        rope,
                    };
                    return Ok((heads, &ops[i + 1..]));
                }
                _ => return Err(unsupported(&ops[i..])),
            }
        }
        Err(anyhow!("the operations of attention end without it"))
    }

    /// What scores are multiplied with, so that powers of two give the softmax.
    pub fn exponent_scale(&self) -> f32 {
        self.attention.scale * std::f32::consts::LOG2_E
    }
}

fn same_epsilon(q_norm: Option<&Norm>, k_norm: Option<&Norm>, layer: usize) -> Result<f32> {
    let mut epsilons = [q_norm, k_norm].into_iter().flatten().map(|n| n.epsilon);
    let epsilon = epsilons.next().unwrap_or(0.0);
    ensure!(
        epsilons.all(|other| other == epsilon),
        "layer {layer} norms queries and keys with different epsilons, for which CUDA has no kernel: use --device cpu"
    );
    Ok(epsilon)
}

/// The weights of a norm of each head.
fn of_heads(norm: Option<&Norm>, layer: usize, head_dim: usize) -> Result<Option<&Vector>> {
    let weight = norm.map(|norm| &norm.weight);
    ensure!(
        weight.is_none_or(|weight| weight.len() == head_dim),
        "layer {layer} norms queries and keys over all heads at once, for which CUDA has no kernel: use --device cpu"
    );
    Ok(weight)
}

/// A matrix whose product no kernel adds a bias to.
fn unbiased(linear: &Linear) -> Result<&Tensor> {
    ensure!(
        linear.bias.is_none(),
        "{} has a bias, which CUDA kernels add to queries, keys, values and logits only: use --device cpu",
        linear.weights.name()
    );
    Ok(&linear.weights)
}

/// The error of operations that begin no group.
fn unsupported(ops: &[Op]) -> anyhow::Error {
    let names: Vec<&str> = ops.iter().take(3).map(name).collect();
    anyhow!(
        "the model's operations \"{}\" have no CUDA kernel in this order: use --device cpu",
        names.join(", ")
    )
}

/// What a message calls an operation. A new one is to become part of a group, or to end here.
fn name(op: &Op) -> &'static str {
    match op {
        Op::Embed { .. } => "embed",
        Op::Norm { .. } => "norm",
        Op::HeadNorm { .. } => "head norm",
        Op::Linear { .. } => "linear",
        Op::Rope { .. } => "rope",
        Op::Store { .. } => "store",
        Op::Attend { .. } => "attend",
        Op::Gate { .. } => "gate",
        Op::Copy { .. } => "copy",
        Op::Add { .. } => "add",
        Op::Scale { .. } => "scale",
        Op::Softcap { .. } => "softcap",
        Op::Suppress { .. } => "suppress",
        Op::Select => "select",
    }
}

//! From a decoder's operations to groups of them that the kernels do as one, for decoding and for prompts alike.

use std::{ops::Range, sync::Arc};

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
    TokenInputs(TokenInputs<'a>),
    /// What the groups behind read of the residual stream.
    Norm(&'a Norm),
    /// All of attention but its output projection.
    Attention {
        q: &'a Linear,
        /// `None`: those of another layer
        kv: Option<KeyValueProducts<'a>>,
        heads: Heads<'a>,
    },
    /// `activation(gate x) * (up x)`
    Gate {
        gate: &'a Tensor,
        up: &'a Tensor,
        activation: Activation,
    },
    /// `activation(gate x) * inputs[part]`, with x the residual stream as it is, and what the token gives to all layers.
    GateInputs {
        gate: &'a Tensor,
        part: Range<usize>,
        activation: Activation,
    },
    /// A product of what the heads gathered is added to the residual stream.
    AddAttended(Branch<'a>),
    /// A product of what was gated is.
    AddGated(Branch<'a>),
    /// Only the tokens whose logits are wanted go on.
    Select,
    Logits {
        linear: &'a Linear,
        finish: Finish<'a>,
    },
}

/// What becomes of logits behind their product.
pub struct Finish<'a> {
    pub softcap: Option<f32>,
    pub suppressed: Option<&'a Arc<[u32]>>,
}

/// What a token gives to every layer: `(row_scale * table[token] + norm(projection_scale * projection x)) * sum_scale`, with x
/// the residual stream as it is.
pub struct TokenInputs<'a> {
    pub table: &'a Tensor,
    pub row_scale: f32,
    pub projection: &'a Tensor,
    pub projection_scale: f32,
    pub norm: &'a Norm,
    pub sum_scale: f32,
}

pub struct KeyValueProducts<'a> {
    pub k: &'a Linear,
    /// `None`: values are what keys are before their norm
    pub v: Option<&'a Linear>,
}

/// The residual stream becomes `(x + norm(matrix branch)) * scale`.
pub struct Branch<'a> {
    pub matrix: &'a Tensor,
    pub norm: Option<&'a Norm>,
    pub scale: Option<f32>,
}

impl Branch<'_> {
    /// Whether the product is added as it is.
    pub fn is_plain(&self) -> bool {
        self.norm.is_none() && self.scale.is_none()
    }
}

/// Whether any layer norms what it adds to the residual stream.
pub fn norms_branches(decoder: &Decoder) -> bool {
    let norms = |op: &Op| matches!(op, Op::Norm { x: Var::Branch, .. });
    decoder.ops.iter().any(norms)
}

/// What lies between the products of queries, keys and values and what the heads gather.
pub struct Heads<'a> {
    pub layer: usize,
    pub attention: &'a Attention,
    pub q_norm: Option<&'a Vector>,
    pub k_norm: Option<&'a Vector>,
    pub v_norm: Option<&'a Vector>,
    /// Of all norms; 0 where there is none.
    pub epsilon: f32,
    pub rope: &'a Arc<Rope>,
    /// Whether keys and values are cached, and not those of another layer read.
    pub stores: bool,
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
                let (scale, rest) = scale_of(Var::Hidden, rest);
                let scale = scale.unwrap_or(1.0);
                (Group::Embed { table, scale }, rest)
            }
            [
                Op::Embed {
                    table,
                    out: Var::TokenRow,
                },
                rest @ ..,
            ] => token_inputs(table, rest)?,
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
                rest @ ..,
            ] => {
                let (kv, rest) = key_value_products(rest);
                let (heads, rest) = Heads::parse(decoder, kv.is_some(), rest)?;
                (Group::Attention { q, kv, heads }, rest)
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
                    activation,
                    out: Var::Gated,
                },
                rest @ ..,
            ] => {
                let (gate, up) = (unbiased(gate)?, unbiased(up)?);
                let activation = *activation;
                let group = Group::Gate {
                    gate,
                    up,
                    activation,
                };
                (group, rest)
            }
            [
                Op::Linear {
                    x: Var::Hidden,
                    linear: gate,
                    out: Var::Gate,
                },
                Op::Copy {
                    x: Var::TokenInputs,
                    range,
                    out: Var::Up,
                },
                Op::Gate {
                    gate: Var::Gate,
                    up: Var::Up,
                    activation,
                    out: Var::Gated,
                },
                rest @ ..,
            ] => {
                let group = Group::GateInputs {
                    gate: unbiased(gate)?,
                    part: range.clone(),
                    activation: *activation,
                };
                (group, rest)
            }
            [
                Op::Linear {
                    x: x @ (Var::Attended | Var::Gated),
                    linear,
                    out: Var::Branch,
                },
                rest @ ..,
            ] => {
                let (branch, rest) = branch(linear, rest)?;
                let group = match x {
                    Var::Attended => Group::AddAttended(branch),
                    _ => Group::AddGated(branch),
                };
                (group, rest)
            }
            [Op::Select, rest @ ..] => (Group::Select, rest),
            [
                Op::Linear {
                    x: Var::Normed,
                    linear,
                    out: Var::Logits,
                },
                rest @ ..,
            ] => {
                let (softcap, rest) = match rest {
                    [
                        Op::Softcap {
                            x: Var::Logits,
                            cap,
                        },
                        rest @ ..,
                    ] => (Some(*cap), rest),
                    rest => (None, rest),
                };
                let (suppressed, rest) = match rest {
                    [Op::Suppress { tokens }, rest @ ..] => (Some(tokens), rest),
                    rest => (None, rest),
                };
                let finish = Finish {
                    softcap,
                    suppressed,
                };
                (Group::Logits { linear, finish }, rest)
            }
            _ => return Err(unsupported(ops)),
        };
        groups.push(group);
        ops = rest;
    }
    Ok(groups)
}

/// The factor of `x` that `ops` begin with, if they do, and those behind.
fn scale_of(x: Var, ops: &[Op]) -> (Option<f32>, &[Op]) {
    match ops {
        [Op::Scale { x: scaled, factor }, rest @ ..] if *scaled == x => (Some(*factor), rest),
        _ => (None, ops),
    }
}

/// What follows the row of the table of inputs.
fn token_inputs<'a>(table: &'a Tensor, ops: &'a [Op]) -> Result<(Group<'a>, &'a [Op])> {
    let (row_scale, rest) = scale_of(Var::TokenRow, ops);
    let [
        Op::Linear {
            x: Var::Hidden,
            linear: projection,
            out: Var::TokenInputs,
        },
        rest @ ..,
    ] = rest
    else {
        return Err(unsupported(rest));
    };
    let (projection_scale, rest) = scale_of(Var::TokenInputs, rest);
    let [
        Op::HeadNorm {
            x: Var::TokenInputs,
            norm,
        },
        Op::Add {
            x: Var::TokenRow,
            to: Var::TokenInputs,
        },
        rest @ ..,
    ] = rest
    else {
        return Err(unsupported(rest));
    };
    let (sum_scale, rest) = scale_of(Var::TokenInputs, rest);
    let inputs = TokenInputs {
        table,
        row_scale: row_scale.unwrap_or(1.0),
        projection: unbiased(projection)?,
        projection_scale: projection_scale.unwrap_or(1.0),
        norm,
        sum_scale: sum_scale.unwrap_or(1.0),
    };
    Ok((Group::TokenInputs(inputs), rest))
}

/// The products of keys and values that `ops` begin with, if they do, and the operations behind.
fn key_value_products(ops: &[Op]) -> (Option<KeyValueProducts<'_>>, &[Op]) {
    let [
        Op::Linear {
            x: Var::Normed,
            linear: k,
            out: Var::Key,
        },
        rest @ ..,
    ] = ops
    else {
        return (None, ops);
    };
    match rest {
        [
            Op::Linear {
                x: Var::Normed,
                linear: v,
                out: Var::Value,
            },
            rest @ ..,
        ] => (Some(KeyValueProducts { k, v: Some(v) }), rest),
        [
            Op::Copy {
                x: Var::Key,
                range,
                out: Var::Value,
            },
            rest @ ..,
        ] if *range == (0..k.weights.rows()) => (Some(KeyValueProducts { k, v: None }), rest),
        _ => (None, ops),
    }
}

/// What follows the product that makes a branch.
fn branch<'a>(linear: &'a Linear, ops: &'a [Op]) -> Result<(Branch<'a>, &'a [Op])> {
    let (norm, rest) = match ops {
        [
            Op::Norm {
                x: Var::Branch,
                norm,
                out: Var::Branch,
            },
            rest @ ..,
        ] => (Some(norm), rest),
        _ => (None, ops),
    };
    let [
        Op::Add {
            x: Var::Branch,
            to: Var::Hidden,
        },
        rest @ ..,
    ] = rest
    else {
        return Err(unsupported(rest));
    };
    let (scale, rest) = scale_of(Var::Hidden, rest);
    let branch = Branch {
        matrix: unbiased(linear)?,
        norm,
        scale,
    };
    Ok((branch, rest))
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
    /// Reads the operations up to an [`Op::Attend`], and returns what they come to and those behind. With `stores`, keys and
    /// values are the layer's own.
    fn parse(decoder: &'a Decoder, stores: bool, ops: &'a [Op]) -> Result<(Self, &'a [Op])> {
        let (mut q_norm, mut k_norm, mut v_norm) = (None, None, None);
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
                Op::HeadNorm {
                    x: Var::Value,
                    norm,
                } if v_norm.is_none() && stored.is_none() => v_norm = Some(norm),
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
                } if stored == stores.then_some(*layer) => {
                    let (Some(rope), true) = (q_rope, k_rope.is_some() == stores) else {
                        return Err(unsupported(ops));
                    };
                    ensure!(
                        k_rope.is_none_or(|other| Arc::ptr_eq(rope, other)),
                        "layer {layer} rotates queries and keys differently, for which CUDA has no kernel: use --device cpu"
                    );
                    let attention = &decoder.layers[*layer].attention;
                    let norms = [q_norm, k_norm, v_norm];
                    let epsilon = same_epsilon(norms, *layer)?;
                    let [q_norm, k_norm, v_norm] =
                        norms.map(|norm| of_heads(norm, *layer, attention.head_dim));
                    let heads = Self {
                        layer: *layer,
                        attention,
                        q_norm: q_norm?,
                        k_norm: k_norm?,
                        v_norm: v_norm?,
                        epsilon,
                        rope,
                        stores,
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

    /// What scores so multiplied are capped by; 0 for none.
    pub fn exponent_softcap(&self) -> f32 {
        self.attention.softcap.unwrap_or(0.0) * std::f32::consts::LOG2_E
    }
}

fn same_epsilon(norms: [Option<&Norm>; 3], layer: usize) -> Result<f32> {
    let mut epsilons = norms.into_iter().flatten().map(|norm| norm.epsilon);
    let epsilon = epsilons.next().unwrap_or(0.0);
    ensure!(
        epsilons.all(|other| other == epsilon),
        "layer {layer} norms heads with different epsilons, for which CUDA has no kernel: use --device cpu"
    );
    Ok(epsilon)
}

/// The weights of a norm of each head.
fn of_heads(norm: Option<&Norm>, layer: usize, head_dim: usize) -> Result<Option<&Vector>> {
    let weight = norm.map(|norm| &norm.weight);
    ensure!(
        weight.is_none_or(|weight| weight.len() == head_dim),
        "layer {layer} norms queries or keys over all heads at once, for which CUDA has no kernel: use --device cpu"
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

//! The forward pass as a list of operations: written once for each order that architectures use, run or lowered by every
//! backend.
//!
//! An operation reads and writes variables, each of which holds one vector for every token of a batch. What it writes is
//! another variable than those it reads, but for a norm, which may be in place. A backend may do several operations at
//! once, as long as what the list says comes out.

use std::{f32::consts::FRAC_1_SQRT_2, ops::Range, sync::Arc};

use super::{
    decoder::{
        Activation, Attention, FeedForward, KeyValues, Layer, Linear, Norm, Rope, TokenInput,
        TokenInputs,
    },
    gguf::Tensor,
};

/// A variable: one vector of float32 for each token. Its length is that of what was written to it last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Var {
    /// (hidden_size): the residual stream
    Hidden,
    /// (hidden_size): what attention or the feed-forward reads of it
    Normed,
    /// (q_dim)
    Query,
    /// (kv_dim)
    Key,
    /// (kv_dim)
    Value,
    /// (q_dim): what the heads gathered
    Attended,
    /// (feed_forward_length), or a layer's part of [`Var::TokenInputs`], as the next two
    Gate,
    Up,
    Gated,
    /// (hidden_size): what is about to be added to the residual stream
    Branch,
    /// (width * layers): the token's row of the table that [`Var::TokenInputs`] is made of
    TokenRow,
    /// (width * layers): what the token gives to each layer
    TokenInputs,
    /// (vocab_size)
    Logits,
}

/// One operation on every token of a batch.
pub enum Op {
    /// `out = table[token]`; the table is (hidden_size, vocab_size)
    Embed { table: Tensor, out: Var },
    /// `out = norm(x)` over the whole vector
    Norm { x: Var, norm: Norm, out: Var },
    /// `x = norm(x)` over each part of `norm.weight.len()` values: a head, or all heads
    HeadNorm { x: Var, norm: Norm },
    /// `out = W x + bias`
    Linear { x: Var, linear: Linear, out: Var },
    /// Rotates each head of `head_dim` values of `x` by the token's position
    Rope {
        x: Var,
        rope: Arc<Rope>,
        head_dim: usize,
    },
    /// Caches the token's key and value as those of `layer`
    Store { layer: usize, key: Var, value: Var },
    /// `out[head] = Σ softmax(softcap(scale * query[head] · keys)) values`, over what `layer` sees of the cache
    Attend { layer: usize, query: Var, out: Var },
    /// `out = activation(gate) * up`
    Gate {
        gate: Var,
        up: Var,
        activation: Activation,
        out: Var,
    },
    /// `out = x[range]`
    Copy {
        x: Var,
        range: Range<usize>,
        out: Var,
    },
    /// `to += x`
    Add { x: Var, to: Var },
    /// `x *= factor`
    Scale { x: Var, factor: f32 },
    /// `x = cap * tanh(x / cap)`
    Softcap { x: Var, cap: f32 },
    /// The logits of `tokens` become [`SUPPRESSED`]
    Suppress { tokens: Arc<[u32]> },
    /// From here on, only the tokens whose logits are wanted count
    Select,
}

impl Op {
    /// The matrix that tokens are multiplied with.
    pub fn weights(&self) -> Option<&Tensor> {
        match self {
            Self::Linear { linear, .. } => Some(&linear.weights),
            Self::Embed { .. }
            | Self::Norm { .. }
            | Self::HeadNorm { .. }
            | Self::Rope { .. }
            | Self::Store { .. }
            | Self::Attend { .. }
            | Self::Gate { .. }
            | Self::Copy { .. }
            | Self::Add { .. }
            | Self::Scale { .. }
            | Self::Softcap { .. }
            | Self::Suppress { .. }
            | Self::Select => None,
        }
    }

    fn reads(&self, var: Var) -> bool {
        match self {
            Self::Embed { .. } | Self::Select => false,
            Self::Norm { x, .. }
            | Self::HeadNorm { x, .. }
            | Self::Linear { x, .. }
            | Self::Rope { x, .. }
            | Self::Copy { x, .. }
            | Self::Scale { x, .. }
            | Self::Softcap { x, .. } => *x == var,
            Self::Suppress { .. } => var == Var::Logits,
            Self::Store { key, value, .. } => *key == var || *value == var,
            Self::Attend { query, .. } => *query == var,
            Self::Gate { gate, up, .. } => *gate == var || *up == var,
            Self::Add { x, to } => *x == var || *to == var,
        }
    }

    /// Whether it writes the whole of `var` without reading it.
    fn replaces(&self, var: Var) -> bool {
        match self {
            Self::Embed { out, .. }
            | Self::Norm { out, .. }
            | Self::Linear { out, .. }
            | Self::Attend { out, .. }
            | Self::Gate { out, .. }
            | Self::Copy { out, .. } => *out == var,
            Self::HeadNorm { .. }
            | Self::Rope { .. }
            | Self::Store { .. }
            | Self::Add { .. }
            | Self::Scale { .. }
            | Self::Softcap { .. }
            | Self::Suppress { .. }
            | Self::Select => false,
        }
    }
}

/// Whether any of `ops` needs what `var` holds before them: what is not needed need not be written.
pub fn needs(ops: &[Op], var: Var) -> bool {
    for op in ops {
        if op.reads(var) {
            return true;
        }
        if op.replaces(var) {
            return false;
        }
    }
    var == Var::Logits
}

/// What stands around the layers.
pub struct Ends {
    /// (hidden_size, vocab_size)
    pub embedding: Tensor,
    /// What its rows are multiplied with.
    pub embedding_scale: Option<f32>,
    pub token_inputs: Option<TokenInputs>,
    /// (hidden_size)
    pub output_norm: Norm,
    /// (hidden_size, vocab_size)
    pub output: Tensor,
    /// Logits become `softcap * tanh(logit / softcap)`.
    pub softcap: Option<f32>,
    /// Tokens that the model never gives, (their number)
    pub suppressed: Arc<[u32]>,
}

/// A logit whose token has no probability at all, and which is a number nevertheless, as all logits must be.
pub const SUPPRESSED: f32 = -1e30;

/// The order of Llama and those after it: attention, then the feed-forward, each a branch from the residual stream that is
/// added to it, with the norms before and behind the branch that the layer has.
///
/// Behind the last layer that caches anything, tokens whose logits nobody wants are of no use.
pub fn residual_order(layers: &[Layer], ends: &Ends) -> Vec<Op> {
    let owns = |layer: &Layer| matches!(layer.attention.kv, KeyValues::Own(_));
    let selected = layers.iter().rposition(owns).map_or(0, |last| last + 1);
    let scale_hidden = |factor| scale(Var::Hidden, factor);
    let mut ops = vec![Op::Embed {
        table: ends.embedding.clone(),
        out: Var::Hidden,
    }];
    ops.extend(ends.embedding_scale.map(scale_hidden));
    if let Some(inputs) = &ends.token_inputs {
        token_inputs(&mut ops, inputs);
    }
    for (index, layer) in layers.iter().enumerate() {
        if index == selected {
            ops.push(Op::Select);
        }
        attention(&mut ops, index, &layer.attention);
        feed_forward(&mut ops, &layer.feed_forward);
        if let Some(input) = &layer.token_input {
            token_input(&mut ops, index, input);
        }
        ops.extend(layer.output_scale.map(scale_hidden));
    }
    if selected == layers.len() {
        ops.push(Op::Select);
    }
    let output = Linear {
        weights: ends.output.clone(),
        bias: None,
    };
    ops.push(norm(Var::Hidden, &ends.output_norm, Var::Normed));
    ops.push(linear(Var::Normed, &output, Var::Logits));
    ops.extend(ends.softcap.map(|cap| Op::Softcap {
        x: Var::Logits,
        cap,
    }));
    if !ends.suppressed.is_empty() {
        let tokens = ends.suppressed.clone();
        ops.push(Op::Suppress { tokens });
    }
    ops
}

/// Products of numbers in the matrices of `ops`, with `tokens` tokens and behind [`Op::Select`] with `selected`.
pub fn products(ops: &[Op], tokens: usize, selected: usize) -> f64 {
    let mut tokens = tokens;
    let mut products = 0.0;
    for op in ops {
        if let Op::Select = op {
            tokens = selected;
        }
        if let Some(weights) = op.weights() {
            products += (tokens * weights.rows() * weights.row_len()) as f64;
        }
    }
    products
}

/// Lets all tokens of a prompt pass through all layers: [`Op::Select`] goes behind them.
pub fn select_late(ops: &mut Vec<Op>) {
    ops.retain(|op| !matches!(op, Op::Select));
    let reads_hidden = |op: &Op| matches!(op, Op::Norm { x: Var::Hidden, .. });
    let last = ops.iter().rposition(reads_hidden).unwrap_or(ops.len());
    ops.insert(last, Op::Select);
}

fn attention(ops: &mut Vec<Op>, layer: usize, attention: &Attention) {
    let rope = |x| Op::Rope {
        x,
        rope: attention.rope.clone(),
        head_dim: attention.head_dim,
    };
    let input = branch_input(ops, &attention.norm);
    ops.push(linear(input, &attention.q, Var::Query));
    if let KeyValues::Own(own) = &attention.kv {
        ops.push(linear(input, &own.k, Var::Key));
        ops.push(match &own.v {
            Some(v) => linear(input, v, Var::Value),
            None => Op::Copy {
                x: Var::Key,
                range: 0..attention.kv_dim(),
                out: Var::Value,
            },
        });
    }
    ops.extend(head_norm(Var::Query, &attention.q_norm));
    ops.push(rope(Var::Query));
    if let KeyValues::Own(own) = &attention.kv {
        ops.extend(head_norm(Var::Key, &own.k_norm));
        ops.push(rope(Var::Key));
        ops.extend(head_norm(Var::Value, &own.v_norm));
        ops.push(Op::Store {
            layer,
            key: Var::Key,
            value: Var::Value,
        });
    }
    ops.push(Op::Attend {
        layer,
        query: Var::Query,
        out: Var::Attended,
    });
    ops.push(linear(Var::Attended, &attention.output, Var::Branch));
    add_branch(ops, &attention.output_norm);
}

fn feed_forward(ops: &mut Vec<Op>, feed_forward: &FeedForward) {
    let input = branch_input(ops, &feed_forward.norm);
    ops.push(linear(input, &feed_forward.gate, Var::Gate));
    ops.push(linear(input, &feed_forward.up, Var::Up));
    ops.push(Op::Gate {
        gate: Var::Gate,
        up: Var::Up,
        activation: feed_forward.activation,
        out: Var::Gated,
    });
    ops.push(linear(Var::Gated, &feed_forward.down, Var::Branch));
    add_branch(ops, &feed_forward.output_norm);
}

fn token_inputs(ops: &mut Vec<Op>, inputs: &TokenInputs) {
    let (width, hidden_size) = (
        inputs.norm.weight.len(),
        inputs.projection.weights.row_len(),
    );
    ops.extend([
        Op::Embed {
            table: inputs.table.clone(),
            out: Var::TokenRow,
        },
        scale(Var::TokenRow, (width as f32).sqrt()),
        linear(Var::Hidden, &inputs.projection, Var::TokenInputs),
        scale(Var::TokenInputs, (hidden_size as f32).sqrt().recip()),
        Op::HeadNorm {
            x: Var::TokenInputs,
            norm: inputs.norm.clone(),
        },
        Op::Add {
            x: Var::TokenRow,
            to: Var::TokenInputs,
        },
        scale(Var::TokenInputs, FRAC_1_SQRT_2),
    ]);
}

fn token_input(ops: &mut Vec<Op>, layer: usize, input: &TokenInput) {
    let width = input.gate.weights.rows();
    ops.extend([
        linear(Var::Hidden, &input.gate, Var::Gate),
        Op::Copy {
            x: Var::TokenInputs,
            range: layer * width..(layer + 1) * width,
            out: Var::Up,
        },
        Op::Gate {
            gate: Var::Gate,
            up: Var::Up,
            activation: input.activation,
            out: Var::Gated,
        },
        linear(Var::Gated, &input.projection, Var::Branch),
    ]);
    add_branch(ops, &Some(input.norm.clone()));
}

/// What a branch reads: the residual stream, or its norm.
fn branch_input(ops: &mut Vec<Op>, input_norm: &Option<Norm>) -> Var {
    match input_norm {
        Some(input_norm) => {
            ops.push(norm(Var::Hidden, input_norm, Var::Normed));
            Var::Normed
        }
        None => Var::Hidden,
    }
}

/// The residual stream `+= norm(branch)`.
fn add_branch(ops: &mut Vec<Op>, output_norm: &Option<Norm>) {
    ops.extend(
        output_norm
            .as_ref()
            .map(|output_norm| norm(Var::Branch, output_norm, Var::Branch)),
    );
    ops.push(Op::Add {
        x: Var::Branch,
        to: Var::Hidden,
    });
}

fn scale(x: Var, factor: f32) -> Op {
    Op::Scale { x, factor }
}

fn norm(x: Var, norm: &Norm, out: Var) -> Op {
    Op::Norm {
        x,
        norm: norm.clone(),
        out,
    }
}

fn head_norm(x: Var, norm: &Option<Norm>) -> Option<Op> {
    let norm = norm.clone()?;
    Some(Op::HeadNorm { x, norm })
}

fn linear(x: Var, linear: &Linear, out: Var) -> Op {
    Op::Linear {
        x,
        linear: linear.clone(),
        out,
    }
}

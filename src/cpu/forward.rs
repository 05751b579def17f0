//! Runs a decoder's operations on a batch, from token ids to logits.

use std::{mem, ops::Range, sync::Arc};

use super::{
    Arithmetic, Workers,
    attention::{QUERIES, Scoring},
    elementwise,
    eviction::{Cut, Eviction},
    integer::{Activations8, Detected},
    kv_cache::KvCache,
    matmul::{Input, Product, matmul, matmul_gated},
    rope::Rotations,
    simd::Matrix,
    workers::SharedMatrix,
};
use crate::{
    backend::{Batch, NEWEST, Watch},
    model::{
        Tensor,
        decoder::{Activation, Attention, Decoder, Linear, Norm, Rope},
        ops::{Op, SUPPRESSED, Var, needs, products},
    },
};

/// What the variables hold, and what becomes of positions.
pub struct Activations {
    /// By variable: (its greatest length, tokens). [`Var::Logits`] has its own place.
    vars: [Matrix; Var::Logits as usize],
    /// What quantized matrices are multiplied with next, where that is done in integers.
    in_8_bits: Option<Activations8>,
    /// (vocab_size, tokens)
    logits: Vec<f32>,
    /// Of each rotation that the model has.
    rotations: Vec<(Arc<Rope>, Rotations)>,
}

impl Activations {
    /// For chunks of up to `tokens` tokens, or `None` where there is no memory for them.
    pub fn new(decoder: &Decoder, tokens: usize, arithmetic: Arithmetic) -> Option<Self> {
        let mut rotations: Vec<(Arc<Rope>, Rotations)> = Vec::new();
        for layer in &decoder.layers {
            let Attention { rope, head_dim, .. } = &layer.attention;
            if !rotations.iter().any(|(other, _)| Arc::ptr_eq(other, rope)) {
                rotations.push((rope.clone(), Rotations::new(rope, *head_dim, tokens)?));
            }
        }
        let mut vars: [Matrix; Var::Logits as usize] = Default::default();
        for (matrix, len) in vars.iter_mut().zip(greatest_lengths(decoder)) {
            *matrix = Matrix::zeros(len, tokens)?;
        }
        let in_8_bits = match (arithmetic, longest_row(decoder)) {
            (Arithmetic::Exact, _) | (Arithmetic::EightBits, 0) => None,
            (Arithmetic::EightBits, len) => Some(Activations8::new(Detected::best(), len, tokens)?),
        };
        let logits = decoder.vocab_size.checked_mul(tokens)?;
        Some(Self {
            vars,
            in_8_bits,
            logits: bytemuck::try_zeroed_vec(logits).ok()?,
            rotations,
        })
    }

    /// Whether quantized matrices are multiplied in integers.
    pub fn are_in_8_bits(&self) -> bool {
        self.in_8_bits.is_some()
    }

    fn get(&self, var: Var) -> &Matrix {
        &self.vars[var as usize]
    }

    /// A variable to be written while others are read: vectors of `len` for `tokens`. It must be put back.
    fn take(&mut self, var: Var, len: usize, tokens: &Range<usize>) -> Matrix {
        let mut matrix = mem::take(&mut self.vars[var as usize]);
        matrix.reshape(len, tokens.clone());
        matrix
    }

    fn put(&mut self, var: Var, matrix: Matrix) {
        self.vars[var as usize] = matrix;
    }
}

/// Values of the longest row of a quantized matrix that is multiplied.
pub fn longest_row(decoder: &Decoder) -> usize {
    let matrices = decoder.ops.iter().filter_map(Op::weights);
    let quantized = matrices.filter(|weights| !weights.tensor_type().is_float());
    quantized.map(Tensor::row_len).max().unwrap_or(0)
}

/// The greatest length that each variable gets.
fn greatest_lengths(decoder: &Decoder) -> [usize; Var::Logits as usize + 1] {
    let mut lengths = [0; Var::Logits as usize + 1];
    let mut greatest = lengths;
    for op in &decoder.ops {
        let (out, len) = match op {
            Op::Embed { table, out } => (out, table.row_len()),
            Op::Norm { x, out, .. } => (out, lengths[*x as usize]),
            Op::Linear { linear, out, .. } => (out, linear.weights.rows()),
            Op::Attend { layer, out, .. } => (out, decoder.layers[*layer].attention.q_dim()),
            Op::Gate { gate, out, .. } => (out, lengths[*gate as usize]),
            Op::Copy { range, out, .. } => (out, range.len()),
            Op::HeadNorm { .. }
            | Op::Rope { .. }
            | Op::Store { .. }
            | Op::Add { .. }
            | Op::Scale { .. }
            | Op::Softcap { .. }
            | Op::Suppress { .. }
            | Op::Select => continue,
        };
        lengths[*out as usize] = len;
        greatest[*out as usize] = greatest[*out as usize].max(len);
    }
    greatest
}

/// Computes a batch, and returns the logits of the tokens that get any: (vocab_size, those). `eviction`: where there is a
/// budget. `watch` is asked behind every operation but the last; `None` where it broke. Nothing is evicted then, and all
/// that the batch would have written counts as written.
pub fn forward<'a>(
    decoder: &Decoder,
    workers: &Workers,
    cache: &mut KvCache,
    eviction: Option<&mut Eviction>,
    activations: &'a mut Activations,
    batch: &Batch,
    watch: Watch,
) -> Option<&'a [f32]> {
    let end = batch.positions().end;
    cache.begin(batch.positions());
    let to_keep = cache.layout().to_keep(end, cache.written());
    let cut = to_keep.filter(|_| batch.ends_prompt).map(|count| Cut {
        places: end - cache.written().evicted(),
        count,
    });
    let eviction = eviction.zip(cut);
    for (_, rotations) in &mut activations.rotations {
        rotations.seek(batch.position, batch.tokens.len());
    }
    let mut pass = Pass {
        decoder,
        workers,
        cache,
        eviction,
        activations,
        batch,
        tokens: 0..batch.tokens.len(),
    };
    let selected = batch.wanted().len();
    let all = products(&decoder.ops, batch.tokens.len(), selected);
    let mut done = 0.0;
    let mut ops = &decoder.ops[..];
    loop {
        let tokens = pass.tokens.len();
        let rest = pass.advance(ops);
        if rest.is_empty() || pass.tokens.is_empty() {
            break;
        }
        done += products(&ops[..ops.len() - rest.len()], tokens, selected);
        if watch(done / all).is_break() {
            return None;
        }
        ops = rest;
    }
    if let Some((eviction, cut)) = pass.eviction {
        eviction.evict(pass.cache, end, cut);
    }
    Some(&activations.logits[..decoder.vocab_size * batch.wanted().len()])
}

/// A batch on its way.
struct Pass<'a> {
    decoder: &'a Decoder,
    workers: &'a Workers,
    cache: &'a mut KvCache,
    /// Where tokens are to be evicted behind the batch.
    eviction: Option<(&'a mut Eviction, Cut)>,
    activations: &'a mut Activations,
    batch: &'a Batch<'a>,
    /// Those of the batch that count.
    tokens: Range<usize>,
}

impl Pass<'_> {
    /// Does the first of `ops`, or as many as can be done as one, and returns the rest.
    fn advance<'o>(&mut self, ops: &'o [Op]) -> &'o [Op] {
        match ops {
            [
                Op::Linear {
                    x,
                    linear: gate,
                    out: gate_out,
                },
                Op::Linear {
                    x: up_x,
                    linear: up,
                    out: up_out,
                },
                Op::Gate {
                    gate: gate_in,
                    up: up_in,
                    activation,
                    out,
                },
                rest @ ..,
            ] if x == up_x
                && (gate_out, up_out) == (gate_in, up_in)
                && gate.bias.is_none()
                && up.bias.is_none()
                && !needs(rest, *gate_out)
                && !needs(rest, *up_out) =>
            {
                self.gated(*x, gate, up, *activation, *out);
                rest
            }
            [
                Op::Linear { x, linear, out },
                Op::Add { x: added, to },
                rest @ ..,
            ] if out == added && linear.bias.is_none() && !needs(rest, *out) => {
                self.linear_add(*x, linear, *to);
                rest
            }
            [
                Op::Linear {
                    x,
                    linear,
                    out: Var::Logits,
                },
                rest @ ..,
            ] => {
                self.logits(*x, linear);
                rest
            }
            [Op::Linear { x, .. }, ..] => {
                let of_x = |op: &&Op| matches!(op, Op::Linear { x: other, out, .. } if other == x && *out != Var::Logits);
                let (linears, rest) = ops.split_at(ops.iter().take_while(of_x).count());
                self.linears(*x, linears);
                rest
            }
            [op, rest @ ..] => {
                self.run(op);
                rest
            }
            [] => &[],
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Embed { table, out } => {
                let mut matrix = self.activations.take(*out, table.row_len(), &self.tokens);
                for i in self.tokens.clone() {
                    let row = self.batch.tokens[i] as usize * table.row_bytes();
                    let row = &table.bytes()[row..][..table.row_bytes()];
                    table.tensor_type().dequantize(row, matrix.row_mut(i));
                }
                self.activations.put(*out, matrix);
            }
            Op::Norm { x, norm, out } => self.norm(*x, norm, *out),
            Op::HeadNorm { x, norm } => {
                let matrix = &mut self.activations.vars[*x as usize];
                for i in self.tokens.clone() {
                    for head in matrix.row_mut(i).chunks_exact_mut(norm.weight.len()) {
                        elementwise::rms_norm_in_place(head, &norm.weight, norm.epsilon);
                    }
                }
            }
            Op::Linear { x, .. } => self.linears(*x, std::slice::from_ref(op)),
            Op::Rope { x, rope, head_dim } => {
                let Activations {
                    vars, rotations, ..
                } = &mut *self.activations;
                let rotations = rotations.iter().find(|(other, _)| Arc::ptr_eq(other, rope));
                let (_, rotations) = rotations.expect("every layer's rotation was prepared");
                for i in self.tokens.clone() {
                    for head in vars[*x as usize].row_mut(i).chunks_exact_mut(*head_dim) {
                        rotations.rotate(i, head);
                    }
                }
            }
            Op::Store { layer, key, value } => {
                let (keys, values) = (self.activations.get(*key), self.activations.get(*value));
                for i in self.tokens.clone() {
                    let position = self.batch.position + i;
                    self.cache
                        .store(*layer, position, keys.row(i), values.row(i));
                }
            }
            Op::Attend { layer, query, out } => {
                let attention = &self.decoder.layers[*layer].attention;
                let mut matrix = self.activations.take(*out, attention.q_dim(), &self.tokens);
                self.attend(*layer, attention, self.activations.get(*query), &mut matrix);
                self.activations.put(*out, matrix);
                self.choose_kept(*layer, attention, *query);
            }
            Op::Gate {
                gate,
                up,
                activation,
                out,
            } => {
                let len = self.activations.get(*gate).len();
                let mut matrix = self.activations.take(*out, len, &self.tokens);
                for i in self.tokens.clone() {
                    matrix
                        .row_mut(i)
                        .copy_from_slice(self.activations.get(*gate).row(i));
                    let up = self.activations.get(*up).row(i);
                    elementwise::gate(*activation, matrix.row_mut(i), up);
                }
                self.activations.put(*out, matrix);
            }
            Op::Copy { x, range, out } => {
                let mut matrix = self.activations.take(*out, range.len(), &self.tokens);
                for i in self.tokens.clone() {
                    let part = &self.activations.get(*x).row(i)[range.clone()];
                    matrix.row_mut(i).copy_from_slice(part);
                }
                self.activations.put(*out, matrix);
            }
            Op::Add { x, to } => {
                let len = self.activations.get(*to).len();
                let mut matrix = self.activations.take(*to, len, &self.tokens);
                for i in self.tokens.clone() {
                    elementwise::add(matrix.row_mut(i), self.activations.get(*x).row(i));
                }
                self.activations.put(*to, matrix);
            }
            Op::Scale { x, factor } => {
                let matrix = &mut self.activations.vars[*x as usize];
                for i in self.tokens.clone() {
                    matrix.row_mut(i).iter_mut().for_each(|x| *x *= factor);
                }
            }
            Op::Softcap {
                x: Var::Logits,
                cap,
            } => elementwise::softcap(&mut self.activations.logits, *cap),
            Op::Softcap { x, cap } => {
                let matrix = &mut self.activations.vars[*x as usize];
                for i in self.tokens.clone() {
                    elementwise::softcap(matrix.row_mut(i), *cap);
                }
            }
            Op::Suppress { tokens } => {
                let logits = &mut self.activations.logits;
                for logits in logits.chunks_exact_mut(self.decoder.vocab_size) {
                    for &token in &tokens[..] {
                        logits[token as usize] = SUPPRESSED;
                    }
                }
            }
            Op::Select => self.tokens = self.batch.wanted(),
        }
    }

    fn norm(&mut self, x: Var, norm: &Norm, out: Var) {
        if x == out {
            let matrix = &mut self.activations.vars[x as usize];
            for i in self.tokens.clone() {
                elementwise::rms_norm_in_place(matrix.row_mut(i), &norm.weight, norm.epsilon);
            }
            return;
        }
        let len = self.activations.get(x).len();
        let mut matrix = self.activations.take(out, len, &self.tokens);
        for i in self.tokens.clone() {
            let x = self.activations.get(x).row(i);
            elementwise::rms_norm(x, &norm.weight, norm.epsilon, matrix.row_mut(i));
        }
        self.activations.put(out, matrix);
    }

    /// Prepares `x` to be multiplied.
    fn quantize(&mut self, x: Var) {
        let Activations {
            vars, in_8_bits, ..
        } = &mut *self.activations;
        if let Some(in_8_bits) = in_8_bits {
            in_8_bits.quantize(self.workers, &vars[x as usize], self.tokens.clone());
        }
    }

    /// `x`, which was prepared last.
    fn input(&self, x: Var) -> Input<'_> {
        Input {
            exact: self.activations.get(x),
            in_8_bits: self.activations.in_8_bits.as_ref(),
            tokens: &self.tokens,
        }
    }

    /// Linear operations on one `x`, all as one product.
    fn linears(&mut self, x: Var, linears: &[Op]) {
        self.quantize(x);
        let mut outs: Vec<(&Linear, Var, Matrix)> = Vec::new();
        for op in linears {
            if let Op::Linear { linear, out, .. } = op {
                let rows = linear.weights.rows();
                let matrix = self.activations.take(*out, rows, &self.tokens);
                outs.push((linear, *out, matrix));
            }
        }
        let products = outs.iter_mut().map(|(linear, _, matrix)| Product {
            weights: &linear.weights,
            out: matrix.share(),
            first_row: self.tokens.start,
        });
        let products: Vec<Product> = products.collect();
        matmul(self.workers, &products, self.input(x), |out, x| *out = x);
        for (linear, out, mut matrix) in outs {
            if let Some(bias) = &linear.bias {
                for i in self.tokens.clone() {
                    elementwise::add(matrix.row_mut(i), bias);
                }
            }
            self.activations.put(out, matrix);
        }
    }

    /// The logits lie close together, and only those of tokens that count.
    fn logits(&mut self, x: Var, linear: &Linear) {
        self.quantize(x);
        let mut logits = mem::take(&mut self.activations.logits);
        let rows = linear.weights.rows();
        let product = Product {
            weights: &linear.weights,
            out: SharedMatrix::new(&mut logits, rows),
            first_row: 0,
        };
        matmul(self.workers, &[product], self.input(x), |out, x| *out = x);
        if let Some(bias) = &linear.bias {
            for logits in logits.chunks_exact_mut(rows).take(self.tokens.len()) {
                elementwise::add(logits, bias);
            }
        }
        self.activations.logits = logits;
    }

    /// `to += W x`
    fn linear_add(&mut self, x: Var, linear: &Linear, to: Var) {
        self.quantize(x);
        let rows = linear.weights.rows();
        let mut matrix = self.activations.take(to, rows, &self.tokens);
        let product = Product {
            weights: &linear.weights,
            out: matrix.share(),
            first_row: self.tokens.start,
        };
        let add = |out: &mut f32, x| *out += x;
        matmul(self.workers, &[product], self.input(x), add);
        self.activations.put(to, matrix);
    }

    /// `out = activation(gate x) * (up x)`
    fn gated(&mut self, x: Var, gate: &Linear, up: &Linear, activation: Activation, out: Var) {
        self.quantize(x);
        let rows = gate.weights.rows();
        let mut matrix = self.activations.take(out, rows, &self.tokens);
        let matrices = [&gate.weights, &up.weights];
        matmul_gated(
            self.workers,
            activation,
            matrices,
            self.input(x),
            &mut matrix,
        );
        self.activations.put(out, matrix);
    }

    /// Attends with every head of every token over the positions that it sees.
    fn attend(&self, layer: usize, attention: &Attention, queries: &Matrix, out: &mut Matrix) {
        let out = out.share();
        let (dim, group) = (attention.head_dim, attention.group());
        let heads_kv = attention.head_count_kv;
        // Those of a key/value head: all of its group of one token, then of the next.
        let queries_of_head = self.tokens.len() * group;
        // Where a single token has few of them, all workers are to have some.
        let most = queries_of_head * heads_kv / self.workers.threads();
        let readings = queries_of_head.div_ceil(most.clamp(1, QUERIES));
        let sharing = queries_of_head.div_ceil(readings);
        self.workers.run(readings * heads_kv, |task, scratch| {
            // The last token has the most positions to attend over, so that it comes first.
            let (reading, head_kv) = (readings - 1 - task / heads_kv, task % heads_kv);
            let sharing = reading * sharing..queries_of_head.min((reading + 1) * sharing);
            let asking = sharing.map(|query| {
                let token = self.tokens.start + query / group;
                (token, head_kv * group + query % group)
            });
            let queries = asking
                .clone()
                .map(|(token, head)| self.query(attention, queries, token, head));
            let scoring = Scoring::of(attention);
            let attended =
                self.cache
                    .attend(layer, head_kv, queries, scoring, &mut scratch.attention);
            for ((token, head), attended) in asking.zip(attended) {
                // SAFETY: no other task has this head of this token.
                let out = unsafe { out.part(token, head * dim..(head + 1) * dim) };
                out.copy_from_slice(attended.out);
            }
        });
    }

    /// The position of a token, and the query of one of its heads.
    fn query<'q>(
        &self,
        attention: &Attention,
        queries: &'q Matrix,
        token: usize,
        head: usize,
    ) -> (usize, &'q [f32]) {
        let dim = attention.head_dim;
        let numbers = &queries.row(token)[head * dim..(head + 1) * dim];
        (self.batch.position + token, numbers)
    }

    /// Where tokens are to be evicted, lets the last ones choose which of a layer stay.
    fn choose_kept(&mut self, layer: usize, attention: &Attention, query: Var) {
        let Some((eviction, cut)) = self.eviction.take() else {
            return;
        };
        if eviction.concerns(layer) {
            let queries = self.activations.get(query);
            let scoring = Scoring::of(attention);
            let end = self.tokens.end;
            let observers = end.saturating_sub(NEWEST)..end;
            eviction.choose(
                self.workers,
                self.cache,
                layer,
                cut,
                |head, scratch, each| {
                    for first in observers.clone().step_by(QUERIES) {
                        let tokens = first..end.min(first + QUERIES);
                        let of_tokens =
                            tokens.map(|token| self.query(attention, queries, token, head));
                        let attended = self.cache.attend(
                            layer,
                            head / attention.group(),
                            of_tokens,
                            scoring,
                            &mut scratch.attention,
                        );
                        for attended in attended {
                            each(attended.weights, attended.weight_scale);
                        }
                    }
                },
            );
        }
        self.eviction = Some((eviction, cut));
    }
}

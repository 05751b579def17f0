//! What layers add to the residual stream, and what tokens give to layers: kernels that few models need.

use sharpi::{
    cuda::{
        launches::{self, BranchSum, Chunk},
        params::TokenInputsParams,
        tensor_types::KernelType,
    },
    model::ops::SUPPRESSED,
};

use crate::{
    common::gpu::TestResult,
    harness::{
        Buffer, CHUNK_LENS, EPSILON, Findings, activate, activation_of, device, floats,
        norm_weights, random, run, sum_of_squares,
    },
    matrices::{TYPES, Weights},
    quantized::{Output, check_normed},
};

/// `(x + rms_norm(factor * branch)) * scale` of one token.
fn summed(x: &[f32], branch: &[f32], factor: f32, norm: Option<&[f32]>, scale: f32) -> Vec<f64> {
    let mean = f64::from(factor).powi(2) * sum_of_squares(branch) / branch.len() as f64;
    let divisor = (mean + f64::from(EPSILON)).sqrt();
    let sum = |i: usize| {
        let value = f64::from(factor) * f64::from(branch[i]);
        let value = norm.map_or(value, |norm| value / divisor * f64::from(norm[i]));
        (f64::from(x[i]) + value) * f64::from(scale)
    };
    (0..x.len()).map(sum).collect()
}

pub fn branches_are_normalized_and_added() -> TestResult {
    let (mut random, mut findings) = (random(21), Findings::default());
    for columns in [64, 256, 640, 2560, 5376] {
        for (normed, scale, read_as_it_is) in
            [(true, 1.0, false), (true, 0.3, true), (false, 0.7, false)]
        {
            let case = format!("{columns}, norm {normed}, scale {scale}");
            let x = floats(&mut random, columns, 3.0);
            let branch = floats(&mut random, columns, 1.5);
            let norm = norm_weights(&mut random, columns);
            let next_norm = match read_as_it_is {
                true => vec![1.0; columns],
                false => norm_weights(&mut random, columns),
            };
            let buffers = [&x, &branch, &norm, &next_norm].map(|values| Buffer::new(values));
            let [x_buffer, branch_buffer, norm_buffer, next_buffer] = buffers;
            let (x_buffer, branch_buffer) = (x_buffer?, branch_buffer?);
            let (norm_buffer, next_buffer) = (norm_buffer?, next_buffer?);
            let sum = BranchSum {
                norm: if normed { norm_buffer.address() } else { 0 },
                epsilon: EPSILON,
                scale,
            };
            let next = Output::new(columns)?;
            let launch = launches::add_branch(
                device()?,
                x_buffer.address(),
                branch_buffer.address(),
                sum,
                columns,
                if read_as_it_is {
                    0
                } else {
                    next_buffer.address()
                },
                next.normed(),
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let ours: Vec<f32> = x_buffer.read()?;
            let weights = normed.then_some(&norm[..]);
            let reference = summed(&x, &branch, 1.0, weights, scale);
            let widened = ours.iter().map(|&v| f64::from(v));
            findings.relative("sums", &case, &reference, widened, 1e-6);
            let values = next.read(&mut findings, &case)?;
            check_normed(&mut findings, &case, &values, &ours, &next_norm);
            next.check_squares(&mut findings, &case, &ours)?;
        }
    }
    for columns in [256, 523, 640, 1026, 5376] {
        for tokens in CHUNK_LENS {
            let (normed, case) = (tokens % 3 != 0, format!("{columns} x {tokens}"));
            let x = floats(&mut random, columns * tokens, 3.0);
            let branch = floats(&mut random, columns * tokens, 1.5);
            let norm = norm_weights(&mut random, columns);
            let (x_buffer, branch_buffer) = (Buffer::new(&x)?, Buffer::new(&branch)?);
            let norm_buffer = Buffer::new(&norm)?;
            let sum = BranchSum {
                norm: if normed { norm_buffer.address() } else { 0 },
                epsilon: EPSILON,
                scale: 0.6,
            };
            let launch = launches::add_branch_tokens(
                device()?,
                x_buffer.address(),
                branch_buffer.address(),
                16.0,
                sum,
                columns,
                Chunk { tokens },
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let weights = normed.then_some(&norm[..]);
            let pairs = x.chunks_exact(columns).zip(branch.chunks_exact(columns));
            let reference: Vec<f64> = pairs
                .flat_map(|(x, branch)| summed(x, branch, 16.0, weights, 0.6))
                .collect();
            let ours: Vec<f32> = x_buffer.read()?;
            let ours = ours.into_iter().map(f64::from);
            findings.relative("sums of a chunk", &case, &reference, ours, 1e-6);
        }
    }
    findings.verdict()
}

pub fn tokens_give_every_layer_its_input() -> TestResult {
    const TOKENS: [i32; 3] = [5, 0, 3];
    let (mut random, mut findings) = (random(22), Findings::default());
    for (index, tensor_type) in TYPES.into_iter().enumerate() {
        let (width, layers) = ([256, 64][index % 2], 8);
        let columns = width * layers;
        let table = Weights::new(&mut random, tensor_type, (6, columns))?;
        let projected = floats(&mut random, columns * TOKENS.len(), 2.0);
        let norm = norm_weights(&mut random, width);
        let rms = [0.5f32, 2.0, 11.0];
        let scaled = index % 3 != 0;
        let projected_buffer = Buffer::new(&projected)?;
        let buffers = (
            Buffer::new(&norm)?,
            Buffer::new(&rms)?,
            Buffer::new(&TOKENS)?,
        );
        let params = TokenInputsParams {
            table: table.matrix.address,
            token: buffers.2.address(),
            projected: projected_buffer.address(),
            rms: if scaled { buffers.1.address() } else { 0 },
            norm: buffers.0.address(),
            row_scale: 16.0,
            projection_scale: 0.02,
            sum_scale: 0.7,
            epsilon: EPSILON,
            tensor_type: KernelType::of(tensor_type)?.id,
            width: width as i32,
        };
        let chunk = Chunk {
            tokens: TOKENS.len(),
        };
        let launch = launches::token_inputs(device()?, layers, params, chunk)?;
        // SAFETY: the launch is that of these buffers, which outlive it.
        unsafe { run(&launch)? };
        let mut reference = Vec::new();
        for (i, token) in TOKENS.into_iter().enumerate() {
            let row = &table.values[token as usize * columns..][..columns];
            let projected = &projected[i * columns..][..columns];
            let parts = row.chunks_exact(width).zip(projected.chunks_exact(width));
            for (row, projected) in parts {
                let factor = 0.02f32 * if scaled { rms[i] } else { 1.0 };
                let row: Vec<f32> = row.iter().map(|v| v * 16.0).collect();
                reference.extend(summed(&row, projected, factor, Some(&norm), 0.7));
            }
        }
        let ours: Vec<f32> = projected_buffer.read()?;
        let ours = ours.into_iter().map(f64::from);
        let case = format!("{} of {width}", table.shape());
        findings.relative("inputs", &case, &reference, ours, 2e-6);
    }

    for columns in [64, 96, 256, 1000] {
        let activation = activation_of(columns / 32);
        let (gate, up) = (
            floats(&mut random, columns, 3.0),
            floats(&mut random, columns, 3.0),
        );
        let (gate_buffer, up_buffer) = (Buffer::new(&gate)?, Buffer::new(&up)?);
        let out = Output::new(columns)?;
        let launch = launches::gate_token(
            device()?,
            gate_buffer.address(),
            up_buffer.address(),
            columns,
            activation,
            out.normed().activation,
        )?;
        // SAFETY: the launch is that of these buffers, which outlive it.
        unsafe { run(&launch)? };
        let pairs = gate.iter().zip(&up);
        let reference: Vec<f64> = pairs
            .map(|(&gate, &up)| activate(activation, gate.into()) * f64::from(up))
            .collect();
        let case = format!("{columns} gated by {activation:?}");
        let ours = out.read(&mut findings, &case)?.into_iter().map(f64::from);
        findings.relative("gated inputs", &case, &reference, ours, 2e-6);
    }
    findings.verdict()
}

pub fn logits_are_capped_and_suppressed() -> TestResult {
    let (mut random, mut findings) = (random(23), Findings::default());
    let suppressed = [3i32, 999];
    let suppressed_buffer = Buffer::new(&suppressed)?;
    for tokens in [1, 5] {
        for (softcap, count) in [(30.0, 0), (30.0, 2), (0.0, 1)] {
            let logits = floats(&mut random, 1000 * tokens, 40.0);
            let buffer = Buffer::new(&logits)?;
            let launch = launches::finish_logits(
                device()?,
                buffer.address(),
                softcap,
                suppressed_buffer.address(),
                count,
                1000,
                Chunk { tokens },
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let cap = f64::from(softcap);
            let finished = |(i, &logit): (usize, &f32)| match f64::from(logit) {
                _ if suppressed[..count].contains(&((i % 1000) as i32)) => f64::from(SUPPRESSED),
                logit if softcap == 0.0 => logit,
                logit => cap * (logit / cap).tanh(),
            };
            let expected: Vec<f64> = logits.iter().enumerate().map(finished).collect();
            let ours: Vec<f32> = buffer.read()?;
            let close = |(expected, ours): (&f64, &f32)| {
                (expected - f64::from(*ours)).abs() <= 1e-6 * expected.abs().max(1.0)
            };
            findings.holds(expected.iter().zip(&ours).all(close), || {
                format!("{tokens} tokens, cap {softcap}, {count} suppressed: another logit")
            });
        }
    }
    findings.verdict()
}

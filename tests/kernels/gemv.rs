//! Products with one quantized vector.

use sharpi::{
    cuda::{
        Matrix,
        launches::{self, Linear},
    },
    quant::TensorType::*,
};

use crate::{
    common::{gguf_writer::Random, gpu::TestResult},
    harness::{
        Buffer, EPSILON, Findings, activation_of, device, floats, norm_weights, random, run,
    },
    matrices::{SHAPES, Sum, TYPES, Weights},
    quantized::{Input, Output, check_normed},
};

/// Float32 sums of a few thousand terms.
const DECODE_BOUND: f64 = 2e-5;

pub fn gemv_store_multiplies_and_adds_bias() -> TestResult {
    let (mut random, mut findings) = (random(2), Findings::default());
    let check = |random: &mut Random, findings: &mut Findings, weights: &[Weights], bias: bool| {
        let input = Input::new(random, weights[0].matrix.columns)?;
        let mut linears = Vec::new();
        let mut buffers = Vec::new();
        for weights in weights {
            let rows = weights.matrix.rows;
            let bias = if bias {
                floats(random, rows, 1.0)
            } else {
                Vec::new()
            };
            let (bias_buffer, out) = (Buffer::new(&bias)?, Buffer::poisoned(rows * 4)?);
            linears.push(Linear {
                weights: weights.matrix,
                bias: if bias.is_empty() {
                    0
                } else {
                    bias_buffer.address()
                },
                out: out.address(),
            });
            buffers.push((bias, bias_buffer, out));
        }
        let launch = launches::gemv_store(device()?, &linears, input.normed(), EPSILON)?;
        // SAFETY: the launch is that of these buffers, which outlive it.
        unsafe { run(&launch)? };
        for (weights, (bias, _, out)) in weights.iter().zip(&buffers) {
            let mut reference = input.product(weights);
            for (sum, &bias) in reference.iter_mut().zip(bias) {
                *sum = sum.affine(1.0, bias.into());
            }
            let case = format!("{}, {} matrices", weights.shape(), buffers.len());
            findings.sums("products", &case, &reference, &out.read()?, DECODE_BOUND);
        }
        anyhow::Ok(())
    };
    for tensor_type in TYPES {
        let any = (1 + random.below(700), 32 * (3 + random.below(80)));
        for shape in SHAPES.into_iter().chain([any]) {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            check(&mut random, &mut findings, &[weights], shape.0 % 2 == 0)?;
        }
    }
    for types in [
        [Q4_K, Q4_K, Q6_K],
        [Q4_K, Q4_K, Q4_K],
        [F16, Q8_0, F32],
        [Q5_0, BF16, Q4_1],
        [Q5_K, Q5_1, Q4_0],
        [Q2_K, Q2_K, Q3_K],
        [IQ4_XS, MXFP4, IQ4_NL],
        [IQ3_XXS, IQ3_S, IQ2_S],
    ] {
        for (rows, columns) in [
            ([577, 33, 7], 1536),
            ([1, 577, 33], 4864),
            ([512, 128, 128], 512),
        ] {
            for bias in [false, true] {
                let mut weights = Vec::new();
                for (tensor_type, rows) in types.into_iter().zip(rows) {
                    weights.push(Weights::new(&mut random, tensor_type, (rows, columns))?);
                }
                check(&mut random, &mut findings, &weights, bias)?;
            }
        }
    }
    findings.verdict()
}

pub fn gemv_store_multiplies_what_it_activates() -> TestResult {
    let (mut random, mut findings) = (random(17), Findings::default());
    for (count, tensor_type) in TYPES.into_iter().enumerate() {
        for shape in SHAPES {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            let Matrix { rows, columns, .. } = weights.matrix;
            let input = Input::new(&mut random, columns)?;
            let factors = floats(&mut random, rows, 1.0);
            let (factor_buffer, out) = (Buffer::new(&factors)?, Buffer::poisoned(rows * 4)?);
            let linear = Linear {
                weights: weights.matrix,
                bias: 0,
                out: out.address(),
            };
            let activation = activation_of(count);
            let launch = launches::gemv_store_gated(
                device()?,
                linear,
                input.activation(),
                activation,
                factor_buffer.address(),
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let sums = weights.times(input.met_by(tensor_type)).into_iter();
            let exact = |&value: &f32| Sum {
                value: value.into(),
                spread: 0.0,
            };
            let factors = factors.iter().map(exact);
            let reference: Vec<Sum> = sums
                .zip(factors)
                .map(|(sum, factor)| Sum::gated(activation, sum, factor))
                .collect();
            let case = weights.shape();
            findings.sums(
                "gated values",
                &case,
                &reference,
                &out.read()?,
                DECODE_BOUND,
            );
        }
    }
    findings.verdict()
}

pub fn gemv_add_adds_to_the_residual_and_prepares_the_norm() -> TestResult {
    let (mut random, mut findings) = (random(3), Findings::default());
    for tensor_type in TYPES {
        let any = (1 + random.below(700), 32 * (3 + random.below(80)));
        for shape in SHAPES.into_iter().chain([any]) {
            let weights = Weights::new(&mut random, tensor_type, shape)?;
            let (case, Matrix { rows, columns, .. }) = (weights.shape(), weights.matrix);
            let input = Input::new(&mut random, columns)?;
            let old = floats(&mut random, rows, 1.0);
            let norm = norm_weights(&mut random, rows);
            let (x, norm_buffer) = (Buffer::new(&old)?, Buffer::new(&norm)?);
            let next = Output::new(rows)?;
            let launch = launches::gemv_add(
                device()?,
                weights.matrix,
                input.activation(),
                x.address(),
                norm_buffer.address(),
                next.normed(),
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let sums = weights.times(input.met_by(tensor_type)).into_iter();
            let sums = sums
                .zip(&old)
                .map(|(sum, &old)| sum.affine(1.0, old.into()));
            let reference: Vec<Sum> = sums.collect();
            let x: Vec<f32> = x.read()?;
            findings.sums("residuals", &case, &reference, &x, DECODE_BOUND);
            let values = next.read(&mut findings, &case)?;
            check_normed(&mut findings, &case, &values, &x, &norm);
            next.check_squares(&mut findings, &case, &x)?;
        }
    }
    findings.verdict()
}

pub fn gemv_gate_gates_and_quantizes() -> TestResult {
    let (mut random, mut findings) = (random(4), Findings::default());
    let same = TYPES.map(|tensor_type| (tensor_type, tensor_type));
    let mixed = [
        (Q4_K, Q6_K),
        (F16, Q4_0),
        (Q8_0, F32),
        (BF16, F16),
        (Q3_K, Q4_K),
        (IQ2_S, IQ3_S),
    ];
    let mut count = 0;
    for (gate_type, up_type) in same.into_iter().chain(mixed) {
        for (rows, columns) in SHAPES {
            let block_len = gate_type.block_len().max(up_type.block_len());
            let shape = (rows, columns.next_multiple_of(block_len));
            let gate = Weights::new(&mut random, gate_type, shape)?;
            let up = Weights::new(&mut random, up_type, shape)?;
            let input = Input::new(&mut random, shape.1)?;
            let out = Output::new(rows)?;
            count += 1;
            let activation = activation_of(count);
            let launch = launches::gemv_gate(
                device()?,
                gate.matrix,
                up.matrix,
                activation,
                input.normed(),
                EPSILON,
                out.normed().activation,
            )?;
            // SAFETY: the launch is that of these buffers, which outlive it.
            unsafe { run(&launch)? };
            let pairs = input.product(&gate).into_iter().zip(input.product(&up));
            let reference: Vec<Sum> = pairs.map(|(g, u)| Sum::gated(activation, g, u)).collect();
            let case = format!("{} and {}", gate.shape(), up.shape());
            let values = out.read(&mut findings, &case)?;
            findings.sums("gated values", &case, &reference, &values, DECODE_BOUND);
        }
    }
    findings.verdict()
}

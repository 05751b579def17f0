//! `sharpi bench`: tokens per second, in the rows of llama-bench, and how far from the memory's own speed they are.

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    backend::{self, Compute},
    escape::escaped,
    exit::Outcome,
    interrupt::Interrupt,
    output::{WRITING, write_json_line},
    progress::{CountBar, Spinner},
    resolve::ModelSource,
};
use crate::{
    backend::{Backend, StepReport},
    cuda,
    engine::{Kind, Workload, measure},
    model::ops,
};

pub struct BenchRequest {
    pub model: ModelSource,
    pub compute: Compute,
    pub workloads: Vec<Workload>,
    pub repetitions: usize,
    /// Time every decode row with graphs off, too.
    pub compare_graph: bool,
    /// Read prompts through the layers that could be skipped.
    pub all_layers: bool,
    pub json: bool,
}

/// What the device gives at best, where it is known.
#[derive(Clone, Copy)]
struct Ceilings {
    bytes_per_second: Option<f64>,
    operations_per_second: Option<f64>,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Report {
    model: String,
    backend: &'static str,
    device: String,
    /// What a kernel reads that does nothing else; `None` on the CPU.
    read_ceiling_gb_per_second: Option<f64>,
    /// What cuBLASLt reaches on float16 matrices; `None` on the CPU and without cuBLASLt.
    gemm_ceiling_tflops: Option<f64>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    /// As llama-bench names it.
    test: String,
    tokens_per_second: f64,
    standard_deviation: f64,
    samples_tokens_per_second: Vec<f64>,
    cuda_graph: bool,
    /// Of decode rows on CUDA: what computed a token.
    step_kernel: Option<StepReport>,
    /// Of decode rows: weights and KV cache.
    bytes_per_token: Option<u64>,
    gb_per_second: Option<f64>,
    fraction_of_read_ceiling: Option<f64>,
    /// Of prompt rows: the matrices' multiplications and additions, attention's not counted.
    tflops: Option<f64>,
    fraction_of_gemm_ceiling: Option<f64>,
    /// Of decode rows with `--compare-graph`: the speed with graphs over that without.
    graph_speedup: Option<f64>,
}

pub fn run(request: &BenchRequest) -> Result<Outcome> {
    Interrupt::catch()?;
    let show_progress = request.compute.show_progress;
    let spinner = Spinner::loading(show_progress, &request.model.name());
    let mut opening = request.compute.clone().open();
    let mut model = request.model.open(request.compute.context_len)?;
    if request.all_layers {
        let decoder = Arc::get_mut(&mut model.decoder);
        ops::select_late(&mut decoder.context("the model is in use already")?.ops);
    }
    let gpu = opening.gpu()?;
    // Before the weights are there, while the memory that it reads is free.
    let ceilings = Ceilings {
        bytes_per_second: gpu.as_ref().map(cuda::read_ceiling).transpose()?,
        operations_per_second: match &gpu {
            Some(gpu) => cuda::gemm_ceiling(gpu)?,
            None => None,
        },
    };
    let mut backend: Box<dyn Backend> = match gpu {
        Some(gpu) => Box::new(backend::on_gpu(gpu, &request.compute, &model.decoder)?),
        None => backend::on_cpu(&request.compute, &model.decoder)?,
    };
    drop(spinner);
    let mut report = Report {
        model: model.gguf.name().to_owned(),
        backend: backend.name(),
        device: backend.device().to_owned(),
        read_ceiling_gb_per_second: ceilings.bytes_per_second.map(|rate| rate / 1e9),
        gemm_ceiling_tflops: ceilings.operations_per_second.map(|rate| rate / 1e12),
        rows: Vec::new(),
    };
    let mut out = io::stdout().lock();
    if !request.json {
        write_head(&mut out, &report).context(WRITING)?;
    }
    for &workload in &request.workloads {
        let time = |backend: &mut dyn Backend| {
            let measuring = format!("measuring {}", workload.name());
            let mut bar = CountBar::new(show_progress, &measuring, "tokens");
            let samples = measure(backend, workload, request.repetitions, &mut |done, all| {
                bar.update(done, all)
            })
            .context(measuring)?;
            let operations = model.decoder.operations(workload.tokens);
            anyhow::Ok(Row::new(workload, &samples, backend, operations, ceilings))
        };
        let mut rows = Vec::new();
        if request.compare_graph && workload.kind == Kind::Generate {
            backend.set_graph(Some("--compare-graph".to_owned()));
            rows.push(time(&mut *backend)?);
            backend.set_graph(None);
        }
        rows.push(time(&mut *backend)?);
        if let [direct, graph] = &mut rows[..] {
            graph.graph_speedup = Some(graph.tokens_per_second / direct.tokens_per_second);
        }
        for row in rows {
            if !request.json {
                write_row(&mut out, &row).context(WRITING)?;
            }
            report.rows.push(row);
        }
    }
    if request.json {
        write_json_line(&mut out, &report).context(WRITING)?;
    }
    Ok(Outcome::Done)
}

impl Row {
    /// `operations`: of the matrices, for the whole workload read as a prompt.
    fn new(
        workload: Workload,
        samples: &[Duration],
        backend: &dyn Backend,
        operations: f64,
        ceilings: Ceilings,
    ) -> Self {
        let rate = |time: &Duration| workload.tokens as f64 / time.as_secs_f64();
        let rates: Vec<f64> = samples.iter().map(rate).collect();
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        let squares: f64 = rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        let generate = workload.kind == Kind::Generate;
        // Averaged over the row: the cache grows by a token each step.
        let bytes = generate.then(|| backend.bytes_per_token(workload.depth + workload.tokens / 2));
        let bytes_per_second = bytes.map(|bytes| bytes as f64 * mean);
        let operations_per_second =
            (!generate).then_some(operations * mean / workload.tokens as f64);
        let fraction = |rate: Option<f64>, ceiling: Option<f64>| Some(rate? / ceiling?);
        Self {
            test: workload.name(),
            tokens_per_second: mean,
            standard_deviation: (squares / (rates.len() - 1).max(1) as f64).sqrt(),
            samples_tokens_per_second: rates,
            cuda_graph: backend.graph_report().is_some_and(|report| report.enabled),
            step_kernel: backend.step_report().filter(|_| generate).cloned(),
            bytes_per_token: bytes,
            gb_per_second: bytes_per_second.map(|rate| rate / 1e9),
            fraction_of_read_ceiling: fraction(bytes_per_second, ceilings.bytes_per_second),
            tflops: operations_per_second.map(|rate| rate / 1e12),
            fraction_of_gemm_ceiling: fraction(
                operations_per_second,
                ceilings.operations_per_second,
            ),
            graph_speedup: None,
        }
    }
}

fn write_head(out: &mut impl Write, report: &Report) -> io::Result<()> {
    writeln!(out, "model   {}", escaped(&report.model))?;
    writeln!(out, "device  {}, {}", report.backend, report.device)?;
    if let Some(ceiling) = report.read_ceiling_gb_per_second {
        writeln!(out, "reads   {ceiling:.0} GB/s at best, measured here")?;
        match report.gemm_ceiling_tflops {
            Some(ceiling) => writeln!(
                out,
                "GEMM    {ceiling:.0} TFLOP/s at best, cuBLASLt in float16 measured here"
            )?,
            None => writeln!(
                out,
                "GEMM    no ceiling: cuBLASLt (libcublasLt.so) was not found"
            )?,
        }
    }
    writeln!(
        out,
        "\n{:<16} {:>6} {:>9} {:>20} {:>10} {:>14} {:>8} {:>8}",
        "test", "graph", "kernel", "tokens/s", "MB/token", "rate", "ceiling", "speedup"
    )
}

fn write_row(out: &mut impl Write, row: &Row) -> io::Result<()> {
    let optional = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let kernel = row.step_kernel.as_ref().map(|step| match step.enabled {
        true => "step".to_owned(),
        false => "separate".to_owned(),
    });
    let speed = format!(
        "{:.1} ± {:.1}",
        row.tokens_per_second, row.standard_deviation
    );
    let bytes = row
        .bytes_per_token
        .map(|bytes| format!("{:.1}", bytes as f64 / 1e6));
    let gb_per_second = row.gb_per_second.map(|rate| format!("{rate:.0} GB/s"));
    let tflops = row.tflops.map(|rate| format!("{rate:.1} TFLOP/s"));
    let fraction = row
        .fraction_of_read_ceiling
        .or(row.fraction_of_gemm_ceiling);
    writeln!(
        out,
        "{:<16} {:>6} {:>9} {speed:>20} {:>10} {:>14} {:>8} {:>8}",
        row.test,
        if row.cuda_graph { "on" } else { "off" },
        optional(kernel),
        optional(bytes),
        optional(gb_per_second.or(tflops)),
        optional(fraction.map(|fraction| format!("{:.1}%", fraction * 100.0))),
        optional(row.graph_speedup.map(|ratio| format!("{ratio:.2}x"))),
    )?;
    out.flush()
}

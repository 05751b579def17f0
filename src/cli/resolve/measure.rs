//! `sharpi bench`, `perplexity` and `verify`.

use anyhow::Result;

use super::{
    machine::{compute, with_graph},
    model::model,
    usage,
};
use crate::{
    cli::{
        args::{BenchArgs, MOST_TOKENS, VerbosityArgs},
        bench::BenchRequest,
    },
    engine::{Kind, Workload},
};

/// The rows of a benchmark: for each depth all prompts, then all generations.
pub fn bench(args: BenchArgs, verbosity: &VerbosityArgs) -> Result<BenchRequest> {
    let mut workloads = Vec::new();
    for &depth in &args.n_depth {
        for (kind, lengths) in [
            (Kind::Prompt, &args.n_prompt),
            (Kind::Generate, &args.n_gen),
        ] {
            let lengths = lengths.iter().filter(|&&tokens| tokens > 0);
            workloads.extend(lengths.map(|&tokens| Workload {
                kind,
                tokens,
                depth,
            }));
        }
    }
    let Some(longest) = workloads.iter().max_by_key(|w| w.depth + w.tokens) else {
        return Err(usage(
            "nothing to measure: give --n-prompt or --n-gen a number above 0",
        ));
    };
    let context_len = longest.depth + longest.tokens;
    if context_len > MOST_TOKENS {
        return Err(usage(&format!(
            "{} takes a context of {context_len} tokens, and at most {MOST_TOKENS} are possible: lower --n-depth, \
             --n-prompt or --n-gen",
            longest.name()
        )));
    }
    let flags = "--n-depth, --n-prompt and --n-gen";
    let compute = compute(args.machine, Some(context_len), flags, verbosity);
    Ok(BenchRequest {
        compute: match args.compare_graph {
            true => with_graph("--compare-graph", compute)?,
            false => compute,
        },
        model: model(args.model.into(), Some(args.rope), verbosity)?,
        workloads,
        repetitions: args.repetitions,
        compare_graph: args.compare_graph,
        all_layers: args.all_layers,
        json: args.json,
    })
}

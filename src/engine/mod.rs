//! From a prompt to a stream of tokens: the session over a backend, the generation loop and sampling.

mod answer;
mod bench;
mod constraint;
mod evaluate;
mod generate;
mod json_schema;
mod prompt_cache;
mod reasoning;
mod sampling;
mod session;
mod text_stream;
mod verify;

pub use crate::backend::SamplingParams;
pub use bench::{Kind, Workload, made_up_tokens, measure};
pub use constraint::{Constraint, Grammar, Guide};
pub use evaluate::{Divergence, Evaluation, evaluate};
pub use generate::{
    FinishReason, GenerateOptions, Generation, Logprobs, Observer, Timings, TokenEvent, generate,
};
pub use prompt_cache::{Identity, PromptCache, model_id};
pub use reasoning::unmarked;
pub use sampling::{Sampler, log_softmax_denominator};
pub use session::{Session, SessionStream};
pub use text_stream::TextStream;
pub use verify::{Comparison, Trace};

//! From what was typed to what the commands need: conflicts refused, files read, defaults filled in. Nothing below
//! this layer asks the command line anything.

use std::{
    env,
    ffi::OsString,
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap_complete::Shell;
use serde::de::DeserializeOwned;

use super::{
    args::{
        self, BenchArgs, Device, MOST_TOKENS, MachineArgs, ModelArgs, PromptArgs, RopeArgs,
        RunArgs, SamplingArgs, TokenizeArgs, VerbosityArgs,
    },
    backend::Compute,
    bench::BenchRequest,
    exit::UsageError,
    perplexity::PerplexityRequest,
    progress,
    verify::VerifyRequest,
};
use crate::{
    backend::KvOptions,
    cuda::StepKernel,
    engine::{Kind, SamplingParams, Workload},
    model::{
        self, ChatTemplate, Decoder, Gguf, Message, Model, Prompt, RopeOptions, TemplateOptions,
        arch::{self, RopeScalingType},
    },
};

/// One command, ready to be carried out.
pub enum Request {
    Run(Box<RunRequest>),
    Info {
        model: ModelSource,
        json: bool,
    },
    Tokenize(TokenizeRequest),
    Bench(BenchRequest),
    Perplexity(PerplexityRequest),
    Verify(VerifyRequest),
    Devices,
    Completions(Shell),
    /// Of a command, or of all.
    Man(Option<String>),
}

pub struct RunRequest {
    pub model: ModelSource,
    pub input: Input,
    /// `None`: until the end of the answer or of the context.
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub sampling: SamplingFlags,
    pub format: Format,
    pub compute: Compute,
}

pub struct TokenizeRequest {
    pub model: ModelSource,
    pub input: Input,
    pub json: bool,
}

/// What goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    /// With the `top_logprobs` likeliest tokens at every step.
    Json {
        top_logprobs: Option<usize>,
    },
}

/// Where the model comes from.
pub enum ModelSource {
    File(PathBuf, RopeOptions),
    Demo,
}

impl ModelSource {
    /// For a context of `context_len` tokens, where that many are asked for.
    pub fn open(&self, context_len: Option<usize>) -> Result<Model> {
        Model::of_architectures(self.open_gguf()?, arch::ALL, &self.rope(context_len))
    }

    /// What `gguf`, this file, computes, for a context likewise.
    pub fn describe(&self, gguf: &Gguf, context_len: Option<usize>) -> Result<Arc<Decoder>> {
        let decoder = arch::describe(gguf, arch::ALL, &self.rope(context_len))
            .with_context(|| format!("cannot load {}", gguf.name()))?;
        Ok(decoder.into())
    }

    /// The file alone, whether or not it is a model that can be run.
    pub fn open_gguf(&self) -> Result<Gguf> {
        match self {
            Self::File(path, _) => Gguf::open(path),
            Self::Demo => model::demo(),
        }
    }

    /// What takes the place of the file's own positions, for a context likewise.
    pub fn rope(&self, context_len: Option<usize>) -> RopeOptions {
        let rope = match self {
            Self::File(_, rope) => rope.clone(),
            Self::Demo => RopeOptions::default(),
        };
        RopeOptions {
            context_len,
            ..rope
        }
    }

    /// What to call it while it is being loaded.
    pub fn name(&self) -> String {
        match self {
            Self::File(path, _) => path.display().to_string(),
            Self::Demo => "the demo model".to_owned(),
        }
    }
}

/// The text that a model is to read.
pub enum Input {
    /// As it is.
    Raw(String),
    /// Through the model's chat template.
    Chat {
        messages: Vec<Message>,
        options: TemplateOptions,
    },
}

impl Input {
    /// Renders the text with the template of the file called `name`.
    pub fn render(&self, template: Option<&ChatTemplate>, name: &str) -> Result<Prompt> {
        match self {
            Self::Raw(text) => Ok(Prompt::raw(text)),
            Self::Chat { messages, options } => {
                let template = template.with_context(|| {
                    format!(
                        "{name} has no chat template (tokenizer.chat_template): give the prompt as the model is to read it, \
                         to `run` with --raw and to `tokenize` without --chat"
                    )
                })?;
                let prompt = template.render(messages, options)?;
                if prompt.depends_on_clock() {
                    tracing::debug!(
                        "the chat template asks what day it is, so the prompt changes with the day; --date fixes it"
                    );
                }
                Ok(prompt)
            }
        }
    }
}

/// Turns what was typed into a request, reading the files that it names except for the model.
pub fn resolve(command: args::Command, verbosity: &VerbosityArgs) -> Result<Request> {
    Ok(match command {
        args::Command::Run(args) => Request::Run(Box::new(run(*args, verbosity)?)),
        args::Command::Info(args) => Request::Info {
            model: model(args.model, None)?,
            json: args.json,
        },
        args::Command::Tokenize(args) => Request::Tokenize(tokenize(args)?),
        args::Command::Bench(args) => Request::Bench(bench(args, verbosity)?),
        args::Command::Perplexity(args) => Request::Perplexity(PerplexityRequest {
            text: read_text("--file", &args.file)?,
            model: model(args.model, Some(args.rope))?,
            compute: compute(args.machine, Some(args.ctx_size), "--ctx-size", verbosity),
            window: args.ctx_size,
            kl: args.kl,
        }),
        args::Command::Verify(args) => Request::Verify(VerifyRequest {
            compute: with_graph(
                "verify",
                compute(args.machine, None, "--prompt and --max-tokens", verbosity),
            )?,
            model: model(args.model, Some(args.rope))?,
            cpu: args.cpu,
            tokens: args.max_tokens,
            prompt: args.prompt,
        }),
        args::Command::Devices => Request::Devices,
        args::Command::Completions { shell } => Request::Completions(shell),
        args::Command::Man { command } => Request::Man(command),
    })
}

fn run(mut args: RunArgs, verbosity: &VerbosityArgs) -> Result<RunRequest> {
    take_short_form(&mut args)?;
    Ok(RunRequest {
        input: if args.raw {
            Input::Raw(text(&args.prompt)?)
        } else {
            chat(args.prompt)?
        },
        model: model(args.model, Some(args.rope))?,
        max_tokens: args.max_tokens,
        stop: args.stop,
        ignore_eos: args.ignore_eos,
        sampling: SamplingFlags(args.sampling),
        format: match args.json {
            true => Format::Json {
                top_logprobs: args.logprobs,
            },
            false => Format::Text,
        },
        compute: compute(
            args.machine,
            (args.ctx_size > 0).then_some(args.ctx_size),
            "--ctx-size",
            verbosity,
        ),
    })
}

/// Takes `[MODEL] [PROMPT]` for what `--model` and `--prompt` give.
fn take_short_form(args: &mut RunArgs) -> Result<()> {
    let is_file = |name: &OsString| Path::new(name).extension().is_some_and(|e| e == "gguf");
    let (model, prompt) = match (args.first.take(), args.second.take()) {
        (Some(one), None) if args.model.model.is_some() => (None, Some(one)),
        (Some(one), None) if default_model().is_some() && !is_file(&one) => (None, Some(one)),
        both => both,
    };
    let twice = |what, flag| {
        usage(&format!(
            "the {what} is given twice, as an argument and with {flag}"
        ))
    };
    if let Some(model) = model
        && args.model.model.replace(model.into()).is_some()
    {
        return Err(twice("model", "--model"));
    }
    if let Some(prompt) = prompt {
        let prompt = prompt
            .into_string()
            .map_err(|_| usage("the prompt is not UTF-8 text"))?;
        if args.prompt.messages.is_some() {
            return Err(usage(
                "a prompt as an argument cannot be used with --messages",
            ));
        }
        if args.prompt.prompt.replace(prompt).is_some() {
            return Err(twice("prompt", "--prompt"));
        }
    }
    Ok(())
}

/// The model where none is given.
fn default_model() -> Option<PathBuf> {
    env::var_os("SHARPI_MODEL")
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
}

fn compute(
    args: MachineArgs,
    context_len: Option<usize>,
    context_flags: &'static str,
    verbosity: &VerbosityArgs,
) -> Compute {
    Compute {
        device: args.device,
        threads: args.threads.unwrap_or(0),
        graph_disabled: forbidden(args.no_cuda_graph, "--no-cuda-graph", "SHARPI_CUDA_GRAPH"),
        step_kernel: step_kernel(args.no_step_kernel),
        ubatch: args.ubatch,
        context_len,
        kv: KvOptions {
            tiles: args.kv_type.tiles(),
            budget: args.kv_budget,
        },
        context_flags,
        show_progress: progress::wanted(verbosity),
    }
}

/// When the step kernel computes tokens: the flag or the variable forbids it, or the variable asks for it in any case.
fn step_kernel(forbidden_by_flag: bool) -> StepKernel {
    const VARIABLE: &str = "SHARPI_STEP_KERNEL";
    match forbidden(forbidden_by_flag, "--no-step-kernel", VARIABLE) {
        Some(forbids) => StepKernel::Never(forbids),
        None if env::var_os(VARIABLE).is_some_and(|value| value == "1") => StepKernel::Always,
        None => StepKernel::WhereFaster,
    }
}

/// What forbids a way of computing: the flag, where it is given, or else the environment's variable.
fn forbidden(given: bool, flag: &str, variable: &str) -> Option<String> {
    let is_zero = || env::var_os(variable).is_some_and(|value| value == "0");
    match given {
        true => Some(flag.to_owned()),
        false => is_zero().then(|| format!("{variable}=0")),
    }
}

/// For `what` compares a graph with direct launches: a GPU, and nothing that forbids the graph.
fn with_graph(what: &str, compute: Compute) -> Result<Compute> {
    if let Some(forbids) = &compute.graph_disabled {
        return Err(usage(&format!(
            "{what} compares the CUDA graph with direct launches, and {forbids} forbids the graph: use one or the other"
        )));
    }
    let device = match compute.device {
        Device::Cpu => {
            return Err(usage(&format!(
                "{what} compares ways of computing on a GPU, and --device cpu asks for none: use one or the other"
            )));
        }
        Device::Auto => Device::Cuda(0),
        gpu => gpu,
    };
    Ok(Compute { device, ..compute })
}

/// The rows of a benchmark: for each depth all prompts, then all generations.
fn bench(args: BenchArgs, verbosity: &VerbosityArgs) -> Result<BenchRequest> {
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
        model: model(args.model, Some(args.rope))?,
        workloads,
        repetitions: args.repetitions,
        compare_graph: args.compare_graph,
        all_layers: args.all_layers,
        json: args.json,
    })
}

fn tokenize(args: TokenizeArgs) -> Result<TokenizeRequest> {
    let PromptArgs {
        system,
        messages,
        no_think,
        tools,
        date,
        ..
    } = &args.prompt;
    let for_chat = system.is_some() || messages.is_some() || tools.is_some() || date.is_some();
    if !args.chat && (for_chat || *no_think) {
        return Err(usage(
            "--system, --messages, --tools, --date and --no-think are for the chat template: add --chat",
        ));
    }
    Ok(TokenizeRequest {
        input: if args.chat {
            chat(args.prompt)?
        } else {
            Input::Raw(text(&args.prompt)?)
        },
        model: model(args.model, None)?,
        json: args.json,
    })
}

/// Asked last, so that what is said about it does not precede an error of usage.
fn model(args: ModelArgs, rope: Option<RopeArgs>) -> Result<ModelSource> {
    let rope = rope.map(rope_options).unwrap_or_default();
    if let Some(path) = args.model.or_else(default_model) {
        return Ok(ModelSource::File(path, rope));
    }
    if rope != RopeOptions::default() {
        return Err(usage(
            "--rope-* and --yarn-* are for a model file: add --model FILE",
        ));
    }
    tracing::info!("no --model given: using the built-in demo model, which tells simple stories");
    Ok(ModelSource::Demo)
}

fn rope_options(args: RopeArgs) -> RopeOptions {
    RopeOptions {
        context_len: None,
        scaling: args.rope_scaling.map(|scaling| match scaling {
            args::RopeScaling::None => RopeScalingType::None,
            args::RopeScaling::Linear => RopeScalingType::Linear,
            args::RopeScaling::Yarn => RopeScalingType::Yarn,
        }),
        scale: args.rope_scale,
        freq_base: args.rope_freq_base,
        yarn_orig_ctx: args.yarn_orig_ctx,
        yarn_ext_factor: args.yarn_ext_factor,
        yarn_attn_factor: args.yarn_attn_factor,
        yarn_beta_fast: args.yarn_beta_fast,
        yarn_beta_slow: args.yarn_beta_slow,
    }
}

fn chat(args: PromptArgs) -> Result<Input> {
    let is_stdin = |path: &Option<PathBuf>| path.as_ref().is_some_and(|p| p.as_os_str() == "-");
    if is_stdin(&args.tools) && (is_stdin(&args.messages) || is_stdin(&args.file)) {
        return Err(usage(
            "standard input can be read once: give --tools, or the prompt, a file",
        ));
    }
    let messages = match &args.messages {
        Some(path) => read_messages(path)?,
        None => {
            let user = Message::new("user", text(&args)?);
            args.system
                .map(|content| Message::new("system", content))
                .into_iter()
                .chain([user])
                .collect()
        }
    };
    Ok(Input::Chat {
        messages,
        options: TemplateOptions {
            enable_thinking: args.no_think.then_some(false),
            tools: args.tools.map(|path| read_tools(&path)).transpose()?,
            date: args.date,
        },
    })
}

/// The prompt, the file, or both with a blank line between them.
fn text(args: &PromptArgs) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(prompt), None) => Ok(prompt.clone()),
        (None, Some(path)) => read_text("--file", path),
        (Some(prompt), Some(path)) => Ok(format!("{prompt}\n\n{}", read_text("--file", path)?)),
        (None, None) => {
            let piped = match io::stdin().is_terminal() {
                true => String::new(),
                false => read_text("the prompt", Path::new("-"))?,
            };
            if piped.is_empty() {
                return Err(usage(
                    "no prompt: give one with --prompt TEXT, --file FILE or --messages FILE, or on standard input",
                ));
            }
            Ok(piped)
        }
    }
}

fn read_messages(path: &Path) -> Result<Vec<Message>> {
    let expected = r#"[{"role":"user","content":"..."}, ...]"#;
    let messages: Vec<Message> = read_json("--messages", path, expected)?;
    match messages.last() {
        Some(last) if last.role() == "assistant" => {
            bail!(
                "--messages {}: the last turn is the assistant's; end with the turn to answer",
                path.display()
            )
        }
        Some(_) => Ok(messages),
        None => bail!(
            "--messages {}: the conversation has no turns",
            path.display()
        ),
    }
}

fn read_tools(path: &Path) -> Result<Vec<serde_json::Value>> {
    let expected = r#"[{"type":"function","function":{"name":"...", ...}}, ...]"#;
    read_json("--tools", path, expected)
}

/// Reads JSON, before which editors of Windows put a byte order mark.
fn read_json<T: DeserializeOwned>(flag: &str, path: &Path, expected: &str) -> Result<T> {
    let json = read_text(flag, path)?;
    serde_json::from_str(json.trim_start_matches('\u{feff}'))
        .with_context(|| format!("{flag} {}: expected {expected}", path.display()))
}

/// Reads `path`, or standard input for `-`, as UTF-8.
fn read_text(flag: &str, path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let name = if path.as_os_str() == "-" {
        if io::stdin().is_terminal() {
            let end = if cfg!(windows) {
                "Ctrl-Z and Enter"
            } else {
                "Ctrl-D"
            };
            tracing::info!("{flag} -: reading what is typed; {end} on a line of its own ends it");
        }
        io::stdin()
            .read_to_end(&mut bytes)
            .with_context(|| format!("{flag} -: reading standard input"))?;
        "standard input".to_owned()
    } else {
        bytes = fs::read(path).with_context(|| format!("{flag}: reading {}", path.display()))?;
        path.display().to_string()
    };
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        anyhow!("{flag}: {name} is not UTF-8 text: byte {offset} starts no character; convert it, for example with iconv")
    })
}

fn usage(message: &str) -> anyhow::Error {
    UsageError(message.to_owned()).into()
}

/// Sampling as asked for; what was not asked for waits for the model file's recommendation.
pub struct SamplingFlags(SamplingArgs);

impl SamplingFlags {
    /// Fills in what the file recommends under llama.cpp's keys, else the program's defaults.
    pub fn resolve(&self, gguf: &Gguf, context_len: usize) -> Result<SamplingParams> {
        let Self(flags) = self;
        let not_negative = |x: f64| x >= 0.0;
        let probability = |x: f64| (0.0..=1.0).contains(&x);
        let number = |flag: Option<f32>, recommended: Recommended| match flag {
            Some(value) => Ok(value),
            None => recommended.read(gguf).map(|value| value as f32),
        };
        let last_n = Recommended("penalty_last_n", "--repeat-last-n", 64.0, |n| n >= -1.0);
        let repeat_last_n = flags
            .repeat_last_n
            .map_or_else(|| last_n.read(gguf).map(|n| n as i64), Ok)?;
        let top_k = Recommended("top_k", "--top-k", 40.0, not_negative);
        Ok(SamplingParams {
            temperature: number(flags.temp, Recommended("temp", "--temp", 0.7, not_negative))?,
            top_k: flags
                .top_k
                .map_or_else(|| top_k.read(gguf).map(|k| k as usize), Ok)?,
            top_p: number(
                flags.top_p,
                Recommended("top_p", "--top-p", 0.95, probability),
            )?,
            min_p: number(
                flags.min_p,
                Recommended("min_p", "--min-p", 0.05, probability),
            )?,
            repeat_penalty: number(
                flags.repeat_penalty,
                Recommended("penalty_repeat", "--repeat-penalty", 1.0, |x| x > 0.0),
            )?,
            // -1 is the whole context.
            repeat_last_n: usize::try_from(repeat_last_n).unwrap_or(context_len),
            presence_penalty: flags.presence_penalty,
            frequency_penalty: flags.frequency_penalty,
            seed: flags.seed.unwrap_or_else(draw_seed),
        })
    }
}

/// A key under `general.sampling.`, the flag that overrides it, the value where neither is given, and which values
/// make sense.
struct Recommended(&'static str, &'static str, f64, fn(f64) -> bool);

impl Recommended {
    fn read(&self, gguf: &Gguf) -> Result<f64> {
        let Self(key, flag, default, valid) = self;
        let key = format!("general.sampling.{key}");
        let value = gguf.f64(&key)?.unwrap_or(*default);
        ensure!(
            value.is_finite() && valid(value),
            "{}: {key} is {value}, which cannot be used: choose a value with {flag}",
            gguf.name()
        );
        Ok(value)
    }
}

/// A seed that is new each time. It stays below 2^32, so that every JSON reader takes it for what it is.
fn draw_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}

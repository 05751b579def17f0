//! `sharpi info`: what a model file holds, whole or not, and whether it would run here.

mod memory;
mod metadata;
mod shape;

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::{self, IsTerminal, Write},
    path::PathBuf,
};

use anyhow::{Context, Result};
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;
use serde_json::{Map, Value};

use self::{memory::Place, shape::HyperParameters};
use super::{
    escape::{escaped, escaped_lines},
    exit::Outcome,
    output::{WRITING, write_json_line},
    resolve::ModelSource,
};
use crate::model::{
    Decoder, Gguf, Tokenizer, arch,
    gguf::{FileType, Inspection, ListedTensor, Part},
};

/// What people look up of a model that we cannot run: rows, and keys behind the architecture's prefix.
const WELL_KNOWN: [(&str, &str); 7] = [
    ("context length", "context_length"),
    ("layers", "block_count"),
    ("hidden size", "embedding_length"),
    ("feed-forward length", "feed_forward_length"),
    ("attention heads", "attention.head_count"),
    ("of keys and values", "attention.head_count_kv"),
    ("experts", "expert_count"),
];

/// More reasons and missing parts than this are counted, not listed.
const MOST_LISTED: usize = 3;

const TEMPLATE: &str = "tokenizer.chat_template";

pub struct InfoRequest {
    pub model: ModelSource,
    pub view: View,
    pub json: bool,
}

/// What of a file is shown.
pub enum View {
    Summary,
    /// All keys, or the value of one.
    Metadata(Option<String>),
    /// The chat template of this name, or the one without.
    Template(Option<String>),
}

pub fn run(request: &InfoRequest) -> Result<Outcome> {
    let file = request.model.inspect()?;
    let mut out = io::stdout().lock();
    match (&request.view, request.json) {
        (View::Template(name), _) => {
            let template = template(file.gguf(), name.as_deref())?;
            write_text(&mut out, template)
        }
        (View::Metadata(Some(key)), json) => {
            let value = metadata::Entry::find(&file, key)?;
            match json {
                true => write_json_line(&mut out, &value.to_json()),
                false => value.write_whole(&mut out),
            }
        }
        (View::Metadata(None), false) => metadata::write_lines(&mut out, &file),
        (view, json) => {
            // Of a model with a rotation for long contexts, that one.
            let rope = request.model.rope(Some(usize::MAX));
            let decoder = arch::describe(file.gguf(), arch::ALL, &rope);
            let tokenizer = Tokenizer::from_gguf(file.gguf());
            let mut info = Info::new(&file, &decoder, &tokenizer);
            if let View::Metadata(_) = view {
                info.metadata = Some(metadata::to_json(&file));
            }
            match json {
                true => write_json_line(&mut out, &info),
                false => info.write_table(&mut out),
            }
        }
    }
    .context(WRITING)?;
    Ok(Outcome::Done)
}

/// The file's chat template.
fn template<'a>(gguf: &'a Gguf, name: Option<&str>) -> Result<&'a str> {
    let key = match name {
        Some(name) => format!("{TEMPLATE}.{name}"),
        None => TEMPLATE.to_owned(),
    };
    gguf.str(&key)?.with_context(|| {
        let others: Vec<_> = named_templates(gguf)
            .map(|name| format!("--template={name}"))
            .collect();
        let others = match others.is_empty() {
            true => String::new(),
            false => format!("; there are {}", others.join(", ")),
        };
        format!("{} has no chat template ({key}){others}", gguf.name())
    })
}

/// The names of templates beside the one that conversations go through.
fn named_templates(gguf: &Gguf) -> impl Iterator<Item = &str> {
    gguf.metadata().filter_map(|(key, value)| {
        let name = key.strip_prefix(TEMPLATE)?.strip_prefix('.')?;
        value.is_string().then_some(name)
    })
}

/// Writes `text` as it is, or on a terminal without what would command that.
fn write_text(out: &mut (impl Write + IsTerminal), text: &str) -> io::Result<()> {
    match out.is_terminal() {
        true => writeln!(out, "{}", escaped_lines(text.trim_end_matches('\n')))?,
        false => out.write_all(text.as_bytes())?,
    }
    out.flush()
}

#[derive(Serialize)]
struct Info<'a> {
    file: &'a str,
    file_bytes: u64,
    name: Option<&'a str>,
    architecture: &'a str,
    /// What the file holds: `model`, `vocabulary`, or what it says it is.
    kind: &'a str,
    gguf_version: u32,
    parameter_count: u64,
    quantization: Option<&'a str>,
    bits_per_weight: Option<f64>,
    /// `None` where the file is no model that can be run.
    hyper_parameters: Option<HyperParameters>,
    /// Why not.
    cannot_run: Option<String>,
    /// All that is wrong with the file.
    faults: Vec<String>,
    missing_bytes: u64,
    split: Option<SplitInfo<'a>>,
    tensor_types: Vec<TypeCount>,
    tokenizer: TokenizerInfo<'a>,
    chat_template: bool,
    /// Names of further ones.
    chat_templates: Vec<&'a str>,
    /// The file's own `general.sampling.*`, keys without that prefix.
    sampling: BTreeMap<&'a str, &'a Value>,
    /// Where it would run, and with how much memory.
    runs_on: Vec<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Map<String, Value>>,
    #[serde(skip)]
    source: &'a Inspection,
}

/// Which part of a split model the file is.
#[derive(Serialize)]
struct SplitInfo<'a> {
    part: u64,
    parts: u64,
    /// Files that are not there.
    missing: &'a [PathBuf],
}

/// All tensors of one type.
#[derive(Serialize)]
struct TypeCount {
    #[serde(rename = "type")]
    tensor_type: &'static str,
    tensors: usize,
    bytes: u64,
    #[serde(skip)]
    value_count: u64,
}

#[derive(Serialize)]
struct TokenizerInfo<'a> {
    model: &'a str,
    pre: Option<&'a str>,
    vocab_size: usize,
    end_of_generation: Vec<Piece<'a>>,
}

#[derive(Serialize)]
struct Piece<'a> {
    id: u32,
    piece: &'a str,
}

impl<'a> Info<'a> {
    fn new(
        file: &'a Inspection,
        decoder: &Result<Decoder>,
        tokenizer: &'a Result<Tokenizer>,
    ) -> Self {
        let gguf = file.gguf();
        // A value of another type than it should have is shown with the metadata.
        let text = |key| gguf.str(key).ok().flatten();
        let whole_model = decoder.as_ref().ok().filter(|_| file.faults().is_empty());
        let of_model = decoder.as_ref().err().or(tokenizer.as_ref().err());
        let cannot_run = file.faults().first().or(of_model);
        let tensor_types = count_types(&file.tensors);
        let parameter_count = sum(tensor_types.iter().map(|kind| kind.value_count));
        let tensor_bytes = sum(tensor_types.iter().map(|kind| kind.bytes));
        let sampling = gguf
            .metadata()
            .filter_map(|(key, value)| Some((key.strip_prefix("general.sampling.")?, value)));
        Self {
            file: gguf.name(),
            file_bytes: gguf.file_bytes(),
            name: text("general.name"),
            architecture: text("general.architecture").unwrap_or_default(),
            kind: kind(file),
            gguf_version: file.version,
            parameter_count,
            quantization: named_quantization(gguf, &tensor_types)
                .or_else(|| Some(dominant(&tensor_types)?.tensor_type)),
            bits_per_weight: (parameter_count > 0)
                .then(|| tensor_bytes as f64 * 8.0 / parameter_count as f64),
            hyper_parameters: whole_model
                .and_then(|decoder| HyperParameters::new(gguf, decoder).ok()),
            runs_on: match (whole_model, cannot_run) {
                (Some(decoder), None) => memory::places(gguf, decoder),
                _ => Vec::new(),
            },
            cannot_run: cannot_run.map(|error| format!("{error:#}")),
            faults: file
                .faults()
                .iter()
                .map(|fault| format!("{fault:#}"))
                .collect(),
            missing_bytes: file.missing_bytes,
            split: file.part.as_ref().map(|part| SplitInfo {
                part: part.number,
                parts: part.count,
                missing: &part.missing,
            }),
            tensor_types,
            tokenizer: TokenizerInfo {
                model: text("tokenizer.ggml.model").unwrap_or_default(),
                pre: text("tokenizer.ggml.pre"),
                vocab_size: (gguf.array("tokenizer.ggml.tokens").ok().flatten())
                    .map_or(0, <[_]>::len),
                end_of_generation: tokenizer.as_ref().map_or_else(|_| Vec::new(), ends),
            },
            chat_template: text(TEMPLATE).is_some(),
            chat_templates: named_templates(gguf).collect(),
            sampling: sampling.collect(),
            metadata: None,
            source: file,
        }
    }

    fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        row(out, "file", self.file)?;
        row(out, "size", HumanBytes(self.file_bytes))?;
        row(out, "name", self.name.unwrap_or("-"))?;
        let architecture = Some(self.architecture).filter(|name| !name.is_empty());
        row(out, "architecture", architecture.unwrap_or("-"))?;
        if self.kind != "model" {
            row(out, "kind", self.kind)?;
        }
        if self.parameter_count > 0 {
            row(out, "parameters", HumanCount(self.parameter_count))?;
        }
        if let Some(quantization) = self.quantization_text() {
            row(out, "quantization", quantization)?;
        }
        match &self.hyper_parameters {
            Some(shape) => shape.write_rows(out)?,
            None => self.write_well_known(out)?,
        }
        self.write_faults(out)?;
        self.write_tensor_types(out)?;
        self.write_vocabulary(out)?;
        for (key, value) in &self.sampling {
            row(out, "sampling", format_args!("{key} {value}"))?;
        }
        rows(out, "runs here", self.runs_on.iter().map(Place::to_string))?;
        if !self.runs_on.is_empty() && self.runs_on.iter().all(|place| place.device == "cpu") {
            row(out, "", "no GPU to run it on: `sharpi devices` says why")?;
        }
        out.flush()
    }

    /// What the file calls its quantization, and what it is.
    fn quantization_text(&self) -> Option<String> {
        let dominant = dominant(&self.tensor_types)?.tensor_type;
        let gguf = self.source.gguf();
        let name = match named_quantization(gguf, &self.tensor_types) {
            Some(name) => name.to_owned(),
            None => match file_type(gguf) {
                Some(claimed) => format!("mostly {dominant} (the file says {})", claimed.name),
                None => format!("mostly {dominant}"),
            },
        };
        let bits = self.bits_per_weight.unwrap_or_default();
        Some(format!("{name}, {bits:.2} bits a weight"))
    }

    /// What the metadata says of a model that we cannot make one of.
    fn write_well_known(&self, out: &mut impl Write) -> io::Result<()> {
        for (label, key) in WELL_KNOWN {
            let key = format!("{}.{key}", self.architecture);
            if let Ok(Some(number)) = self.source.gguf().u64(&key) {
                row(out, label, HumanCount(number))?;
            } else if let Ok(entry) = metadata::Entry::find(self.source, &key) {
                row(out, label, entry)?;
            }
        }
        Ok(())
    }

    fn write_faults(&self, out: &mut impl Write) -> io::Result<()> {
        let Some(reason) = &self.cannot_run else {
            return Ok(());
        };
        let others = self.faults.iter().skip(1).cloned();
        let reasons: Vec<_> = [reason.clone()].into_iter().chain(others).collect();
        rows(out, "cannot be run", listed(&reasons, String::clone))?;
        if self.missing_bytes > 0 {
            let expected = self.file_bytes.saturating_add(self.missing_bytes);
            let (missing, expected) = (HumanBytes(self.missing_bytes), HumanBytes(expected));
            row(
                out,
                "missing",
                format_args!("{missing} of {expected}: is the download complete?"),
            )?;
        }
        let (keys, tensors) = (self.source.keys.len(), self.source.tensors.len());
        let (key_count, tensor_count) = (self.source.key_count, self.source.tensor_count);
        if (keys as u64, tensors as u64) != (key_count, tensor_count) {
            row(
                out,
                "header",
                format_args!(
                    "{keys} of {key_count} metadata keys and {tensors} of {tensor_count} tensors can be read"
                ),
            )?;
        }
        let Some(Part {
            number,
            count,
            missing,
        }) = &self.source.part
        else {
            return Ok(());
        };
        row(out, "part", format_args!("{number} of {count}"))?;
        rows(
            out,
            "missing parts",
            listed(missing, |path| path.display().to_string()),
        )
    }

    fn write_tensor_types(&self, out: &mut impl Write) -> io::Result<()> {
        let kinds = self.tensor_types.iter().map(|kind| {
            let (name, bytes) = (kind.tensor_type, HumanBytes(kind.bytes));
            format!("{name:<7} {:>5}  {bytes}", kind.tensors)
        });
        rows(out, "tensors", kinds)
    }

    fn write_vocabulary(&self, out: &mut impl Write) -> io::Result<()> {
        let tokenizer = &self.tokenizer;
        if tokenizer.vocab_size == 0 {
            return Ok(());
        }
        row(
            out,
            "tokenizer",
            format_args!(
                "{} ({}), {} tokens",
                tokenizer.model,
                tokenizer.pre.unwrap_or("no pre-tokenizer named"),
                HumanCount(tokenizer.vocab_size as u64)
            ),
        )?;
        let ends = tokenizer.end_of_generation.iter();
        let ends: Vec<_> = ends
            .map(|end| format!("{} ({})", end.piece, end.id))
            .collect();
        if !ends.is_empty() {
            row(out, "end of generation", ends.join(", "))?;
        }
        let mut template = match self.chat_template {
            true => "yes (--template prints it)".to_owned(),
            false => "no: `run` takes --raw prompts only".to_owned(),
        };
        if !self.chat_templates.is_empty() {
            template += &format!("; by name: {}", self.chat_templates.join(", "));
        }
        row(out, "chat template", template)
    }
}

/// What a file holds.
fn kind(file: &Inspection) -> &str {
    let gguf = file.gguf();
    let text = |key| gguf.str(key).ok().flatten();
    let has_vocabulary = gguf.get("tokenizer.ggml.tokens").is_some();
    match text("general.type") {
        Some(other) if other != "model" => other,
        _ if text("general.architecture") == Some("clip") => "mmproj",
        _ if file.tensor_count == 0 && has_vocabulary => "vocabulary",
        _ => "model",
    }
}

fn file_type(gguf: &Gguf) -> Option<FileType> {
    FileType::from_id(gguf.u64("general.file_type").ok()??)
}

/// The quantization that the file names, unless none of its tensors has the type.
fn named_quantization(gguf: &Gguf, types: &[TypeCount]) -> Option<&'static str> {
    let claimed = file_type(gguf)?;
    let mut types = types.iter();
    types
        .any(|kind| kind.tensor_type == claimed.tensor_type)
        .then_some(claimed.name)
}

/// The type of most of the values.
fn dominant(types: &[TypeCount]) -> Option<&TypeCount> {
    types.iter().max_by_key(|kind| kind.value_count)
}

fn ends(tokenizer: &Tokenizer) -> Vec<Piece<'_>> {
    let ends = tokenizer.end_of_generation().iter();
    let piece = |&id| Piece {
        id,
        piece: tokenizer.piece(id),
    };
    ends.map(piece).collect()
}

/// Tensors and bytes by type, in the order of ids.
fn count_types(tensors: &[ListedTensor]) -> Vec<TypeCount> {
    let mut counts: BTreeMap<u32, TypeCount> = BTreeMap::new();
    for tensor in tensors {
        let count = counts.entry(tensor.type_id).or_insert(TypeCount {
            tensor_type: tensor.type_name,
            tensors: 0,
            bytes: 0,
            value_count: 0,
        });
        count.tensors += 1;
        count.bytes = count.bytes.saturating_add(tensor.bytes);
        count.value_count = count.value_count.saturating_add(tensor.value_count);
    }
    counts.into_values().collect()
}

/// Of what a file may lie about.
fn sum(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

/// The first of `items`, and how many more there are.
fn listed<T>(items: &[T], text: impl Fn(&T) -> String) -> impl Iterator<Item = String> {
    let more = items.len().saturating_sub(MOST_LISTED);
    let more = (more > 0).then(|| format!("and {more} more"));
    items.iter().take(MOST_LISTED).map(text).chain(more)
}

/// Rows of which only the first has the label.
fn rows(
    out: &mut impl Write,
    label: &str,
    values: impl IntoIterator<Item = String>,
) -> io::Result<()> {
    for (number, value) in values.into_iter().enumerate() {
        row(out, if number == 0 { label } else { "" }, value)?;
    }
    Ok(())
}

fn row(out: &mut impl Write, label: &str, value: impl Display) -> io::Result<()> {
    let line = format!("{label:<20} {}", escaped(&value.to_string()));
    writeln!(out, "{}", line.trim_end())
}

//! A file's metadata, key by key.

use std::{
    fmt,
    io::{self, IsTerminal, Write},
};

use anyhow::{Context, Result};
use indicatif::HumanCount;
use serde_json::{Map, Value, json};

use super::write_text;
use crate::{
    cli::escape::escaped,
    model::gguf::{Inspection, ValueType},
};

/// Longer keys stand out of their column.
const KEY_WIDTH: usize = 42;

/// Letters of a value that a line shows.
const SHOWN: usize = 60;

/// A key with its value.
pub struct Entry<'a> {
    key: &'a str,
    value_type: ValueType,
    value: &'a Value,
}

impl<'a> Entry<'a> {
    /// # Errors
    /// There is no such key.
    pub fn find(file: &'a Inspection, key: &str) -> Result<Self> {
        let mut all = Self::all(file);
        all.find(|entry| entry.key == key).with_context(|| {
            format!(
                "{} has no metadata key {key:?}: --metadata lists those that it has",
                file.gguf().name()
            )
        })
    }

    /// In the file's order.
    fn all(file: &'a Inspection) -> impl Iterator<Item = Self> {
        file.keys.iter().filter_map(|(key, value_type)| {
            Some(Self {
                key,
                value_type: *value_type,
                value: file.gguf().get(key)?,
            })
        })
    }

    /// The name of the type: `string`, or `[string]` for an array.
    fn type_name(&self) -> String {
        match self.value_type {
            ValueType { name, is_array } if is_array => format!("[{name}]"),
            ValueType { name, .. } => name.to_owned(),
        }
    }

    pub fn to_json(&self) -> Value {
        match self.value {
            Value::Array(items) => items.iter().map(|item| self.shortest(item)).collect(),
            value => self.shortest(value),
        }
    }

    /// An `f32`, which has become an `f64`, as the shortest number that stands for it.
    fn shortest(&self, value: &Value) -> Value {
        match (self.value_type.name, value.as_f64()) {
            ("f32", Some(number)) => (number as f32)
                .to_string()
                .parse::<f64>()
                .map_or(Value::Null, Value::from),
            _ => value.clone(),
        }
    }

    /// The value alone and in full, an array's elements line by line.
    pub fn write_whole(&self, out: &mut (impl Write + IsTerminal)) -> io::Result<()> {
        match self.value {
            Value::String(text) => write_text(out, text.strip_suffix('\n').unwrap_or(text))?,
            Value::Array(items) => {
                let items = items.iter().map(|item| match item.as_str() {
                    Some(text) => escaped(text),
                    None => self.shown(item),
                });
                return items
                    .into_iter()
                    .try_for_each(|line| writeln!(out, "{line}"));
            }
            value => write!(out, "{}", self.shown(value))?,
        }
        if !(out.is_terminal() && self.value.is_string()) {
            writeln!(out)?;
        }
        out.flush()
    }

    fn shown(&self, value: &Value) -> String {
        match value {
            Value::Null => "NaN or infinite".to_owned(),
            value => self.shortest(value).to_string(),
        }
    }
}

/// The value on a line: long ones abbreviated.
impl fmt::Display for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value {
            Value::String(text) => match text.char_indices().nth(SHOWN) {
                Some((end, _)) => {
                    let letters = HumanCount(text.chars().count() as u64);
                    write!(f, "{}... ({letters} letters)", &text[..end])
                }
                None => f.write_str(text),
            },
            Value::Array(items) => {
                let mut shown = String::new();
                for (index, item) in items.iter().enumerate() {
                    let item = self.shown(item);
                    if index > 0 && shown.chars().count() + item.chars().count() > SHOWN {
                        let count = HumanCount(items.len() as u64);
                        return write!(f, "[{shown}, ...] ({count} elements)");
                    }
                    if index > 0 {
                        shown += ", ";
                    }
                    shown += &item;
                }
                write!(f, "[{shown}]")
            }
            value => f.write_str(&self.shown(value)),
        }
    }
}

/// One key a line, with its type and its value.
pub fn write_lines(out: &mut impl Write, file: &Inspection) -> io::Result<()> {
    let width = file.keys.iter().map(|(key, _)| key.chars().count()).max();
    let width = width.unwrap_or_default().min(KEY_WIDTH);
    for entry in Entry::all(file) {
        let (key, value) = (escaped(entry.key), escaped(&entry.to_string()));
        writeln!(out, "{key:<width$}  {:<8}  {value}", entry.type_name())?;
    }
    out.flush()
}

/// By key, type and whole value.
pub fn to_json(file: &Inspection) -> Map<String, Value> {
    let entry = |entry: Entry| {
        let value = json!({"type": entry.type_name(), "value": entry.to_json()});
        (entry.key.to_owned(), value)
    };
    Entry::all(file).map(entry).collect()
}

//! `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`, which unlike Jinja's own filter
//! escapes nothing for HTML.

use std::cmp::Ordering;

use super::{
    Error, Result,
    format::python_float,
    interpreter::Passed,
    methods::is_true,
    text::{self, Builder, Letter},
    value::{Value, sort},
};

struct Style {
    ensure_ascii: bool,
    /// What a level is indented by.
    indent: Option<Vec<Letter>>,
    item_separator: Vec<Letter>,
    key_separator: Vec<Letter>,
    sort_keys: bool,
}

pub fn tojson(value: &Value, passed: Passed) -> Result<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = passed.take("tojson", names)?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Text(text)) => Some(text.to_vec()),
        Some(width) => {
            let whole = || Error::new("tojson: indent is a whole number or a text");
            let width = width.as_int().ok_or_else(whole)?;
            let blanks = usize::try_from(width.max(0))
                .ok()
                .filter(|width| *width <= 100);
            let blanks = blanks.ok_or_else(|| Error::new("tojson: indent is more than 100"))?;
            Some(text::written(&" ".repeat(blanks)))
        }
    };
    let mut style = Style {
        ensure_ascii: is_true(ensure_ascii),
        item_separator: text::written(if indent.is_some() { "," } else { ", " }),
        key_separator: text::written(": "),
        indent,
        sort_keys: is_true(sort_keys),
    };
    if let Some(separators) = separators.filter(|value| !matches!(value, Value::None)) {
        let separators = separators.iterate()?;
        let [Value::Text(item), Value::Text(key)] = separators.as_slice() else {
            return Err(Error::new("tojson: separators are two texts"));
        };
        (style.item_separator, style.key_separator) = (item.to_vec(), key.to_vec());
    }
    let mut out = Builder::default();
    style.write(value, 0, &mut out)?;
    Ok(Value::text(out.finish()))
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut Builder) -> Result<()> {
        match value {
            Value::Text(text) | Value::Safe(text) => self.write_text(text, out),
            Value::List(list) => {
                let items = list.items.iter().map(|item| (None, item));
                self.write_all("[", items.collect(), "]", depth, out)
            }
            Value::Dict(dict) => {
                let mut entries: Vec<_> = dict.entries.iter().map(|(k, v)| (Some(k), v)).collect();
                if self.sort_keys {
                    sort(&mut entries, |(a, _), (b, _)| match (a, b) {
                        (Some(a), Some(b)) => a.compare(b),
                        _ => Ok(Ordering::Equal),
                    })?;
                }
                self.write_all("{", entries, "}", depth, out)
            }
            value => out.write(&plain(value)?),
        }
    }

    fn write_all(
        &self,
        open: &str,
        entries: Vec<(Option<&Value>, &Value)>,
        close: &str,
        depth: usize,
        out: &mut Builder,
    ) -> Result<()> {
        out.write(open)?;
        let empty = entries.is_empty();
        for (number, (key, value)) in entries.into_iter().enumerate() {
            if number > 0 {
                out.push(&self.item_separator)?;
            }
            self.new_line(depth + 1, out)?;
            match key {
                Some(Value::Text(key) | Value::Safe(key)) => self.write_text(key, out)?,
                Some(key) => out.write(&format!("\"{}\"", plain(key)?))?,
                None => {}
            }
            if key.is_some() {
                out.push(&self.key_separator)?;
            }
            self.write(value, depth + 1, out)?;
        }
        if !empty {
            self.new_line(depth, out)?;
        }
        out.write(close)
    }

    fn new_line(&self, depth: usize, out: &mut Builder) -> Result<()> {
        if let Some(indent) = &self.indent {
            out.write("\n")?;
            for _ in 0..depth {
                out.push(indent)?;
            }
        }
        Ok(())
    }

    fn write_text(&self, letters: &[Letter], out: &mut Builder) -> Result<()> {
        out.write("\"")?;
        for &letter in letters {
            let escape = match letter.char() {
                '"' => "\\\"".to_owned(),
                '\\' => "\\\\".to_owned(),
                '\n' => "\\n".to_owned(),
                '\r' => "\\r".to_owned(),
                '\t' => "\\t".to_owned(),
                '\x08' => "\\b".to_owned(),
                '\x0c' => "\\f".to_owned(),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    let mut units = [0; 2];
                    let units = c.encode_utf16(&mut units).iter();
                    units.map(|unit| format!("\\u{unit:04x}")).collect()
                }
                _ => {
                    out.push(&[letter])?;
                    continue;
                }
            };
            out.write_as(letter, &escape)?;
        }
        out.write("\"")
    }
}

/// A value that has no parts, as JSON.
fn plain(value: &Value) -> Result<String> {
    Ok(match value {
        Value::None => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) if value.is_nan() => "NaN".to_owned(),
        Value::Float(value) if value.is_infinite() => if *value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned(),
        Value::Float(value) => python_float(*value),
        other => {
            return Err(Error::new(format!(
                "tojson: a value of type {} has no JSON",
                other.kind()
            )));
        }
    })
}

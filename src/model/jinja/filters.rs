//! Jinja's filters and tests.

use std::cmp::Ordering;

use super::{
    Error, Result,
    format::percent,
    interpreter::{Interpreter, Passed, attribute, calculate, item},
    json::tojson,
    methods::{self, int_argument, text_argument},
    parser::{Comparison, Operator},
    text::{self, Builder, Letter},
    value::Value,
};

/// The widest that a filter may make a line, a table or an indentation.
const WIDEST: usize = 100_000;

impl Interpreter<'_> {
    /// `value | name(passed)`
    pub fn filter(&mut self, name: &str, value: Value, passed: Passed) -> Result<Value> {
        match name {
            "default" | "d" => {
                let [default, boolean] = passed.take(name, ["default_value", "boolean"])?;
                let falsy = boolean.is_some_and(|value| value.is_true()) && !value.is_true();
                match falsy || matches!(value, Value::Undefined(_)) {
                    true => Ok(default.unwrap_or_else(|| Value::written(""))),
                    false => Ok(value),
                }
            }
            "length" | "count" => Ok(Value::Int(value.len()? as i128)),
            "list" => Value::list(self.iterate(&value)?),
            "string" | "safe" => Ok(Value::Text(value.to_text()?)),
            "first" | "last" => {
                let items = self.iterate(&value)?;
                let found = if name == "first" {
                    items.first()
                } else {
                    items.last()
                };
                Ok(found
                    .cloned()
                    .unwrap_or_else(|| Value::undefined("nothing has no first or last item")))
            }
            "items" => match value {
                Value::Undefined(_) => Value::list(Vec::new()),
                value => methods::items(&value),
            },
            "attr" => {
                let [wanted] = passed.take(name, ["name"])?;
                let name = text::string(&text_argument(wanted, name)?);
                // Python's attributes, not what is under a key.
                match methods::exist(&value, &name) || !matches!(value, Value::Dict(_)) {
                    true => attribute(&value, &name),
                    false => Ok(Value::undefined(format!(
                        "a dict has no attribute '{name}'"
                    ))),
                }
            }
            "tojson" => tojson(&value, passed),
            "abs" => match value.as_int() {
                Some(number) => Ok(Value::Int(number.saturating_abs())),
                None => Ok(Value::Float(number(&value, name)?.abs())),
            },
            "int" => to_int(&value, passed),
            "float" => {
                let [default] = passed.take(name, ["default"])?;
                value.defined()?;
                Ok(match parse_float(&value) {
                    Some(number) => Value::Float(number),
                    None => default.unwrap_or(Value::Float(0.0)),
                })
            }
            "round" => round(&value, passed),
            "sum" => {
                let [path, start] = passed.take(name, ["attribute", "start"])?;
                let mut sum = start.unwrap_or(Value::Int(0));
                for value in self.attributes(&value, path.as_ref())? {
                    sum = calculate(Operator::Add, &sum, &value)?;
                    self.spend(1)?;
                }
                Ok(sum)
            }
            "min" | "max" => {
                let [case, path] = passed.take(name, ["case_sensitive", "attribute"])?;
                let wanted = if name == "min" {
                    Ordering::Less
                } else {
                    Ordering::Greater
                };
                let case = case.is_some_and(|value| value.is_true());
                let mut best: Option<(Value, Value)> = None;
                for value in self.iterate(&value)? {
                    let key = self.sort_key(&value, path.as_ref(), case)?;
                    let better = match &best {
                        Some((best, _)) => key.compare(best)? == wanted,
                        None => true,
                    };
                    if better {
                        best = Some((key, value));
                    }
                }
                let none = || Value::undefined("nothing has no least or greatest item");
                Ok(best.map_or_else(none, |(_, value)| value))
            }
            "sort" => {
                let names = ["reverse", "case_sensitive", "attribute"];
                let [reverse, case, path] = passed.take(name, names)?;
                let items = self.iterate(&value)?;
                let case = case.is_some_and(|value| value.is_true());
                let items = self.sorted(items, path.as_ref(), case, is_true(reverse))?;
                Value::list(items)
            }
            "dictsort" => {
                let [case, by, reverse] = passed.take(name, ["case_sensitive", "by", "reverse"])?;
                let by_value = by.as_ref().and_then(Value::as_text);
                let by_value = by_value.is_some_and(|by| text::spells(by, "value"));
                let pairs = methods::items(&value)?.iterate()?;
                let place = Value::Int(by_value.into());
                Value::list(self.sorted(pairs, Some(&place), is_true(case), is_true(reverse))?)
            }
            "unique" => {
                let [case, path] = passed.take(name, ["case_sensitive", "attribute"])?;
                let case = is_true(case);
                let (mut keys, mut kept) = (Vec::new(), Vec::new());
                for value in self.iterate(&value)? {
                    let key = self.sort_key(&value, path.as_ref(), case)?;
                    self.spend(keys.len())?;
                    if !keys.contains(&key) {
                        keys.push(key);
                        kept.push(value);
                    }
                }
                Value::list(kept)
            }
            "groupby" => {
                let [path, default, case] =
                    passed.take(name, ["attribute", "default", "case_sensitive"])?;
                let case = is_true(case);
                let items = self.iterate(&value)?;
                let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
                for value in self.sorted(items, path.as_ref(), case, false)? {
                    let shown = match self.path(&value, path.as_ref())? {
                        Value::Undefined(_) => default.clone().unwrap_or(Value::None),
                        shown => shown,
                    };
                    let key = folded(&shown, case);
                    match groups.last_mut() {
                        Some((last, _, group)) if *last == key => group.push(value),
                        _ => groups.push((key, shown, vec![value])),
                    }
                }
                let group = |(_, key, group)| Value::tuple(vec![key, Value::list(group)?]);
                Value::list(groups.into_iter().map(group).collect::<Result<_>>()?)
            }
            "reverse" => match &value {
                Value::Text(text) => {
                    Ok(Value::text(text.iter().rev().copied().collect::<Vec<_>>()))
                }
                value => Value::list(self.iterate(value)?.into_iter().rev().collect()),
            },
            "map" => self.map(&value, passed),
            "select" | "reject" | "selectattr" | "rejectattr" => self.select(name, &value, passed),
            "join" => {
                let [separator, path] = passed.take(name, ["d", "attribute"])?;
                let separator = separator.map(|value| value.to_text()).transpose()?;
                let parts = self.attributes(&value, path.as_ref())?;
                let parts: Vec<_> = parts.iter().map(Value::to_text).collect::<Result<_>>()?;
                let separator = separator.unwrap_or_else(|| [].into());
                Ok(Value::text(text::join(
                    &separator,
                    parts.iter().map(|part| &**part),
                )?))
            }
            "batch" => {
                let [size, fill] = passed.take(name, ["linecount", "fill_with"])?;
                let size = self.width(size, name, 0)?;
                if size == 0 {
                    return Err(Error::new("batch takes how many items a row has"));
                }
                let items = self.iterate(&value)?;
                let row = |row: &[Value]| {
                    let mut row = row.to_vec();
                    if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None)) {
                        row.resize(size, fill.clone());
                    }
                    Value::list(row)
                };
                Value::list(items.chunks(size).map(row).collect::<Result<_>>()?)
            }
            "slice" => {
                let [count, fill] = passed.take(name, ["slices", "fill_with"])?;
                let count = self.width(count, name, 0)?;
                if count == 0 {
                    return Err(Error::new("slice takes how many columns there are"));
                }
                let items = self.iterate(&value)?;
                let (size, longer) = (items.len() / count, items.len() % count);
                let mut rest = items.as_slice();
                let mut columns = Vec::new();
                for number in 0..count {
                    let (column, others) = rest.split_at(size + usize::from(number < longer));
                    rest = others;
                    let mut column = column.to_vec();
                    if let Some(fill) = &fill
                        && number >= longer
                        && longer > 0
                    {
                        column.push(fill.clone());
                    }
                    columns.push(Value::list(column)?);
                }
                Value::list(columns)
            }
            "format" => {
                let format = text_argument(Some(value), name)?;
                let arguments = match passed.named.is_empty() {
                    true => Value::tuple(passed.positional)?,
                    false => {
                        let named = passed.named.into_iter();
                        Value::dict(
                            named
                                .map(|(n, value)| (Value::written(&n), value))
                                .collect(),
                        )?
                    }
                };
                Ok(Value::text(percent(&format, &arguments)?))
            }
            _ => self.text_filter(name, &value, passed),
        }
    }

    /// A filter that takes its value as a text.
    fn text_filter(&mut self, name: &str, value: &Value, passed: Passed) -> Result<Value> {
        let text = match name {
            "upper" | "lower" | "capitalize" | "title" | "trim" | "replace" | "center"
            | "indent" | "wordcount" | "wordwrap" | "truncate" | "striptags" | "urlencode"
            | "e" | "escape" | "forceescape" => value.to_text()?,
            _ => return Err(Error::new(format!("there is no filter {name}"))),
        };
        let made = |letters: Vec<Letter>| Ok(Value::text(letters));
        match name {
            "upper" => made(text::upper(&text)),
            "lower" => made(text::lower(&text)),
            "capitalize" => made(text::capitalize(&text)),
            "title" => {
                let begins = |c: char| text::is_space(c) || "-({[<".contains(c);
                let words = text.chunk_by(|a, b| begins(a.char()) == begins(b.char()));
                made(words.flat_map(text::capitalize).collect())
            }
            "trim" => methods::call(&Value::Text(text), "strip", passed),
            "replace" => {
                let [old, new, count] = passed.take(name, ["old", "new", "count"])?;
                let as_text = |value: Option<Value>| match value {
                    Some(value) => value.to_text(),
                    None => Err(Error::new("replace takes what to replace, and with what")),
                };
                let count = int_argument(count, name)?.unwrap_or(-1);
                let most = usize::try_from(count).unwrap_or(usize::MAX);
                made(text::replace(&text, &as_text(old)?, &as_text(new)?, most)?)
            }
            "center" => {
                let [width] = passed.take(name, ["width"])?;
                let width = width.unwrap_or(Value::Int(80));
                methods::call(&Value::Text(text), "center", Passed::of(vec![width]))
            }
            "indent" => indent(&text, passed),
            "wordcount" => {
                let in_word =
                    |letter: &Letter| letter.char() == '_' || letter.char().is_alphanumeric();
                let words = text.chunk_by(|a, b| in_word(a) == in_word(b));
                let words = words.filter(|word| word.first().is_some_and(in_word));
                Ok(Value::Int(words.count() as i128))
            }
            "wordwrap" => {
                let names = [
                    "width",
                    "break_long_words",
                    "wrapstring",
                    "break_on_hyphens",
                ];
                let [width, break_long, newline, break_on_hyphens] = passed.take(name, names)?;
                let break_on_hyphens = break_on_hyphens.is_none_or(|value| value.is_true());
                if break_on_hyphens && text.iter().any(|letter| letter.char() == '-') {
                    return Err(Error::new(
                        "wordwrap at hyphens is not supported; break_on_hyphens=false keeps to blanks",
                    ));
                }
                let width = self.width(width, name, 79)?.max(1);
                let break_long = break_long.is_none_or(|value| value.is_true());
                let newline = match newline {
                    Some(Value::Text(newline)) => newline,
                    _ => text::written("\n").into(),
                };
                let lines = text::lines(&text, false);
                let lines = lines.into_iter().map(|line| {
                    let wrapped = wrap(line, width, break_long);
                    text::join(&newline, wrapped)
                });
                let lines: Vec<_> = lines.collect::<Result<_>>()?;
                made(text::join(&newline, lines.iter().map(Vec::as_slice))?)
            }
            "truncate" => {
                let names = ["length", "killwords", "end", "leeway"];
                let [length, kill, end, leeway] = passed.take(name, names)?;
                let length = self.width(length, name, 255)?;
                let leeway = self.width(leeway, name, 5)?;
                let end = match end {
                    Some(end) => end.to_text()?,
                    None => text::written("...").into(),
                };
                if text.len() <= length + leeway {
                    return Ok(Value::Text(text));
                }
                let cut = &text[..length.saturating_sub(end.len())];
                let cut = match is_true(kill) {
                    true => cut,
                    false => text::split_from_right(cut, &text::written(" "), 1)[0],
                };
                made(text::join(&[], [cut, &end])?)
            }
            "striptags" => made(strip_tags(&text)?),
            "urlencode" => match value {
                Value::Dict(_) | Value::List(_) => {
                    let pairs = match value {
                        Value::Dict(_) => methods::items(value)?.iterate()?,
                        value => value.iterate()?,
                    };
                    let pair = |pair: Value| match pair.iterate()?.as_slice() {
                        [key, value] => {
                            let (key, value) = (key.to_text()?, value.to_text()?);
                            let (key, value) = (url(&key, true), url(&value, true));
                            text::join(&text::written("="), [key.as_slice(), &value])
                        }
                        _ => Err(Error::new("urlencode takes pairs")),
                    };
                    let pairs: Vec<_> = pairs.into_iter().map(pair).collect::<Result<_>>()?;
                    made(text::join(
                        &text::written("&"),
                        pairs.iter().map(Vec::as_slice),
                    )?)
                }
                _ => made(url(&text, false)),
            },
            _ => {
                let mut out = Builder::default();
                for &letter in text.iter() {
                    let escape = match letter.char() {
                        '&' => "&amp;",
                        '<' => "&lt;",
                        '>' => "&gt;",
                        '"' => "&#34;",
                        '\'' => "&#39;",
                        _ => {
                            out.push(&[letter])?;
                            continue;
                        }
                    };
                    let escape: Vec<Letter> = escape.chars().map(|c| letter.with(c)).collect();
                    out.push(&escape)?;
                }
                made(out.finish())
            }
        }
    }

    fn width(&self, value: Option<Value>, name: &str, default: usize) -> Result<usize> {
        let Some(width) = int_argument(value, name)? else {
            return Ok(default);
        };
        let width = usize::try_from(width).ok().filter(|width| *width <= WIDEST);
        width.ok_or_else(|| Error::new(format!("{name} is passed a number out of range")))
    }

    /// What `a.b.0` means for a value; the value itself without a path.
    fn path(&self, value: &Value, path: Option<&Value>) -> Result<Value> {
        match path {
            None | Some(Value::None) => Ok(value.clone()),
            Some(Value::Text(path)) => {
                let mut value = value.clone();
                for part in text::split(path, &text::written("."), usize::MAX) {
                    let part = match text::string(part).parse() {
                        Ok(index) => Value::Int(index),
                        Err(_) => Value::text(part),
                    };
                    value = item(&value, &part)?;
                }
                Ok(value)
            }
            Some(place) => item(value, place),
        }
    }

    fn attributes(&mut self, values: &Value, path: Option<&Value>) -> Result<Vec<Value>> {
        let values = self.iterate(values)?;
        values.iter().map(|value| self.path(value, path)).collect()
    }

    /// What items are put in order by: without `case`, large and small letters alike.
    fn sort_key(&self, value: &Value, path: Option<&Value>, case: bool) -> Result<Value> {
        let keys = match path {
            // Several paths with commas between them.
            Some(Value::Text(paths)) if paths.contains(&Letter::written(',')) => {
                let paths = text::split(paths, &text::written(","), usize::MAX);
                let key = |path: &[Letter]| self.path(value, Some(&Value::text(path)));
                let keys = paths.into_iter().map(key).collect::<Result<Vec<_>>>()?;
                return Value::list(keys.iter().map(|key| folded(key, case)).collect());
            }
            path => self.path(value, path)?,
        };
        Ok(folded(&keys, case))
    }

    fn sorted(
        &mut self,
        items: Vec<Value>,
        path: Option<&Value>,
        case: bool,
        reverse: bool,
    ) -> Result<Vec<Value>> {
        let keyed = items
            .into_iter()
            .map(|value| Ok((self.sort_key(&value, path, case)?, value)));
        let mut keyed: Vec<_> = keyed.collect::<Result<_>>()?;
        self.spend(keyed.len() * keyed.len().checked_ilog2().unwrap_or(0) as usize)?;
        let mut failed = None;
        keyed.sort_by(|(a, _), (b, _)| {
            let order = a.compare(b).unwrap_or_else(|error| {
                failed = Some(error);
                Ordering::Equal
            });
            if reverse { order.reverse() } else { order }
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(keyed.into_iter().map(|(_, value)| value).collect()),
        }
    }

    /// `map('filter', ...)` or `map(attribute='name', default=...)`.
    fn map(&mut self, values: &Value, mut passed: Passed) -> Result<Value> {
        let values = self.iterate(values)?;
        let mut mapped = Vec::with_capacity(values.len());
        if passed.positional.is_empty() {
            let [path, default] = passed.take("map", ["attribute", "default"])?;
            let path = path.ok_or_else(|| Error::new("map takes a filter or an attribute"))?;
            for value in values {
                mapped.push(match (self.path(&value, Some(&path))?, &default) {
                    (Value::Undefined(_), Some(default)) => default.clone(),
                    (found, _) => found,
                });
            }
        } else {
            let name = text::string(&text_argument(Some(passed.positional.remove(0)), "map")?);
            for value in values {
                self.spend(1)?;
                mapped.push(self.filter(&name, value, passed.clone())?);
            }
        }
        Value::list(mapped)
    }

    fn select(&mut self, name: &str, values: &Value, mut passed: Passed) -> Result<Value> {
        let mut path = None;
        if name.ends_with("attr") {
            if passed.positional.is_empty() {
                return Err(Error::new(format!("{name} takes an attribute")));
            }
            path = Some(passed.positional.remove(0));
        }
        let test = match passed.positional.is_empty() {
            true => None,
            false => Some(text::string(&text_argument(
                Some(passed.positional.remove(0)),
                name,
            )?)),
        };
        let mut kept = Vec::new();
        for value in self.iterate(values)? {
            self.spend(1)?;
            let asked = self.path(&value, path.as_ref())?;
            let holds = match &test {
                Some(test) => self.test(test, &asked, passed.clone())?,
                None => asked.is_true(),
            };
            if holds == name.starts_with("select") {
                kept.push(value);
            }
        }
        Value::list(kept)
    }

    /// `value is name(passed)`
    pub fn test(&mut self, name: &str, value: &Value, passed: Passed) -> Result<bool> {
        let comparison = match name {
            "eq" | "==" | "equalto" => Some(Comparison::Eq),
            "ne" | "!=" => Some(Comparison::Ne),
            "lt" | "<" | "lessthan" => Some(Comparison::Lt),
            "le" | "<=" => Some(Comparison::Le),
            "gt" | ">" | "greaterthan" => Some(Comparison::Gt),
            "ge" | ">=" => Some(Comparison::Ge),
            "in" => Some(Comparison::In),
            _ => None,
        };
        if comparison.is_some() || matches!(name, "divisibleby" | "sameas") {
            let [other] = passed.take(name, ["other"])?;
            let other =
                other.ok_or_else(|| Error::new(format!("the test {name} takes a value")))?;
            return match (comparison, value, &other) {
                (Some(comparison), ..) => self.compares(comparison, value, &other),
                (_, Value::None, Value::None) => Ok(true),
                (_, Value::Bool(a), Value::Bool(b)) if name == "sameas" => Ok(a == b),
                _ if name == "sameas" => Ok(value.kind() == other.kind() && *value == other),
                _ => {
                    let divisor = int_argument(Some(other), name)?.unwrap_or(0);
                    let rest = whole(value, name)?.checked_rem(divisor);
                    rest.map(|rest| rest == 0)
                        .ok_or_else(|| Error::new("division by zero"))
                }
            };
        }
        let is_case = |method| {
            let text = Value::Text(value.to_text()?);
            methods::call(&text, method, Passed::default()).map(|holds| holds.is_true())
        };
        Ok(match name {
            "defined" => !matches!(value, Value::Undefined(_)),
            "undefined" => matches!(value, Value::Undefined(_)),
            "none" => matches!(value, Value::None),
            "true" => matches!(value, Value::Bool(true)),
            "false" => matches!(value, Value::Bool(false)),
            "boolean" => matches!(value, Value::Bool(_)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "number" => value.as_float().is_some(),
            "string" => matches!(value, Value::Text(_)),
            "mapping" => matches!(value, Value::Dict(_)),
            "sequence" | "iterable" => {
                matches!(
                    value,
                    Value::Text(_) | Value::List(_) | Value::Dict(_) | Value::Undefined(_)
                ) || (name == "iterable" && matches!(value, Value::Loop(_)))
            }
            "callable" => matches!(
                value,
                Value::Function(_) | Value::Undefined(_) | Value::Loop(_)
            ),
            "odd" => whole(value, name)? % 2 != 0,
            "even" => whole(value, name)? % 2 == 0,
            "lower" => is_case("islower")?,
            "upper" => is_case("isupper")?,
            "escaped" => false,
            _ => return Err(Error::new(format!("there is no test {name}"))),
        })
    }
}

fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

fn number(value: &Value, name: &str) -> Result<f64> {
    value.defined()?;
    let no_number = || Error::new(format!("{name} takes a number, no {}", value.kind()));
    value.as_float().ok_or_else(no_number)
}

fn whole(value: &Value, name: &str) -> Result<i128> {
    value.defined()?;
    let no_int = || Error::new(format!("{name} takes a whole number, no {}", value.kind()));
    value.as_int().ok_or_else(no_int)
}

fn folded(value: &Value, case: bool) -> Value {
    match value {
        Value::Text(text) if !case => Value::text(text::lower(text)),
        value => value.clone(),
    }
}

fn parse_float(value: &Value) -> Option<f64> {
    let Value::Text(text) = value else {
        return value.as_float();
    };
    let text = text::string(text).to_lowercase();
    let text = text.trim_matches(text::is_space);
    // Python takes digits with _ between them, and no other words than these.
    let is_word = text
        .trim_start_matches(['+', '-'])
        .starts_with(|c: char| c.is_alphabetic());
    let is_known = text.ends_with("inf") || text.ends_with("infinity") || text.ends_with("nan");
    (!is_word || is_known).then(|| text.replace('_', "").parse().ok())?
}

/// Python's `int`; for a text that is no number, or for another value, the default.
fn to_int(value: &Value, passed: Passed) -> Result<Value> {
    let [default, base] = passed.take("int", ["default", "base"])?;
    value.defined()?;
    let base = int_argument(base, "int")?.unwrap_or(10);
    let whole = match value {
        Value::Text(text) => {
            let digits = text::string(text)
                .trim_matches(text::is_space)
                .to_lowercase();
            let prefix = match base {
                2 => "0b",
                8 => "0o",
                16 => "0x",
                _ => "",
            };
            let digits = digits
                .strip_prefix(prefix)
                .unwrap_or(&digits)
                .replace('_', "");
            let base = u32::try_from(base)
                .ok()
                .filter(|base| (2..=36).contains(base));
            base.and_then(|base| i128::from_str_radix(&digits, base).ok())
        }
        value => value.as_int(),
    };
    let whole = whole.or_else(|| {
        let number = parse_float(value).filter(|number| number.is_finite());
        number.map(|number| number.trunc() as i128)
    });
    Ok(whole.map_or_else(|| default.unwrap_or(Value::Int(0)), Value::Int))
}

fn round(value: &Value, passed: Passed) -> Result<Value> {
    let [precision, method] = passed.take("round", ["precision", "method"])?;
    let precision = int_argument(precision, "round")?
        .unwrap_or(0)
        .clamp(-300, 300) as i32;
    let method = match method {
        Some(method) => text::string(&text_argument(Some(method), "round")?),
        None => "common".to_owned(),
    };
    let scale = 10f64.powi(precision);
    let size = number(value, "round")?;
    Ok(match method.as_str() {
        "common" if value.as_int().is_some() && precision >= 0 => value.clone(),
        // To the nearest decimal, and from the middle to the even one, as Python does.
        "common" if precision >= 0 => {
            let digits = format!("{size:.*}", precision as usize);
            Value::Float(digits.parse().unwrap_or(size))
        }
        "common" => {
            let rounded = (size * scale).round_ties_even() / scale;
            match value.as_int() {
                Some(_) => Value::Int(rounded as i128),
                None => Value::Float(rounded),
            }
        }
        "ceil" => Value::Float((size * scale).ceil() / scale),
        "floor" => Value::Float((size * scale).floor() / scale),
        other => return Err(Error::new(format!("round knows no method {other}"))),
    })
}

fn indent(letters: &[Letter], passed: Passed) -> Result<Value> {
    let [width, first, blank] = passed.take("indent", ["width", "first", "blank"])?;
    let (first, blank) = (is_true(first), is_true(blank));
    let indentation = match width {
        Some(Value::Text(text)) => text.to_vec(),
        width => {
            let width = usize::try_from(int_argument(width, "indent")?.unwrap_or(4)).unwrap_or(0);
            text::written(&" ".repeat(width.min(WIDEST)))
        }
    };
    // As if the text ended with one more line end, so that one at its end counts.
    let newline = text::written("\n");
    let ended = text::join(&[], [letters, &newline])?;
    let mut out = Builder::default();
    for (number, line) in text::lines(&ended, false).into_iter().enumerate() {
        if number > 0 {
            out.push(&newline)?;
        }
        let indents = if number == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if indents {
            out.push(&indentation)?;
        }
        out.push(line)?;
    }
    Ok(Value::text(out.finish()))
}

/// Lines of at most `width` letters, cut at blanks, which go where a line is cut.
fn wrap(line: &[Letter], width: usize, break_long: bool) -> Vec<&[Letter]> {
    let chunks = line.chunk_by(|a, b| a.is_space() == b.is_space());
    let mut lines: Vec<&[Letter]> = Vec::new();
    // Where the current line begins and ends.
    let (mut start, mut end) = (0, 0);
    for chunk in chunks {
        let (is_blank, mut rest) = (chunk[0].is_space(), chunk.len());
        if is_blank && start == end && !lines.is_empty() {
            (start, end) = (end + rest, end + rest);
            continue;
        }
        if end - start + rest > width && start < end && !(break_long && rest > width) {
            lines.push(text::strip_end(&line[start..end], Letter::is_space));
            start = end;
            if is_blank {
                (start, end) = (end + rest, end + rest);
                continue;
            }
        }
        while break_long && end - start + rest > width {
            let taken = width - (end - start);
            lines.push(&line[start..end + taken]);
            (start, end, rest) = (end + taken, end + taken, rest - taken);
        }
        end += rest;
    }
    lines.push(text::strip_end(&line[start..end], Letter::is_space));
    lines.retain(|line| !line.is_empty());
    lines
}

fn strip_tags(letters: &[Letter]) -> Result<Vec<Letter>> {
    let without = |letters: &[Letter], open: &str, close: &str| -> Result<Vec<Letter>> {
        let mut out = Builder::default();
        let mut rest = letters;
        let (opens, closes) = (text::written(open), text::written(close));
        while let Some(start) = rest.windows(opens.len()).position(|w| w == opens)
            && let Some(end) = rest[start..]
                .windows(closes.len())
                .position(|w| w == closes)
        {
            out.push(&rest[..start])?;
            rest = &rest[start + end + closes.len()..];
        }
        out.push(rest)?;
        Ok(out.finish())
    };
    let letters = without(letters, "<!--", "-->")?;
    let letters = without(&letters, "<", ">")?;
    let mut letters = text::join(&text::written(" "), text::words(&letters, usize::MAX))?;
    for (entity, character) in [
        ("&lt;", '<'),
        ("&gt;", '>'),
        ("&#34;", '"'),
        ("&quot;", '"'),
        ("&#39;", '\''),
        ("&amp;", '&'),
    ] {
        let entity = text::written(entity);
        let mut out = Builder::default();
        let mut done = 0;
        for at in text::matches(&letters, &entity) {
            out.push(&letters[done..at])?;
            out.push(&[letters[at].with(character)])?;
            done = at + entity.len();
        }
        out.push(&letters[done..])?;
        letters = out.finish();
    }
    Ok(letters)
}

/// Percent-encoded; `query`: for a query, in which a blank is `+` and a slash is encoded too.
fn url(letters: &[Letter], query: bool) -> Vec<Letter> {
    let mut out = Vec::new();
    for &letter in letters {
        match letter.char() {
            c if c.is_ascii_alphanumeric() || "_.-~".contains(c) || (c == '/' && !query) => {
                out.push(letter);
            }
            ' ' if query => out.push(letter.with('+')),
            c => {
                let mut bytes = [0; 4];
                let bytes = c.encode_utf8(&mut bytes).bytes();
                let escape: String = bytes.map(|byte| format!("%{byte:02X}")).collect();
                out.extend(escape.chars().map(|c| letter.with(c)));
            }
        }
    }
    out
}

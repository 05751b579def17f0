//! Jinja's filters.

use std::cmp::Ordering;

use super::{
    Error, Result,
    access::{attribute, item, of_safe},
    arithmetic::{calculate, number, truncated},
    interpreter::{Interpreter, Passed},
    json::tojson,
    methods::{self, int_argument, is_true, text_argument},
    syntax::Operator,
    text::{self, Letter},
    value::{Form, Value, sort},
};

/// The widest that a filter may make a line or a table.
const WIDEST: usize = 100_000;

impl Interpreter<'_> {
    /// `value | name(passed)`
    pub fn filter(&mut self, name: &str, value: Value, passed: Passed) -> Result<Value> {
        match name {
            "default" | "d" => {
                let [default, boolean] = passed.take(name, ["default_value", "boolean"])?;
                let falsy = is_true(boolean) && !value.is_true();
                match falsy || matches!(value, Value::Undefined(_)) {
                    true => Ok(default.unwrap_or_else(|| Value::written(""))),
                    false => Ok(value),
                }
            }
            "length" | "count" => Ok(Value::Int(value.len()? as i128)),
            "list" => Value::list(self.iterate(&value)?),
            "string" if matches!(value, Value::Safe(_)) => Ok(value),
            "string" => Ok(Value::Text(value.to_text()?)),
            "safe" => Ok(Value::Safe(value.to_text()?)),
            "e" | "escape" => Ok(Value::Safe(value.html()?)),
            "forceescape" => Ok(Value::Safe(text::html(&value.to_text()?)?.into())),
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
                Value::Undefined(_) => Value::generator(Vec::new()),
                value => Value::generator(methods::items(&value)?),
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
                    let next = calculate(Operator::Add, &sum, &value)?;
                    sum = self.made(next)?;
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
                let case = is_true(case);
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
                Value::list(self.sorted(items, path.as_ref(), is_true(case), is_true(reverse))?)
            }
            "dictsort" => {
                let [case, by, reverse] = passed.take(name, ["case_sensitive", "by", "reverse"])?;
                let by_value = by.as_ref().and_then(Value::as_text);
                let by_value = by_value.is_some_and(|by| text::spells(by, "value"));
                let pairs = methods::items(&value)?;
                let place = Value::Int(by_value.into());
                Value::list(self.sorted(pairs, Some(&place), is_true(case), is_true(reverse))?)
            }
            "unique" => {
                let [case, path] = passed.take(name, ["case_sensitive", "attribute"])?;
                let case = is_true(case);
                let (mut keys, mut kept) = (Vec::new(), Vec::new());
                for value in self.iterate(&value)? {
                    let key = self.sort_key(&value, path.as_ref(), case)?;
                    self.spend(keys.len().saturating_mul(1 + key.steps()))?;
                    if !keys.contains(&key) {
                        keys.push(key);
                        kept.push(value);
                    }
                }
                Value::generator(kept)
            }
            "groupby" => {
                let [path, default, case] =
                    passed.take(name, ["attribute", "default", "case_sensitive"])?;
                let case = is_true(case);
                let items = self.iterate(&value)?;
                let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
                for value in self.sorted(items, path.as_ref(), case, false)? {
                    let shown = match self.path(&value, path.as_ref())? {
                        missing @ Value::Undefined(_) => default.clone().unwrap_or(missing),
                        shown => shown,
                    };
                    let key = folded(&shown, case);
                    match groups.last_mut() {
                        Some((last, _, group)) if *last == key => group.push(value),
                        _ => groups.push((key, shown, vec![value])),
                    }
                }
                let group =
                    |(_, key, group)| Value::sequence(vec![key, Value::list(group)?], Form::Group);
                Value::list(groups.into_iter().map(group).collect::<Result<_>>()?)
            }
            "reverse" => match &value {
                Value::Text(text) => {
                    Ok(Value::text(text.iter().rev().copied().collect::<Vec<_>>()))
                }
                Value::Safe(_) => Err(of_safe("the reverse")),
                value => {
                    let items = self.iterate(value)?.into_iter().rev().collect();
                    match value {
                        Value::List(list) if !list.has_places() => Value::list(items),
                        _ => Value::generator(items),
                    }
                }
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
                Value::generator(items.chunks(size).map(row).collect::<Result<_>>()?)
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
                    if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None))
                        && number >= longer
                    {
                        column.push(fill.clone());
                    }
                    columns.push(Value::list(column)?);
                }
                Value::generator(columns)
            }
            "format" => {
                let format = match value {
                    Value::Safe(_) => value,
                    value => Value::Text(value.to_text()?),
                };
                let named = passed.named.into_iter();
                let named: Vec<_> = named.map(|(n, v)| (Value::written(&n), v)).collect();
                let arguments = match named.is_empty() {
                    true => Value::tuple(passed.positional)?,
                    false => Value::dict(named)?,
                };
                calculate(Operator::Rem, &format, &arguments)
            }
            _ => self.text_filter(name, &value, passed),
        }
    }

    pub fn width(&self, value: Option<Value>, name: &str, default: usize) -> Result<usize> {
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
        let steps: usize = keyed.iter().map(|(key, _)| 1 + key.steps()).sum();
        self.spend(steps * keyed.len().checked_ilog2().unwrap_or(0) as usize)?;
        sort(&mut keyed, |(a, _), (b, _)| {
            let order = a.compare(b)?;
            Ok(if reverse { order.reverse() } else { order })
        })?;
        Ok(keyed.into_iter().map(|(_, value)| value).collect())
    }

    /// `map('filter', ...)` or `map(attribute='name', default=...)`.
    fn map(&mut self, values: &Value, mut passed: Passed) -> Result<Value> {
        let values = self.each(values)?;
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
        Value::generator(mapped)
    }

    /// What `map` and `select` go through: nothing where the value counts as false.
    fn each(&mut self, values: &Value) -> Result<Vec<Value>> {
        match values.is_true() {
            true => self.iterate(values),
            false => Ok(Vec::new()),
        }
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
        for value in self.each(values)? {
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
        Value::generator(kept)
    }
}

fn folded(value: &Value, case: bool) -> Value {
    match value.as_text() {
        Some(text) if !case => Value::text(text::lower(text)),
        _ => value.clone(),
    }
}

fn parse_float(value: &Value) -> Option<f64> {
    let Some(text) = value.as_text() else {
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
    let whole = match value.as_text() {
        Some(text) => {
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
        None => value.as_int(),
    };
    Ok(match (whole, parse_float(value)) {
        (Some(whole), _) => Value::Int(whole),
        (None, Some(number)) if number.is_finite() => Value::Int(truncated(number)?),
        _ => default.unwrap_or(Value::Int(0)),
    })
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
        "common" if value.as_int().is_some() && precision >= 0 => {
            value.as_int().map_or(Value::None, Value::Int)
        }
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

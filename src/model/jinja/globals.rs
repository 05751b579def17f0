//! The functions that every template can call.

use std::{cell::Cell, rc::Rc};

use super::{
    Error, Result,
    interpreter::{Interpreter, Passed},
    methods::int_argument,
    text,
    value::{Form, Function, Namespace, Value},
};

/// Python's sandbox allows no longer ranges.
const LONGEST_RANGE: u128 = 100_000;

pub const GLOBALS: [&str; 7] = [
    "raise_exception",
    "strftime_now",
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
];

impl Interpreter<'_> {
    pub fn call_global(&mut self, name: &str, passed: Passed) -> Result<Value> {
        match name {
            "raise_exception" => {
                let [message] = passed.take(name, ["message"])?;
                let message = message.map(|message| message.to_text()).transpose()?;
                Err(Error::new(
                    message.map_or_else(String::new, |m| text::string(&m)),
                ))
            }
            "strftime_now" => {
                let [format] = passed.take(name, ["format"])?;
                let format = format.as_ref().and_then(Value::as_text);
                let format = format.ok_or_else(|| Error::new("strftime_now takes a format"))?;
                self.asked_time = true;
                let now = (self.input.now)(&text::string(format)).map_err(Error::new)?;
                Ok(match format.iter().any(|letter| letter.is_given()) {
                    true => Value::text(text::given(&now)),
                    false => Value::written(&now),
                })
            }
            "range" => range(passed),
            "dict" => {
                let mut entries = Vec::new();
                for value in &passed.positional {
                    entries.extend(pairs(value)?);
                }
                let named = passed.named.into_iter();
                entries.extend(named.map(|(name, value)| (Value::text(text::given(&name)), value)));
                self.dict(entries)
            }
            "namespace" => {
                let namespace = Namespace::default();
                for value in &passed.positional {
                    for (key, value) in pairs(value)? {
                        namespace.set(&text::string(&key.to_text()?), value)?;
                    }
                }
                for (name, value) in passed.named {
                    namespace.set(&name, value)?;
                }
                Ok(Value::Namespace(Rc::new(namespace)))
            }
            "cycler" => match passed.positional.is_empty() {
                true => Err(Error::new("cycler takes what to go through")),
                false => Ok(Value::Function(Rc::new(Function::Cycler {
                    items: passed.positional,
                    position: Cell::new(0),
                }))),
            },
            _ => {
                let [separator] = passed.take("joiner", ["sep"])?;
                Ok(Value::Function(Rc::new(Function::Joiner {
                    separator: separator.unwrap_or_else(|| Value::written(", ")),
                    used: Cell::new(false),
                })))
            }
        }
    }
}

/// The entries of a dict, or of a list of pairs.
fn pairs(value: &Value) -> Result<Vec<(Value, Value)>> {
    if let Value::Dict(dict) = value {
        return Ok(dict.entries.clone());
    }
    let pair = |pair: Value| match <[Value; 2]>::try_from(pair.iterate()?) {
        Ok([key, value]) => Ok((key, value)),
        Err(_) => Err(Error::new("a dict is made of pairs")),
    };
    value.iterate()?.into_iter().map(pair).collect()
}

fn range(passed: Passed) -> Result<Value> {
    let [first, second, step] = passed.take("range", ["start", "stop", "step"])?;
    let first = int_argument(first, "range")?;
    let (start, stop) = match (first, int_argument(second, "range")?) {
        (Some(start), Some(stop)) => (start, stop),
        (Some(stop), None) => (0, stop),
        (None, _) => return Err(Error::new("range takes where to stop")),
    };
    let step = int_argument(step, "range")?.unwrap_or(1);
    if step == 0 {
        return Err(Error::new("range goes no step further"));
    }
    let too_long = || Error::new("a range is too long");
    let distance = stop.checked_sub(start).ok_or_else(too_long)?;
    let count = match distance != 0 && (distance > 0) == (step > 0) {
        true => (distance.unsigned_abs() - 1) / step.unsigned_abs() + 1,
        false => 0,
    };
    if count > LONGEST_RANGE {
        return Err(too_long());
    }
    let numbers = (0..count as i128).map(|n| Value::Int(start + n * step));
    Value::sequence(numbers.collect(), Form::Range)
}

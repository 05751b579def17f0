//! What stands at `.name`, `[key]` and `[start:stop:step]` of a value.

use std::rc::Rc;

use super::{
    Error, Result,
    interpreter::Loop,
    methods,
    text::{self, Letter},
    value::{Form, Function, Value},
};

/// `value.name`: a method or field of its type, else what stands under that key.
pub fn attribute(value: &Value, name: &str) -> Result<Value> {
    value.defined()?;
    if methods::exist(value, name) {
        return Ok(method(value, name));
    }
    let found = match value {
        Value::Dict(dict) => dict.get_named(name).cloned(),
        Value::Namespace(namespace) => namespace.get(name),
        Value::List(list) if list.form == Form::Group => match name {
            "grouper" => list.items.first().cloned(),
            "list" => list.items.last().cloned(),
            _ => None,
        },
        Value::Loop(state) => loop_field(value, state, name),
        Value::Function(function) => match &**function {
            Function::Macro(closure) if name == "name" => {
                Some(Value::written(&closure.definition.name))
            }
            Function::Cycler { items, position } => match name {
                "next" => Some(value.clone()),
                "current" => Some(items[position.get()].clone()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    };
    Ok(found.unwrap_or_else(|| no_attribute(value, name)))
}

fn no_attribute(value: &Value, name: &str) -> Value {
    Value::undefined(format!(
        "'{} object' has no attribute '{name}'",
        value.kind()
    ))
}

fn method(value: &Value, name: &str) -> Value {
    Value::Function(Rc::new(Function::Method(value.clone(), name.to_owned())))
}

fn loop_field(value: &Value, state: &Loop, name: &str) -> Option<Value> {
    let (index, len) = (state.index.get(), state.items.len());
    let count = |number: usize| Value::Int(number as i128);
    let neighbour = |item: Option<&Value>, what: &str| {
        let none = || Value::undefined(format!("there is no {what} item"));
        item.cloned().unwrap_or_else(none)
    };
    Some(match name {
        "index" => count(index + 1),
        "index0" => count(index),
        "revindex" => count(len - index),
        "revindex0" => count(len - index - 1),
        "first" => Value::Bool(index == 0),
        "last" => Value::Bool(index + 1 == len),
        "length" => count(len),
        "depth" => count(state.depth + 1),
        "depth0" => count(state.depth),
        "previtem" => neighbour(
            index
                .checked_sub(1)
                .and_then(|before| state.items.get(before)),
            "previous",
        ),
        "nextitem" => neighbour(state.items.get(index + 1), "next"),
        "cycle" | "changed" => method(value, name),
        _ => return None,
    })
}

/// `value[key]`: what stands at that place or under that key, else a method of that name.
pub fn item(value: &Value, key: &Value) -> Result<Value> {
    value.defined()?;
    let found = match (value, key) {
        (Value::Dict(dict), key) => dict.get(key).cloned(),
        (Value::List(list), key) if list.has_places() => {
            place(key, list.items.len()).map(|at| list.items[at].clone())
        }
        (Value::Text(text), key) => place(key, text.len()).map(|at| Value::text([text[at]])),
        (Value::Safe(_), _) => return Err(of_safe("a part")),
        _ => None,
    };
    match (found, key.as_text()) {
        (Some(found), _) => Ok(found),
        (None, Some(name)) => attribute(value, &text::string(name)),
        (None, None) => {
            let number = key.as_int().map(|number| number.to_string());
            Ok(Value::undefined(format!(
                "'{} object' has no element {}",
                value.kind(),
                number.as_deref().unwrap_or(key.kind())
            )))
        }
    }
}

/// What is not done to a text that the filter `safe` or `escape` gave.
pub fn of_safe(what: &str) -> Error {
    Error::new(format!("{what} of a text marked safe is not supported"))
}

/// The place that an index means in a sequence: counted from its end where negative.
fn place(index: &Value, len: usize) -> Option<usize> {
    let index = index.as_int()?;
    let index = from_end(index, len as i128);
    usize::try_from(index).ok().filter(|index| *index < len)
}

/// A bound of a part of a sequence: counted from its end where negative.
pub fn from_end(bound: i128, len: i128) -> i128 {
    match bound < 0 {
        true => bound.saturating_add(len),
        false => bound,
    }
}

/// `value[start:stop:step]`
pub fn slice(value: &Value, [start, stop, step]: [Option<i128>; 3]) -> Result<Value> {
    let len = match value.defined()? {
        Value::Text(text) => text.len(),
        Value::List(list) if list.has_places() => list.items.len(),
        Value::Safe(_) => return Err(of_safe("a part")),
        other => {
            let kind = other.kind();
            return Err(Error::new(format!("a value of type {kind} has no slices")));
        }
    } as i128;
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Error::new("a slice goes no step further"));
    }
    // Where to begin and to end, as Python clamps it.
    let (least, most) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clamp = |bound: i128| from_end(bound, len).clamp(least, most);
    let start = start.map_or(if step > 0 { 0 } else { len - 1 }, clamp);
    let stop = stop.map_or(if step > 0 { len } else { -1 }, clamp);
    let mut places = Vec::new();
    let mut at = start;
    while if step > 0 { at < stop } else { at > stop } {
        places.push(at as usize);
        at = at.saturating_add(step);
    }
    match value {
        Value::List(list) => {
            let items = places.into_iter().map(|at| list.items[at].clone());
            Value::sequence(items.collect(), list.form.clone())
        }
        Value::Text(text) => {
            let letters: Vec<Letter> = places.into_iter().map(|at| text[at]).collect();
            Ok(Value::text(letters))
        }
        _ => Ok(Value::None),
    }
}

//! Jinja's tests, which follow `is`.

use super::{
    Error, Result,
    arithmetic::calculate,
    interpreter::{Interpreter, Passed},
    methods,
    syntax::{Comparison, Operator},
    value::Value,
};

impl Interpreter<'_> {
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
                _ => Ok(calculate(Operator::Rem, value, &other)? == Value::Int(0)),
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
            "string" => value.as_text().is_some(),
            "mapping" => matches!(value, Value::Dict(_)),
            "sequence" => match value {
                Value::List(list) => list.has_places(),
                Value::Text(_) | Value::Safe(_) | Value::Dict(_) | Value::Undefined(_) => true,
                _ => false,
            },
            "iterable" => matches!(
                value,
                Value::Text(_)
                    | Value::Safe(_)
                    | Value::List(_)
                    | Value::Dict(_)
                    | Value::Undefined(_)
                    | Value::Loop(_)
            ),
            "callable" => matches!(
                value,
                Value::Function(_) | Value::Undefined(_) | Value::Loop(_)
            ),
            "odd" => calculate(Operator::Rem, value, &Value::Int(2))? == Value::Int(1),
            "even" => calculate(Operator::Rem, value, &Value::Int(2))? == Value::Int(0),
            "lower" => is_case("islower")?,
            "upper" => is_case("isupper")?,
            "escaped" => matches!(value, Value::Safe(_)),
            _ => return Err(Error::new(format!("there is no test {name}"))),
        })
    }
}

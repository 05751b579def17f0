//! Python's arithmetic.

use super::{
    Error, Result,
    access::of_safe,
    format::percent,
    syntax::Operator,
    text::{self, LETTERS_PER_STEP, MOST_LETTERS},
    value::{Form, Value},
};

/// Python's arithmetic, on numbers, texts and lists.
pub fn calculate(operator: Operator, left: &Value, right: &Value) -> Result<Value> {
    use Operator::{Add, Div, FloorDiv, Mul, Pow, Rem, Sub};
    match (operator, left, right) {
        (Add, Value::Text(a), Value::Text(b)) => {
            return Ok(Value::text(text::join(&[], [&**a, &**b])?));
        }
        (Add, Value::Text(_) | Value::Safe(_), Value::Text(_) | Value::Safe(_)) => {
            let (a, b) = (left.html()?, right.html()?);
            return Ok(Value::Safe(text::join(&[], [&*a, &b])?.into()));
        }
        (Add, Value::List(a), Value::List(b)) if a.form == b.form => {
            if let Form::List | Form::Tuple = a.form {
                let items = [a.items.as_slice(), &b.items].concat();
                return Value::sequence(items, a.form.clone());
            }
        }
        (Rem, Value::Safe(_), _) => return Err(of_safe("a format")),
        (Rem, Value::Text(format), arguments) => {
            return Ok(Value::text(percent(format, arguments)?));
        }
        (Mul, Value::Text(_) | Value::List(_), count) if count.as_int().is_some() => {
            return times(left, count.as_int().unwrap_or(0));
        }
        (Mul, count, Value::Text(_) | Value::List(_)) if count.as_int().is_some() => {
            return times(right, count.as_int().unwrap_or(0));
        }
        _ => {}
    }
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        let whole = match operator {
            Add => a.checked_add(b),
            Sub => a.checked_sub(b),
            Mul => a.checked_mul(b),
            FloorDiv | Rem if b == 0 => return Err(by_zero()),
            // Rounded down, and the remainder with the divisor's sign.
            FloorDiv => a.checked_div_euclid(b).map(|q| {
                if b < 0 && a.rem_euclid(b) != 0 {
                    q - 1
                } else {
                    q
                }
            }),
            Rem => a
                .checked_rem_euclid(b)
                .map(|r| if b < 0 && r != 0 { r + b } else { r }),
            Pow if b >= 0 => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            Pow => return power(a as f64, b as f64),
            Div => {
                return if b == 0 {
                    Err(by_zero())
                } else {
                    Ok(Value::Float(a as f64 / b as f64))
                };
            }
        };
        return whole.map(Value::Int).ok_or_else(too_large);
    }
    let (Some(a), Some(b)) = (left.defined()?.as_float(), right.defined()?.as_float()) else {
        return Err(Error::new(format!(
            "{} does not take values of types {} and {}",
            operator.symbol(),
            left.kind(),
            right.kind()
        )));
    };
    Ok(Value::Float(match operator {
        Add => a + b,
        Sub => a - b,
        Mul => a * b,
        Div | FloorDiv | Rem if b == 0.0 => return Err(by_zero()),
        Div => a / b,
        FloorDiv => (a / b).floor(),
        Rem => a - b * (a / b).floor(),
        Pow => return power(a, b),
    }))
}

/// `count` copies of a text or a list.
fn times(value: &Value, count: i128) -> Result<Value> {
    let len = value.len()?;
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    if len.saturating_mul(count) > MOST_LETTERS / LETTERS_PER_STEP {
        return Err(Error::new("it makes a value without end"));
    }
    match value {
        Value::List(list) => {
            let items = std::iter::repeat_n(&list.items, count).flatten().cloned();
            Value::sequence(items.collect(), list.form.clone())
        }
        value => Ok(Value::text(value.to_text()?.repeat(count))),
    }
}

/// A value that must be a number.
pub fn number(value: &Value, what: &str) -> Result<f64> {
    value.defined()?;
    let no_number = || Error::new(format!("{what} takes a number, no {}", value.kind()));
    value.as_float().ok_or_else(no_number)
}

pub fn too_large() -> Error {
    Error::new("a number is out of range")
}

/// `-value`
pub fn negative(value: &Value) -> Result<Value> {
    match value.as_int() {
        Some(number) => Ok(Value::Int(number.checked_neg().ok_or_else(too_large)?)),
        None => Ok(Value::Float(-number(value, "-")?)),
    }
}

/// The whole part of a float.
pub fn truncated(number: f64) -> Result<i128> {
    let fits = number.abs() < i128::MAX as f64;
    fits.then_some(number as i128).ok_or_else(too_large)
}

fn power(base: f64, exponent: f64) -> Result<Value> {
    if base == 0.0 && exponent < 0.0 {
        return Err(by_zero());
    }
    let power = base.powf(exponent);
    let is_real = power.is_finite() || !base.is_finite() || !exponent.is_finite();
    is_real.then_some(Value::Float(power)).ok_or_else(too_large)
}

fn by_zero() -> Error {
    Error::new("division by zero")
}

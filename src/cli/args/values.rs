//! What single values may be.

use jiff::civil::DateTime;

use super::MOST_TOKENS;
use crate::backend::MIN_BUDGET;

pub fn date(text: &str) -> Result<DateTime, String> {
    let expected = "expected a date, such as 2026-01-31 or 2026-01-31T18:30";
    text.parse().map_err(|_| expected.to_owned())
}

pub fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err("expected a number".to_owned()),
    }
}

pub fn zero_or_more(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "must not be negative")
}

pub fn more_than_zero(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0, "must be more than 0")
}

pub fn at_least_1(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 1.0, "must be at least 1")
}

/// The range that a file's own factor may have.
pub fn rope_scale(text: &str) -> Result<f32, String> {
    number(
        text,
        |value| (1e-3..=1e6).contains(&value),
        "must be between 0.001 and 1000000",
    )
}

pub fn probability(text: &str) -> Result<f32, String> {
    number(
        text,
        |value| (0.0..=1.0).contains(&value),
        "must be between 0 and 1",
    )
}

fn number(text: &str, valid: fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    let value = finite(text)?;
    valid(value)
        .then_some(value)
        .ok_or_else(|| expected.to_owned())
}

pub fn count(text: &str) -> Result<usize, String> {
    whole_number(text, 0, usize::MAX)
}

pub fn seed(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a whole number between 0 and {}", u64::MAX);
    text.parse().map_err(|_| expected())
}

pub fn at_least_one(text: &str) -> Result<usize, String> {
    whole_number(text, 1, usize::MAX)
}

pub fn tokens(text: &str) -> Result<usize, String> {
    whole_number(text, 0, MOST_TOKENS)
}

pub fn kv_budget(text: &str) -> Result<usize, String> {
    whole_number(text, MIN_BUDGET, MOST_TOKENS)
}

pub fn some_tokens(text: &str) -> Result<usize, String> {
    whole_number(text, 1, MOST_TOKENS)
}

/// Half of a window is predicted, and its last token has no successor.
pub fn window(text: &str) -> Result<usize, String> {
    whole_number(text, 4, MOST_TOKENS)
}

/// More threads than this is a slip of the finger, and would only run into the system's own limit.
pub fn thread_count(text: &str) -> Result<usize, String> {
    whole_number(text, 1, 1024)
}

fn whole_number(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let expected = match most {
        usize::MAX => format!("expected a whole number, at least {least}"),
        _ => format!("expected a whole number between {least} and {most}"),
    };
    let value = text
        .parse()
        .ok()
        .filter(|value| (least..=most).contains(value));
    value.ok_or(expected)
}

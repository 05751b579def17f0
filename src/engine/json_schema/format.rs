//! The values of `format`.

use anyhow::{Result, bail};
use serde_json::{Value, json};

macro_rules! date {
    () => {
        concat!(
            r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))",
            // Leap years.
            r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
        )
    };
}

/// Without leap seconds, which are not in every minute, nor known for years to come.
macro_rules! time {
    () => {
        r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    };
}

/// Without two hyphens in a row, which are for encoded names.
macro_rules! host {
    () => {
        r"(?:[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)(?:\.[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)*"
    };
}

macro_rules! atom {
    () => {
        r"[A-Za-z0-9!#$%\&'*+/=?^_`{|}\~\-]+"
    };
}

/// Schemas that together enforce a format which llguidance takes too widely: days that a month does not have, leap seconds
/// in any minute, and names of any length. `None` where llguidance enforces it.
///
/// # Errors
/// A format that cannot be enforced.
pub fn exact(name: &str) -> Result<Option<Vec<Value>>> {
    let pattern = |pattern: &str| json!({"pattern": pattern});
    Ok(Some(match name {
        "date" => vec![pattern(concat!("^", date!(), "$"))],
        "time" => vec![pattern(concat!("^", time!(), "$"))],
        "date-time" => vec![pattern(concat!("^", date!(), "T", time!(), "$"))],
        "hostname" => vec![
            pattern(concat!("^", host!(), "$")),
            pattern(r"^[^.]{1,63}(?:\.[^.]{1,63})*$"),
            json!({"maxLength": 253}),
        ],
        "email" => vec![
            pattern(concat!(
                "^",
                atom!(),
                r"(?:\.",
                atom!(),
                ")*@",
                host!(),
                "$"
            )),
            pattern(r"^[^@]{1,64}@[^.]{1,63}(?:\.[^.]{1,63})*$"),
            json!({"maxLength": 254}),
        ],
        "duration" | "ipv4" | "ipv6" | "uuid" | "uri" => return Ok(None),
        _ => bail!(
            "the format {name:?} cannot be enforced; those that can are date, time, date-time, duration, email, hostname, \
             ipv4, ipv6, uuid and uri"
        ),
    }))
}

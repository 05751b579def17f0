//! Figures as people read them.

use std::time::Duration;

use indicatif::HumanCount;

/// Three digits that count: `0.0512`, `18.3`, `1,240`.
pub fn three_digits(value: f64) -> String {
    // Rounding can carry into a digit more, so that the exponent is taken from what is rounded.
    let rounded = format!("{value:.2e}");
    let exponent = rounded.split_once('e').and_then(|(_, e)| e.parse().ok());
    let value: f64 = rounded.parse().unwrap_or(value);
    match exponent.unwrap_or(0i32) {
        _ if value == 0.0 => "0".to_owned(),
        exponent @ ..2 => format!("{value:.0$}", (2 - exponent) as usize),
        _ => HumanCount(value as u64).to_string(),
    }
}

/// Bytes, in the largest unit of which there is one: `1.21 GiB`.
pub fn bytes(count: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (count.max(1.0).log2() / 10.0) as usize;
    let unit = unit.min(UNITS.len() - 1);
    let value = count / 1024f64.powi(unit as i32);
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// Whole seconds: `7s`, `2m05s`, `1h05m`.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{:02}s", seconds % 60),
        _ => format!("{hours}h{:02}m", minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_count() {
        for (value, expected) in [
            (0.0, "0"),
            (0.051_23, "0.0512"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (18.34, "18.3"),
            (99.96, "100"),
            (123.4, "123"),
            (999.6, "1,000"),
            (1237.0, "1,240"),
            (68_712.0, "68,700"),
        ] {
            assert_eq!(three_digits(value), expected);
        }
    }

    #[test]
    fn bytes_have_a_unit_and_times_two_at_most() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(1000.0), "1,000 B");
        assert_eq!(bytes(1.3e9), "1.21 GiB");
        assert_eq!(bytes(1e16), "9,090 TiB");
        for (seconds, expected) in [(7, "7s"), (125, "2m05s"), (3900, "1h05m")] {
            assert_eq!(time(Duration::from_secs(seconds)), expected);
        }
    }
}

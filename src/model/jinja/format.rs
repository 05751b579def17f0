//! Python's three ways from values to text: `str` of a float, `'%s' % values` and `'{}'.format(values)`.

use super::{
    Error, Result,
    access::{attribute, item},
    arithmetic::truncated,
    interpreter::Passed,
    text::{self, Builder, Letter},
    value::{Form, Value},
};

/// The widest that a format may pad to, and the most digits.
const WIDEST: usize = 10_000;

/// Python's `repr` of a float: the shortest digits that give it back, with an exponent where it is far from 1.
pub fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') {
            plain
        } else {
            format!("{plain}.0")
        };
    }
    format!("{digits}{}", python_exponent(exponent))
}

fn python_exponent(exponent: i32) -> String {
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("e{sign}{:02}", exponent.unsigned_abs())
}

/// How a value is to stand, in the terms of both ways of formatting.
struct Layout {
    fill: Letter,
    /// `<`, `>`, `^`, or `=`: the filling between a sign and its number.
    align: Option<char>,
    /// `+` or a blank before numbers that are not negative.
    sign: Option<char>,
    alternate: bool,
    width: usize,
    /// `,` or `_` between thousands.
    grouping: Option<char>,
    precision: Option<usize>,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            fill: Letter::written(' '),
            align: None,
            sign: None,
            alternate: false,
            width: 0,
            grouping: None,
            precision: None,
        }
    }
}

impl Layout {
    fn pad(&self, sign: &str, body: &[Letter], align: char, out: &mut Builder) -> Result<()> {
        let missing = self.width.saturating_sub(sign.len() + body.len());
        let (before, inside, after) = match align {
            '<' => (0, 0, missing),
            '^' => (missing / 2, 0, missing - missing / 2),
            '=' => (0, missing, 0),
            _ => (missing, 0, 0),
        };
        out.fill(self.fill, before)?;
        out.write(sign)?;
        out.fill(self.fill, inside)?;
        out.push(body)?;
        out.fill(self.fill, after)
    }

    fn text(&self, letters: &[Letter], align: char, out: &mut Builder) -> Result<()> {
        let shown = self.precision.unwrap_or(usize::MAX).min(letters.len());
        self.pad("", &letters[..shown], self.align.unwrap_or(align), out)
    }

    fn number(&self, negative: bool, prefix: &str, digits: &str, out: &mut Builder) -> Result<()> {
        let sign = match (negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        };
        let digits = match self.grouping {
            Some(_) if self.fill.char() == '0' => {
                return Err(Error::new("a format with 0 and grouping is not supported"));
            }
            Some(separator) => grouped(digits, separator),
            None => digits.to_owned(),
        };
        let body = text::written(&digits);
        self.pad(
            &format!("{sign}{prefix}"),
            &body,
            self.align.unwrap_or('>'),
            out,
        )
    }

    fn integer(&self, value: i128, kind: char, out: &mut Builder) -> Result<()> {
        if self.grouping.is_some() && "xXob".contains(kind) {
            return Err(Error::new(
                "a format that groups the digits of x, o or b is not supported",
            ));
        }
        let size = value.unsigned_abs();
        let (prefix, digits) = match kind {
            'x' => ("0x", format!("{size:x}")),
            'X' => ("0X", format!("{size:X}")),
            'o' => ("0o", format!("{size:o}")),
            'b' => ("0b", format!("{size:b}")),
            _ => ("", size.to_string()),
        };
        let zeros = self.precision.unwrap_or(0).saturating_sub(digits.len());
        let digits = "0".repeat(zeros) + &digits;
        self.number(
            value < 0,
            if self.alternate { prefix } else { "" },
            &digits,
            out,
        )
    }

    fn float(&self, value: f64, kind: char, out: &mut Builder) -> Result<()> {
        let size = value.abs();
        if self.alternate {
            return Err(Error::new("a format with # of a float is not supported"));
        }
        let precision = self.precision.unwrap_or(6);
        let mut digits = if !size.is_finite() {
            if size.is_nan() { "nan" } else { "inf" }.to_owned()
        } else {
            match kind.to_ascii_lowercase() {
                'f' => format!("{size:.precision$}"),
                '%' => format!("{:.precision$}%", size * 100.0),
                'e' => with_exponent(size, precision),
                _ => general(size, precision.max(1)),
            }
        };
        if kind.is_ascii_uppercase() {
            digits = digits.to_uppercase();
        }
        self.number(
            value.is_sign_negative() && !value.is_nan(),
            "",
            &digits,
            out,
        )
    }
}

/// `1.50e+01`
fn with_exponent(size: f64, precision: usize) -> String {
    let scientific = format!("{size:.precision$e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    format!("{digits}{}", python_exponent(exponent.parse().unwrap_or(0)))
}

/// Python's `g`: this many significant digits, without zeros behind.
fn general(size: f64, precision: usize) -> String {
    let scientific = format!("{size:.*e}", precision - 1);
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let shorten = |digits: &str| match digits.contains('.') {
        true => digits
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        false => digits.to_owned(),
    };
    if exponent < -4 || exponent >= precision as i32 {
        return shorten(digits) + &python_exponent(exponent);
    }
    let decimals = (precision as i32 - 1 - exponent).max(0) as usize;
    shorten(&format!("{size:.decimals$}"))
}

/// `separator` before every third digit of the whole part.
fn grouped(digits: &str, separator: char) -> String {
    let whole = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    let mut out = String::new();
    for (at, digit) in digits[..whole].char_indices() {
        if at > 0 && (whole - at) % 3 == 0 {
            out.push(separator);
        }
        out.push(digit);
    }
    out + &digits[whole..]
}

fn repr(value: &Value) -> Result<Vec<Letter>> {
    let mut out = Builder::default();
    value.write_repr(&mut out)?;
    Ok(out.finish())
}

fn bounded(number: usize) -> Result<usize> {
    match number > WIDEST {
        true => Err(Error::new("a format is wider than anything needs")),
        false => Ok(number),
    }
}

/// Letters read from the left.
struct Reader<'a> {
    rest: &'a [Letter],
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<char> {
        self.rest.first().map(|letter| letter.char())
    }

    fn skip(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn one_of(&mut self, wanted: &str) -> Option<char> {
        let found = self.peek().filter(|c| wanted.contains(*c));
        found.inspect(|_| self.rest = &self.rest[1..])
    }

    fn number(&mut self) -> Result<Option<usize>> {
        let digits = self.until(|c| !c.is_ascii_digit());
        if digits.is_empty() {
            return Ok(None);
        }
        let number = text::string(digits).parse().unwrap_or(usize::MAX);
        bounded(number).map(Some)
    }

    /// Up to the first letter that `ends` holds of, or to the end.
    fn until(&mut self, ends: impl Fn(char) -> bool) -> &'a [Letter] {
        let len = self.rest.iter().position(|letter| ends(letter.char()));
        let (taken, rest) = self.rest.split_at(len.unwrap_or(self.rest.len()));
        self.rest = rest;
        taken
    }
}

/// `format % arguments`, as in C: a tuple holds several arguments, a dict those of `%(name)s`.
pub fn percent(format: &[Letter], arguments: &Value) -> Result<Vec<Letter>> {
    let mut values = match arguments {
        Value::List(list) if list.form == Form::Tuple => list.items.as_slice(),
        value => std::slice::from_ref(value),
    };
    // Python counts the arguments of a tuple and of a value without items only.
    let is_counted = match arguments {
        Value::List(list) => list.form == Form::Tuple,
        value => !matches!(value, Value::Dict(_)),
    };
    let mut out = Builder::default();
    let mut reader = Reader { rest: format };
    let mut next = || -> Result<Value> {
        let missing = || Error::new("not enough values for a % format");
        let (first, rest) = values.split_first().ok_or_else(missing)?;
        values = rest;
        Ok(first.clone())
    };
    loop {
        out.push(reader.until(|c| c == '%'))?;
        if !reader.skip('%') {
            break;
        }
        let mut named = None;
        if reader.skip('(') {
            let name = reader.until(|c| c == ')');
            reader.skip(')');
            named = Some(item(arguments, &Value::text(name))?);
        }
        let mut layout = Layout::default();
        let mut zeros = false;
        let mut left = false;
        while let Some(flag) = reader.one_of("#0- +") {
            match flag {
                '#' => layout.alternate = true,
                '0' => zeros = true,
                '-' => left = true,
                '+' => layout.sign = Some('+'),
                _ => layout.sign = layout.sign.or(Some(' ')),
            }
        }
        let mut count = |reader: &mut Reader| -> Result<Option<usize>> {
            if !reader.skip('*') {
                return reader.number();
            }
            let whole = || Error::new("a width is a whole number");
            let width = next()?.as_int().ok_or_else(whole)?;
            bounded(usize::try_from(width).map_err(|_| whole())?).map(Some)
        };
        layout.width = count(&mut reader)?.unwrap_or(0);
        if reader.skip('.') {
            layout.precision = Some(count(&mut reader)?.unwrap_or(0));
        }
        let cut_short = || Error::new("a % format is cut short");
        let kind = reader.peek().ok_or_else(cut_short)?;
        reader.skip(kind);
        if kind == '%' {
            out.write("%")?;
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => next()?,
        };
        layout.align = left.then_some('<');
        match kind {
            's' => layout.text(&value.to_text()?, '>', &mut out)?,
            'r' => layout.text(&repr(&value)?, '>', &mut out)?,
            'c' => {
                let character = value
                    .as_int()
                    .and_then(|code| char::from_u32(code.try_into().ok()?));
                let letters = match (&value, character) {
                    (Value::Text(text), _) if text.len() == 1 => text.to_vec(),
                    // Who wrote a number is not known.
                    (_, Some(character)) => vec![Letter::given(character)],
                    _ => return Err(Error::new("%c takes one character")),
                };
                layout.precision = None;
                layout.text(&letters, '>', &mut out)?;
            }
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                if zeros && !left {
                    (layout.fill, layout.align) = (Letter::written('0'), Some('='));
                }
                let number = value.as_float().ok_or_else(|| {
                    Error::new(format!("%{kind} takes a number, no {}", value.kind()))
                })?;
                match value.as_int() {
                    _ if "eEfFgG".contains(kind) => layout.float(number, kind, &mut out)?,
                    Some(whole) => layout.integer(whole, kind, &mut out)?,
                    None if "diu".contains(kind) => {
                        layout.integer(truncated(number)?, kind, &mut out)?;
                    }
                    None => return Err(Error::new(format!("%{kind} takes no float"))),
                }
            }
            other => return Err(Error::new(format!("%{other} is no format"))),
        }
    }
    if !values.is_empty() && is_counted {
        return Err(Error::new("too many values for a % format"));
    }
    Ok(out.finish())
}

/// `template.format(arguments)`.
pub fn braces(template: &[Letter], passed: &Passed) -> Result<Vec<Letter>> {
    let mut next = 0;
    fill(template, passed, &mut next, 2)
}

/// `levels`: how deep fields may stand in the layouts of fields.
fn fill(
    template: &[Letter],
    passed: &Passed,
    next: &mut usize,
    levels: usize,
) -> Result<Vec<Letter>> {
    let mut out = Builder::default();
    let mut reader = Reader { rest: template };
    loop {
        out.push(reader.until(|c| c == '{' || c == '}'))?;
        if reader.skip('}') {
            if !reader.skip('}') {
                return Err(Error::new("a single } in a format"));
            }
            out.write("}")?;
            continue;
        }
        if !reader.skip('{') {
            return Ok(out.finish());
        }
        if reader.skip('{') {
            out.write("{")?;
            continue;
        }
        let mut depth = 1;
        let end = reader.rest.iter().position(|letter| {
            match letter.char() {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let end = end.ok_or_else(|| Error::new("a { in a format does not end"))?;
        let mut field = Reader {
            rest: &reader.rest[..end],
        };
        reader.rest = &reader.rest[end + 1..];
        let value = named_field(field.until(|c| c == '!' || c == ':'), passed, next)?;
        let value = match field.skip('!').then(|| field.one_of("rs")) {
            Some(Some('s')) => Value::Text(value.to_text()?),
            Some(Some(_)) => Value::text(repr(&value)?),
            Some(None) => return Err(Error::new("a conversion in a format is !r or !s")),
            None => value,
        };
        field.skip(':');
        let layout = match levels {
            0 => field.rest.to_vec(),
            _ => fill(field.rest, passed, next, levels - 1)?,
        };
        formatted(&value, &layout, &mut out)?;
    }
}

/// The value of `name`, `0`, `name.attribute[item]` or, by place, of nothing.
fn named_field(field: &[Letter], passed: &Passed, next: &mut usize) -> Result<Value> {
    let mut reader = Reader { rest: field };
    let name = text::string(reader.until(|c| c == '.' || c == '['));
    let missing = || Error::new(format!("a format has no value for {{{name}}}"));
    let place = match name.is_empty() {
        true => {
            *next += 1;
            Some(*next - 1)
        }
        false => name.parse().ok(),
    };
    let mut value = match place {
        Some(place) => passed.positional.get(place),
        None => passed
            .named
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, value)| value),
    }
    .cloned()
    .ok_or_else(missing)?;
    while !reader.rest.is_empty() {
        if reader.skip('.') {
            value = attribute(
                &value,
                &text::string(reader.until(|c| c == '.' || c == '[')),
            )?;
        } else {
            reader.skip('[');
            let key = reader.until(|c| c == ']');
            reader.skip(']');
            let key = match text::string(key).parse() {
                Ok(index) => Value::Int(index),
                Err(_) => Value::text(key),
            };
            value = item(&value, &key)?;
        }
        value.defined()?;
    }
    Ok(value)
}

/// `[[fill]align][sign][#][0][width][grouping][.precision][type]`
fn formatted(value: &Value, layout: &[Letter], out: &mut Builder) -> Result<()> {
    let is_plain = layout.is_empty();
    let mut reader = Reader { rest: layout };
    let mut layout = Layout::default();
    let is_align = |letter: Option<&Letter>| letter.is_some_and(|l| "<>^=".contains(l.char()));
    let has_fill = is_align(reader.rest.get(1));
    if has_fill {
        layout.fill = reader.rest[0];
        reader.rest = &reader.rest[1..];
    }
    layout.align = reader.one_of("<>^=");
    layout.sign = reader.one_of("+- ");
    layout.alternate = reader.skip('#');
    if reader.skip('0') {
        if !has_fill {
            layout.fill = Letter::written('0');
        }
        layout.align = layout.align.or(Some('='));
    }
    layout.width = reader.number()?.unwrap_or(0);
    layout.grouping = reader.one_of(",_");
    if reader.skip('.') {
        layout.precision = reader.number()?;
    }
    let kind = reader.one_of("sdnxXobeEfFgG%c");
    if !reader.rest.is_empty() {
        let rest = text::string(reader.rest);
        return Err(Error::new(format!("a format has no meaning for {rest:?}")));
    }
    match (value, kind) {
        (Value::Text(text), None | Some('s')) => {
            if layout.align == Some('=') {
                // `0` before the width, which is for numbers.
                layout.align = None;
            }
            layout.text(text, '<', out)
        }
        (Value::Int(_) | Value::Bool(_), Some('d' | 'n' | 'x' | 'X' | 'o' | 'b'))
            if layout.precision.is_some() =>
        {
            Err(Error::new("a whole number has no precision"))
        }
        (Value::Int(number), None | Some('d' | 'n' | 'x' | 'X' | 'o' | 'b')) => {
            layout.integer(*number, kind.unwrap_or('d'), out)
        }
        (Value::Bool(flag), None) if !is_plain => layout.integer((*flag).into(), 'd', out),
        (Value::Bool(flag), Some('d' | 'n' | 'x' | 'X' | 'o' | 'b')) => {
            layout.integer((*flag).into(), kind.unwrap_or('d'), out)
        }
        (Value::Float(number), None) if layout.precision.is_none() && !layout.alternate => {
            let digits = python_float(number.abs());
            layout.number(
                number.is_sign_negative() && !number.is_nan(),
                "",
                &digits,
                out,
            )
        }
        (Value::Float(_), None) => Err(Error::new(
            "a format with # or a precision of a float, but without e, f or g, is not supported",
        )),
        (value, Some(kind)) if "eEfFgG%".contains(kind) && value.as_float().is_some() => {
            layout.float(value.as_float().unwrap_or(0.0), kind, out)
        }
        (value, None | Some('s')) => layout.text(&value.to_text()?, '<', out),
        (value, Some(kind)) => Err(Error::new(format!(
            "{{:{kind}}} does not take a value of type {}",
            value.kind()
        ))),
    }
}

//! The methods that Python's strings, lists and dicts have, as far as Jinja's sandbox allows them: none changes its value.

use std::sync::LazyLock;

use regex::Regex;

use super::{
    Error, Result,
    access::{from_end, of_safe},
    format::braces,
    interpreter::Passed,
    text::{self, Builder, Letter, Text},
    value::{Form, Value, is_printable},
};

const OF_TEXT: &str = "capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii \
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip \
    partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith \
    strip swapcase title upper zfill";
const OF_LIST: &str = "copy count index";
const OF_TUPLE: &str = "count index";
const OF_DICT: &str = "copy get items keys values";

/// Digits that make no decimal number, as `str.isdigit` has them: superscripts, circled ones and others.
const DIGITS: &str = concat!(
    r"\p{Nd}\u{b2}\u{b3}\u{b9}\u{1369}-\u{1371}\u{19da}\u{2070}\u{2074}-\u{2079}\u{2080}-\u{2089}\u{2460}-\u{2468}",
    r"\u{2474}-\u{247c}\u{2488}-\u{2490}\u{24ea}\u{24f5}-\u{24fd}\u{24ff}\u{2776}-\u{277e}\u{2780}-\u{2788}",
    r"\u{278a}-\u{2792}\u{10a40}-\u{10a43}\u{10e60}-\u{10e68}\u{11052}-\u{1105a}\u{1f100}-\u{1f10a}"
);
/// Numbers, as `str.isnumeric` has them: Han ideographs that are numerals too.
const NUMERALS: &str = concat!(
    r"\p{N}㐅㒃㠪㭍一七万三九二五亖亿什仟仨伍佰億兆兩八六十千卄卅卌叁参參叄四壱壹幺廾廿弌弍弎弐拾捌柒漆玖百肆萬貮貳贰阡陆陌陸零",
    r"\u{f96b}\u{f973}\u{f978}\u{f9b2}\u{f9d1}\u{f9d3}\u{f9fd}\u{20001}\u{20064}\u{200e2}\u{20121}\u{2092a}\u{20983}",
    r"\u{2098c}\u{2099c}\u{20aea}\u{20afd}\u{20b19}\u{22390}\u{22998}\u{23b1b}\u{2626d}\u{2f890}"
);

/// The methods that ask whether a text is all of one kind of letters.
static KINDS: LazyLock<[(&str, Option<Regex>); 6]> = LazyLock::new(|| {
    let all = |letters: &str| Regex::new(&format!("^(?:{letters})$")).ok();
    [
        ("isalpha", all(r"\p{L}+")),
        ("isalnum", all(&format!(r"[\p{{L}}{DIGITS}{NUMERALS}]+"))),
        ("isdecimal", all(r"\p{Nd}+")),
        ("isdigit", all(&format!("[{DIGITS}]+"))),
        ("isnumeric", all(&format!("[{NUMERALS}]+"))),
        ("isidentifier", all(r"[_\p{XID_Start}]\p{XID_Continue}*")),
    ]
});

/// Whether values of this type have a method of this name.
pub fn exist(value: &Value, name: &str) -> bool {
    let names = match value {
        Value::Text(_) | Value::Safe(_) => OF_TEXT,
        Value::List(list) => match list.form {
            Form::List => OF_LIST,
            Form::Tuple | Form::Group | Form::Range => OF_TUPLE,
            Form::View(_) | Form::Generator { .. } => "",
        },
        Value::Dict(_) => OF_DICT,
        Value::Float(_) => "is_integer",
        _ => "",
    };
    names.split(' ').any(|other| other == name)
}

/// Calls a method that exists.
pub fn call(value: &Value, name: &str, passed: Passed) -> Result<Value> {
    match value {
        Value::Text(text) => of_text(text, name, passed),
        Value::Safe(_) => Err(of_safe(&format!("the method {name}"))),
        Value::List(list) => match name {
            "copy" => Ok(value.clone()),
            _ => {
                let [item] = passed.take(name, ["value"])?;
                let item = item.ok_or_else(|| missing(name))?;
                let places = list
                    .items
                    .iter()
                    .enumerate()
                    .filter(|(_, other)| **other == item);
                let mut places = places.map(|(place, _)| place);
                match name {
                    "count" => Ok(count(places.count())),
                    _ => places
                        .next()
                        .map(count)
                        .ok_or_else(|| Error::new("the value is not in the list")),
                }
            }
        },
        Value::Dict(dict) => match name {
            "copy" => Ok(value.clone()),
            "keys" => Value::sequence(value.iterate()?, Form::View("dict_keys")),
            "values" => {
                let values = dict.entries.iter().map(|(_, value)| value.clone());
                Value::sequence(values.collect(), Form::View("dict_values"))
            }
            "items" => Value::sequence(items(value)?, Form::View("dict_items")),
            _ => {
                let [key, default] = passed.take(name, ["key", "default"])?;
                let key = key.ok_or_else(|| missing(name))?;
                Ok(dict.get(&key).cloned().or(default).unwrap_or(Value::None))
            }
        },
        Value::Float(number) => Ok(Value::Bool(number.fract() == 0.0)),
        other => Err(missing(other.kind())),
    }
}

/// Pairs of key and value.
pub fn items(dict: &Value) -> Result<Vec<Value>> {
    let Value::Dict(dict) = dict else {
        return Err(Error::new(format!(
            "a value of type {} has no items",
            dict.kind()
        )));
    };
    let pairs = dict
        .entries
        .iter()
        .map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()]));
    pairs.collect()
}

fn missing(name: &str) -> Error {
    Error::new(format!("{name} lacks an argument"))
}

fn count(number: usize) -> Value {
    Value::Int(number as i128)
}

fn texts(parts: Vec<&[Letter]>) -> Vec<Value> {
    parts.into_iter().map(Value::text).collect()
}

/// An argument that is a flag, and not set where it is missing.
pub fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

/// An argument that must be a text.
pub fn text_argument(value: Option<Value>, name: &str) -> Result<Text> {
    match value {
        Some(Value::Text(text) | Value::Safe(text)) => Ok(text),
        Some(other) => {
            other.defined()?;
            Err(Error::new(format!(
                "{name} takes a text, no {}",
                other.kind()
            )))
        }
        None => Err(missing(name)),
    }
}

/// An argument that is a whole number where it is given.
pub fn int_argument(value: Option<Value>, name: &str) -> Result<Option<i128>> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(value) => {
            value.defined()?;
            let no_int = || Error::new(format!("{name} takes a whole number, no {}", value.kind()));
            value.as_int().map(Some).ok_or_else(no_int)
        }
    }
}

/// How often at most: for a negative number as often as there is.
fn most(value: Option<Value>, name: &str) -> Result<usize> {
    let number = int_argument(value, name)?.unwrap_or(-1);
    Ok(usize::try_from(number).unwrap_or(usize::MAX))
}

fn of_text(text: &Text, name: &str, passed: Passed) -> Result<Value> {
    let made = |letters: Vec<Letter>| Ok(Value::text(letters));
    match name {
        "upper" => made(text::upper(text)),
        "lower" => made(text::lower(text)),
        "capitalize" => made(text::capitalize(text)),
        "casefold" => {
            let fold = |letter: &Letter| text::lower(&text::upper(&[*letter]));
            made(text.iter().flat_map(fold).collect())
        }
        "title" => made(text::title(text)),
        "swapcase" => {
            let swap = |letter: &Letter| match letter.char().is_uppercase() {
                true => text::lower(&[*letter]),
                false => text::upper(&[*letter]),
            };
            made(text.iter().flat_map(swap).collect())
        }
        "isalnum" | "isalpha" | "isdecimal" | "isdigit" | "isidentifier" | "isnumeric" => {
            let kind = KINDS.iter().find(|(kind, _)| *kind == name);
            let kind = kind.and_then(|(_, kind)| kind.as_ref());
            let is_all = kind.is_some_and(|kind| kind.is_match(&text::string(text)));
            Ok(Value::Bool(is_all))
        }
        "isspace" => Ok(Value::Bool(
            !text.is_empty() && text.iter().all(|letter| letter.is_space()),
        )),
        "isascii" => Ok(Value::Bool(
            text.iter().all(|letter| letter.char().is_ascii()),
        )),
        "isprintable" => Ok(Value::Bool(
            text.iter().all(|letter| is_printable(letter.char())),
        )),
        "islower" | "isupper" => {
            let lower = text.iter().any(|letter| letter.char().is_lowercase());
            let upper = text.iter().any(|letter| letter.char().is_uppercase());
            let (wanted, other) = if name == "islower" {
                (lower, upper)
            } else {
                (upper, lower)
            };
            let neither = text.iter().any(|letter| text::is_title(*letter));
            Ok(Value::Bool(wanted && !other && !neither))
        }
        // Every word is one large letter and then small ones.
        "istitle" => {
            let is_small = |letter: &Letter| letter.char().is_lowercase();
            let mut words = text
                .chunk_by(|a, b| text::is_cased(*a) == text::is_cased(*b))
                .filter(|word| text::is_cased(word[0]))
                .peekable();
            let any = words.peek().is_some();
            let is_title = |word: &[Letter]| !is_small(&word[0]) && word[1..].iter().all(is_small);
            Ok(Value::Bool(any && words.all(is_title)))
        }
        "strip" | "lstrip" | "rstrip" => {
            let [characters] = passed.take(name, ["chars"])?;
            let characters = characters.filter(|value| !matches!(value, Value::None));
            let characters = characters
                .map(|value| text_argument(Some(value), name))
                .transpose()?;
            let of = |letter: Letter| match &characters {
                Some(characters) => characters.contains(&letter),
                None => letter.is_space(),
            };
            let stripped = if name == "rstrip" {
                text
            } else {
                text::strip_start(text, of)
            };
            Ok(Value::text(if name == "lstrip" {
                stripped
            } else {
                text::strip_end(stripped, of)
            }))
        }
        "removeprefix" => {
            let [prefix] = passed.take(name, ["prefix"])?;
            let prefix = text_argument(prefix, name)?;
            Ok(Value::text(text.strip_prefix(&*prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let [suffix] = passed.take(name, ["suffix"])?;
            let suffix = text_argument(suffix, name)?;
            Ok(Value::text(text.strip_suffix(&*suffix).unwrap_or(text)))
        }
        "replace" => {
            let [old, new, times] = passed.take(name, ["old", "new", "count"])?;
            let (old, new) = (text_argument(old, name)?, text_argument(new, name)?);
            made(text::replace(text, &old, &new, most(times, name)?)?)
        }
        "split" | "rsplit" => {
            let [separator, times] = passed.take(name, ["sep", "maxsplit"])?;
            let times = most(times, name)?;
            let separator = separator.filter(|value| !matches!(value, Value::None));
            let from_left = name == "split";
            let parts = match separator {
                None if from_left => text::words(text, times),
                None => text::words_from_right(text, times),
                Some(separator) => {
                    let separator = text_argument(Some(separator), name)?;
                    if separator.is_empty() {
                        return Err(Error::new(format!("{name} takes no empty separator")));
                    }
                    match from_left {
                        true => text::split(text, &separator, times),
                        false => text::split_from_right(text, &separator, times),
                    }
                }
            };
            Value::list(texts(parts))
        }
        "partition" | "rpartition" => {
            let [separator] = passed.take(name, ["sep"])?;
            let separator = text_argument(separator, name)?;
            if separator.is_empty() {
                return Err(Error::new(format!("{name} takes no empty separator")));
            }
            let found = match name {
                "partition" => text::find(text, &separator),
                _ => text::matches_from_right(text, &separator).first().copied(),
            };
            let end = found.map(|at| at + separator.len());
            let parts: [&[Letter]; 3] = match (found, end) {
                (Some(at), Some(end)) => [&text[..at], &text[at..end], &text[end..]],
                _ if name == "partition" => [text, &[], &[]],
                _ => [&[], &[], text],
            };
            Value::tuple(texts(parts.to_vec()))
        }
        "splitlines" => {
            let [keep_ends] = passed.take(name, ["keepends"])?;
            Value::list(texts(text::lines(text, is_true(keep_ends))))
        }
        "join" => {
            let [parts] = passed.take(name, ["iterable"])?;
            let parts = parts.ok_or_else(|| missing(name))?.iterate()?;
            let parts = parts
                .into_iter()
                .map(|part| text_argument(Some(part), "join"));
            let parts: Vec<Text> = parts.collect::<Result<_>>()?;
            made(text::join(text, parts.iter().map(|part| &**part))?)
        }
        "format" => made(braces(text, &passed)?),
        "count" | "find" | "index" | "rfind" | "rindex" | "startswith" | "endswith" => {
            search(text, name, passed)
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = passed.take(name, ["width", "fillchar"])?;
            let width = int_argument(width, name)?.ok_or_else(|| missing(name))?;
            let fill = match fill {
                None => Letter::written(' '),
                Some(fill) => match &*text_argument(Some(fill), name)? {
                    [fill] => *fill,
                    _ => return Err(Error::new(format!("{name} fills with one character"))),
                },
            };
            let missing = usize::try_from(width)
                .unwrap_or(0)
                .saturating_sub(text.len());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                // Where it is uneven, as Python decides.
                _ => missing / 2 + (missing & width as usize & 1),
            };
            let mut out = Builder::default();
            out.fill(fill, left)?;
            out.push(text)?;
            out.fill(fill, missing - left)?;
            made(out.finish())
        }
        "zfill" => {
            let [width] = passed.take(name, ["width"])?;
            let width = int_argument(width, name)?.ok_or_else(|| missing(name))?;
            let missing = usize::try_from(width)
                .unwrap_or(0)
                .saturating_sub(text.len());
            let signed = text
                .first()
                .is_some_and(|first| matches!(first.char(), '+' | '-'));
            let (sign, rest) = text.split_at(usize::from(signed));
            let mut out = Builder::default();
            out.push(sign)?;
            out.fill(Letter::written('0'), missing)?;
            out.push(rest)?;
            made(out.finish())
        }
        "expandtabs" => {
            let [size] = passed.take(name, ["tabsize"])?;
            let size = usize::try_from(int_argument(size, name)?.unwrap_or(8)).unwrap_or(0);
            let mut out = Builder::default();
            let mut column = 0;
            for &letter in text.iter() {
                match letter.char() {
                    '\t' => {
                        let blanks = if size == 0 { 0 } else { size - column % size };
                        out.fill(letter.with(' '), blanks)?;
                        column += blanks;
                    }
                    character => {
                        out.push(&[letter])?;
                        column = if matches!(character, '\n' | '\r') {
                            0
                        } else {
                            column + 1
                        };
                    }
                }
            }
            made(out.finish())
        }
        _ => Err(Error::new(format!("strings have no method {name}"))),
    }
}

/// What looks for a part between two places.
fn search(text: &Text, name: &str, passed: Passed) -> Result<Value> {
    let [part, start, end] = passed.take(name, ["sub", "start", "end"])?;
    let len = text.len() as i128;
    let place = |bound: i128| from_end(bound, len).max(0);
    let start = int_argument(start, name)?.map_or(0, place);
    let end = int_argument(end, name)?.map_or(len, place).min(len);
    // Nothing, not even an empty part, is found past the end.
    let outside = start > end;
    let start = start.min(end) as usize;
    let within = &text[start..end as usize];
    if matches!(name, "startswith" | "endswith") {
        let parts = match part {
            Some(Value::List(list)) if list.form == Form::Tuple => list.items.clone(),
            Some(part) => vec![part],
            None => return Err(missing(name)),
        };
        let mut found = false;
        for part in parts {
            let part = text_argument(Some(part), name)?;
            found |= match name {
                "startswith" => within.starts_with(&part),
                _ => within.ends_with(&part),
            };
        }
        return Ok(Value::Bool(found && !outside));
    }
    let part = text_argument(part, name)?;
    let places = match name.starts_with('r') {
        true => text::matches_from_right(within, &part),
        false => text::matches(within, &part),
    };
    let places = if outside { Vec::new() } else { places };
    match (name, places.first()) {
        ("count", _) => Ok(count(places.len())),
        (_, Some(place)) => Ok(count(place + start)),
        ("index" | "rindex", None) => Err(Error::new("the part is not in the string")),
        (_, None) => Ok(Value::Int(-1)),
    }
}

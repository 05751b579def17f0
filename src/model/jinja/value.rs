//! Values as Python has them: what is true, equal, less, in what, and how each is printed.

use std::{
    cell::{Cell, RefCell},
    cmp::Ordering,
    rc::Rc,
};

use super::{
    Error, Result,
    format::python_float,
    interpreter::{Closure, Loop},
    text::{self, Builder, LETTERS_PER_STEP, Letter, Text},
};

/// How deep lists and dicts may nest.
const MOST_NESTED: usize = 200;
/// What a value may hold: a list that holds another twice holds its items twice.
const LARGEST: usize = 1 << 26;

#[derive(Clone)]
pub enum Value {
    /// What is not there, and what to say to those who need it.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Text),
    /// Python's `Markup`: to what is added to such a text happens what HTML needs.
    Safe(Text),
    List(Rc<List>),
    Dict(Rc<Dict>),
    Namespace(Rc<Namespace>),
    Loop(Rc<Loop>),
    Function(Rc<Function>),
}

/// Values in an order.
pub struct List {
    pub items: Vec<Value>,
    pub form: Form,
    extent: Extent,
}

/// The types that Python has for values in an order.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    List,
    Tuple,
    /// A tuple of `groupby`, with the names `grouper` and `list` for its two.
    Group,
    Range,
    /// `dict_keys`, `dict_values` or `dict_items`: these have no places.
    View(&'static str),
    /// What filters give that work item by item: it has no places, always counts as true, and can be gone through once.
    Generator {
        spent: Cell<bool>,
    },
}

/// How far a value goes.
#[derive(Clone, Copy, Default)]
struct Extent {
    /// Containers inside one another.
    depth: usize,
    /// Values inside, at every depth.
    size: usize,
}

/// In the order in which keys were first set.
pub struct Dict {
    pub entries: Vec<(Value, Value)>,
    extent: Extent,
}

#[derive(Default)]
pub struct Namespace {
    values: RefCell<Vec<(String, Value)>>,
    extent: Cell<Extent>,
}

pub enum Function {
    Global(&'static str),
    /// A method of a value.
    Method(Value, String),
    Macro(Closure),
    Cycler {
        items: Vec<Value>,
        position: Cell<usize>,
    },
    /// Nothing the first time, then a separator.
    Joiner {
        separator: Value,
        used: Cell<bool>,
    },
}

impl Value {
    pub fn written(text: &str) -> Self {
        Self::Text(text::written(text).into())
    }

    pub fn text(letters: impl Into<Text>) -> Self {
        Self::Text(letters.into())
    }

    /// JSON whose texts came in from outside, but for those of `trusted_roles` under the key `role`.
    pub fn given(json: &serde_json::Value, trusted_roles: &[&str]) -> Result<Self> {
        use serde_json::Value as Json;
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match number.as_i128() {
                Some(number) => Self::Int(number),
                None => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(value) => Self::text(text::given(value)),
            Json::Array(items) => {
                let items = items.iter().map(|item| Self::given(item, trusted_roles));
                Self::list(items.collect::<Result<_>>()?)?
            }
            Json::Object(entries) => {
                let entry = |(key, value): (&String, &Json)| {
                    let value = match value.as_str() {
                        Some(role) if key == "role" && trusted_roles.contains(&role) => {
                            Self::written(role)
                        }
                        _ => Self::given(value, trusted_roles)?,
                    };
                    Ok((Self::text(text::given(key)), value))
                };
                Self::unique(entries.iter().map(entry).collect::<Result<_>>()?)?
            }
        })
    }

    pub fn list(items: Vec<Self>) -> Result<Self> {
        Self::sequence(items, Form::List)
    }

    pub fn tuple(items: Vec<Self>) -> Result<Self> {
        Self::sequence(items, Form::Tuple)
    }

    pub fn generator(items: Vec<Self>) -> Result<Self> {
        let spent = Cell::new(false);
        Self::sequence(items, Form::Generator { spent })
    }

    pub fn sequence(items: Vec<Self>, form: Form) -> Result<Self> {
        let extent = Extent::around(&items)?;
        Ok(Self::List(Rc::new(List {
            items,
            form,
            extent,
        })))
    }

    /// A dict of entries in which a later one replaces an earlier one of the same key.
    pub fn dict(entries: Vec<(Self, Self)>) -> Result<Self> {
        let mut unique: Vec<(Self, Self)> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            match unique.iter_mut().find(|(k, _)| *k == key) {
                Some(entry) => entry.1 = value,
                None => unique.push((key, value)),
            }
        }
        Self::unique(unique)
    }

    fn unique(entries: Vec<(Self, Self)>) -> Result<Self> {
        let extent = Extent::around(entries.iter().map(|(_, value)| value))?;
        Ok(Self::Dict(Rc::new(Dict { entries, extent })))
    }

    pub fn undefined(why: impl Into<Rc<str>>) -> Self {
        Self::Undefined(why.into())
    }

    fn extent(&self) -> Extent {
        let inside = |depth| Extent { depth, size: 0 };
        match self {
            Self::List(list) => list.extent,
            Self::Dict(dict) => dict.extent,
            Self::Namespace(namespace) => namespace.extent.get(),
            // It holds what it runs over: in a list, loops could hold one another without end.
            Self::Loop(_) => inside(MOST_NESTED),
            Self::Function(function) => match &**function {
                Function::Method(value, _) => inside(value.extent().depth + 1),
                Function::Joiner { separator, .. } => inside(separator.extent().depth + 1),
                Function::Cycler { items, .. } => {
                    let depths = items.iter().map(|item| item.extent().depth);
                    inside(depths.max().unwrap_or(0) + 1)
                }
                Function::Global(_) | Function::Macro(_) => inside(0),
            },
            _ => inside(0),
        }
    }

    /// Steps that it takes to make the value or to compare it with another.
    pub fn steps(&self) -> usize {
        match self {
            Self::Text(text) | Self::Safe(text) => text.len() / LETTERS_PER_STEP,
            value => value.extent().size,
        }
    }

    /// Python's name of the type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Safe(_) => "Markup",
            Self::List(list) => match list.form {
                Form::List => "list",
                Form::Tuple | Form::Group => "tuple",
                Form::Range => "range",
                Form::View(kind) => kind,
                Form::Generator { .. } => "generator",
            },
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Loop(_) => "LoopContext",
            Self::Function(_) => "function",
        }
    }

    /// The value, or an error where it is not there.
    pub fn defined(&self) -> Result<&Self> {
        match self {
            Self::Undefined(why) => Err(Error::new(&**why)),
            value => Ok(value),
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Text(text) | Self::Safe(text) => !text.is_empty(),
            Self::List(list) => {
                matches!(list.form, Form::Generator { .. }) || !list.items.is_empty()
            }
            Self::Dict(dict) => !dict.entries.is_empty(),
            Self::Namespace(_) | Self::Loop(_) | Self::Function(_) => true,
        }
    }

    /// A whole number; true and false are 1 and 0.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Self::Bool(value) => Some((*value).into()),
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            value => value.as_int().map(|value| value as f64),
        }
    }

    pub fn as_text(&self) -> Option<&Text> {
        match self {
            Self::Text(text) | Self::Safe(text) => Some(text),
            _ => None,
        }
    }

    /// The value as HTML: what is safe stays as it is.
    pub fn html(&self) -> Result<Text> {
        match self {
            Self::Safe(text) => Ok(text.clone()),
            value => Ok(text::html(&value.to_text()?)?.into()),
        }
    }

    /// Python's `len`.
    pub fn len(&self) -> Result<usize> {
        match self {
            Self::Text(text) | Self::Safe(text) => Ok(text.len()),
            Self::List(list) => Ok(list.items.len()),
            Self::Dict(dict) => Ok(dict.entries.len()),
            Self::Loop(looped) => Ok(looped.items.len()),
            Self::Undefined(_) => Ok(0),
            other => Err(Error::new(format!(
                "a value of type {} has no length",
                other.kind()
            ))),
        }
    }

    /// What a loop over the value goes through.
    pub fn iterate(&self) -> Result<Vec<Self>> {
        match self {
            Self::Text(text) | Self::Safe(text) => {
                Ok(text.iter().map(|letter| Self::text([*letter])).collect())
            }
            Self::List(list) => match &list.form {
                Form::Generator { spent } if spent.replace(true) => Ok(Vec::new()),
                _ => Ok(list.items.clone()),
            },
            Self::Dict(dict) => Ok(dict.entries.iter().map(|(key, _)| key.clone()).collect()),
            Self::Undefined(_) => Ok(Vec::new()),
            other => Err(Error::new(format!(
                "a value of type {} is not iterable",
                other.kind()
            ))),
        }
    }

    /// Whether `item in self`.
    pub fn contains(&self, item: &Self) -> Result<bool> {
        match (self, item) {
            (Self::Text(text) | Self::Safe(text), item) => match item.as_text() {
                Some(part) => Ok(text::find(text, part).is_some()),
                None => Err(Error::new(format!(
                    "a value of type {} is in no string",
                    item.kind()
                ))),
            },
            (Self::Dict(dict), key) => Ok(dict.get(key).is_some()),
            (list, item) => Ok(list.iterate()?.contains(item)),
        }
    }

    /// Python's `<`, `==` and `>`, where the values have an order.
    pub fn compare(&self, other: &Self) -> Result<Ordering> {
        let order = match (self, other) {
            (Self::List(a), Self::List(b)) if a.has_places_as(b) => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if a != b {
                        return a.compare(b);
                    }
                }
                Some(a.items.len().cmp(&b.items.len()))
            }
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => match (a.as_float(), b.as_float()) {
                    (Some(a), Some(b)) => Some(a.partial_cmp(&b).unwrap_or(Ordering::Greater)),
                    _ => a.as_text().zip(b.as_text()).map(|(a, b)| a.cmp(b)),
                },
            },
        };
        self.defined()?;
        other.defined()?;
        order.ok_or_else(|| {
            let (a, b) = (self.kind(), other.kind());
            Error::new(format!("values of types {a} and {b} have no order"))
        })
    }

    /// Python's `str`: what is printed.
    pub fn to_text(&self) -> Result<Text> {
        match self {
            Self::Text(text) | Self::Safe(text) => Ok(text.clone()),
            Self::Undefined(_) => Ok([].into()),
            value => {
                let mut out = Builder::default();
                value.write_repr(&mut out)?;
                Ok(out.finish().into())
            }
        }
    }

    /// Python's `repr`, as strings inside lists are printed.
    pub fn write_repr(&self, out: &mut Builder) -> Result<()> {
        match self {
            Self::Undefined(_) => out.write("Undefined"),
            Self::None => out.write("None"),
            Self::Bool(true) => out.write("True"),
            Self::Bool(false) => out.write("False"),
            Self::Int(value) => out.write(&value.to_string()),
            Self::Float(value) => out.write(&python_float(*value)),
            Self::Text(text) => write_quoted(text, out),
            Self::Safe(text) => {
                out.write("Markup(")?;
                write_quoted(text, out)?;
                out.write(")")
            }
            Self::List(list) => {
                let (open, close) = match list.form {
                    Form::List => ("[", "]"),
                    Form::Tuple | Form::Group if list.items.len() == 1 => ("(", ",)"),
                    Form::Tuple | Form::Group => ("(", ")"),
                    Form::View(_) => ("([", "])"),
                    Form::Range => return Err(Error::new("a range as text is not supported")),
                    Form::Generator { .. } => return out.write("<generator>"),
                };
                if let Form::View(kind) = list.form {
                    out.write(kind)?;
                }
                out.write(open)?;
                for (number, item) in list.items.iter().enumerate() {
                    out.write(if number > 0 { ", " } else { "" })?;
                    item.write_repr(out)?;
                }
                out.write(close)
            }
            Self::Dict(dict) => {
                out.write("{")?;
                for (number, (key, value)) in dict.entries.iter().enumerate() {
                    out.write(if number > 0 { ", " } else { "" })?;
                    key.write_repr(out)?;
                    out.write(": ")?;
                    value.write_repr(out)?;
                }
                out.write("}")
            }
            // It may hold itself.
            Self::Namespace(_) => Err(Error::new("a namespace as text is not supported")),
            // Python says where it lies in memory.
            Self::Loop(_) | Self::Function(_) => out.write(&format!("<{}>", self.kind())),
        }
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::List(a), Self::List(b)) => {
                Rc::ptr_eq(a, b) || a.has_places_as(b) && a.items == b.items
            }
            (Self::Dict(a), Self::Dict(b)) => {
                let same = |(key, value): &(Self, Self)| b.get(key) == Some(value);
                a.entries.len() == b.entries.len() && a.entries.iter().all(same)
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Loop(a), Self::Loop(b)) => Rc::ptr_eq(a, b),
            (Self::Function(a), Self::Function(b)) => Rc::ptr_eq(a, b),
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => match a.as_float() {
                    Some(a) => b.as_float() == Some(a),
                    None => a.as_text().is_some_and(|a| b.as_text() == Some(a)),
                },
            },
        }
    }
}

impl List {
    pub fn has_places(&self) -> bool {
        !matches!(self.form, Form::View(_) | Form::Generator { .. })
    }

    /// Whether Python compares the two item by item.
    fn has_places_as(&self, other: &Self) -> bool {
        let is_tuple = |list: &Self| matches!(list.form, Form::Tuple | Form::Group);
        self.has_places() && (self.form == other.form || is_tuple(self) && is_tuple(other))
    }
}

impl Dict {
    pub fn get(&self, key: &Value) -> Option<&Value> {
        let entry = self.entries.iter().find(|(k, _)| k == key);
        entry.map(|(_, value)| value)
    }

    pub fn get_named(&self, name: &str) -> Option<&Value> {
        let is_named = |key: &Value| key.as_text().is_some_and(|key| text::spells(key, name));
        let entry = self.entries.iter().find(|(key, _)| is_named(key));
        entry.map(|(_, value)| value)
    }
}

impl Namespace {
    pub fn get(&self, name: &str) -> Option<Value> {
        let values = self.values.borrow();
        let entry = values.iter().find(|(n, _)| n == name);
        entry.map(|(_, value)| value.clone())
    }

    pub fn set(&self, name: &str, value: Value) -> Result<()> {
        let (before, now) = (self.extent.get(), Extent::around([&value])?);
        self.extent.set(Extent {
            depth: before.depth.max(now.depth),
            size: 0,
        });
        let mut values = self.values.borrow_mut();
        // Dropped after the borrow: it may be the last to hold something.
        let _old = match values.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => Some(std::mem::replace(old, value)),
            None => {
                values.push((name.to_owned(), value));
                None
            }
        };
        drop(values);
        Ok(())
    }
}

impl Extent {
    /// That of a container of `values`.
    fn around<'a>(values: impl IntoIterator<Item = &'a Value>) -> Result<Self> {
        let mut around = Self::default();
        for value in values {
            let inside = value.extent();
            around.depth = around.depth.max(inside.depth);
            around.size += 1 + inside.size;
            if around.size > LARGEST {
                return Err(Error::new("it makes a value without end"));
            }
        }
        around.depth += 1;
        match around.depth > MOST_NESTED {
            true => Err(Error::new("it nests lists and dicts too deeply")),
            false => Ok(around),
        }
    }
}

/// Sorts, and keeps equals in their order.
pub fn sort<T>(items: &mut [T], compare: impl Fn(&T, &T) -> Result<Ordering>) -> Result<()> {
    let mut sorted = Ok(());
    items.sort_by(|a, b| {
        compare(a, b).unwrap_or_else(|error| {
            sorted = Err(error);
            Ordering::Equal
        })
    });
    sorted
}

/// A string literal of Python for a text.
fn write_quoted(letters: &[Letter], out: &mut Builder) -> Result<()> {
    let has = |c: char| letters.contains(&Letter::written(c));
    let quote = if has('\'') && !has('"') { '"' } else { '\'' };
    out.push(&[Letter::written(quote)])?;
    for &letter in letters {
        let escape = match letter.char() {
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            c if c == quote => format!("\\{c}"),
            c if is_printable(c) => {
                out.push(&[letter])?;
                continue;
            }
            c => match u32::from(c) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            },
        };
        out.write_as(letter, &escape)?;
    }
    out.push(&[Letter::written(quote)])
}

/// Python's `str.isprintable`, by Rust's own list of what does not print.
pub fn is_printable(character: char) -> bool {
    // A letter in front keeps marks that join it from being escaped.
    let mut text = String::from("a");
    text.push(character);
    matches!(character, '\\' | '\'' | '"') || text.escape_debug().nth(1) == Some(character)
}

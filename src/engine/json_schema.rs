//! JSON schemas as llguidance enforces them exactly: what it would ignore or take loosely is refused by name, and what it
//! takes too widely is written more narrowly. Semantics are those of draft 2020-12, with formats asserted.

mod format;
mod numbers;
mod pattern;

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

pub use numbers::Numbers;

/// Integers up to it are all different as doubles, which llguidance compares by.
const LARGEST_NUMBER: f64 = 9_007_199_254_740_991.0;

/// Units of a `multipleOf` at most, so that what llguidance computes of two of them fits into 32 bits.
const LARGEST_STEP: f64 = 65_535.0;

/// References and choices one within the other, up to which schemas are compared.
const DEPTH: usize = 8;

const TYPES: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];

/// What stands behind a keyword.
enum Operand {
    /// Nothing that restricts documents.
    Annotation,
    Value,
    Schema,
    Schemas,
    NamedSchemas,
}

impl Operand {
    fn of(keyword: &str) -> Option<Self> {
        Some(match keyword {
            "title" | "description" | "default" | "examples" | "example" | "deprecated"
            | "readOnly" | "writeOnly" | "$comment" | "$schema" | "contentMediaType"
            | "contentEncoding" | "contentSchema" | "discriminator" => Self::Annotation,
            // But for one that would change what llguidance enforces.
            _ if keyword.starts_with("x-") && keyword != "x-guidance" => Self::Annotation,
            "type" | "const" | "enum" | "$ref" | "minimum" | "maximum" | "exclusiveMinimum"
            | "exclusiveMaximum" | "multipleOf" | "minLength" | "maxLength" | "pattern"
            | "format" | "minItems" | "maxItems" | "required" | "minProperties"
            | "maxProperties" => Self::Value,
            "items" | "additionalProperties" => Self::Schema,
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => Self::Schemas,
            "properties" | "patternProperties" | "$defs" | "definitions" => Self::NamedSchemas,
            _ => return None,
        })
    }
}

/// The schema as llguidance is to have it.
///
/// # Errors
/// Names the place and what cannot be enforced there.
pub fn prepare(schema: &Value) -> Result<Value> {
    let mut preparation = Preparation {
        root: schema,
        places: HashSet::new(),
        references: Vec::new(),
    };
    let mut prepared = match preparation.schema(schema, "#")? {
        Value::Object(schema) => schema,
        Value::Bool(false) => bail!("no document satisfies the schema false"),
        _ => Map::new(),
    };
    for (place, target) in &preparation.references {
        ensure!(
            preparation.places.contains(target),
            "{place}/$ref: {target} is no schema within this one, and nothing else is read"
        );
    }
    // Escapes such as \u0061 would let a name pass for one that is not in `properties`.
    let options = json!({
        "whitespace_flexible": false,
        "item_separator": ", ?",
        "key_separator": ": ?",
        "json_allowed_escapes": r#"nrbtf\""#,
    });
    prepared.insert("x-guidance".to_owned(), options);
    Ok(prepared.into())
}

struct Preparation<'a> {
    root: &'a Value,
    /// Of all schemas, as references name them.
    places: HashSet<String>,
    /// Where they are, and what they name.
    references: Vec<(String, String)>,
}

impl Preparation<'_> {
    /// Prepares the schema at `place`.
    fn schema(&mut self, schema: &Value, place: &str) -> Result<Value> {
        self.places.insert(place.to_owned());
        let keywords = match schema {
            Value::Bool(_) => return Ok(schema.clone()),
            Value::Object(keywords) => keywords,
            _ => bail!("{place}: {schema} is no schema: expected an object, true or false"),
        };
        let mut prepared = Map::new();
        for (keyword, operand) in keywords {
            let inner = format!("{place}/{}", escaped(keyword));
            let operand = match Operand::of(keyword) {
                // The root's own name changes nothing; any other would change what references mean.
                None if keyword == "$id" && place == "#" => continue,
                None => bail!("{place}: the keyword {keyword:?} cannot be enforced"),
                Some(Operand::Annotation) => continue,
                Some(Operand::Value) => operand.clone(),
                Some(Operand::Schema) => self.schema(operand, &inner)?,
                Some(Operand::Schemas) => self.schemas(operand, &inner)?,
                Some(Operand::NamedSchemas) => self.named_schemas(keyword, operand, &inner)?,
            };
            if keyword == "$ref" {
                let target = operand.as_str();
                let target = target.with_context(|| format!("{inner}: expected a string"))?;
                self.references.push((place.to_owned(), target.to_owned()));
            }
            prepared.insert(keyword.clone(), operand);
        }
        self.narrow(&mut prepared)
            .with_context(|| place.to_owned())?;
        Ok(prepared.into())
    }

    fn schemas(&mut self, schemas: &Value, place: &str) -> Result<Value> {
        let schemas = schemas
            .as_array()
            .with_context(|| format!("{place}: expected a list of schemas"))?;
        let schemas = schemas.iter().enumerate();
        let prepared = schemas.map(|(i, schema)| self.schema(schema, &format!("{place}/{i}")));
        prepared.collect()
    }

    fn named_schemas(&mut self, keyword: &str, schemas: &Value, place: &str) -> Result<Value> {
        let schemas = schemas
            .as_object()
            .with_context(|| format!("{place}: expected an object of schemas"))?;
        let mut prepared = Map::new();
        for (name, schema) in schemas {
            let inner = format!("{place}/{}", escaped(name));
            let schema = self.schema(schema, &inner)?;
            let name = match keyword {
                "patternProperties" => pattern::translate(name).with_context(|| inner)?,
                _ => name.clone(),
            };
            prepared.insert(name, schema);
        }
        Ok(prepared.into())
    }

    /// Writes what llguidance would take too widely so that it does not, or refuses it.
    fn narrow(&self, schema: &mut Map<String, Value>) -> Result<()> {
        for keyword in ["const", "enum"] {
            schema.get(keyword).map_or(Ok(()), check_constant)?;
        }
        narrow_numbers(schema)?;
        if let Some(Value::String(pattern)) = schema.get_mut("pattern") {
            *pattern = pattern::translate(pattern)?;
        }
        if let Some(name) = schema.get("format").and_then(Value::as_str)
            && let Some(exact) = format::exact(name)?
        {
            let r#type = schema.get("type").cloned();
            let exact = exact.into_iter().map(|mut exact| {
                if let (Value::Object(exact), Some(r#type)) = (&mut exact, &r#type) {
                    exact.insert("type".to_owned(), r#type.clone());
                }
                exact
            });
            add_to_all_of(schema, exact);
            schema.remove("format");
        }
        check_properties(schema)?;
        if let Some(options) = schema.remove("oneOf") {
            let types = self.types(&schema.clone().into(), 0);
            ensure!(
                self.exclude_each_other(options.as_array().map_or(&[], Vec::as_slice), &types),
                "oneOf can be enforced where its schemas exclude each other visibly: by type, by const or enum, or by a \
                 property that is required and has such a schema in each; use anyOf where a document may match several"
            );
            add_to_all_of(schema, [json!({"anyOf": options})]);
        }
        Ok(())
    }

    /// Whether no document of these types can match two of `schemas`, as far as can be seen.
    fn exclude_each_other(&self, schemas: &[Value], types: &[&str]) -> bool {
        let mut pairs = schemas.iter().enumerate();
        pairs.all(|(i, a)| {
            let mut others = schemas[i + 1..].iter();
            others.all(|b| self.exclude(a, b, types))
        })
    }

    fn exclude(&self, a: &Value, b: &Value, types: &[&str]) -> bool {
        let (types_a, types_b) = (self.types(a, 0), self.types(b, 0));
        let in_both = |name: &&&str| types_a.contains(name) && types_b.contains(name);
        let common: Vec<_> = types.iter().filter(in_both).collect();
        if common.is_empty() {
            return true;
        }
        let (Some(a), Some(b)) = (self.resolve(a), self.resolve(b)) else {
            return false;
        };
        if let (Some(constants_a), Some(constants_b)) = (constants(a), constants(b)) {
            return !constants_a
                .iter()
                .any(|a| constants_b.iter().any(|b| equal(a, b)));
        }
        common == [&"object"] && (self.property_excludes(a, b) || self.property_excludes(b, a))
    }

    /// The types of documents that may match, an integer being a number.
    fn types(&self, schema: &Value, depth: usize) -> Vec<&'static str> {
        let mut types = TYPES.to_vec();
        let Some(schema) = schema.as_object().filter(|_| depth < DEPTH) else {
            return types;
        };
        if let Some(constants) = constants(schema) {
            types.retain(|name| constants.iter().any(|value| type_of(value) == *name));
        }
        if let Some(given) = schema.get("type") {
            let is = |given: &Value, name| match given.as_str() {
                Some("integer") => name == "number",
                given => given == Some(name),
            };
            types.retain(|name| match given {
                Value::Array(given) => given.iter().any(|given| is(given, name)),
                given => is(given, name),
            });
        }
        if let Some(target) = schema.get("$ref").and_then(|target| self.target(target)) {
            let target = self.types(target, depth + 1);
            types.retain(|name| target.contains(name));
        }
        for keyword in ["anyOf", "oneOf"] {
            if let Some(Value::Array(options)) = schema.get(keyword) {
                let options = options
                    .iter()
                    .flat_map(|option| self.types(option, depth + 1));
                let options: HashSet<_> = options.collect();
                types.retain(|name| options.contains(name));
            }
        }
        types
    }

    /// What a reference names.
    fn target(&self, reference: &Value) -> Option<&Value> {
        self.root.pointer(reference.as_str()?.strip_prefix('#')?)
    }

    /// Whether `a` requires a property that `b` does not allow so, or not at all.
    fn property_excludes(&self, a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
        let property = |schema: &'_ Map<String, Value>, name: &str| {
            let properties = schema.get("properties").and_then(Value::as_object);
            properties.and_then(|properties| properties.get(name).cloned())
        };
        let closed = b.get("additionalProperties") == Some(&Value::Bool(false))
            && !b.contains_key("patternProperties");
        required(a).any(|name| match (property(a, name), property(b, name)) {
            (_, None) => closed,
            (Some(a), Some(b)) => self.exclude(&a, &b, &TYPES),
            (None, Some(_)) => false,
        })
    }

    /// The keywords of `schema`, or of what it refers to.
    fn resolve<'s>(&'s self, schema: &'s Value) -> Option<&'s Map<String, Value>> {
        let mut schema = schema.as_object()?;
        for _ in 0..DEPTH {
            let Some(reference) = schema.get("$ref") else {
                return Some(schema);
            };
            schema = self.target(reference)?.as_object()?;
        }
        None
    }
}

/// As a part of a reference.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

fn add_to_all_of(schema: &mut Map<String, Value>, schemas: impl IntoIterator<Item = Value>) {
    let all_of = schema
        .entry("allOf")
        .or_insert_with(|| Value::Array(Vec::new()));
    if let Value::Array(all_of) = all_of {
        all_of.extend(schemas);
    }
}

/// Refuses what llguidance cannot write as it is.
fn check_constant(value: &Value) -> Result<()> {
    match value {
        Value::String(text) => {
            let unwritable = |c: char| {
                c.is_ascii_control() && !matches!(c, '\n' | '\r' | '\t' | '\u{8}' | '\u{c}')
            };
            ensure!(
                !text.contains(unwritable),
                "{value} has a control character, which cannot be enforced"
            );
        }
        Value::Number(number) => check_number(number.as_f64(), value)?,
        Value::Array(values) => values.iter().try_for_each(check_constant)?,
        Value::Object(values) => values.values().try_for_each(check_constant)?,
        Value::Null | Value::Bool(_) => {}
    }
    Ok(())
}

fn check_number(number: Option<f64>, value: &Value) -> Result<()> {
    ensure!(
        number.is_some_and(|number| number.abs() <= LARGEST_NUMBER),
        "{value} cannot be enforced: expected a number from -{LARGEST_NUMBER} to {LARGEST_NUMBER}"
    );
    Ok(())
}

/// Refuses numbers that llguidance would round, and turns exclusive bounds into inclusive ones: what lies between a bound and
/// the next number of 15 digits may be read as the bound itself.
fn narrow_numbers(schema: &mut Map<String, Value>) -> Result<()> {
    for keyword in [
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    ] {
        if let Some(value) = schema.get(keyword) {
            check_number(value.as_f64(), value).with_context(|| keyword)?;
        }
    }
    if let Some(step) = schema.get("multipleOf") {
        let (number, mut units) = (step.as_f64().unwrap_or(0.0), step.as_f64().unwrap_or(0.0));
        while units.fract() != 0.0 && units < LARGEST_STEP {
            units *= 10.0;
        }
        ensure!(
            number > 0.0 && units <= LARGEST_STEP,
            "multipleOf: {step} cannot be enforced: expected a number above 0 of at most {LARGEST_STEP} units of its last digit"
        );
    }
    if schema.get("type") == Some(&Value::from("integer")) {
        return Ok(());
    }
    let number = |value: Option<Value>| value.as_ref().and_then(Value::as_f64);
    if let Some(bound) = number(schema.remove("exclusiveMinimum")) {
        let least = bound + gap(bound);
        let given = number(schema.get("minimum").cloned());
        schema.insert(
            "minimum".to_owned(),
            given.unwrap_or(least).max(least).into(),
        );
    }
    if let Some(bound) = number(schema.remove("exclusiveMaximum")) {
        let most = bound - gap(bound);
        let given = number(schema.get("maximum").cloned());
        schema.insert("maximum".to_owned(), given.unwrap_or(most).min(most).into());
    }
    Ok(())
}

/// From `bound` to the next number of 15 digits.
fn gap(bound: f64) -> f64 {
    let exponent = match bound {
        0.0 => 0.0,
        _ => bound.abs().log10().floor(),
    };
    10f64.powf(exponent - 14.0)
}

/// A name that is given twice counts twice for llguidance: so it can be relied on for one property beside the required ones.
fn check_properties(schema: &Map<String, Value>) -> Result<()> {
    let least = schema.get("minProperties").and_then(Value::as_u64);
    let required = required(schema).collect::<HashSet<_>>().len() as u64;
    ensure!(
        least.unwrap_or(0) <= required + 1,
        "minProperties can be enforced up to one more than the properties that are required here"
    );
    Ok(())
}

fn required(schema: &Map<String, Value>) -> impl Iterator<Item = &str> {
    let names = schema.get("required").and_then(Value::as_array);
    names.into_iter().flatten().filter_map(Value::as_str)
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn constants(schema: &Map<String, Value>) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(vec![value]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        _ => None,
    }
}

/// Whether two constants are the same document, or may be.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(_), Value::Array(_)) | (Value::Object(_), Value::Object(_)) => true,
        _ => a == b,
    }
}

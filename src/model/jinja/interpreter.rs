//! Runs a template. Work and depth are limited, for a template comes with a file that nobody has read.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::{Rc, Weak},
};

use super::{
    Error, Input, Result,
    format::percent,
    methods,
    parser::{
        Arguments, Body, Comparison, Expr, For, Kind, Macro, Operator, Statement, Suffix, Target,
    },
    text::{self, Builder, Letter, MOST_LETTERS},
    value::{Function, Namespace, Value},
};

/// Steps that a template may take, of which each makes a value, an item or a few letters. Real templates take a few
/// dozen a message; an endless one is stopped within seconds.
const FUEL: usize = 20_000_000;
/// Letters to a step.
const LETTERS_PER_STEP: usize = 16;
/// Statements, expressions and calls inside one another.
const MOST_NESTED: usize = 3000;
/// Python's sandbox allows no longer ranges.
const LONGEST_RANGE: i128 = 100_000;

/// What a template makes of its input.
pub struct Rendered {
    pub letters: Vec<Letter>,
    /// Whether it asked for the time.
    pub asked_time: bool,
}

pub fn render(body: &Body, input: &Input) -> Result<Rendered> {
    let root = Scope::new(None);
    for (name, text) in &input.written {
        root.set(name, Value::written(text));
    }
    for (name, json) in &input.given {
        root.set(name, Value::given(json, input.trusted_roles)?);
    }
    let mut interpreter = Interpreter {
        input,
        fuel: FUEL,
        nested: 0,
        out: Builder::default(),
        asked_time: false,
    };
    interpreter.run(body, &root)?;
    Ok(Rendered {
        letters: interpreter.out.finish(),
        asked_time: interpreter.asked_time,
    })
}

/// Variables, and those around them.
pub struct Scope {
    variables: RefCell<HashMap<String, Value>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    fn new(parent: Option<&Rc<Self>>) -> Rc<Self> {
        Rc::new(Self {
            variables: RefCell::default(),
            parent: parent.cloned(),
        })
    }

    fn set(&self, name: &str, value: Value) {
        // The old value is dropped after the borrow.
        let _old = self.variables.borrow_mut().insert(name.to_owned(), value);
    }

    fn get(&self, name: &str) -> Option<Value> {
        let mut scope = self;
        loop {
            if let Some(value) = scope.variables.borrow().get(name) {
                return Some(value.clone());
            }
            scope = scope.parent.as_deref()?;
        }
    }
}

/// A macro with what it sees. It holds its scope weakly, for that scope holds the macro.
pub struct Closure {
    definition: Rc<Macro>,
    scope: Weak<Scope>,
}

/// The `loop` of a `for`.
pub struct Loop {
    pub items: Vec<Value>,
    index: Cell<usize>,
    depth: usize,
    changed: RefCell<Option<Vec<Value>>>,
    definition: Rc<For>,
    scope: Weak<Scope>,
}

/// What a call passes.
#[derive(Clone, Default)]
pub struct Passed {
    pub positional: Vec<Value>,
    /// A name may come from a dict that was given: where it becomes a text again, that counts as given.
    pub named: Vec<(String, Value)>,
}

impl Passed {
    pub fn of(positional: Vec<Value>) -> Self {
        Self {
            positional,
            named: Vec::new(),
        }
    }

    /// The arguments of these names, passed by place or by name.
    pub fn take<const N: usize>(self, what: &str, names: [&str; N]) -> Result<[Option<Value>; N]> {
        let mut taken = [const { None }; N];
        if self.positional.len() > N {
            return Err(Error::new(format!("{what} takes {N} arguments at most")));
        }
        for (place, value) in taken.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.named {
            match names.iter().position(|n| *n == name) {
                Some(place) if taken[place].is_none() => taken[place] = Some(value),
                Some(_) => return Err(Error::new(format!("{what} is passed {name} twice"))),
                None => return Err(Error::new(format!("{what} takes no argument {name}"))),
            }
        }
        Ok(taken)
    }
}

/// How a statement ends.
#[derive(PartialEq)]
enum Flow {
    On,
    Break,
    Continue,
}

pub struct Interpreter<'a> {
    pub input: &'a Input<'a>,
    fuel: usize,
    nested: usize,
    out: Builder,
    asked_time: bool,
}

impl Interpreter<'_> {
    pub fn spend(&mut self, steps: usize) -> Result<()> {
        let left = self.fuel.checked_sub(steps);
        self.fuel = left.ok_or_else(|| Error::new("it goes on without end"))?;
        Ok(())
    }

    fn nest<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.nested == MOST_NESTED {
            return Err(Error::new("it calls itself without end"));
        }
        self.nested += 1;
        let result = run(self);
        self.nested -= 1;
        result
    }

    /// What `run` prints.
    fn capture(&mut self, run: impl FnOnce(&mut Self) -> Result<Flow>) -> Result<Value> {
        let out = std::mem::take(&mut self.out);
        let result = run(self);
        let captured = std::mem::replace(&mut self.out, out);
        result.map(|_| Value::text(captured.finish()))
    }

    fn print(&mut self, value: &Value) -> Result<()> {
        let text = value.to_text()?;
        self.spend(text.len() / LETTERS_PER_STEP)?;
        self.out.push(&text)
    }

    // Statements.

    fn run(&mut self, body: &Body, scope: &Rc<Scope>) -> Result<Flow> {
        self.nest(|interpreter| {
            for statement in body {
                let flow = interpreter.statement(statement, scope);
                let flow = flow.map_err(|error| error.at(statement.line))?;
                if flow != Flow::On {
                    return Ok(flow);
                }
            }
            Ok(Flow::On)
        })
    }

    fn statement(&mut self, statement: &Statement, scope: &Rc<Scope>) -> Result<Flow> {
        self.spend(1)?;
        match &statement.kind {
            Kind::Data(letters) => {
                self.spend(letters.len() / LETTERS_PER_STEP)?;
                self.out.push(letters)?;
            }
            Kind::Output(value) => {
                let value = self.evaluate(value, scope)?;
                self.print(&value)?;
            }
            Kind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.evaluate(condition, scope)?.is_true() {
                        return self.run(body, scope);
                    }
                }
                return self.run(otherwise, scope);
            }
            Kind::For(definition) => {
                let items = self.evaluate(&definition.items, scope)?;
                // The depth of a loop counts loops of the same `for` only.
                self.repeat(definition, items, scope, 0)?;
            }
            Kind::Set(target, value) => {
                let value = self.evaluate(value, scope)?;
                self.assign(target, value, scope)?;
            }
            Kind::SetBlock(target, filters, body) => {
                let inner = Scope::new(Some(scope));
                let text = self.capture(|interpreter| interpreter.run(body, &inner))?;
                let text = self.suffixes(text, filters, scope)?;
                self.assign(target, text, scope)?;
            }
            Kind::Macro(definition) => {
                let closure = closure(definition, scope);
                scope.set(&definition.name, closure);
            }
            Kind::Call(caller, call) => {
                let caller = closure(caller, scope);
                let printed = self.call_with_caller(call, caller, scope)?;
                self.print(&printed)?;
            }
            Kind::Filter(filters, body) => {
                let inner = Scope::new(Some(scope));
                let text = self.capture(|interpreter| interpreter.run(body, &inner))?;
                let text = self.suffixes(text, filters, scope)?;
                self.print(&text)?;
            }
            Kind::With(values, body) => {
                let inner = Scope::new(Some(scope));
                for (target, value) in values {
                    let value = self.evaluate(value, scope)?;
                    self.assign(target, value, &inner)?;
                }
                return self.run(body, &inner);
            }
            Kind::Generation(body) => return self.run(body, &Scope::new(Some(scope))),
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    fn repeat(
        &mut self,
        definition: &Rc<For>,
        items: Value,
        scope: &Rc<Scope>,
        depth: usize,
    ) -> Result<()> {
        let mut items = self.iterate(&items)?;
        if let Some(condition) = &definition.condition {
            let mut kept = Vec::new();
            for item in items {
                let inner = Scope::new(Some(scope));
                self.assign(&definition.target, item.clone(), &inner)?;
                if self.evaluate(condition, &inner)?.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            self.run(&definition.otherwise, &Scope::new(Some(scope)))?;
            return Ok(());
        }
        let state = Rc::new(Loop {
            items,
            index: Cell::new(0),
            depth,
            changed: RefCell::default(),
            definition: definition.clone(),
            scope: Rc::downgrade(scope),
        });
        for (index, item) in state.items.iter().enumerate() {
            state.index.set(index);
            let inner = Scope::new(Some(scope));
            inner.set("loop", Value::Loop(state.clone()));
            self.assign(&definition.target, item.clone(), &inner)?;
            if self.run(&definition.body, &inner)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    fn assign(&mut self, target: &Target, value: Value, scope: &Rc<Scope>) -> Result<()> {
        match target {
            Target::Name(name) => scope.set(name, value),
            Target::Attribute(name, attribute) => match scope.get(name) {
                Some(Value::Namespace(namespace)) => namespace.set(attribute, value)?,
                _ => {
                    return Err(Error::new(format!(
                        "{name} is no namespace to set {attribute} of"
                    )));
                }
            },
            Target::Tuple(targets) => {
                let values = self.iterate(&value)?;
                if values.len() != targets.len() {
                    return Err(Error::new(format!(
                        "{} values for {} names",
                        values.len(),
                        targets.len()
                    )));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
            }
        }
        Ok(())
    }

    pub fn iterate(&mut self, value: &Value) -> Result<Vec<Value>> {
        let items = value.iterate()?;
        self.spend(items.len())?;
        Ok(items)
    }

    // Expressions.

    fn evaluate(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        self.spend(1)?;
        self.nest(|interpreter| interpreter.expression(expr, scope))
    }

    fn all(&mut self, exprs: &[Expr], scope: &Rc<Scope>) -> Result<Vec<Value>> {
        exprs
            .iter()
            .map(|expr| self.evaluate(expr, scope))
            .collect()
    }

    /// Pays for a value that was made.
    fn made(&mut self, value: Value) -> Result<Value> {
        self.spend(match &value {
            Value::Text(text) => text.len() / LETTERS_PER_STEP,
            Value::List(list) => list.items.len(),
            Value::Dict(dict) => dict.entries.len(),
            _ => 0,
        })?;
        Ok(value)
    }

    fn expression(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        match expr {
            Expr::Constant(value) => Ok(value.clone()),
            Expr::Name(name) => Ok(lookup(name, scope)),
            Expr::List(items) => Value::list(self.all(items, scope)?),
            Expr::Tuple(items) => Value::tuple(self.all(items, scope)?),
            Expr::Dict(entries) => {
                let entry = |(key, value): &(Expr, Expr)| {
                    Ok((self.evaluate(key, scope)?, self.evaluate(value, scope)?))
                };
                Value::dict(entries.iter().map(entry).collect::<Result<_>>()?)
            }
            Expr::If(parts) => {
                let (value, condition, otherwise) = &**parts;
                match (self.evaluate(condition, scope)?.is_true(), otherwise) {
                    (true, _) => self.evaluate(value, scope),
                    (false, Some(otherwise)) => self.evaluate(otherwise, scope),
                    (false, None) => Ok(Value::undefined("an if without else has no value here")),
                }
            }
            Expr::And(operands) | Expr::Or(operands) => {
                let ends = matches!(expr, Expr::Or(_));
                let mut value = Value::None;
                for operand in operands {
                    value = self.evaluate(operand, scope)?;
                    if value.is_true() == ends {
                        break;
                    }
                }
                Ok(value)
            }
            Expr::Not(value) => Ok(Value::Bool(!self.evaluate(value, scope)?.is_true())),
            Expr::Negative(value) => {
                let value = self.evaluate(value, scope)?;
                match value.as_int() {
                    Some(number) => Ok(Value::Int(number.checked_neg().ok_or_else(too_large)?)),
                    None => Ok(Value::Float(-number(&value, "-")?)),
                }
            }
            Expr::Positive(value) => {
                let value = self.evaluate(value, scope)?;
                match value.as_int() {
                    Some(number) => Ok(Value::Int(number)),
                    None => Ok(Value::Float(number(&value, "+")?)),
                }
            }
            Expr::Compare(first, rest) => {
                let mut left = self.evaluate(first, scope)?;
                for (comparison, right) in rest {
                    let right = self.evaluate(right, scope)?;
                    if !self.compares(*comparison, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::Arithmetic(first, rest) => {
                let mut left = self.evaluate(first, scope)?;
                for (operator, right) in rest {
                    let right = self.evaluate(right, scope)?;
                    let value = calculate(*operator, &left, &right)?;
                    left = self.made(value)?;
                }
                Ok(left)
            }
            Expr::Concat(operands) => {
                let mut out = Builder::default();
                for operand in operands {
                    out.push(&self.evaluate(operand, scope)?.to_text()?)?;
                }
                self.made(Value::text(out.finish()))
            }
            Expr::Chain(value, suffixes) => {
                let value = self.evaluate(value, scope)?;
                self.suffixes(value, suffixes, scope)
            }
        }
    }

    pub fn compares(
        &mut self,
        comparison: Comparison,
        left: &Value,
        right: &Value,
    ) -> Result<bool> {
        // Long texts and lists take their time.
        let len = |value: &Value| match value {
            Value::Text(text) => text.len() / LETTERS_PER_STEP,
            Value::List(list) => list.items.len(),
            Value::Dict(dict) => dict.entries.len(),
            _ => 0,
        };
        self.spend(len(left) + len(right))?;
        Ok(match comparison {
            Comparison::Eq => left == right,
            Comparison::Ne => left != right,
            Comparison::Lt => left.compare(right)?.is_lt(),
            Comparison::Le => left.compare(right)?.is_le(),
            Comparison::Gt => left.compare(right)?.is_gt(),
            Comparison::Ge => left.compare(right)?.is_ge(),
            Comparison::In => right.contains(left)?,
            Comparison::NotIn => !right.contains(left)?,
        })
    }

    fn suffixes(&mut self, value: Value, suffixes: &[Suffix], scope: &Rc<Scope>) -> Result<Value> {
        let mut value = value;
        for suffix in suffixes {
            self.spend(1)?;
            value = match suffix {
                Suffix::Attribute(name) => attribute(&value, name)?,
                Suffix::Item(key) => {
                    let key = self.evaluate(key, scope)?;
                    item(&value, &key)?
                }
                Suffix::Slice(parts) => {
                    let mut bounds = [None; 3];
                    for (bound, part) in bounds.iter_mut().zip(&**parts) {
                        if let Some(part) = part {
                            let part = self.evaluate(part, scope)?;
                            *bound = methods::int_argument(Some(part), "a slice")?;
                        }
                    }
                    self.made(slice(&value, bounds)?)?
                }
                Suffix::Call(arguments) => {
                    let passed = self.passed(arguments, scope)?;
                    let returned = self.call(&value, passed)?;
                    self.made(returned)?
                }
                Suffix::Filter(name, arguments) => {
                    let passed = self.passed(arguments, scope)?;
                    let filtered = self.filter(name, value, passed)?;
                    self.made(filtered)?
                }
                Suffix::Test {
                    name,
                    arguments,
                    negated,
                } => {
                    let passed = self.passed(arguments, scope)?;
                    Value::Bool(self.test(name, &value, passed)? != *negated)
                }
            };
        }
        Ok(value)
    }

    fn passed(&mut self, arguments: &Arguments, scope: &Rc<Scope>) -> Result<Passed> {
        let mut passed = Passed::of(self.all(&arguments.positional, scope)?);
        for (name, value) in &arguments.named {
            passed
                .named
                .push((name.clone(), self.evaluate(value, scope)?));
        }
        if let Some(spread) = &arguments.spread {
            let spread = self.evaluate(spread, scope)?;
            passed.positional.extend(self.iterate(&spread)?);
        }
        if let Some(spread) = &arguments.spread_named {
            let Value::Dict(dict) = self.evaluate(spread, scope)? else {
                return Err(Error::new("what follows ** is no dict"));
            };
            for (key, value) in &dict.entries {
                passed
                    .named
                    .push((text::string(&key.to_text()?), value.clone()));
            }
        }
        Ok(passed)
    }

    // Calls.

    /// Calls what `{% call %}` names, which may use `caller`.
    fn call_with_caller(&mut self, call: &Expr, caller: Value, scope: &Rc<Scope>) -> Result<Value> {
        let Expr::Chain(value, suffixes) = call else {
            return Err(Error::new("what {% call %} names is no call"));
        };
        let Some((Suffix::Call(arguments), before)) = suffixes.split_last() else {
            return Err(Error::new("what {% call %} names is no call"));
        };
        let called = self.evaluate(value, scope)?;
        let called = self.suffixes(called, before, scope)?;
        let mut passed = self.passed(arguments, scope)?;
        passed.named.push(("caller".to_owned(), caller));
        self.call(&called, passed)
    }

    fn call(&mut self, function: &Value, passed: Passed) -> Result<Value> {
        match function {
            Value::Function(function) => match &**function {
                Function::Global(name) => self.call_global(name, passed),
                Function::Method(value, name) => match value {
                    Value::Loop(state) => call_loop_method(state, name, passed),
                    value => methods::call(value, name, passed),
                },
                Function::Macro(closure) => self.call_macro(closure, passed),
                Function::Cycler { items, position } => {
                    let item = items[position.get() % items.len()].clone();
                    position.set((position.get() + 1) % items.len());
                    Ok(item)
                }
                Function::Joiner { separator, used } => Ok(match used.replace(true) {
                    true => separator.clone(),
                    false => Value::written(""),
                }),
            },
            Value::Loop(state) => {
                let [items] = passed.take("loop", ["items"])?;
                let (Some(items), Some(scope)) = (items, state.scope.upgrade()) else {
                    return Err(Error::new("loop() takes what to go through"));
                };
                if !state.definition.recursive {
                    return Err(Error::new("only a recursive loop can be called"));
                }
                self.capture(|interpreter| {
                    interpreter.repeat(&state.definition, items, &scope, state.depth + 1)?;
                    Ok(Flow::On)
                })
            }
            other => {
                other.defined()?;
                Err(Error::new(format!(
                    "a value of type {} cannot be called",
                    other.kind()
                )))
            }
        }
    }

    fn call_macro(&mut self, closure: &Closure, passed: Passed) -> Result<Value> {
        let definition = &closure.definition;
        let scope = closure.scope.upgrade();
        let scope = scope.ok_or_else(|| {
            Error::new(format!(
                "the macro {} is called outside of where it is defined",
                definition.name
            ))
        })?;
        let scope = Scope::new(Some(&scope));
        let mut positional = passed.positional.into_iter();
        let mut named = passed.named;
        for (name, default) in &definition.parameters {
            let by_name = named.iter().position(|(n, _)| n == name);
            let value = match (positional.next(), by_name, default) {
                (Some(value), None, _) => value,
                (None, Some(place), _) => named.remove(place).1,
                (None, None, Some(default)) => self.evaluate(default, &scope)?,
                (None, None, None) => {
                    Value::undefined(format!("parameter '{name}' was not provided"))
                }
                (Some(_), Some(_), _) => {
                    return Err(Error::new(format!(
                        "{} is passed {name} twice",
                        definition.name
                    )));
                }
            };
            scope.set(name, value);
        }
        if let Some(place) = named.iter().position(|(name, _)| name == "caller") {
            scope.set("caller", named.remove(place).1);
        }
        scope.set("varargs", Value::tuple(positional.collect())?);
        let named = named
            .into_iter()
            .map(|(name, value)| (Value::text(text::given(&name)), value));
        scope.set("kwargs", Value::dict(named.collect())?);
        self.capture(|interpreter| interpreter.run(&definition.body, &scope))
    }

    fn call_global(&mut self, name: &str, passed: Passed) -> Result<Value> {
        match name {
            "raise_exception" => {
                let [message] = passed.take(name, ["message"])?;
                let message = message.map(|message| message.to_text()).transpose()?;
                Err(Error::new(
                    message.map_or_else(String::new, |m| text::string(&m)),
                ))
            }
            "strftime_now" => {
                let [format] = passed.take(name, ["format"])?;
                let format = format.as_ref().and_then(Value::as_text);
                let format = format.ok_or_else(|| Error::new("strftime_now takes a format"))?;
                self.asked_time = true;
                let now = (self.input.now)(&text::string(format)).map_err(Error::new)?;
                Ok(match format.iter().any(|letter| letter.is_given()) {
                    true => Value::text(text::given(&now)),
                    false => Value::written(&now),
                })
            }
            "range" => {
                let [first, second, step] = passed.take(name, ["start", "stop", "step"])?;
                let whole = |value: Option<Value>, default| match value {
                    Some(value) => value.as_int().ok_or_else(|| {
                        Error::new(format!("range takes whole numbers, no {}", value.kind()))
                    }),
                    None => Ok(default),
                };
                let first = first.map(|value| whole(Some(value), 0)).transpose()?;
                let (start, stop) = match (first, second) {
                    (Some(start), Some(stop)) => (start, whole(Some(stop), 0)?),
                    (Some(stop), None) => (0, stop),
                    (None, _) => return Err(Error::new("range takes where to stop")),
                };
                let step = whole(step, 1)?;
                if step == 0 {
                    return Err(Error::new("range goes no step further"));
                }
                let too_long = || Error::new("a range is too long");
                let distance = stop.checked_sub(start).ok_or_else(too_long)?;
                let count = match (distance > 0) == (step > 0) && distance != 0 {
                    true => (distance.unsigned_abs() - 1) / step.unsigned_abs() + 1,
                    false => 0,
                };
                if count > LONGEST_RANGE as u128 {
                    return Err(too_long());
                }
                Value::list(
                    (0..count as i128)
                        .map(|n| Value::Int(start + n * step))
                        .collect(),
                )
            }
            "dict" => {
                let mut entries = Vec::new();
                for value in &passed.positional {
                    entries.extend(pairs(value)?);
                }
                let named = passed.named.into_iter();
                entries.extend(named.map(|(name, value)| (Value::text(text::given(&name)), value)));
                // Each key is looked for among those before.
                self.spend(entries.len() * entries.len() / 2)?;
                Value::dict(entries)
            }
            "namespace" => {
                let namespace = Namespace::default();
                for value in &passed.positional {
                    for (key, value) in pairs(value)? {
                        namespace.set(&text::string(&key.to_text()?), value)?;
                    }
                }
                for (name, value) in passed.named {
                    namespace.set(&name, value)?;
                }
                Ok(Value::Namespace(Rc::new(namespace)))
            }
            "cycler" => match passed.positional.is_empty() {
                true => Err(Error::new("cycler takes what to go through")),
                false => Ok(Value::Function(Rc::new(Function::Cycler {
                    items: passed.positional,
                    position: Cell::new(0),
                }))),
            },
            _ => {
                let [separator] = passed.take("joiner", ["sep"])?;
                Ok(Value::Function(Rc::new(Function::Joiner {
                    separator: separator.unwrap_or_else(|| Value::written(", ")),
                    used: Cell::new(false),
                })))
            }
        }
    }
}

const GLOBALS: [&str; 7] = [
    "raise_exception",
    "strftime_now",
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
];

fn lookup(name: &str, scope: &Scope) -> Value {
    if let Some(value) = scope.get(name) {
        return value;
    }
    match GLOBALS.iter().find(|global| **global == name) {
        Some(global) => Value::Function(Rc::new(Function::Global(global))),
        None => Value::undefined(format!("'{name}' is undefined")),
    }
}

fn closure(definition: &Rc<Macro>, scope: &Rc<Scope>) -> Value {
    Value::Function(Rc::new(Function::Macro(Closure {
        definition: definition.clone(),
        scope: Rc::downgrade(scope),
    })))
}

/// The entries of a dict, or of a list of pairs.
fn pairs(value: &Value) -> Result<Vec<(Value, Value)>> {
    if let Value::Dict(dict) = value {
        return Ok(dict.entries.clone());
    }
    let pair = |pair: Value| match <[Value; 2]>::try_from(pair.iterate()?) {
        Ok([key, value]) => Ok((key, value)),
        Err(_) => Err(Error::new("a dict is made of pairs")),
    };
    value.iterate()?.into_iter().map(pair).collect()
}

/// `value.name`: a method or field of its type, else what stands under that key.
pub fn attribute(value: &Value, name: &str) -> Result<Value> {
    value.defined()?;
    if methods::exist(value, name) {
        return Ok(method(value, name));
    }
    let found = match value {
        Value::Dict(dict) => dict.get_named(name).cloned(),
        Value::Namespace(namespace) => namespace.get(name),
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
    if found.is_none() && value.kind() == "tuple" && matches!(name, "grouper" | "list") {
        return Err(Error::new(format!(
            "a group's field {name} is not supported; `for key, items in ...` names both"
        )));
    }
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

fn call_loop_method(state: &Loop, name: &str, passed: Passed) -> Result<Value> {
    let values = passed.positional;
    if name == "cycle" {
        let none = || Error::new("loop.cycle takes what to go through");
        let len = values.len();
        let place = state.index.get().checked_rem(len).ok_or_else(none)?;
        return Ok(values[place].clone());
    }
    let changed = state.changed.borrow().as_ref() != Some(&values);
    let _old = state.changed.replace(Some(values));
    Ok(Value::Bool(changed))
}

/// `value[key]`: what stands at that place or under that key, else a method of that name.
pub fn item(value: &Value, key: &Value) -> Result<Value> {
    value.defined()?;
    let found = match (value, key) {
        (Value::Dict(dict), key) => dict.get(key).cloned(),
        (Value::List(list), key) => place(key, list.items.len()).map(|at| list.items[at].clone()),
        (Value::Text(text), key) => place(key, text.len()).map(|at| Value::text([text[at]])),
        _ => None,
    };
    match (found, key) {
        (Some(found), _) => Ok(found),
        (None, Value::Text(name)) => match value {
            Value::Dict(_) if !methods::exist(value, &text::string(name)) => {
                Ok(no_attribute(value, &text::string(name)))
            }
            _ => attribute(value, &text::string(name)),
        },
        (None, key) => {
            let mut repr = Builder::default();
            key.write_repr(&mut repr)?;
            let key = text::string(&repr.finish());
            Ok(Value::undefined(format!(
                "'{} object' has no element {key}",
                value.kind()
            )))
        }
    }
}

/// The place that an index means in a sequence: counted from its end where negative.
fn place(index: &Value, len: usize) -> Option<usize> {
    let index = index.as_int()?;
    let index = if index < 0 {
        index + len as i128
    } else {
        index
    };
    usize::try_from(index).ok().filter(|index| *index < len)
}

fn slice(value: &Value, [start, stop, step]: [Option<i128>; 3]) -> Result<Value> {
    let len = match value {
        Value::Text(text) => text.len(),
        Value::List(list) => list.items.len(),
        other => {
            other.defined()?;
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
    let clamp = |bound: i128| {
        let bound = if bound < 0 {
            bound.saturating_add(len)
        } else {
            bound
        };
        bound.clamp(least, most)
    };
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
            Value::sequence(items.collect(), list.is_tuple)
        }
        Value::Text(text) => {
            let letters: Vec<Letter> = places.into_iter().map(|at| text[at]).collect();
            Ok(Value::text(letters))
        }
        _ => Ok(Value::None),
    }
}

fn too_large() -> Error {
    Error::new("a number is out of range")
}

fn number(value: &Value, operator: &str) -> Result<f64> {
    value.defined()?;
    let no_number = || {
        Error::new(format!(
            "{operator} does not take a value of type {}",
            value.kind()
        ))
    };
    value.as_float().ok_or_else(no_number)
}

/// Python's arithmetic, on numbers, texts and lists.
pub fn calculate(operator: Operator, left: &Value, right: &Value) -> Result<Value> {
    use Operator::{Add, Div, FloorDiv, Mul, Pow, Rem, Sub};
    match (operator, left, right) {
        (Add, Value::Text(a), Value::Text(b)) => {
            return Ok(Value::text(text::join(&[], [&**a, &**b])?));
        }
        (Add, Value::List(a), Value::List(b)) if a.is_tuple == b.is_tuple => {
            return Value::sequence([a.items.as_slice(), &b.items].concat(), a.is_tuple);
        }
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
    left.defined()?;
    right.defined()?;
    let zero = || Error::new("division by zero");
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        let whole = match operator {
            Add => a.checked_add(b),
            Sub => a.checked_sub(b),
            Mul => a.checked_mul(b),
            FloorDiv | Rem if b == 0 => return Err(zero()),
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
            Pow => return Ok(Value::Float((a as f64).powf(b as f64))),
            Div => {
                return if b == 0 {
                    Err(zero())
                } else {
                    Ok(Value::Float(a as f64 / b as f64))
                };
            }
        };
        return whole.map(Value::Int).ok_or_else(too_large);
    }
    let (Some(a), Some(b)) = (left.as_float(), right.as_float()) else {
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
        Div | FloorDiv | Rem if b == 0.0 => return Err(zero()),
        Div => a / b,
        FloorDiv => (a / b).floor(),
        Rem => a - b * (a / b).floor(),
        Pow => a.powf(b),
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
            Value::sequence(items.collect(), list.is_tuple)
        }
        value => Ok(Value::text(value.to_text()?.repeat(count))),
    }
}

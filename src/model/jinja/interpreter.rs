//! Runs a template. Work and depth are limited, for a template comes with a file that nobody has read.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    rc::{Rc, Weak},
};

use super::{
    Error, Input, Result,
    access::{attribute, item, slice},
    arithmetic::{calculate, negative, number},
    globals::GLOBALS,
    methods,
    syntax::{Arguments, Body, Comparison, Expr, For, Kind, Macro, Statement, Suffix, Target},
    text::{self, Builder, LETTERS_PER_STEP, Letter},
    value::{Function, Value},
};

/// Steps that a template may take, of which each makes a value, an item or a few letters. Real templates take a few
/// dozen a message; an endless one is stopped within seconds.
const FUEL: usize = 20_000_000;
/// Statements, expressions and calls inside one another.
const MOST_NESTED: usize = 3000;

/// What a template makes of its input.
pub struct Rendered {
    pub letters: Vec<Letter>,
    /// Whether it asked for the time.
    pub asked_time: bool,
    /// The names whose values it looked at.
    pub read: HashSet<String>,
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
        read: HashSet::new(),
    };
    interpreter.run(body, &root)?;
    Ok(Rendered {
        letters: interpreter.out.finish(),
        asked_time: interpreter.asked_time,
        read: interpreter.read,
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
    pub definition: Rc<Macro>,
    scope: Weak<Scope>,
}

/// The `loop` of a `for`.
pub struct Loop {
    pub items: Vec<Value>,
    pub index: Cell<usize>,
    pub depth: usize,
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
    pub asked_time: bool,
    read: HashSet<String>,
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
                return self.repeat(definition, items, scope, 0);
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
    ) -> Result<Flow> {
        let mut items = self.iterate(&items)?;
        // Between the rounds, which may change what it asks, unless `loop` has to know how many there are.
        let mut condition = definition.condition.as_ref();
        if definition.uses_loop
            && let Some(condition) = condition.take()
        {
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
        let state = Rc::new(Loop {
            items,
            index: Cell::new(0),
            depth,
            changed: RefCell::default(),
            definition: definition.clone(),
            scope: Rc::downgrade(scope),
        });
        // `else` follows where no round comes to its end.
        let mut is_else = true;
        for (index, item) in state.items.iter().enumerate() {
            state.index.set(index);
            let inner = Scope::new(Some(scope));
            inner.set("loop", Value::Loop(state.clone()));
            self.assign(&definition.target, item.clone(), &inner)?;
            if let Some(condition) = condition
                && !self.evaluate(condition, &inner)?.is_true()
            {
                continue;
            }
            match self.run(&definition.body, &inner)? {
                Flow::On => is_else = false,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        match is_else {
            true => self.run(&definition.otherwise, &Scope::new(Some(scope))),
            false => Ok(Flow::On),
        }
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

    /// Pays for a value that was made of others.
    pub fn made(&mut self, value: Value) -> Result<Value> {
        self.spend(match &value {
            Value::List(list) => list.items.len(),
            Value::Dict(dict) => dict.entries.len(),
            value => value.steps(),
        })?;
        Ok(value)
    }

    pub fn dict(&mut self, entries: Vec<(Value, Value)>) -> Result<Value> {
        // Each key is looked for among those before.
        self.spend(entries.len() * entries.len() / 2)?;
        Value::dict(entries)
    }

    fn expression(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        match expr {
            Expr::Constant(value) => Ok(value.clone()),
            Expr::Name(name) => {
                if !self.read.contains(name) {
                    self.read.insert(name.clone());
                }
                Ok(lookup(name, scope))
            }
            Expr::List(items) => Value::list(self.all(items, scope)?),
            Expr::Tuple(items) => Value::tuple(self.all(items, scope)?),
            Expr::Dict(entries) => {
                let entry = |(key, value): &(Expr, Expr)| {
                    Ok((self.evaluate(key, scope)?, self.evaluate(value, scope)?))
                };
                let entries = entries.iter().map(entry).collect::<Result<_>>()?;
                self.dict(entries)
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
            Expr::Negative(value) => negative(&self.evaluate(value, scope)?),
            Expr::Positive(value) => {
                let value = self.evaluate(value, scope)?;
                number(&value, "+")?;
                Ok(value.as_int().map_or(value, Value::Int))
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
        self.spend(match comparison {
            Comparison::In | Comparison::NotIn => right.steps(),
            _ => left.steps().min(right.steps()),
        })?;
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
                    value => {
                        self.spend(value.steps())?;
                        methods::call(value, name, passed)
                    }
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
                    interpreter.repeat(&state.definition, items, &scope, state.depth + 1)
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
}

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

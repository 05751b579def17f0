//! From tokens to statements and expressions: Jinja 3.1's grammar, with the `break`, `continue` and `generation` tags that
//! transformers adds, and without what needs other templates.

use std::rc::Rc;

use super::{
    Error, Result,
    lexer::{Lexeme, Token, tokens},
    syntax::{
        Arguments, Body, Comparison, Expr, For, Kind, Macro, Operator, Statement, Suffix, Target,
    },
    value::Value,
};

/// How deep tags and brackets may nest.
const MOST_NESTED: usize = 100;

pub fn parse(source: &str) -> Result<Body> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        nested: 0,
        names_loop: false,
    };
    let parsed = parser.body(&[]);
    parsed
        .map(|(body, _)| body)
        .map_err(|error| error.at(parser.line()))
}

struct Parser {
    /// Ends with `Token::End`.
    tokens: Vec<Lexeme>,
    at: usize,
    nested: usize,
    /// Whether the name `loop` was read.
    names_loop: bool,
}

impl Parser {
    fn line(&self) -> usize {
        self.tokens[self.at].line
    }

    fn token(&self) -> &Token {
        &self.tokens[self.at].token
    }

    fn next_token(&self) -> &Token {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].token
    }

    fn advance(&mut self) {
        self.at = (self.at + 1).min(self.tokens.len() - 1);
    }

    fn is_operator(&self, operator: &str) -> bool {
        matches!(self.token(), Token::Operator(o) if *o == operator)
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.token(), Token::Name(name) if name == word)
    }

    fn skip_operator(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        if found {
            self.advance();
        }
        found
    }

    fn skip_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.advance();
        }
        found
    }

    fn expect_operator(&mut self, operator: &str) -> Result<()> {
        match self.skip_operator(operator) {
            true => Ok(()),
            false => Err(self.unexpected(operator)),
        }
    }

    fn expect(&mut self, token: Token) -> Result<()> {
        if *self.token() != token {
            return Err(self.unexpected(describe(&token)));
        }
        self.advance();
        Ok(())
    }

    fn name(&mut self) -> Result<String> {
        let Token::Name(name) = self.token() else {
            return Err(self.unexpected("a name"));
        };
        let name = name.clone();
        self.advance();
        Ok(name)
    }

    fn unexpected(&self, expected: &str) -> Error {
        let found = match self.token() {
            Token::Name(name) => name.clone(),
            Token::Operator(operator) => (*operator).to_owned(),
            other => describe(other).to_owned(),
        };
        Error::new(format!("unexpected {found}, expected {expected}"))
    }

    fn nest<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.nested == MOST_NESTED {
            return Err(Error::new("tags and brackets nest too deeply"));
        }
        self.nested += 1;
        let parsed = parse(self);
        self.nested -= 1;
        parsed
    }

    // Statements.

    /// Up to a tag of one of the names `ends`, or to the template's end where there are none; with that name.
    fn body(&mut self, ends: &[&str]) -> Result<(Body, String)> {
        self.nest(|parser| parser.statements(ends))
    }

    fn statements(&mut self, ends: &[&str]) -> Result<(Body, String)> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.token() {
                Token::Data(text) => {
                    let text = text.clone();
                    self.advance();
                    Kind::Data(text)
                }
                Token::VariableBegin => {
                    self.advance();
                    let value = self.tuple(true)?;
                    self.expect(Token::VariableEnd)?;
                    Kind::Output(value)
                }
                Token::BlockBegin => {
                    self.advance();
                    let name = self.name()?;
                    if ends.contains(&name.as_str()) {
                        return Ok((body, name));
                    }
                    self.statement(&name).map_err(|error| error.at(line))?
                }
                Token::End if ends.is_empty() => return Ok((body, String::new())),
                _ => {
                    let ends = ends.join(" or ");
                    return Err(self.unexpected(&format!("a tag {ends}")));
                }
            };
            body.push(Statement { line, kind });
        }
    }

    /// A body up to the one tag `end`, and that tag.
    fn block(&mut self, end: &str) -> Result<Body> {
        self.expect(Token::BlockEnd)?;
        let (body, _) = self.body(&[end])?;
        self.expect(Token::BlockEnd)?;
        Ok(body)
    }

    fn statement(&mut self, name: &str) -> Result<Kind> {
        let kind = match name {
            "if" => return self.if_statement(),
            "for" => return self.for_statement(),
            "set" => return self.set(),
            "macro" => {
                let name = self.name()?;
                let parameters = self.parameters()?;
                let body = self.block("endmacro")?;
                return Ok(Kind::Macro(Rc::new(Macro {
                    name,
                    parameters,
                    body,
                })));
            }
            "call" => {
                let parameters = match self.is_operator("(") {
                    true => self.parameters()?,
                    false => Vec::new(),
                };
                let call = self.expression()?;
                let body = self.block("endcall")?;
                let name = "caller".to_owned();
                return Ok(Kind::Call(
                    Rc::new(Macro {
                        name,
                        parameters,
                        body,
                    }),
                    call,
                ));
            }
            "filter" => {
                let filters = self.filters(true)?;
                return Ok(Kind::Filter(filters, self.block("endfilter")?));
            }
            "with" => {
                let mut values = Vec::new();
                while *self.token() != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect_operator(",")?;
                    }
                    let target = self.target()?;
                    self.expect_operator("=")?;
                    values.push((target, self.expression()?));
                }
                return Ok(Kind::With(values, self.block("endwith")?));
            }
            // It notes where the assistant speaks, which matters in training alone.
            "generation" => return Ok(Kind::With(Vec::new(), self.block("endgeneration")?)),
            "break" => Kind::Break,
            "continue" => Kind::Continue,
            _ => return Err(Error::new(format!("unknown tag {name}"))),
        };
        self.expect(Token::BlockEnd)?;
        Ok(kind)
    }

    fn if_statement(&mut self) -> Result<Kind> {
        let mut branches = Vec::new();
        loop {
            let condition = self.tuple(false)?;
            self.expect(Token::BlockEnd)?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((condition, body));
            match end.as_str() {
                "elif" => {}
                "else" => return Ok(Kind::If(branches, self.block("endif")?)),
                _ => {
                    self.expect(Token::BlockEnd)?;
                    return Ok(Kind::If(branches, Vec::new()));
                }
            }
        }
    }

    fn for_statement(&mut self) -> Result<Kind> {
        let target = self.target()?;
        if !self.skip_word("in") {
            return Err(self.unexpected("in"));
        }
        let items = self.tuple(false)?;
        let condition = match self.skip_word("if") {
            true => Some(self.expression()?),
            false => None,
        };
        let recursive = self.skip_word("recursive");
        self.expect(Token::BlockEnd)?;
        let before = std::mem::take(&mut self.names_loop);
        let (body, end) = self.body(&["endfor", "else"])?;
        let uses_loop = self.names_loop;
        self.names_loop |= before;
        let otherwise = match end.as_str() {
            "else" => self.block("endfor")?,
            _ => {
                self.expect(Token::BlockEnd)?;
                Vec::new()
            }
        };
        Ok(Kind::For(Rc::new(For {
            target,
            items,
            condition,
            recursive,
            uses_loop,
            body,
            otherwise,
        })))
    }

    fn set(&mut self) -> Result<Kind> {
        let target = self.target()?;
        if self.skip_operator("=") {
            let value = self.tuple(true)?;
            self.expect(Token::BlockEnd)?;
            return Ok(Kind::Set(target, value));
        }
        let filters = self.filters(false)?;
        Ok(Kind::SetBlock(target, filters, self.block("endset")?))
    }

    /// What a value is assigned to: a name, `namespace.name`, or several.
    fn target(&mut self) -> Result<Target> {
        let mut targets = Vec::new();
        loop {
            if self.skip_operator("(") {
                targets.push(self.nest(Self::target)?);
                self.expect_operator(")")?;
            } else {
                let name = self.name()?;
                targets.push(match self.skip_operator(".") {
                    true => Target::Attribute(name, self.name()?),
                    false => Target::Name(name),
                });
            }
            let is_tuple = targets.len() > 1 || self.is_operator(",");
            let goes_on = self.skip_operator(",")
                && (matches!(self.token(), Token::Name(name) if name != "in")
                    || self.is_operator("("));
            if goes_on {
                continue;
            }
            return Ok(match is_tuple {
                true => Target::Tuple(targets),
                false => targets.remove(0),
            });
        }
    }

    fn parameters(&mut self) -> Result<Vec<(String, Option<Expr>)>> {
        self.expect_operator("(")?;
        let mut parameters = Vec::new();
        while !self.is_operator(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
            }
            let name = self.name()?;
            let default = match self.skip_operator("=") {
                true => Some(self.expression()?),
                false => None,
            };
            parameters.push((name, default));
        }
        self.advance();
        Ok(parameters)
    }

    /// `| filter | filter`; the first without its bar where `inline`.
    fn filters(&mut self, inline: bool) -> Result<Vec<Suffix>> {
        let mut filters = Vec::new();
        while (inline && filters.is_empty()) || self.skip_operator("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    // Expressions, from what binds least.

    fn expression(&mut self) -> Result<Expr> {
        self.nest(Self::conditional)
    }

    fn conditional(&mut self) -> Result<Expr> {
        let value = self.or()?;
        if !self.skip_word("if") {
            return Ok(value);
        }
        let condition = self.or()?;
        let otherwise = match self.skip_word("else") {
            true => Some(self.expression()?),
            false => None,
        };
        Ok(Expr::If(Box::new((value, condition, otherwise))))
    }

    fn or(&mut self) -> Result<Expr> {
        let mut operands = vec![self.and()?];
        while self.skip_word("or") {
            operands.push(self.and()?);
        }
        Ok(one_or(operands, Expr::Or))
    }

    fn and(&mut self) -> Result<Expr> {
        let mut operands = vec![self.not()?];
        while self.skip_word("and") {
            operands.push(self.not()?);
        }
        Ok(one_or(operands, Expr::And))
    }

    fn not(&mut self) -> Result<Expr> {
        match self.skip_word("not") {
            true => Ok(Expr::Not(Box::new(self.nest(Self::not)?))),
            false => self.compare(),
        }
    }

    fn compare(&mut self) -> Result<Expr> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.token() {
                Token::Operator("==") => Comparison::Eq,
                Token::Operator("!=") => Comparison::Ne,
                Token::Operator("<") => Comparison::Lt,
                Token::Operator("<=") => Comparison::Le,
                Token::Operator(">") => Comparison::Gt,
                Token::Operator(">=") => Comparison::Ge,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not"
                        && matches!(self.next_token(), Token::Name(next) if next == "in") =>
                {
                    self.advance();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.advance();
            rest.push((comparison, self.sum()?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Compare(Box::new(first), rest),
        })
    }

    fn sum(&mut self) -> Result<Expr> {
        self.arithmetic(&[("+", Operator::Add), ("-", Operator::Sub)], Self::concat)
    }

    fn concat(&mut self) -> Result<Expr> {
        let mut operands = vec![self.product()?];
        while self.skip_operator("~") {
            operands.push(self.product()?);
        }
        Ok(one_or(operands, Expr::Concat))
    }

    fn product(&mut self) -> Result<Expr> {
        let operators = [
            ("*", Operator::Mul),
            ("/", Operator::Div),
            ("//", Operator::FloorDiv),
            ("%", Operator::Rem),
        ];
        self.arithmetic(&operators, Self::power)
    }

    fn power(&mut self) -> Result<Expr> {
        self.arithmetic(&[("**", Operator::Pow)], |parser| parser.unary(true))
    }

    fn arithmetic(
        &mut self,
        operators: &[(&str, Operator)],
        operand: impl Fn(&mut Self) -> Result<Expr>,
    ) -> Result<Expr> {
        let first = operand(self)?;
        let mut rest = Vec::new();
        while let Token::Operator(symbol) = self.token()
            && let Some((_, operator)) = operators.iter().find(|(s, _)| s == symbol)
        {
            let operator = *operator;
            self.advance();
            rest.push((operator, operand(self)?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Arithmetic(Box::new(first), rest),
        })
    }

    fn unary(&mut self, filters: bool) -> Result<Expr> {
        let value = if self.skip_operator("-") {
            Expr::Negative(Box::new(self.nest(|parser| parser.unary(false))?))
        } else if self.skip_operator("+") {
            Expr::Positive(Box::new(self.nest(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let mut suffixes = self.postfixes()?;
        if filters {
            loop {
                if self.skip_operator("|") {
                    suffixes.push(self.filter()?);
                } else if self.skip_word("is") {
                    suffixes.push(self.test()?);
                } else if self.is_operator("(") {
                    suffixes.push(Suffix::Call(self.arguments()?));
                } else {
                    break;
                }
            }
        }
        Ok(chain(value, suffixes))
    }

    fn postfixes(&mut self) -> Result<Vec<Suffix>> {
        let mut suffixes = Vec::new();
        loop {
            if self.skip_operator(".") {
                suffixes.push(match self.token() {
                    Token::Int(index) => {
                        let index = Value::Int(*index);
                        self.advance();
                        Suffix::Item(Expr::Constant(index))
                    }
                    _ => Suffix::Attribute(self.name()?),
                });
            } else if self.skip_operator("[") {
                suffixes.push(self.nest(Self::subscript)?);
            } else if self.is_operator("(") {
                suffixes.push(Suffix::Call(self.arguments()?));
            } else {
                return Ok(suffixes);
            }
        }
    }

    /// From behind `[` to behind `]`.
    fn subscript(&mut self) -> Result<Suffix> {
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        let mut colons = 0;
        loop {
            if self.skip_operator("]") {
                break;
            }
            if self.skip_operator(":") {
                colons += 1;
                if colons == 3 {
                    return Err(Error::new("a slice has three parts at most"));
                }
                continue;
            }
            if parts[colons].is_some() {
                return Err(self.unexpected("]"));
            }
            parts[colons] = Some(match colons {
                0 => self.tuple(true)?,
                _ => self.expression()?,
            });
        }
        if colons > 0 {
            return Ok(Suffix::Slice(Box::new(parts)));
        }
        let [item, ..] = parts;
        item.map(Suffix::Item)
            .ok_or_else(|| Error::new("nothing between [ and ]"))
    }

    fn filter(&mut self) -> Result<Suffix> {
        let name = self.dotted_name()?;
        let arguments = match self.is_operator("(") {
            true => self.arguments()?,
            false => Arguments::default(),
        };
        Ok(Suffix::Filter(name, arguments))
    }

    fn test(&mut self) -> Result<Suffix> {
        let negated = self.skip_word("not");
        let name = self.dotted_name()?;
        let mut arguments = Arguments::default();
        let begins_value = match self.token() {
            Token::Name(name) => !matches!(name.as_str(), "else" | "or" | "and" | "is"),
            Token::Text(_) | Token::Int(_) | Token::Float(_) => true,
            Token::Operator(operator) => matches!(*operator, "[" | "{"),
            _ => false,
        };
        if self.is_operator("(") {
            arguments = self.arguments()?;
        } else if begins_value {
            let value = self.primary()?;
            let suffixes = self.postfixes()?;
            arguments.positional.push(chain(value, suffixes));
        }
        Ok(Suffix::Test {
            name,
            arguments,
            negated,
        })
    }

    fn dotted_name(&mut self) -> Result<String> {
        let mut name = self.name()?;
        while self.skip_operator(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect_operator("(")?;
        self.nest(|parser| {
            let mut arguments = Arguments::default();
            let mut first = true;
            while !parser.is_operator(")") {
                if !first {
                    parser.expect_operator(",")?;
                    if parser.is_operator(")") {
                        break;
                    }
                }
                first = false;
                let is_named = matches!(parser.token(), Token::Name(_))
                    && *parser.next_token() == Token::Operator("=");
                if parser.skip_operator("**") {
                    arguments.spread_named = Some(Box::new(parser.expression()?));
                } else if parser.skip_operator("*") {
                    arguments.spread = Some(Box::new(parser.expression()?));
                } else if is_named {
                    let name = parser.name()?;
                    parser.advance();
                    arguments.named.push((name, parser.expression()?));
                } else {
                    arguments.positional.push(parser.expression()?);
                }
            }
            parser.advance();
            Ok(arguments)
        })
    }

    fn primary(&mut self) -> Result<Expr> {
        let value = match self.token() {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Expr::Constant(Value::Bool(true)),
                "false" | "False" => Expr::Constant(Value::Bool(false)),
                "none" | "None" => Expr::Constant(Value::None),
                name => {
                    let expr = Expr::Name(name.to_owned());
                    self.names_loop |= name == "loop";
                    expr
                }
            },
            Token::Int(number) => Expr::Constant(Value::Int(*number)),
            Token::Float(number) => Expr::Constant(Value::Float(*number)),
            Token::Text(_) => {
                let mut text = Vec::new();
                while let Token::Text(more) = self.token() {
                    text.extend_from_slice(more);
                    self.advance();
                }
                return Ok(Expr::Constant(Value::text(text)));
            }
            Token::Operator("(") => {
                self.advance();
                let value = match self.is_operator(")") {
                    true => Expr::Tuple(Vec::new()),
                    false => self.tuple(true)?,
                };
                self.expect_operator(")")?;
                return Ok(value);
            }
            Token::Operator("[") => {
                self.advance();
                let items = self.items("]", Self::expression)?;
                return Ok(Expr::List(items));
            }
            Token::Operator("{") => {
                self.advance();
                let entries = self.items("}", |parser| {
                    let key = parser.expression()?;
                    parser.expect_operator(":")?;
                    Ok((key, parser.expression()?))
                })?;
                return Ok(Expr::Dict(entries));
            }
            _ => return Err(self.unexpected("a value")),
        };
        self.advance();
        Ok(value)
    }

    /// Items with commas between them, to behind `end`.
    fn items<T>(&mut self, end: &str, item: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        while !self.is_operator(end) {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.is_operator(end) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        self.advance();
        Ok(items)
    }

    /// One expression, or several with commas between them; `conditional`: of the form `a if b else c` too.
    fn tuple(&mut self, conditional: bool) -> Result<Expr> {
        let item = |parser: &mut Self| match conditional {
            true => parser.expression(),
            false => parser.nest(Self::or),
        };
        let mut items = vec![item(self)?];
        let mut is_tuple = false;
        while self.skip_operator(",") {
            is_tuple = true;
            let ends = match self.token() {
                Token::VariableEnd | Token::BlockEnd | Token::End => true,
                Token::Operator(operator) => matches!(*operator, ")" | "]" | "}"),
                _ => false,
            };
            if ends {
                break;
            }
            items.push(item(self)?);
        }
        Ok(match is_tuple {
            true => Expr::Tuple(items),
            false => items.remove(0),
        })
    }
}

fn one_or(mut operands: Vec<Expr>, several: impl Fn(Vec<Expr>) -> Expr) -> Expr {
    match operands.len() {
        1 => operands.remove(0),
        _ => several(operands),
    }
}

fn chain(value: Expr, suffixes: Vec<Suffix>) -> Expr {
    match suffixes.is_empty() {
        true => value,
        false => Expr::Chain(Box::new(value), suffixes),
    }
}

fn describe(token: &Token) -> &'static str {
    match token {
        Token::Data(_) => "text",
        Token::BlockBegin => "{%",
        Token::BlockEnd => "%}",
        Token::VariableBegin => "{{",
        Token::VariableEnd => "}}",
        Token::Name(_) => "a name",
        Token::Text(_) => "a string",
        Token::Int(_) | Token::Float(_) => "a number",
        Token::Operator(operator) => operator,
        Token::End => "end of the template",
    }
}

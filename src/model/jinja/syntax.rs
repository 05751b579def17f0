//! A template as the parser leaves it to the interpreter.

use std::rc::Rc;

use super::{text::Letter, value::Value};

pub type Body = Vec<Statement>;

pub struct Statement {
    /// Counted from 1.
    pub line: usize,
    pub kind: Kind,
}

pub enum Kind {
    Data(Vec<Letter>),
    Output(Expr),
    /// Conditions with what follows from them, then what follows from none.
    If(Vec<(Expr, Body)>, Body),
    For(Rc<For>),
    Set(Target, Expr),
    /// A captured body, through filters.
    SetBlock(Target, Vec<Suffix>, Body),
    Macro(Rc<Macro>),
    /// `{% call(parameters) expression %}body{% endcall %}`
    Call(Rc<Macro>, Expr),
    Filter(Vec<Suffix>, Body),
    With(Vec<(Target, Expr)>, Body),
    Break,
    Continue,
}

pub struct For {
    pub target: Target,
    pub items: Expr,
    pub condition: Option<Expr>,
    pub recursive: bool,
    /// Whether its body names `loop`.
    pub uses_loop: bool,
    pub body: Body,
    pub otherwise: Body,
}

pub struct Macro {
    pub name: String,
    /// With their defaults.
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Body,
}

pub enum Target {
    Name(String),
    /// Of a namespace.
    Attribute(String, String),
    Tuple(Vec<Target>),
}

pub enum Expr {
    Constant(Value),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    /// Value, condition, value otherwise.
    If(Box<(Expr, Expr, Option<Expr>)>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// From left to right.
    Arithmetic(Box<Expr>, Vec<(Operator, Expr)>),
    Concat(Vec<Expr>),
    Chain(Box<Expr>, Vec<Suffix>),
}

/// What stands behind a value: `.name`, `[item]`, `[a:b:c]`, `(arguments)`, `| filter`, `is test`.
pub enum Suffix {
    Attribute(String),
    Item(Expr),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Arguments),
    Filter(String, Arguments),
    Test {
        name: String,
        arguments: Arguments,
        negated: bool,
    },
}

#[derive(Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list`
    pub spread: Option<Box<Expr>>,
    /// `**dict`
    pub spread_named: Option<Box<Expr>>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Operator {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

impl Operator {
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Sub => "-",
            Self::Mul => "*",
            Self::Div => "/",
            Self::FloorDiv => "//",
            Self::Rem => "%",
            Self::Pow => "**",
        }
    }
}

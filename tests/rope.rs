//! Rotation frequencies against transformers' (tests/make_rope_vectors.py).

use serde::Deserialize;
use sharpi::model::decoder::{Rope, RopeScaling, RopeStyle, Yarn};

#[derive(Deserialize)]
struct Case {
    dimensions: usize,
    base: f32,
    original_context: usize,
    factor: f32,
    beta_fast: Option<f32>,
    beta_slow: Option<f32>,
    /// In place of what YaRN asks for.
    attention_factor: Option<f32>,
    magnitude: f64,
    frequencies: Vec<f64>,
}

/// The reference rounds to float32 a few times on the way.
#[test]
fn yarn_turns_as_transformers_does() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("data/rope-yarn.json")).unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        // A file gives the factor by which its own differs.
        let attn_factor = case
            .attention_factor
            .map_or(1.0, |factor| factor / (1.0 + 0.1 * case.factor.ln()));
        let rope = Rope {
            style: RopeStyle::Neox,
            base: case.base,
            dimensions: case.dimensions,
            factors: None,
            scaling: RopeScaling::Yarn(Yarn {
                factor: case.factor,
                original_context: case.original_context,
                beta_fast: case.beta_fast.unwrap_or(32.0),
                beta_slow: case.beta_slow.unwrap_or(1.0),
                ext_factor: 1.0,
            }),
            attn_factor,
        };
        let name = format!("{} times {}", case.factor, case.original_context);
        assert!(
            (f64::from(rope.magnitude()) / case.magnitude - 1.0).abs() < 3e-7,
            "{name}: {} for {}",
            rope.magnitude(),
            case.magnitude
        );
        let frequencies = rope.frequencies();
        assert_eq!(frequencies.len(), case.frequencies.len());
        for (i, (ours, theirs)) in frequencies.iter().zip(&case.frequencies).enumerate() {
            assert!(
                (ours / theirs - 1.0).abs() < 2e-6,
                "{name}: frequency {i} is {ours} for {theirs}"
            );
        }
    }
}

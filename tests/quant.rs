//! Tensor formats against the PyPI package `gguf`: see `tests/data/quant/make.py`.

use std::path::Path;

use sharpi::quant::TensorType;

fn data(file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/quant")
        .join(file);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Both sides round each operation to float32 in the same order, so nothing less than equal bits will do.
#[test]
fn every_type_dequantizes_to_the_bits_of_the_reference() {
    for &tensor_type in TensorType::ALL {
        let name = tensor_type.name();
        let blocks = data(&format!("{name}.bin"));
        let expected: Vec<f32> = data(&format!("{name}.f32"))
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(
            expected.len(),
            blocks.len() / tensor_type.block_bytes() * tensor_type.block_len(),
            "{name}: block size"
        );
        // One byte off the allocation, since a mapped tensor may start at any address.
        let shifted: Vec<u8> = std::iter::once(0).chain(blocks.iter().copied()).collect();
        for blocks in [&blocks[..], &shifted[1..]] {
            let mut values = vec![f32::NAN; expected.len()];
            tensor_type.dequantize(blocks, &mut values);
            for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
                assert_eq!(
                    value.to_bits(),
                    expected.to_bits(),
                    "{name}[{i}]: {value} for {expected}"
                );
            }
        }
    }
}

#[test]
fn float16_infinities_and_nan_survive() {
    let mut values = [0.0; 3];
    TensorType::F16.dequantize(&[0x00, 0x7c, 0x00, 0xfc, 0x01, 0x7e], &mut values);
    assert_eq!(values[..2], [f32::INFINITY, f32::NEG_INFINITY]);
    assert!(values[2].is_nan());
}

/// Ids as in ggml's `enum ggml_type`, without those withdrawn (4, 5, 31 to 33, 36 to 38), those of activations (9, 15),
/// plain numbers that weights are not stored in (24 to 28) and NVFP4 (40).
#[test]
fn ids_name_the_types_that_ggml_names() {
    let named: Vec<_> = (0..=40)
        .filter_map(|id| TensorType::from_ggml_id(id).map(|tensor_type| (id, tensor_type.name())))
        .collect();
    let expected = [
        (0, "F32"),
        (1, "F16"),
        (2, "Q4_0"),
        (3, "Q4_1"),
        (6, "Q5_0"),
        (7, "Q5_1"),
        (8, "Q8_0"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (12, "Q4_K"),
        (13, "Q5_K"),
        (14, "Q6_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (29, "IQ1_M"),
        (30, "BF16"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    assert_eq!(named, expected);
}

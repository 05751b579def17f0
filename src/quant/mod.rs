//! The ggml tensor formats: how many bytes a block of values takes and how to read it back.

/// The format of a tensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl TensorType {
    /// The type with this id in a GGUF file, or `None` where it is not supported.
    pub fn from_ggml_id(_id: u32) -> Option<Self> {
        todo!()
    }

    /// The name that ggml uses, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        todo!()
    }

    /// Values in one block.
    pub fn block_len(self) -> usize {
        todo!()
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        todo!()
    }

    /// Writes the values of `blocks` (whole blocks) to `out`, `blocks.len() / block_bytes() * block_len()` long.
    pub fn dequantize(self, _blocks: &[u8], _out: &mut [f32]) {
        todo!()
    }
}

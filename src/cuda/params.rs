//! The one parameter of each kernel: the structs of `kernels/params.h`, which says what each field is, field by field
//! at the same bytes. Addresses are of device memory; 0 stands for null.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUdeviceptr;

/// Kinds of heads that the step kernel does in one model.
pub const HEAD_KINDS: usize = 2;

/// Declares structs as C lays them out, and holds them to the size and the offsets that the header is held to as well.
macro_rules! params {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($offset:literal $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Pod, Zeroable)]
        #[repr(C)]
        pub struct $name {
            $(pub $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
        };
    )*};
}

params! {
    /// A quantized vector: i8 (length), its scales f32 (length / 32), and the values as f32 (length), the length
    /// rounded up to [`super::UNIT`].
    Activation: 24 {
        0 q: CUdeviceptr,
        8 scale: CUdeviceptr,
        16 value: CUdeviceptr,
    }

    /// `embed`.
    EmbedParams: 80 {
        0 weights: CUdeviceptr,
        8 token: CUdeviceptr,
        16 x: CUdeviceptr,
        24 norm: CUdeviceptr,
        32 next: Activation,
        56 next_squares: CUdeviceptr,
        64 tensor_type: i32,
        68 columns: i32,
        72 scale: f32,
        76 unused: i32,
    }

    /// Of `gemv_store`, `gemv_add` and `gemv_gate`.
    GemvMatrix: 40 {
        0 weights: CUdeviceptr,
        8 bias: CUdeviceptr,
        16 out: CUdeviceptr,
        24 tensor_type: i32,
        28 rows: i32,
        32 blocks: i32,
        36 unused: i32,
    }

    /// `gemv_store`, `gemv_add` and `gemv_gate`.
    GemvParams: 216 {
        0 matrix: [GemvMatrix; 3],
        120 a: Activation,
        144 squares: CUdeviceptr,
        152 next: Activation,
        176 next_norm: CUdeviceptr,
        184 factors: CUdeviceptr,
        192 next_squares: CUdeviceptr,
        200 epsilon: f32,
        204 columns: i32,
        208 ring_bytes: i32,
        212 gelu: i32,
    }

    /// Of `gemm_*` and `gemm_strips_*`.
    GemmMatrix: 32 {
        0 weights: CUdeviceptr,
        8 bias: CUdeviceptr,
        16 out: CUdeviceptr,
        24 rows: i32,
        28 out_stride: i32,
    }

    /// `gemm_*` and `gemm_strips_*`.
    GemmParams: 160 {
        0 matrix: [GemmMatrix; 3],
        96 x: CUdeviceptr,
        104 gated: CUdeviceptr,
        112 partial: CUdeviceptr,
        120 finished: CUdeviceptr,
        128 factor: f32,
        132 matrices: i32,
        136 epilogue: i32,
        140 tokens: i32,
        144 padded_tokens: i32,
        148 columns: i32,
        152 stages: i32,
        156 gelu: i32,
    }

    /// Of `decode_attention_*` and the step kernel.
    AttentionLayer: 88 {
        0 q_norm: CUdeviceptr,
        8 k_norm: CUdeviceptr,
        16 v_norm: CUdeviceptr,
        24 frequencies: CUdeviceptr,
        32 k_cache: CUdeviceptr,
        40 v_cache: CUdeviceptr,
        48 epsilon: f32,
        52 context: i32,
        56 group: i32,
        60 rope_dims: i32,
        64 interleaved: i32,
        68 scale: f32,
        72 rope_factor: f32,
        76 window: i32,
        80 softcap: f32,
        84 stores: i32,
    }

    /// `decode_attention_*`.
    DecodeAttentionParams: 200 {
        0 q: CUdeviceptr,
        8 k: CUdeviceptr,
        16 v: CUdeviceptr,
        24 layer: AttentionLayer,
        112 position: CUdeviceptr,
        120 place: CUdeviceptr,
        128 partial: CUdeviceptr,
        136 finished: CUdeviceptr,
        144 out: Activation,
        168 tiles: KvTiles,
        192 tile_ring: i32,
        196 tile_depth: i32,
    }

    /// A layer's tiles.
    KvTiles: 24 {
        0 records: CUdeviceptr,
        8 head_bytes: u64,
        16 sinks: CUdeviceptr,
    }

    /// A layer of `compress_tiles_*`.
    CompressedLayer: 48 {
        0 k_cache: CUdeviceptr,
        8 v_cache: CUdeviceptr,
        16 tiles: KvTiles,
        40 context: i32,
        44 unused: i32,
    }

    /// `compress_tiles_*`.
    CompressTilesParams: 24 {
        0 layers: CUdeviceptr,
        8 place: CUdeviceptr,
        16 tokens: i32,
        20 unused: i32,
    }

    /// `copy_tokens`.
    CopyTokensParams: 56 {
        0 k_from: CUdeviceptr,
        8 v_from: CUdeviceptr,
        16 k_to: CUdeviceptr,
        24 v_to: CUdeviceptr,
        32 place: CUdeviceptr,
        40 from_context: i32,
        44 to_context: i32,
        48 head_dim: i32,
        52 tokens: i32,
    }

    /// `rope_tokens_*`.
    RopeParams: 136 {
        0 q: CUdeviceptr,
        8 k: CUdeviceptr,
        16 v: CUdeviceptr,
        24 q_norm: CUdeviceptr,
        32 k_norm: CUdeviceptr,
        40 v_norm: CUdeviceptr,
        48 frequencies: CUdeviceptr,
        56 q_out: CUdeviceptr,
        64 k_cache: CUdeviceptr,
        72 v_cache: CUdeviceptr,
        80 position: CUdeviceptr,
        88 place: CUdeviceptr,
        96 epsilon: f32,
        100 context: i32,
        104 head_count: i32,
        108 head_count_kv: i32,
        112 rope_dims: i32,
        116 interleaved: i32,
        120 scale: f32,
        124 rope_factor: f32,
        128 stores: i32,
        132 compressed: i32,
    }

    /// `flash_attention_*`.
    FlashAttentionParams: 112 {
        0 q: CUdeviceptr,
        8 k_cache: CUdeviceptr,
        16 v_cache: CUdeviceptr,
        24 out: CUdeviceptr,
        32 place: CUdeviceptr,
        40 partial: CUdeviceptr,
        48 finished: CUdeviceptr,
        56 tokens: i32,
        60 padded_tokens: i32,
        64 context: i32,
        68 group: i32,
        72 window: i32,
        76 softcap: f32,
        80 tiles: KvTiles,
        104 tile_ring: i32,
        108 tile_depth: i32,
    }

    /// `evict_observe_*`, `evict_join`, `evict_weigh_*`, `evict_norms_*` and `evict_select`.
    EvictParams: 144 {
        0 q: CUdeviceptr,
        8 k_cache: CUdeviceptr,
        16 v_cache: CUdeviceptr,
        24 tiles: KvTiles,
        48 grams: CUdeviceptr,
        56 partial: CUdeviceptr,
        64 levels: CUdeviceptr,
        72 importance: CUdeviceptr,
        80 norms: CUdeviceptr,
        88 sums: CUdeviceptr,
        96 scores: CUdeviceptr,
        104 kept: CUdeviceptr,
        112 tokens: i32,
        116 places: i32,
        120 context: i32,
        124 group: i32,
        128 softcap: f32,
        132 budget: i32,
        136 blocks: i32,
        140 unused: i32,
    }

    /// `evict_gather_*`.
    GatherKeptParams: 88 {
        0 k_from: CUdeviceptr,
        8 v_from: CUdeviceptr,
        16 k_to: CUdeviceptr,
        24 v_to: CUdeviceptr,
        32 tiles: KvTiles,
        56 kept: CUdeviceptr,
        64 context: i32,
        68 to_context: i32,
        72 budget: i32,
        76 places: i32,
        80 first: i32,
        84 count: i32,
    }

    /// `norm_tokens`.
    NormParams: 48 {
        0 x: CUdeviceptr,
        8 weight: CUdeviceptr,
        16 out: CUdeviceptr,
        24 rms: CUdeviceptr,
        32 epsilon: f32,
        36 columns: i32,
        40 padded_tokens: i32,
        44 unused: i32,
    }

    /// `add_branch_tokens`.
    AddBranchTokensParams: 40 {
        0 x: CUdeviceptr,
        8 branch: CUdeviceptr,
        16 norm: CUdeviceptr,
        24 epsilon: f32,
        28 factor: f32,
        32 scale: f32,
        36 columns: i32,
    }

    /// `add_branch`.
    AddBranchParams: 80 {
        0 x: CUdeviceptr,
        8 branch: CUdeviceptr,
        16 norm: CUdeviceptr,
        24 next_norm: CUdeviceptr,
        32 next: Activation,
        56 next_squares: CUdeviceptr,
        64 epsilon: f32,
        68 scale: f32,
        72 columns: i32,
        76 unused: i32,
    }

    /// `token_inputs`.
    TokenInputsParams: 64 {
        0 table: CUdeviceptr,
        8 token: CUdeviceptr,
        16 projected: CUdeviceptr,
        24 rms: CUdeviceptr,
        32 norm: CUdeviceptr,
        40 row_scale: f32,
        44 projection_scale: f32,
        48 sum_scale: f32,
        52 epsilon: f32,
        56 tensor_type: i32,
        60 width: i32,
    }

    /// `finish_logits`.
    FinishLogitsParams: 32 {
        0 logits: CUdeviceptr,
        8 suppressed: CUdeviceptr,
        16 softcap: f32,
        20 suppressed_logit: f32,
        24 vocabulary: i32,
        28 suppressed_count: i32,
    }

    /// How a text's tokens are chosen, in device memory.
    ChoiceSettings: 36 {
        0 temperature: f32,
        4 top_k: i32,
        8 top_p: f32,
        12 min_p: f32,
        16 repeat_penalty: f32,
        20 presence_penalty: f32,
        24 frequency_penalty: f32,
        28 repeat_last_n: i32,
        32 adjusts: i32,
    }

    /// `choose_best` and `choose_token`.
    ChooseParams: 72 {
        0 logits: CUdeviceptr,
        8 settings: CUdeviceptr,
        16 counts: CUdeviceptr,
        24 lists: CUdeviceptr,
        32 inputs: CUdeviceptr,
        40 uniforms: CUdeviceptr,
        48 text: CUdeviceptr,
        56 allowed: CUdeviceptr,
        64 vocabulary: i32,
        68 unused: i32,
    }

    /// A block's share of a matrix, in the step kernel.
    StepMatrix: 48 {
        0 weights: CUdeviceptr,
        8 bias: CUdeviceptr,
        16 tensor_type: i32,
        20 pairs: i32,
        24 rows: i32,
        28 first_row: i32,
        32 bytes: i32,
        36 entry_tiles: i32,
        40 entry_bytes: i32,
        44 lacking: i32,
    }

    /// A stage of the step kernel but attention, as one block does it.
    StepProduct: 240 {
        0 kind: i32,
        4 columns: i32,
        8 matrices: i32,
        12 factor: f32,
        16 norm: CUdeviceptr,
        24 rows: i32,
        28 floats: i32,
        32 matrix: [StepMatrix; 3],
        176 slices: i32,
        180 slices_inverse: u32,
        184 gelu: i32,
        188 scale: f32,
        192 branch_norm: CUdeviceptr,
        200 branch_epsilon: f32,
        204 all_rows: i32,
        208 inputs: CUdeviceptr,
        216 squares: i32,
        220 unquantized: i32,
        224 row_sums: i32,
        228 plain: i32,
        232 unused: [i32; 2],
    }

    /// Attention as a stage of the step kernel.
    StepAttention: 240 {
        0 kind: i32,
        4 values_are_keys: i32,
        8 layer: AttentionLayer,
        96 newest: CUdeviceptr,
        104 newest_age: i32,
        108 heads: i32,
        112 tiles: KvTiles,
        136 padding: [u64; 13],
    }

    /// A vector between two stages of the step kernel.
    StepVector: 16 {
        0 groups: CUdeviceptr,
        8 values: CUdeviceptr,
    }

    /// What layers of the step kernel have in common that share their jobs of attention.
    StepHeads: 20 {
        0 head_dim: i32,
        4 head_count_kv: i32,
        8 group: i32,
        12 splits: i32,
        16 window: i32,
    }

    /// `step_*`.
    StepParams: 184 {
        0 stages: CUdeviceptr,
        8 epochs: CUdeviceptr,
        16 inputs: CUdeviceptr,
        24 normed: StepVector,
        40 activation: StepVector,
        56 qkv: CUdeviceptr,
        64 partial: CUdeviceptr,
        72 partial_sums: CUdeviceptr,
        80 logits: CUdeviceptr,
        88 branch_squares: CUdeviceptr,
        96 spill: CUdeviceptr,
        104 failure: CUdeviceptr,
        112 stage_count: i32,
        116 slots: i32,
        120 slots_inverse: u32,
        124 in_flight: i32,
        128 hidden: i32,
        132 attention: i32,
        136 vector: i32,
        140 unused: i32,
        144 heads: [StepHeads; HEAD_KINDS],
    }

    /// `gate_tokens`.
    GateParams: 56 {
        0 gate: CUdeviceptr,
        8 up: CUdeviceptr,
        16 rms: CUdeviceptr,
        24 out: CUdeviceptr,
        32 factor: f32,
        36 columns: i32,
        40 up_stride: i32,
        44 padded_tokens: i32,
        48 gelu: i32,
        52 unused: i32,
    }

    /// `gate_token`.
    GateTokenParams: 48 {
        0 gate: CUdeviceptr,
        8 up: CUdeviceptr,
        16 out: Activation,
        40 columns: i32,
        44 gelu: i32,
    }

    /// `float_to_half`.
    ConvertParams: 24 {
        0 weights: CUdeviceptr,
        8 out: CUdeviceptr,
        16 tensor_type: i32,
        20 columns: i32,
    }

    /// `repack`.
    RepackParams: 40 {
        0 input: CUdeviceptr,
        8 out: CUdeviceptr,
        16 tensor_type: i32,
        20 matrix_rows: i32,
        24 columns: i32,
        28 row_begin: i32,
        32 row_count: i32,
        36 unused: i32,
    }

    /// `read_all`.
    ReadParams: 24 {
        0 from: CUdeviceptr,
        8 count: u64,
        16 sum: CUdeviceptr,
    }
}

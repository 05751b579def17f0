//! Each kernel alone against float64 arithmetic on the values that the file's own blocks stand for.
//!
//! Inputs are random, by a seed that is printed and that SHARPI_TEST_SEED sets. Outputs begin as 0xff bytes (NaN), and what
//! lies behind every buffer must stay so.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod branch;
mod choose;
mod convert;
mod embed;
mod evict;
mod gate;
mod gemm;
mod gemv;
mod harness;
mod heads;
mod matrices;
mod norm;
mod quantized;
mod rope;
mod tiles;

use common::gpu::{self, Test};

fn main() {
    eprintln!("SHARPI_TEST_SEED={}", harness::seed());
    let tests: [Test; 22] = [
        (
            "embed_gives_the_files_values",
            embed::embed_gives_the_files_values,
        ),
        (
            "gemv_store_multiplies_and_adds_bias",
            gemv::gemv_store_multiplies_and_adds_bias,
        ),
        (
            "gemv_store_multiplies_what_it_activates",
            gemv::gemv_store_multiplies_what_it_activates,
        ),
        (
            "gemv_add_adds_to_the_residual_and_prepares_the_norm",
            gemv::gemv_add_adds_to_the_residual_and_prepares_the_norm,
        ),
        (
            "gemv_gate_gates_and_quantizes",
            gemv::gemv_gate_gates_and_quantizes,
        ),
        (
            "decode_attention_is_softmax_over_the_cache",
            attention::decode_attention_is_softmax_over_the_cache,
        ),
        ("norm_tokens_normalizes", norm::norm_tokens_normalizes),
        (
            "rope_tokens_rotates_and_fills_the_cache",
            rope::rope_tokens_rotates_and_fills_the_cache,
        ),
        (
            "flash_attention_is_causal_softmax_over_the_cache",
            attention::flash_attention_is_causal_softmax_over_the_cache,
        ),
        ("gemm_stores_add_and_gate", gemm::gemm_stores_add_and_gate),
        (
            "more_rows_than_blocks_take_at_once_are_multiplied",
            gemm::more_rows_than_blocks_take_at_once_are_multiplied,
        ),
        (
            "float_to_half_rounds_to_nearest",
            convert::float_to_half_rounds_to_nearest,
        ),
        (
            "the_device_chooses_as_the_host_does",
            choose::the_device_chooses_as_the_host_does,
        ),
        (
            "logits_that_are_no_numbers_are_reported",
            choose::logits_that_are_no_numbers_are_reported,
        ),
        (
            "gate_tokens_gates_and_stays_finite",
            gate::gate_tokens_gates_and_stays_finite,
        ),
        (
            "branches_are_normalized_and_added",
            branch::branches_are_normalized_and_added,
        ),
        (
            "tokens_give_every_layer_its_input",
            branch::tokens_give_every_layer_its_input,
        ),
        (
            "logits_are_capped_and_suppressed",
            branch::logits_are_capped_and_suppressed,
        ),
        (
            "eviction_keeps_what_observers_look_at",
            evict::eviction_keeps_what_observers_look_at,
        ),
        (
            "eviction_keeps_the_first_of_equal_scores",
            evict::eviction_keeps_the_first_of_equal_scores,
        ),
        (
            "kept_tokens_are_gathered_in_their_place",
            evict::kept_tokens_are_gathered_in_their_place,
        ),
        (
            "kept_tokens_are_gathered_into_a_ring",
            evict::kept_tokens_are_gathered_into_a_ring,
        ),
    ];
    gpu::run(&tests, &[])
}

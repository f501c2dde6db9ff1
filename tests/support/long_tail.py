"""Parameters of tests that wait for ``-m slow``: those of the same test that always run find nearly all they would."""

from __future__ import annotations

import pytest

LONG_TAIL = {
    "tests/e2e/test_families.py::test_a_checkpoint_becomes_a_verified_bundle": ("llama",),
    "tests/stages/test_certificate.py::test_what_cannot_run_here_is_certified_for_a_machine_that_can": ("live",),
    "tests/stages/test_compile_llvm.py::test_code_for_processors_without_avx512_is_as_right": (
        "x86-64-v3-float-vfmadd231ps-0.001",
    ),
    "tests/stages/test_compile_llvm.py::test_prefill_in_chunks_then_decode_equals_the_reference": (
        "e4m3_f16",
        "q0f16",
        "q3f16_1",
        "q4bf16_1",
    ),
    "tests/stages/test_config_fuzz.py::test_any_value_of_config_json": ("mistral", "qwen2", "qwen3"),
    "tests/stages/test_config_parity.py::test_every_pair_of_rope_keys_is_read_as_transformers_reads_it": (
        "mistral",
        "qwen2",
        "qwen3",
    ),
    "tests/stages/test_families.py::test_parent_and_child_of_a_fork_are_as_if_each_were_alone": (
        "-1-mistral",
        "16-mistral",
        "21-mistral",
        "3-mistral",
        "32-mistral",
        "41-mistral",
        "48-mistral",
        "50-mistral",
    ),
    "tests/stages/test_families.py::test_prompts_of_any_length_then_decoding": (
        "qwen2-q0f32",
        "qwen3-q0f32",
        "redpajama-q0f32",
    ),
    "tests/stages/test_families.py::test_the_memory_that_compile_promises_is_what_the_runtime_takes": ("gpt_neox",),
    "tests/stages/test_family_configs.py::test_a_real_model_is_registered_and_exported_without_its_weights": (
        "llama-2-7b",
        "mistral-7b-v0.1",
        "qwen-1.8b",
        "qwen2-0.5b",
        "qwen3-0.6b",
        "redpajama-incite-3b",
        "smollm2-135m",
    ),
    "tests/stages/test_family_configs.py::test_no_stage_of_one_family_depends_on_the_code_of_another": (
        "gpt_neox",
        "llama",
        "mistral",
        "qwen",
        "qwen2",
        "qwen3",
        "rwkv",
    ),
    "tests/stages/test_gguf.py::test_a_byte_level_tokenizer_is_proven_as_of_a_folder": (
        "deepseek-coder",
        "gpt-2",
        "qwen2",
    ),
    "tests/stages/test_lowering_cpu.py::test_a_linear_with_bias_and_residual_becomes_one_kernel": (
        "q3k-70-1120-x86-64",
        "q4a128-661-640-x86-64",
        "q4a32-45-96-x86-64",
        "q4k-70-608-x86-64",
        "q6k-45-96-x86-64",
        "q8f16_1-640-64-x86-64",
    ),
    "tests/stages/test_quantize.py::test_compiled_kernels_store_what_numpy_stores": ("q3f16_1",),
    "tests/stages/test_quantize_faults.py::test_a_value_that_is_not_finite_is_named_with_its_index": (
        "kernels--inf-q0f32",
        "kernels--inf-q3f16_1",
        "kernels--inf-q4f16_1",
        "kernels--inf-q8f32_1",
        "kernels-inf-q0f32",
        "kernels-inf-q3f16_1",
        "kernels-inf-q8f32_1",
        "kernels-nan-q0f32",
        "kernels-nan-q3f16_1",
        "kernels-nan-q4f16_1",
        "kernels-nan-q8f32_1",
    ),
    "tests/stages/test_runtime_tokenizer.py::test_the_runtime_gives_the_references_ids_and_text": (
        "digits",
        "llama3 tables",
        "metaspace first",
        "qwen2 tables",
    ),
    "tests/stages/test_rwkv_parity.py::test_every_step_after_prefills_of_any_length_equals_the_reference": ("q0f32-0",),
    "tests/stages/test_tensor_cores.py::test_a_block_fits_every_architecture": ("q4bf16_1",),
    "tests/stages/test_tensor_cores.py::test_prefill_multiplies_on_tensor_cores_and_decode_does_not": (
        "q0bf16",
        "q0f16",
        "q4bf16_1",
    ),
    "tests/stages/test_tensor_cores.py::test_what_tiles_do_is_what_tvm_says": ("float16",),
    "tests/stages/test_tokenizer_families.py::test_every_family_builds_and_is_proven": (
        "llama3 model",
        "metaspace",
        "neox",
        "qwen2 vocab",
        "sentencepiece",
        "tekken",
    ),
    "tests/stages/test_tokenizer_families.py::test_the_published_vocabularies_equal_their_references_on_a_sample": (
        "neox",
        "rwkv world",
    ),
    "tests/stages/test_tokenizer_faults.py::test_a_stop_id_that_is_no_token_is_refused": (
        "digits",
        "llama3 model",
        "llama3 tables",
        "metaspace",
        "metaspace first",
        "neox",
        "qwen2 tables",
        "sentencepiece modern",
        "tekken",
    ),
    "tests/stages/test_tokenizer_unigram.py::test_every_id_is_sentencepieces_own": ("unigram", "unigram nfkc"),
    "tests/stages/test_traced.py::test_a_bias_of_heads_is_read_with_the_keys_of_each": ("multi_query",),
    "tests/stages/test_verify.py::test_any_context_window_is_verified_as_far_as_it_goes": ("1-live", "88-live"),
    "tests/stages/test_verify.py::test_nothing_in_the_working_directory_is_executed": (":", ":/nowhere"),
}
NAMES = {f"{test}[{parameter}]" for test, parameters in LONG_TAIL.items() for parameter in parameters}
GONE = pytest.StashKey[set[str]]()  # those of the names that are no test, in a run of all tests

"""Compiled models follow attach, detach, active and swap, for every method, without graph breaks."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

import deltakit as dk
from support import compiled_models, compiled_products
from support.compiled_models import CASES, any_number_of_tokens, failure, follows, shared_hooks, start, swaps, traces


@pytest.fixture(scope="module")
def compiler():
    """One process for all cases, for starting one takes longer than most cases. `compiled_models.py` says why another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=start) as pool:
        yield pool


# Compiling takes seconds, so the usual run has one or two methods of each kind. In transformers' models LoRA is enough for all
# that hook layers; of the prompts, each runs in one of them, and parallel adapters are on pairs of layers in BERT.
FAST = {"adapter-toy", "bitfit-toy", "ia3-toy", "loha-toy", "lora-toy", "oft-toy", "vera-toy"}
FAST |= {"lora-bert", "lora-llama", "parallel_adapter-bert", "prefix-llama", "soft_prompt-bert"}
FAST |= {"trainable_tokens-bert", "trainable_tokens-llama"}
SLOW = {case for case in CASES if case.endswith(("-toy", "-bert", "-llama")) or "gated" in case} - FAST


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_compiled_model_follows_its_delta(compiler, case):
    failed = compiler.submit(failure, follows, case).result()
    assert failed is None, failed


@pytest.mark.parametrize("name", [name for name in dk.METHODS if f"{name}-toy" in SLOW])
def test_every_method_is_traced(compiler, name):
    """The others are in the fast cases above."""
    failed = compiler.submit(failure, traces, name).result()
    assert failed is None, failed


def test_deltas_that_share_hooks(compiler):
    failed = compiler.submit(failure, shared_hooks).result()
    assert failed is None, failed


def test_targets_in_compiled_blocks_are_not_reported(compiler):
    failed = compiler.submit(failure, compiled_models.compiled_blocks).result()
    assert failed is None, failed


def test_checkpoints_in_compiled_models(compiler):
    failed = compiler.submit(failure, compiled_models.compiled_checkpoints).result()
    assert failed is None, failed


def test_merging_is_followed(compiler):
    failed = compiler.submit(failure, compiled_models.merges).result()
    assert failed is None, failed


def test_a_swap_compiles_nothing_anew(compiler):
    failed = compiler.submit(failure, swaps).result()
    assert failed is None, failed


def test_one_graph_serves_any_number_of_tokens(compiler):
    failed = compiler.submit(failure, any_number_of_tokens).result()
    assert failed is None, failed


@pytest.mark.parametrize("check", ["rows_of_threads", "rows_of_any_size", "rows_of_tasks", "rows_in_training"])
def test_mixed_batches(compiler, check):
    failed = compiler.submit(failure, getattr(compiled_models, check)).result()
    assert failed is None, failed


@pytest.mark.parametrize(
    "check", ["equal_gradients", "other_forms", "unknown_numbers_of_tokens", "hooks_of_all_modules", "layouts"]
)
def test_low_rank_products(compiler, check):
    failed = compiler.submit(failure, getattr(compiled_products, check)).result()
    assert failed is None, failed

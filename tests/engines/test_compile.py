"""Compiled models follow attach, detach, active and swap, for every method, without graph breaks."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from support import compiled_models
from support.compiled_models import CASES, any_number_of_tokens, failure, follows, start, swaps


@pytest.fixture(scope="module")
def compiler():
    """One process for all cases, for starting one takes longer than most cases. `compiled_models.py` says why another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=start) as pool:
        yield pool


# Adapters, BitFit and IA3 hook layers as LoRA does, which runs in both of these backbones: the toy is enough. Of the prompts,
# each runs in one of them. Parallel adapters are on pairs of layers in BERT.
SLOW = {
    *(
        "adapter-bert",
        "adapter-llama",
        "bitfit-bert",
        "bitfit-llama",
        "ia3-bert",
        "ia3-llama",
        "parallel_adapter-llama",
    ),
    *("low_rank_adapter-bert", "low_rank_adapter-llama", "compacter-bert", "compacter-llama"),
    *("prefix-bert", "soft_prompt-llama"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_compiled_model_follows_its_delta(compiler, case):
    failed = compiler.submit(failure, follows, case).result()
    assert failed is None, failed


def test_a_swap_compiles_nothing_anew(compiler):
    failed = compiler.submit(failure, swaps).result()
    assert failed is None, failed


def test_one_graph_serves_any_number_of_tokens(compiler):
    failed = compiler.submit(failure, any_number_of_tokens).result()
    assert failed is None, failed


@pytest.mark.parametrize("check", ["rows_of_threads", "rows_of_tasks", "rows_in_training"])
def test_mixed_batches(compiler, check):
    failed = compiler.submit(failure, getattr(compiled_models, check)).result()
    assert failed is None, failed

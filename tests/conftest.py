"""Fixtures of the whole suite: one seed, one thread, and backbones of unequal prime sizes."""

import os

# Before torch is imported: the suite's models are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks of types and shapes that only the test run has: bad input must meet our own errors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

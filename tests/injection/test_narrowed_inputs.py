"""A module's input is narrowed to some positions: in calls of this thread, inside the block, and nowhere else."""

import threading

import pytest
import torch
from torch import nn

from deltakit.injection import narrowed_input


def test_the_chosen_positions():
    head, x, places = nn.Linear(5, 7), torch.randn(3, 11, 5), torch.tensor([[0, 4], [10, 2], [3, 3]])
    full = head(x)
    with narrowed_input(head, places) as seen:
        found = head(x)
        assert torch.equal(head(input=x), found)
    torch.testing.assert_close(found, full[torch.arange(3)[:, None], places])
    assert torch.equal(seen.inputs, x[torch.arange(3)[:, None], places])
    assert seen.length == 11
    assert torch.equal(head(x), full)
    assert not head._forward_pre_hooks
    assert not head._forward_pre_hooks_with_kwargs


def test_other_threads_and_other_batches_are_left_alone():
    head, x = nn.Linear(5, 7), torch.randn(3, 11, 5)
    results = []
    with narrowed_input(head, torch.zeros(3, 1, dtype=torch.long)) as seen:
        thread = threading.Thread(target=lambda: results.append(head(x).shape))
        thread.start()
        thread.join()
        assert seen.inputs is None
        assert head(x[:2]).shape == (2, 11, 7)
        assert head(x[0]).shape == (11, 7)
        assert seen.inputs is None
    assert results == [(3, 11, 7)]


def test_blocks_inside_each_other():
    head, x = nn.Linear(5, 7), torch.randn(3, 11, 5)
    with narrowed_input(head, torch.zeros(3, 2, dtype=torch.long)):
        with narrowed_input(head, torch.ones(3, 1, dtype=torch.long)):
            assert head(x).shape == (3, 1, 7)
        assert head(x).shape == (3, 2, 7)


def test_an_error_leaves_nothing():
    head = nn.Linear(5, 7)
    with pytest.raises(RuntimeError), narrowed_input(head, torch.zeros(3, 1, dtype=torch.long)):
        head(torch.randn(3, 11, 4))
    assert not head._forward_pre_hooks
    assert head(torch.randn(3, 11, 5)).shape == (3, 11, 7)

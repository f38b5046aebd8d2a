"""Random sequences of what a user may do, checked after each step. `benchmarks/state_sequences.py` runs thousands of steps."""

import pytest

from support.state_fuzz import BACKBONES, Fuzz

# Warnings are part of it: untrained deltas are saved, merged ones run in training mode, and modules are replaced.
pytestmark = pytest.mark.filterwarnings("ignore::deltakit.DeltaWarning")


@pytest.mark.parametrize("name", BACKBONES)
def test_any_sequence_of_steps_computes_what_plain_torch_does(name):
    sequence = Fuzz(name, seed=1)
    for _ in range(25):
        sequence.step()
    sequence.end()
    assert sequence.counts["comparisons"] == 25

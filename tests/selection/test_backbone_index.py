"""The index of a backbone, which methods are handed: what is expensive is computed once for each attach."""

import pytest

import deltakit as dk
from deltakit.selection import index
from support.models import beside, method_of
from support.tiny_transformers import build


@pytest.mark.parametrize("name", sorted(dk.METHODS))
def test_roles_are_inferred_once_for_an_attach(name, monkeypatch):
    """SoftPrompt inferred them eleven times, which was most of the time that its attach took."""
    model, calls, infer = beside(build("llama"), method_of(name)), [], index.infer_roles
    monkeypatch.setattr(index, "infer_roles", lambda *args: calls.append(args) or infer(*args))
    dk.attach(model, method_of(name))
    # A prefix reads sizes from the attention itself, and what weighs other deltas is where they are: they ask for no roles.
    assert len(calls) == (name not in ("prefix", "p_tuning_v2", "adapter_fusion", "average"))

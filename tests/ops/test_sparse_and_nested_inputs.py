"""Layers whose input is sparse or nested, as of bags of words or of texts of several lengths without padding."""

import jaxtyping
import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import method_of, randomize

METHODS = {
    name: method_of(name, at="0")
    for name, method in dk.METHODS.items()
    if (issubclass(method.kind, dk.LowRank | dk.WeightMap) and name != "ln_tuning") or name in ("lora", "miss", "said")
}
METHODS["dora"] = dk.LoRA(r=4, dora=True, at="0")
METHODS["miss of blocks"] = dk.MiSS(r=5, bat=True, at="0")
"""Those that change linear layers by products with an update of the weight."""


def dense_rows():
    rows = [torch.randn(count, 20, dtype=torch.float64) for count in (2, 3)]
    return [one.where(one > 0.5, 0) for one in rows]


INPUTS = {
    "coo": lambda rows: torch.cat(rows).to_sparse(),
    "csr": lambda rows: torch.cat(rows).to_sparse_csr(),
    "one sparse token": lambda rows: rows[0][:1].to_sparse(),
    "nested": torch.nested.nested_tensor,
    "one nested token": lambda rows: torch.nested.nested_tensor([rows[0][:1]]),
    "jagged": lambda rows: torch.nested.nested_tensor(rows, layout=torch.jagged),
}
"""Inputs with the same values."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_gradients(name, kind, monkeypatch):
    if kind.endswith(("nested", "nested token")):
        if name in ("dora", "glora"):
            pytest.skip("torch adds no bias to nested tensors of this layout, and subtracts none")
        # They have no `shape` that could be checked.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20).double().eval())
    delta = randomize(dk.attach(model, METHODS[name]))
    rows = dense_rows()
    x, plain = INPUTS[kind](rows), rows[0][:1] if kind.startswith("one") else torch.cat(rows)
    wanted = model(plain)
    gradients = torch.autograd.grad(wanted.sin().sum(), list(delta.parameters()))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = model(x)
        found = torch.cat(found.unbind()) if found.is_nested else found
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), list(delta.parameters())), gradients)

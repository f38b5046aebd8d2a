"""Gates that multiply what a delta module adds: one number in (0, 1) for each example, computed from its hidden states.

Mao et al. 2022 (UniPELT), https://arxiv.org/abs/2110.07577: the mean over the positions of sigmoid(x W_g + b_g). All positions
of a call count, also padding and later tokens, as in AdapterHub: its files give its outputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Target, wants_start_values
from deltakit.ops.sizes import like
from deltakit.ops.unfilled import unfilled_linear


def new_gate(d_in: int, target: Target) -> nn.Linear:
    """Returns the layer [1, d_in] of a gate. It starts near zero, so that the gate is about 0.5."""
    gate = unfilled_linear(d_in, 1, **like(target))
    if wants_start_values(gate.weight):
        nn.init.normal_(gate.weight, std=0.02)
        nn.init.zeros_(gate.bias)
    return gate


def gate_of(gate: nn.Module, x: Float[Tensor, "batch *positions d_in"]) -> Float[Tensor, "batch *ones one"]:
    """Returns the gate of each example, with the size 1 in all dimensions but the first."""
    values = torch.sigmoid(gate(x))
    positions = tuple(range(1, values.ndim - 1))
    # Without positions, `mean(())` would be over all dimensions.
    return values.mean(positions, keepdim=True) if positions else values

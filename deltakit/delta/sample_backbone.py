"""A small transformer on which methods are tried."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# They fit the defaults of methods that divide features into blocks.
_WIDTH, _INNER, _COUNT, _VOCABULARY = 256, 512, 4, 64


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = _COUNT
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        # Some backbones have no bias here: what needs one is merged in part.
        self.k_proj = nn.Linear(_WIDTH, _WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (_COUNT, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(_WIDTH, _INNER), nn.Linear(_INNER, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.self_attn, self.mlp = _Attention(), _MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class SampleBackbone(nn.Module):
    """A decoder of two blocks over token ids [batch, tokens], with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, _WIDTH)
        self.layers = nn.ModuleList(_Block() for _ in range(2))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

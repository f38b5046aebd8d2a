"""Several methods in one delta: the MAM adapter and UniPELT.

python examples/mixed_methods.py
"""

import torch
import transformers as tf

import deltakit as dk

config = tf.BartConfig(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=100,
    decoder_start_token_id=2,
    dropout=0.0,
)
MIXES = {
    # He et al. 2022, https://arxiv.org/abs/2110.04366, section 4.6: a prefix at attention, and scaled parallel adapters
    # beside the feed-forward parts.
    "MAM adapter": (dk.Prefix(tokens=4), dk.ParallelAdapter(size=16, scaling=4)),
    # Mao et al. 2022, https://arxiv.org/abs/2110.07577: each part behind a gate of its own, a number for each example. With
    # alpha = r the gate is LoRA's only factor.
    "UniPELT": (
        dk.LoRA(r=4, alpha=4, gate=True),
        dk.Prefix(tokens=4, gate=True),
        dk.Adapter(size=8, at="@ff.down", gate=True),
    ),
}
texts = torch.randint(3, 100, (8, 9), generator=torch.Generator().manual_seed(0))

for name, methods in MIXES.items():
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(config)
    delta = dk.attach(model, *methods)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    for _ in range(20):
        loss = model(texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name}: {delta.num_parameters:,} parameters, loss {loss.item():.3f}")
    print(delta, end="\n\n")

"""LoRA on the queries of the encoder alone, in a model with an encoder and a decoder.

python examples/encoder_only.py
"""

import torch
import transformers as tf

import deltakit as dk

# In your code: model = tf.AutoModelForSeq2SeqLM.from_pretrained("google-t5/t5-small")
torch.manual_seed(0)
config = tf.T5Config(
    vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
)
model = tf.T5ForConditionalGeneration(config)

# `encoder/` is the scope, `@attn.q` a role: the queries have this name on every architecture.
delta = dk.attach(model, dk.LoRA(r=8, at="encoder/@attn.q"))
print(delta)

texts, answers = torch.randint(3, 100, (8, 9)), torch.randint(3, 100, (8, 5))
optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
for _ in range(30):
    loss = model(input_ids=texts, labels=answers).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss after 30 steps: {loss.item():.3f}")

trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print("trained outside the encoder:", [name for name in trained if not name.startswith("encoder.")])

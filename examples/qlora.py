"""QLoRA: LoRA on a model whose weights bitsandbytes stores in 4 bits. It runs on a CPU too.

python examples/qlora.py    (needs: pip install bitsandbytes)
"""

import importlib.util
import sys

import torch
import transformers as tf

import deltakit as dk

if importlib.util.find_spec("bitsandbytes") is None:
    sys.exit("this example needs bitsandbytes: pip install bitsandbytes")

# In your code: the name of a model on the Hub.
torch.manual_seed(0)
config = tf.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
)
tf.LlamaForCausalLM(config).save_pretrained("tiny-llama")

model = tf.AutoModelForCausalLM.from_pretrained(
    "tiny-llama",
    quantization_config=tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    device_map="auto" if torch.cuda.is_available() else "cpu",
)

delta = dk.attach(model, dk.LoRA(r=8, at="@block"))
print(dk.show(model))
texts = torch.randint(0, 1000, (4, 12), device=model.device)
optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
for step in range(10):
    loss = model(texts, labels=texts).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 3 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# The same delta loads onto the model in 16 or 32 bits.
delta.save("qlora-delta")
whole = tf.AutoModelForCausalLM.from_pretrained("tiny-llama")
print(dk.load("qlora-delta", whole))

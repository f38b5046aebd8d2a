"""Take a LoRA from PEFT, train it further, and give it back.

python examples/to_and_from_peft.py    (needs: pip install peft)
"""

import peft
import torch
import transformers as tf

import deltakit as dk

config = tf.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)
text = torch.randint(0, 100, (1, 7), generator=torch.Generator().manual_seed(0))


def fresh_model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval()


# An adapter that PEFT made and saved. Random values stand for training.
theirs = peft.get_peft_model(fresh_model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
for name, parameter in theirs.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.3)
theirs.save_pretrained("from-peft")

# deltakit sees what it is, loads it, and gives PEFT's outputs.
model = fresh_model()
delta = dk.load("from-peft", model)
print(delta)
print(f"read: largest difference {(model(text).logits - theirs(text).logits).abs().max():.1e}")

optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
for _ in range(10):
    model(text, labels=text).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# PeftModel, vLLM and others read what this writes.
delta.save("to-peft", format="peft")
back = peft.PeftModel.from_pretrained(fresh_model(), "to-peft")
print(f"written: largest difference {(model(text).logits - back(text).logits).abs().max():.1e}")

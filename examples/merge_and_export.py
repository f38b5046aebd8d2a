"""Merge a delta into the weights, and export a plain model that needs no deltakit.

python examples/merge_and_export.py
"""

import torch
import transformers as tf

import deltakit as dk

torch.manual_seed(0)
config = tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = tf.BertModel(config).eval()
text = torch.randint(0, 100, (1, 7))
bare = model(text).last_hidden_state

delta = dk.attach(model, dk.LoRA(r=4, at="@block"))
for parameter in delta.parameters():
    torch.nn.init.normal_(parameter, std=0.1)  # stands for training
tuned = model(text).last_hidden_state

# In place, and back again bit for bit: no extra time in forwards.
delta.merge()
print(f"merged: largest difference {(model(text).last_hidden_state - tuned).abs().max():.1e}")
delta.unmerge()
print("unmerged, exact:", torch.equal(model(text).last_hidden_state, tuned))

# The merged weights as a state dict: the model stays as it is.
torch.save(dk.merged_state_dict(model), "merged.pt")

# For good: a plain model without hooks, for save_pretrained, ONNX, GGUF or a quantizer.
plain = delta.merge_and_unload()
plain.save_pretrained("merged-model")
again = tf.BertModel.from_pretrained("merged-model").eval()
print(f"saved and loaded: largest difference {(again(text).last_hidden_state - tuned).abs().max():.1e}")
exported = torch.export.export(plain, (text,), strict=False).module()
print(f"torch.export: largest difference {(exported(text).last_hidden_state - tuned).abs().max():.1e}")
print("the delta did change the outputs:", not torch.allclose(bare, tuned))

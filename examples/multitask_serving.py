"""Correct the spelling of a question, tell its topic and answer it: three deltas on one T5, in OpenDelta's own words.

python examples/multitask_serving.py [--model T5 --spelling DELTA --topic DELTA --fact DELTA]

Each is a folder or a Hub id, also of deltas that OpenDelta saved. Without them, a tiny T5 learns two questions by heart, with
a delta of another type for each task. `multitask_serving` is the code of OpenDelta's tutorial.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import deltakit.opendelta

deltakit.opendelta.install()
from opendelta import AdapterModel, AutoDeltaModel, CompacterModel, LowRankAdapterModel  # noqa: E402

WRONG = ["When was Beiiing olymp#ic heldd ?", "What the commmon career of Newton ad eintesin?"]
RIGHT = ["When was Beijing Olympic held?", "What was the common career of Newton and Einstein?"]
TASKS = {
    "spelling": (WRONG, RIGHT, lambda model: LowRankAdapterModel(model, reduction_factor=2, low_rank_rank=8)),
    "topic": (
        RIGHT,
        ["The question's topic is sports.", "The question's topic is science."],
        lambda model: CompacterModel(model, reduction_factor=2),
    ),
    "fact": (RIGHT, ["2008", "Physicists"], lambda model: AdapterModel(model, bottleneck_dim=24)),
}


def tiny_model():
    """A random T5 whose tokens are the words of the tasks."""
    words = sorted({word for asked, answers, _ in TASKS.values() for text in asked + answers for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    splitter = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    config = transformers.T5Config(
        vocab_size=len(vocabulary), decoder_start_token_id=0, tie_word_embeddings=False, **sizes
    )
    return transformers.T5ForConditionalGeneration(config).eval(), tokenizer


def learn(model, tokenizer, task, folder):
    """Train a delta for a task, save it into a folder, and take it off the model."""
    asked, answers, attach = TASKS[task]
    texts = tokenizer(asked, padding=True, return_tensors="pt")
    ends = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for answer in answers]
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in ends], batch_first=True, padding_value=-100)
    delta = attach(model)
    delta.freeze_module(exclude=["deltas"], set_state_dict=True)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    delta.save_finetuned(folder)
    delta.detach()
    print(f"{task}: loss {loss.item():.4f}, {sum(p.numel() for p in delta.parameters())} parameters")
    return folder


def multitask_serving(model, tokenizer, deltas, input_text):
    delta_model_spelling, delta_model_topic, delta_model_fact = deltas
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids
    delta_model_spelling.attach()
    answers_ids = model.generate(input_ids=input_ids, max_length=20, num_beams=4)
    input_text = tokenizer.decode(answers_ids[0], skip_special_tokens=True)
    print(f"Correct Spelling: {input_text}")
    delta_model_spelling.detach()

    delta_model_topic.attach()
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids
    answers_ids = model.generate(input_ids=input_ids, max_length=20, num_beams=4)
    topic = tokenizer.decode(answers_ids[0], skip_special_tokens=True)
    delta_model_topic.detach()
    print(f"Question Topic: {topic}")

    delta_model_fact.attach()
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids
    answers_ids = model.generate(input_ids=input_ids, max_length=20, num_beams=4)
    input_text = tokenizer.decode(answers_ids[0], skip_special_tokens=True)
    delta_model_fact.detach()
    print(f"Question Answer: {input_text}")


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", *TASKS):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    if options.model:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(options.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        sources = [getattr(options, task) for task in TASKS]
    else:
        model, tokenizer = tiny_model()
        folder = Path(tempfile.mkdtemp())
        sources = [learn(model, tokenizer, task, folder / task) for task in TASKS]
    deltas = []
    for source in sources:
        deltas.append(AutoDeltaModel.from_finetuned(source, backbone_model=model))
        deltas[-1].detach()
    for question in WRONG:
        multitask_serving(model, tokenizer, deltas, question)


if __name__ == "__main__":
    main()

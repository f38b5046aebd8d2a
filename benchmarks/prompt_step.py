"""Times a step and a prediction of a prompt model beside the plain language model's, and its collator beside the tokenizer.

    python benchmarks/prompt_step.py [--models "BERT base" ...] [--seconds 60] [--out FILE.json] [--table FILE.md]

All contestants of a row are one backbone with a LoRA delta, get the same ids, and take turns in one process of one thread.
The figures are CPU time, which other processes change least. "plain" computes the logits of all positions and its own loss,
"all logits" reads the slots out of them, as OpenPrompt does, and "by hand" computes the head of the slots without hooks.
"""

import argparse
import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import rounds
import torch
import torch.nn.functional as F
import transformers as tf
from intent_tasks import snips
from intent_words import TEMPLATE, WORDS
from torch import Tensor

import deltakit as dk
from deltakit.demo.run import bundled_model
from deltakit.prompting import PromptModel, SlotOutput, Template, WordVerbalizer

DEMO = "the demo's encoder"
T5_SMALL = {"vocab_size": 32128, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "dropout_rate": 0}
MODELS = (DEMO, "BERT base", "T5 small", "GPT-2 small")
EXAMPLES = 8
WARM = 2


def tokenizer_of(folder: Path) -> Any:
    """Returns the demo's tokenizer, with the sentinel that T5 has in a slot."""
    found = tf.AutoTokenizer.from_pretrained(folder)
    found.add_special_tokens({"extra_special_tokens": ["<extra_id_0>"]})
    return found


def backbone_of(name: str, folder: Path) -> Any:
    """Returns a language model without dropout, with a LoRA delta. Other weights than the demo's are random."""
    torch.manual_seed(0)
    if name == DEMO:
        config = tf.AutoConfig.from_pretrained(folder, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        model = tf.AutoModelForMaskedLM.from_pretrained(folder, config=config)
    elif name == "T5 small":
        model = tf.T5ForConditionalGeneration(tf.T5Config(**T5_SMALL, decoder_start_token_id=0, use_cache=False))
    else:
        kind = tf.AutoModelForCausalLM if name.startswith("GPT") else tf.AutoModelForMaskedLM
        model = kind.from_config(harness.CONFIGS[name]())
    dk.attach(model, dk.LoRA(r=8))
    return model


def prompt_model(backbone: Any, tokenizer: Any) -> PromptModel:
    kind = "causal" if backbone.config.model_type == "gpt2" else None
    # The slot of a causal model stands at the end.
    text = TEMPLATE if kind is None else TEMPLATE.partition('{"mask"}')[0] + '{"mask"}'
    return PromptModel(backbone, Template(text, tokenizer, backbone, kind=kind, max_length=64), words_of(tokenizer))


def words_of(tokenizer: Any) -> WordVerbalizer:
    return WordVerbalizer(tokenizer, WORDS["SNIPS"], multi="drop")


def at_slots(logits: Tensor, slots: Tensor) -> SlotOutput:
    """Returns the slots of full logits."""
    found = logits[torch.arange(len(slots))[:, None], slots]
    return SlotOutput(found, found)


def by_hand(model: PromptModel, call: Mapping[str, Tensor], slots: Tensor) -> SlotOutput:
    """Returns the slots' logits as a user would compute them without hooks."""
    backbone: Any = model.backbone
    if backbone.config.is_encoder_decoder:
        mask = call["attention_mask"]
        memory = backbone.encoder(call["input_ids"], attention_mask=mask)[0]
        text = {"encoder_hidden_states": memory, "encoder_attention_mask": mask}
        hidden = backbone.decoder(call["decoder_input_ids"], **text)[0] * backbone.model_dim**-0.5
    else:
        hidden = backbone.base_model(**call)[0]
    own = hidden[torch.arange(len(slots))[:, None], slots]
    head = backbone.cls if hasattr(backbone, "cls") else backbone.lm_head
    return SlotOutput(head(own), own)


def plain_loss(backbone: Any, call: Mapping[str, Tensor], slots: Tensor, word: int) -> Tensor:
    """Returns the language model's own loss, of a word in each slot."""
    full = call.get("decoder_input_ids", call["input_ids"])
    targets = torch.full_like(full, -100).scatter(1, slots, word)
    if backbone.config.model_type == "gpt2":
        # It shifts them by itself.
        targets = torch.full_like(full, -100).scatter(1, slots, word).roll(1, 1)
    return backbone(**call, labels=targets).loss


def steps(model: PromptModel, batch: Mapping[str, Tensor]) -> dict[str, rounds.Call]:
    """Returns a training step of each contestant, without the optimiser."""
    backbone: Any = model.backbone
    call = {name: value for name, value in batch.items() if name not in ("slots", "labels")}
    slots, labels, read = batch["slots"], batch["labels"], model.verbalizer
    word = read.token_ids[0]

    def step(loss: Any) -> rounds.Call:
        def run() -> None:
            loss().backward()
            model.zero_grad()

        return run

    return {
        "plain": step(lambda: plain_loss(backbone, call, slots, word)),
        "all logits": step(lambda: F.nll_loss(read(at_slots(backbone(**call).logits, slots)), labels)),
        "by hand": step(lambda: F.nll_loss(read(by_hand(model, call, slots)), labels)),
        "PromptModel": step(lambda: model(**batch)["loss"]),
    }


def predictions(model: PromptModel, batch: Mapping[str, Tensor]) -> dict[str, rounds.Call]:
    """Returns a prediction of each contestant, from ids to classes; that of the plain model to logits."""
    call = {name: value for name, value in batch.items() if name not in ("slots", "labels")}
    slots, read, backbone = batch["slots"], model.verbalizer, model.backbone
    given = {**call, "slots": slots}
    cases = {
        "plain": lambda: backbone(**call),
        "all logits": lambda: read(at_slots(backbone(**call).logits, slots)),
        "by hand": lambda: read(by_hand(model, call, slots)),
        "PromptModel": lambda: model(**given),
    }
    return {name: without_gradients(case) for name, case in cases.items()}


def without_gradients(case: rounds.Call) -> rounds.Call:
    def run() -> None:
        with torch.no_grad():
            case()

    return run


def collators(model: PromptModel, examples: list[dict[str, str]]) -> dict[str, rounds.Call]:
    """Returns the tokenizer's own padded batch of the rendered texts, and the template's of the examples."""
    template = model.template
    texts, tokenizer = [template.render(example) for example in examples], template.tokenizer
    return {
        "tokenizer": lambda: tokenizer(texts, padding=True, return_tensors="pt"),
        "tokenizer, one by one": lambda: [tokenizer(text) for text in texts],
        "collate": lambda: model.collate(examples),
    }


def row(what: str, name: str, cases: Mapping[str, rounds.Call], bound: rounds.Bound, **more: Any) -> dict[str, Any]:
    """Returns a row of results, and prints it."""
    base = next(iter(cases))
    known = rounds.both(*(rounds.ratio_known(who, base, 0.05) for who in cases))
    found = rounds.compared(rounds.interleaved(cases, bound, known, warm=WARM), base)
    print(f"{what:<10} {name:<20} {rounds.said(found, base)}", flush=True)
    return {"what": what, "model": name, "base": base, **found, **more}


def measure(name: str, folder: Path, bound: rounds.Bound) -> list[dict[str, Any]]:
    tokenizer = tokenizer_of(folder)
    model = prompt_model(backbone_of(name, folder), tokenizer).train()
    examples = [{"text": text, "label": intent} for text, intent in snips().pool[:EXAMPLES]]
    batch = model.collate(examples)
    rows, length = batch["input_ids"].shape
    sizes = {"batch": rows, "length": length, "vocabulary": model.backbone.config.vocab_size}
    found = [row("step", name, steps(model, batch), bound, **sizes)]
    model.eval()
    found.append(row("prediction", name, predictions(model, batch), bound, **sizes))
    if name == DEMO:
        # Milliseconds each, so more rounds.
        more = replace(bound, least=20 * bound.least, most=20 * bound.most)
        found.append(row("collate", name, collators(model, copy.deepcopy(examples)), more, **sizes))
    return found


def cell(ratio: Any) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown page."""
    columns = ("all logits", "by hand", "PromptModel")
    lines = [
        f"| what, model, [batch, length] | {' | '.join(columns)} | what slots save |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        if one["what"] != "collate":
            saved = 1 - one["cpu"]["ratios"]["PromptModel"][0] / one["cpu"]["ratios"]["all logits"][0]
            cells = " | ".join(cell(one["cpu"]["ratios"][who]) for who in columns)
            name = f"{one['what']}, {one['model']}, [{one['batch']}, {one['length']}]"
            lines.append(f"| {name} | {cells} | {saved:.0%} |")
    for one in rows:
        if one["what"] == "collate":
            each = [f"{who} {cell(ratio)}" for who, ratio in one["cpu"]["ratios"].items() if who != one["base"]]
            lines += [
                "",
                f"A batch of {one['batch']} texts beside the tokenizer alone (padded, as tensors): {', '.join(each)}.",
            ]
    text = (
        "A training step (forward and backward, with LoRA on a frozen backbone) and a prediction of a PromptModel, as ratios "
        "to the plain language model's, which computes the logits of all positions. All logits: the same, and the classes "
        "read from them. By hand: the base model, and its head on the slots alone, without hooks. Medians with quartiles of "
        "CPU time on one thread."
    )
    return harness.page("prompt_step.py", "The time of a prompt model", text, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--table", type=Path)
    harness.add_options(parser, rounds.Bound(least=9, most=41, seconds=60))
    options = parser.parse_args()
    bound = harness.begin(options)
    # Tokenizers have threads of their own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder, rows = bundled_model(), []
    for name in options.models:
        rows += measure(name, folder, bound)
        harness.write(options.out, "prompt_step", rows)
    if options.table is not None:
        options.table.write_text(page(rows))


if __name__ == "__main__":
    main()

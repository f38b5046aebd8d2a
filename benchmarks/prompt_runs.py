"""One run of `prompts.py`: a reader of the encoder, trained in one of three ways on few examples, and its accuracy."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
from adapted_encoder import adapted, fit, quiet, tokenizer
from intent_tasks import TASKS, Requests, Task
from intent_words import SOFT_TEMPLATE, TEMPLATE, WORDS
from torch import Tensor, nn

import deltakit as dk
from deltakit.demo.run import bundled_model
from deltakit.prompting import (
    KnowledgeableVerbalizer,
    PromptModel,
    PrototypicalVerbalizer,
    Template,
    Verbalizer,
    WordVerbalizer,
)

BATCH = 16
NEW_RATE = 1e-2
"""The learning rate of classifiers, prototypes and weights of words, which start at random or at zero."""
SOFT_TOKENS = 10
UNLABELLED = 200
"""Unlabelled requests with which the knowledgeable verbalizer drops words."""

HEADS = ("head, as published", "head")
READERS = (*HEADS, "words", "KPT", "prototypes")
TUNINGS = ("LoRA", "soft prompt", "full")
UNTRAINED = "none"

Batch = dict[str, Tensor]


class Job(NamedTuple):
    """One run. `shots` are the examples of each class."""

    task: str
    reader: str
    tuning: str
    shots: int
    seed: int
    rate: float


class Settings(NamedTuple):
    """What all runs have in common. Runs with other settings are left alone."""

    adaptation: int
    steps: int
    growth: float
    tested: int


def steps_of(settings: Settings, shots: int) -> int:
    """Returns the training steps of a run: more for more examples. With few of them, a few steps are many passes."""
    return round(settings.steps * (shots / 4) ** settings.growth)


class Contestant(NamedTuple):
    """A model that returns loss and logits, a function that makes its batches, and groups of trained parameters."""

    model: nn.Module
    collate: Callable[[Requests], Batch]
    groups: list[dict[str, Any]]


def few(task: Task, shots: int, seed: int) -> Requests:
    """Returns as many training requests of each class, drawn by the seed."""
    chance = random.Random(seed)
    own = {label: [pair for pair in task.pool if pair[1] == label] for label in task.classes}
    return [pair for label in task.classes for pair in chance.sample(own[label], shots)]


def tuned(backbone: Any, tuning: str, rate: float, soft: dk.Method, train: str | None = None) -> list[dict[str, Any]]:
    """Freezes or attaches what a tuning says, and returns the group of what it trains of the backbone."""
    if tuning == "full":
        return [{"params": list(backbone.requires_grad_().parameters()), "lr": rate}]
    if tuning == UNTRAINED:
        backbone.requires_grad_(False)
        return []
    delta = dk.attach(backbone, dk.LoRA() if tuning == "LoRA" else soft, train=train)
    return [{"params": list(delta.parameters()), "lr": rate}]


def with_head(job: Job, task: Task, place: Path) -> Contestant:
    """Returns the encoder with a classifier, before or after its adaptation."""
    quiet()
    model = tf.AutoModelForSequenceClassification.from_pretrained(bundled_model(), num_labels=len(task.classes))
    if job.reader == "head":
        model.base_model.load_state_dict(adapted(place).base_model.state_dict(), strict=False)
    head = list(model.classifier.parameters())
    groups = tuned(model, job.tuning, job.rate, dk.SoftPrompt(tokens=SOFT_TOKENS), train="@head")
    new = {id(parameter) for parameter in head}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in new]
    own = tokenizer()

    def collate(requests: Requests) -> Batch:
        texts = [request for request, _ in requests]
        found = own(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**found, "labels": torch.tensor([task.classes.index(label) for _, label in requests])}

    return Contestant(model, collate, [*groups, {"params": head, "lr": NEW_RATE}])


def verbalizer_for(job: Job, task: Task, backbone: nn.Module) -> Verbalizer:
    """Returns the verbalizer of a reader."""
    if job.reader == "prototypes":
        return PrototypicalVerbalizer(backbone, task.classes)
    words = {label: WORDS[job.task][label] for label in task.classes}
    if job.reader == "KPT":
        return KnowledgeableVerbalizer(tokenizer(), words)
    return WordVerbalizer(tokenizer(), {label: own[0] for label, own in words.items()})


def with_prompt(job: Job, task: Task, place: Path) -> Contestant:
    """Returns the adapted encoder with a template and a verbalizer."""
    backbone = deepcopy(adapted(place))
    text = SOFT_TEMPLATE if job.tuning == "soft prompt" else TEMPLATE
    template = Template(text, tokenizer(), backbone, max_length=80)
    soft = template.soft_prompt() if template.num_soft else dk.SoftPrompt(tokens=SOFT_TOKENS)
    groups = tuned(backbone, job.tuning, job.rate, soft)
    verbalizer = verbalizer_for(job, task, backbone)
    model = PromptModel(backbone, template, verbalizer)
    if isinstance(verbalizer, KnowledgeableVerbalizer):
        # Without their labels.
        chosen = random.Random(job.seed).sample(task.pool, UNLABELLED)
        model.refine([{"text": request} for request, _ in chosen])

    def collate(requests: Requests) -> Batch:
        return model.collate([{"text": request, "label": label} for request, label in requests])

    new = list(verbalizer.parameters())
    return Contestant(model, collate, [*groups, *([{"params": new, "lr": NEW_RATE}] if new else [])])


def endless(requests: Requests, collate: Callable[[Requests], Batch], seed: int) -> Iterator[Batch]:
    """Yields batches in random order, again and again."""
    chance, order = random.Random(seed), list(requests)
    while True:
        chance.shuffle(order)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield collate(order[start : start + BATCH])


@torch.no_grad()
def accuracy(own: Contestant, requests: Requests) -> float:
    """Returns the share of requests whose class is predicted, in [0, 1]."""
    own.model.eval()
    ordered = sorted(requests, key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, len(ordered), 100):
        batch = own.collate(ordered[start : start + 100])
        right += int((own.model(**batch)["logits"].argmax(-1) == batch["labels"]).sum())
    return right / len(ordered)


def part(requests: Requests, count: int) -> Requests:
    """Returns the same sample of a split in all runs."""
    return random.Random(0).sample(requests, min(count, len(requests)))


def run(job: Job, settings: Settings, place: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Trains one contestant and returns its row, with the accuracy on each of the splits, "valid" and "test"."""
    # Ahead of the seed: the first run of a process loads it, and loading draws random numbers.
    adapted(place)
    torch.manual_seed(job.seed)
    task = TASKS[job.task]()
    own = (with_head if job.reader in HEADS else with_prompt)(job, task, place)
    start = time.perf_counter()
    if job.tuning != UNTRAINED:
        own.model.train()
        batches = endless(few(task, job.shots, job.seed), own.collate, job.seed)
        fit(own.groups, batches, lambda batch: own.model(**batch)["loss"], steps_of(settings, job.shots))
    seconds = time.perf_counter() - start
    found = {split: accuracy(own, part(getattr(task, split), settings.tested)) for split in splits}
    count = sum(parameter.numel() for group in own.groups for parameter in group["params"])
    return {**job._asdict(), **settings._asdict(), **found, "parameters": count, "seconds": seconds}

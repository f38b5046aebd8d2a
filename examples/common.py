"""What the examples share: their options, a fresh classifier, and a check of the saved delta on it."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import deltakit as dk
from deltakit.demo.data import intents
from deltakit.demo.run import bundled_model
from deltakit.demo.training import accuracy, predict

logging.disable_progress_bar()
logging.set_verbosity_error()


def arguments(out):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or Hub id; by default the encoder that the demo extra brings")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(out))
    options = parser.parse_args()
    options.model = options.model or bundled_model()
    return options


def tokenizer_of(model):
    return AutoTokenizer.from_pretrained(model)


def fresh_model(model):
    # The classifier is new, so it is seeded: a delta is loaded onto the backbone that it was trained on.
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(intents()))


def report(model, options, valid, pad):
    """Prints the accuracy, then loads the saved delta onto a fresh backbone and compares predictions."""
    other = fresh_model(options.model)
    print(f"accuracy before {accuracy(other, valid, pad):.3f} after {accuracy(model, valid, pad):.3f}")
    dk.load(options.out, other)
    print(
        "loaded onto a fresh backbone, same predictions:", predict(other, valid, pad).equal(predict(model, valid, pad))
    )

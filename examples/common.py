"""Helpers for the examples: command-line options, a new classifier, and a check of the saved delta."""

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
    parser.add_argument("--model", help="a folder or Hub id (default: the encoder that the demo extra installs)")
    parser.add_argument("--examples", type=int, default=800, help="number of training examples (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="number of epochs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for the saved delta (default: %(default)s)")
    options = parser.parse_args()
    options.model = options.model or bundled_model()
    return options


def tokenizer_of(model):
    return AutoTokenizer.from_pretrained(model)


def fresh_model(model):
    # The classifier's weights are random. The fixed seed makes them equal in each call: `dk.load` refuses a model with
    # weights other than those that the delta was trained on.
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(intents()))


def dataset(examples):
    """The examples as the Trainer wants them."""
    return [{"input_ids": example.ids, "labels": example.label} for example in examples]


def report(model, options, valid, pad):
    """Print the accuracy, load the saved delta onto a new copy of the model, and compare the predictions."""
    other = fresh_model(options.model)
    print(f"accuracy before: {accuracy(other, valid, pad):.3f}, after: {accuracy(model, valid, pad):.3f}")
    dk.load(options.out, other)
    print(
        "loaded onto a fresh backbone, same predictions:", predict(other, valid, pad).equal(predict(model, valid, pad))
    )

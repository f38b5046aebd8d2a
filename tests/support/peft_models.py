"""Backbones on which adapters of PEFT are read and written, with the outputs that are compared."""

import warnings

import pytest
import torch
import transformers as tf

from support.tiny_transformers import build

peft = pytest.importorskip("peft")

OTHER_STACKS = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
"""Whether the installed PEFT stores the factors of stacks of experts the other way round, as releases before 0.19 do."""

RESNET = {"embedding_size": 10, "hidden_sizes": [10, 14], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}


def resnet():
    torch.manual_seed(1)
    return tf.ResNetForImageClassification(tf.ResNetConfig(**RESNET)).eval()


MODELS = {
    "bert": lambda: build("bert", tf.AutoModelForSequenceClassification),
    "distilbert": lambda: build("distilbert", tf.AutoModelForSequenceClassification),
    "gpt2": lambda: build("gpt2", tf.AutoModelForCausalLM),
    "llama": lambda: build("llama", tf.AutoModelForCausalLM),
    "t5": lambda: build("t5", tf.AutoModelForSeq2SeqLM),
    "mixtral": lambda: build("mixtral", tf.AutoModelForCausalLM),
    "resnet": resnet,
}

QUERIES = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "mixtral": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
}
"""What the names of the targets end with."""

# torch has no grouped product of experts in float64.
_SINGLE = {"mixtral"}


def wide(name):
    """A backbone in float64, if it can be."""
    return MODELS[name]() if name in _SINGLE else MODELS[name]().double()


def outputs(name, model):
    generator = torch.Generator().manual_seed(4)
    if name == "resnet":
        pixels = torch.randn(2, 3, 20, 20, generator=generator)
        return model(pixels.to(next(model.parameters()).dtype)).logits
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def close(name, found, expected):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name in _SINGLE else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found, expected, **tolerance)


def saved(name, config, folder, **how):
    """PEFT's outputs with a random adapter, which it saves."""
    return outputs(name, adapted(wide(name), config, folder, **how))


def adapted(backbone, config, folder, **how):
    """PEFT's model with a random adapter, which it saves."""
    with warnings.catch_warnings():
        # PEFT's, of transposed weights, and of embeddings that it saves.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(backbone, config).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.requires_grad:
                    value.add_(torch.randn(value.shape, generator=generator), alpha=0.3)
                assert value.requires_grad or "lora" not in key
        model.save_pretrained(folder, **how)
    return model


def opened(backbone, folder):
    """PEFT's model with the adapter in a folder."""
    with warnings.catch_warnings():
        # PEFT warns of tied weights.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(backbone, folder).eval()


def read_by_peft(name, folder):
    """The outputs of a fresh backbone in which PEFT has loaded the adapter."""
    model = opened(wide(name), folder)
    missing = [
        key
        for key, value in model.named_parameters()
        if "lora_B" in key and not key.endswith(".bias") and not value.any()
    ]
    assert not missing
    return outputs(name, model)

"""The numbers of parameters that OpenDelta's classes train by default: OpenDelta's own, measured with its last version."""

import warnings

import pytest
import torch

import deltakit as dk
from deltakit.opendelta.auto_delta import MODELS as CLASSES
from support.opendelta_models import MODELS

# The trained values and the tensors in the state dict, after freeze_module().
BERT = {
    "lora": (4096, 8),
    "adapter": (12640, 16),
    "parallel_adapter": (12640, 16),
    "low_rank_adapter": (792, 24),
    "compacter": (1328, 32),
    "bitfit": (1152, 16),
    "soft_prompt": (6400, 1),
    # OpenDelta has one last layer for all attention modules together, deltakit one for each: 5 tensors there.
    "prefix": (397056, 7),
    "prefix without MLP": (1536, 4),
}
COUNTS = {
    "bert": BERT,
    "roberta": BERT,
    # OpenDelta has no prefix for it.
    "deberta-v2": BERT | {"bitfit": (1152, 18)},
    # OpenDelta's LoRA finds nothing on GPT-2: its table has one name for the fused projection.
    "gpt2": BERT | {"bitfit": (1472, 13)},
    # OpenDelta's parallel adapter finds no modules here, and it has no prefix.
    "opt": BERT,
    "t5": {
        "lora": (8192, 16),
        "adapter": (25280, 32),
        "parallel_adapter": (25280, 32),
        "low_rank_adapter": (1584, 48),
        "compacter": (2656, 64),
        # In OpenDelta the biases of the 12 norms appear in the first forward, after the optimiser was made.
        "bitfit": (1792 + 12 * 64, 24 + 12),
        "soft_prompt": (6400, 1),
        "prefix": (528384, 11),
        "prefix without MLP": (3072, 8),
    },
}
BEFORE = {
    "bert": 79938,
    "roberta": 80002,
    "deberta-v2": 100546,
    "gpt2": 108544,
    "opt": 75648,
    "t5": 171264,
    "bart": 178432,
}


def counts(model, delta_type, **options):
    with warnings.catch_warnings():
        # Of the new classifier: it stays frozen.
        warnings.simplefilter("ignore", dk.DeltaWarning)
        CLASSES[delta_type](model, **options).freeze_module()
    return sum(p.numel() for p in model.parameters() if p.requires_grad), len(model.state_dict())


@pytest.mark.parametrize("name", COUNTS)
def test_default_counts(name):
    for kind, expected in COUNTS[name].items():
        with torch.device("meta"):
            model = MODELS[name]()
        assert sum(parameter.numel() for parameter in model.parameters()) == BEFORE[name]
        delta_type, _, without = kind.partition(" without ")
        assert counts(model, delta_type, **({"reparameterize": False} if without else {})) == expected, kind


BY_NAME = [
    ("lora", ["q_proj", "v_proj"], (12288, 24)),
    ("lora", ["fc2"], (6144, 8)),
    ("adapter", ["fc2"], (12640, 16)),
    ("parallel_adapter", ["fc1", "fc2"], (12640, 16)),
    ("bitfit", ["fc2"], (256, 4)),
    ("prefix", ["self_attn"], (528384, 11)),
]


@pytest.mark.parametrize(("delta_type", "names", "expected"), BY_NAME)
def test_counts_by_name_on_another_architecture(delta_type, names, expected):
    assert counts(MODELS["bart"](), delta_type, modified_modules=names) == expected


def test_defaults_on_another_architecture():
    """OpenDelta raises a KeyError; deltakit finds the positions itself."""
    assert counts(MODELS["bart"](), "lora") == (12288, 24)


@pytest.mark.parametrize(
    ("name", "expected"), [("bert", (4226, 10)), ("deberta-v2", (4226, 10)), ("roberta", (8386, 12))]
)
def test_counts_with_a_classifier(name, expected):
    model = MODELS[name]()
    with warnings.catch_warnings():
        # Of BERT's pooler, which is new, too.
        warnings.simplefilter("ignore", dk.DeltaWarning)
        dk.LoraModel(model).freeze_module(exclude=["deltas", "classifier"], set_state_dict=True)
    assert (sum(p.numel() for p in model.parameters() if p.requires_grad), len(model.state_dict())) == expected


def test_a_container_by_name():
    """OpenDelta's scripts name containers; its BitFit trains the biases of the layers in them."""
    assert dk.BitFitModel(MODELS["bert"](), modified_modules=["attention"]).delta.num_parameters == 2 * 5 * 64
    assert dk.BitFitModel(MODELS["bert"](), modified_modules=["encoder"]).delta.num_parameters == 1152

"""Folders that OpenDelta itself saved, through OpenDelta's API: the classes put the same deltas at the same modules."""

import pytest
import torch

import deltakit as dk
from support.models import randomize
from support.opendelta_files import CASES, FILES, backbone, known, logits

# Only to be read: OpenDelta's rules with three factors are no option of deltakit's Compacter.
NOT_MADE = [("bert", "compacter_full"), ("bert", "compacter_rule")]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_from_finetuned_gives_opendelta_s_logits(name, case):
    model = backbone(name)
    call, expected = known(name)
    delta = dk.AutoDeltaModel.from_finetuned(FILES / name / case, backbone_model=model)
    torch.testing.assert_close(logits(model, call), expected[case], rtol=1e-5, atol=1e-5)
    assert delta.delta_type == dk.AutoDeltaConfig.from_finetuned(FILES / name / case).delta_type


def places(delta):
    """The modules with a delta, and the shapes of its parameters there, however many methods it has."""
    return {
        path: sorted(tuple(p.shape) for module in modules for p in module.parameters() if p.ndim)
        for path, modules in delta.delta.modules.items()
    }


@pytest.mark.parametrize(("name", "case"), [pair for pair in CASES if pair not in NOT_MADE])
def test_the_config_makes_the_same_delta_anew(name, case):
    config = dk.AutoDeltaConfig.from_finetuned(FILES / name / case)
    if case in ("prefix", "prefix_somewhere"):
        # The MLP is not kept when it is read.
        config.reparameterize = False
    made = dk.AutoDeltaModel.from_config(config, backbone_model=backbone(name))
    read = dk.AutoDeltaModel.from_finetuned(FILES / name / case, backbone_model=backbone(name))
    assert type(made) is type(read)
    if (name, case) != ("t5", "bitfit"):
        assert places(made) == places(read)
    else:
        # OpenDelta makes the biases of T5's norms in the first forward, and here there was none before it saved.
        assert places(made).items() >= places(read).items()
    # The same values give OpenDelta's logits; but a new prefix on T5 leaves the relative positions as they are.
    call, expected = known(name)
    if (name != "t5" and case.startswith("prefix")) or case in ("lora", "adapter", "soft_prompt", "swish"):
        made.delta.load_state_dict(read.delta.state_dict())
        torch.testing.assert_close(logits(made.backbone_model, call), expected[case], rtol=1e-5, atol=1e-5)


def test_training_goes_on_and_is_saved(tmp_path):
    model = backbone("t5")
    delta = dk.AutoDeltaModel.from_finetuned(FILES / "t5" / "compacter", model)
    delta.freeze_module()
    randomize(delta.delta)
    call, _ = known("t5")
    output = logits(model, call)
    delta.save_finetuned(tmp_path)
    again = backbone("t5")
    dk.AutoDeltaModel.from_finetuned(tmp_path, again)
    assert torch.equal(logits(again, call), output)

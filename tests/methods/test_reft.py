"""ReFT against the paper's formulas in float64, the positions that it edits, caches, mixed batches, and bad options."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support import backbone_zoo
from support.models import Calls, Transformer, attached, ids, randomize
from support.peft_layers import CLOSE
from support.tiny_transformers import build

VARIANTS = ("loreft", "noreft", "direft")


class Echo(nn.Module):
    """One layer whose output is its input, called as a language model is."""

    def __init__(self, d=7):
        super().__init__()
        self.layer = nn.Linear(d, d)
        self.d = d
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(d))
            self.layer.bias.zero_()

    def forward(self, input_ids, attention_mask=None):
        generator = torch.Generator().manual_seed(3)
        table = torch.randn(100, self.d, generator=generator, dtype=torch.float64)
        return self.layer(table[input_ids])


def echo(**options):
    model = Echo().double().eval()
    delta = attached(model, dk.ReFT(at="layer", r=3, **options))
    return model, delta, delta.modules["layer"][0]


def gram_schmidt(matrix):
    rows = []
    for row in matrix:
        for other in rows:
            row = row - row.dot(other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def edited(h, module, unit=0):
    """The formulas of section 3 for one hidden state."""
    rows, source, bias = module.rotate[unit], module.source[unit], module.bias[unit]
    rows = gram_schmidt(rows) if module.variant == "loreft" else rows
    return h + rows.T @ (source @ h + bias - (0 if module.variant == "direft" else rows @ h))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_it_is_its_formula(variant):
    model, delta, module = echo(variant=variant, prefix_positions=2, suffix_positions=1)
    with delta.detached():
        h = model(ids(2, 9))
    expected = h.clone()
    for row in range(2):
        for place, unit in ((0, 0), (1, 0), (8, 1)):
            expected[row, place] = edited(h[row, place], module, unit)
    assert not torch.allclose(expected[:, [0, 1, 8]], h[:, [0, 1, 8]], atol=0.1)
    torch.testing.assert_close(model(ids(2, 9)), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_it_is_a_no_op_and_a_step_changes_that(variant):
    model = Transformer().eval()
    bare = model(ids())
    delta = dk.attach(model, dk.ReFT(variant=variant))
    found = model(ids())
    assert torch.equal(found, bare)
    found.square().sum().backward()
    torch.optim.SGD(delta.parameters(), lr=1.0).step()
    assert not torch.allclose(model(ids()), bare, atol=1e-3)


def test_the_rows_of_loreft_stay_orthonormal():
    _, _, module = echo(suffix_positions=2)
    rows = module.rows()
    assert rows.shape == (2, 3, 7)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), **CLOSE)


def changed(model, delta, tokens, mask=None):
    """Which positions differ from the backbone's."""
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=mask)
        with delta.detached():
            return (found - model(input_ids=tokens, attention_mask=mask)).abs().amax(-1) > 1e-6


class TestPositions:
    MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]])

    @pytest.mark.parametrize(
        ("numbers", "wanted"),
        [
            ((2, 0), [[0, 1], [2, 3], [0, 1], [4]]),
            ((0, 2), [[4, 5], [4, 5], [1, 2], [4]]),
            ((2, 1), [[0, 1, 5], [2, 3, 5], [0, 1, 2], [4]]),
            ((9, 9), [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 1, 2], [4]]),
        ],
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_padding_on_either_side_is_not_counted(self, numbers, wanted, tied):
        model, delta, module = echo(prefix_positions=numbers[0], suffix_positions=numbers[1], tied=tied)
        assert len(module.rotate) == (2 if all(numbers) and not tied else 1)
        found = changed(model, delta, ids(4, 6), self.MASK)
        assert [row.nonzero().flatten().tolist() for row in found] == wanted

    def test_a_mask_that_says_nothing_about_padding(self):
        model, _, _ = echo()
        with pytest.raises(
            dk.StateError, match=r"expected an attention mask \[batch, 6\], found the shape \(2, 1, 6, 6\)"
        ):
            model(ids(2, 6), attention_mask=torch.ones(2, 1, 6, 6))

    def test_an_output_without_positions(self):
        model = nn.Sequential(nn.Linear(5, 7))
        dk.attach(model, dk.ReFT(at="0"))
        with pytest.raises(dk.StateError, match=r"\[batch, tokens, d\], found the shape \(3, 7\); select the blocks"):
            model(torch.randn(3, 5))


@pytest.mark.parametrize("suffix", [0, 2])
@torch.no_grad()
def test_generation_with_a_cache_edits_the_prompt_alone(suffix):
    """In each step with a cache the sequence is one token long, which is no prompt."""
    model = build("llama", tf.AutoModelForCausalLM).eval()
    attached(model, dk.ReFT(prefix_positions=3, suffix_positions=suffix))
    tokens, mask = ids(2, 7), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    if not suffix:
        # Without last positions the whole text in one call is the same.
        new = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
        position_ids = (new.cumsum(1) - 1).clamp(min=0)
        whole = model(out.sequences, attention_mask=new, position_ids=position_ids).logits[:, 6:10]
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-5)
    bare = model(tokens, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(out.logits[0], bare, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_generation_of_recurrent_layers_edits_the_prompt_alone():
    """Their cache does not say how long it is."""
    model, _ = backbone_zoo.build("mamba")
    attached(model, dk.ReFT())
    found = [
        model.generate(ids(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_examples_of_a_mixed_batch_have_their_own_padding():
    model, delta, _ = echo(prefix_positions=2)
    mask = TestPositions.MASK
    full = model(ids(4, 6), attention_mask=mask)
    with delta.detached():
        bare = model(ids(4, 6), attention_mask=mask)
    with dk.rows(model, [None, delta.name, delta.name, None]):
        found = model(ids(4, 6), attention_mask=mask)
    torch.testing.assert_close(found, torch.stack([bare[0], full[1], full[2], bare[3]]), **CLOSE)


def test_a_backbone_with_a_decoder_is_refused():
    with pytest.raises(
        dk.TargetError, match="reft: T5Model has an encoder and a decoder, .* attach it to the encoder alone"
    ):
        dk.attach(build("t5"), dk.ReFT())
    model = build("t5")
    randomize(dk.attach(model.encoder, dk.ReFT()))
    assert model.encoder(input_ids=ids(2, 5)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"ReFT\(r=0\): expected a rank of at least 1; 4 is usual"),
        (
            {"prefix_positions": 0},
            r"ReFT\(prefix_positions=0, suffix_positions=0\): expected numbers of at least 0, and one",
        ),
        ({"suffix_positions": -1}, r"ReFT\(prefix_positions=3, suffix_positions=-1\): expected numbers"),
        ({"variant": "reft"}, r"ReFT\(variant='reft'\)"),
    ],
)
def test_bad_options(unchecked, options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.ReFT(**options)


def test_images_are_refused():
    with pytest.raises(dk.TargetError, match="^0: ReFT edits positions of a text, and this Conv2d returns images; use"):
        dk.attach(nn.Sequential(nn.Conv2d(3, 7, 1)), dk.ReFT(at="0"))


def test_a_rank_above_the_features():
    with pytest.raises(dk.OptionError, match=r"^target: rank 6 is above its 5 features; use ReFT\(r=5\) or less"):
        dk.attach(Calls("tensor"), dk.ReFT(at="target", r=6))


def test_under_gradient_checkpointing():
    """transformers computes the blocks' forwards again, outside of which the edits are."""
    model = build("llama", tf.AutoModelForCausalLM).train()
    delta, found = attached(model, dk.ReFT()), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids(2, 5)).logits.square().mean().backward()
        found.append([parameter.grad for parameter in delta.parameters()])
        for parameter in delta.parameters():
            parameter.grad = None
    for one, other in zip(*found, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_a_backbone_without_positions():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    with pytest.raises(dk.TargetError, match="reft: Sequential has only linear layers and norms.*select layers .* at="):
        dk.attach(model, dk.ReFT())
    delta = randomize(dk.attach(model, dk.ReFT(at="0", r=2, prefix_positions=1)))
    x = torch.randn(2, 4, 5)
    with delta.detached():
        before = model(x)
    assert torch.equal((model(x) != before).any(-1), torch.tensor([[True, False, False, False]]).expand(2, 4))

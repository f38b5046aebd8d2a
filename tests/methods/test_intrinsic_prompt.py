"""Intrinsic prompts against their formulas in float64; the decoder reproduces prompts of the subspace it was fitted on."""

import pickle

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize

KEY = "embed.intrinsic_prompt.prompt"


def module_of(delta):
    return delta.modules["embed"][0].shared.encoder


def prompts(count, tokens=3, d=20):
    """Prompts that differ in two directions only."""
    generator = torch.Generator().manual_seed(0)
    mean, first, second = torch.randn(3, tokens, d, generator=generator)
    return [mean + a * first + b * second for a, b in torch.randn(count, 2, generator=generator)]


def test_equals_the_decoder_s_formula_in_float64():
    model = Transformer().double().eval()
    decoder = dk.PromptDecoder(3, 20, size=5, hidden=7)
    delta = dk.attach(model, dk.IntrinsicPrompt(tokens=3, size=5, decoder=decoder))
    assert delta.num_parameters == 5
    z = next(randomize(delta).parameters()).detach()
    first, _, last = (layer.double() if isinstance(layer, torch.nn.Linear) else layer for layer in decoder.layers)
    wanted = torch.stack(
        [last.bias[i] + last.weight[i] @ (first.weight @ z + first.bias).tanh() for i in range(60)]
    ).view(3, 20)
    torch.testing.assert_close(delta.state_dict()[KEY], wanted.detach(), rtol=1e-12, atol=1e-12)


def test_without_a_decoder_a_random_projection_that_keeps_norms():
    model = Transformer().double().eval()
    delta = dk.attach(model, dk.IntrinsicPrompt(tokens=300, size=5, seed=3))
    start = delta.state_dict()[KEY]
    rows = {tuple(row.tolist()) for row in model.embed.weight}
    assert all(tuple(row.tolist()) in rows for row in start)
    z = next(randomize(delta).parameters()).detach()
    change = delta.state_dict()[KEY] - start
    torch.testing.assert_close(change.flatten(), module_of(delta).projection.matrix @ z)
    torch.testing.assert_close(change.norm(), z.norm(), rtol=0.05, atol=0)


def test_a_fitted_decoder_reaches_a_new_prompt_of_the_same_subspace():
    *known, new = prompts(33)
    state = torch.random.get_rng_state()
    decoder = dk.PromptDecoder.fit(known, 2, hidden=31, steps=400, lr=1e-2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert decoder.error < 0.01
    model = Transformer().eval()
    delta = dk.attach(model, dk.IntrinsicPrompt(tokens=3, size=2, decoder=decoder))
    optimizer = torch.optim.LBFGS(delta.parameters(), max_iter=50)

    def loss():
        optimizer.zero_grad()
        found = (module_of(delta)() - new).square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    apart = (new - torch.stack(known).mean(0)).square().sum()
    assert loss().detach() < 0.05 * apart


def test_a_file_has_the_vectors_alone(tmp_path):
    model = Transformer().eval()
    decoder = dk.PromptDecoder.fit(prompts(4), 2, hidden=5, steps=1)
    delta = randomize(dk.attach(model, dk.IntrinsicPrompt(tokens=3, size=2, decoder=decoder)))
    wanted = model(ids())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids()), wanted)
    assert {name: tuple(value.shape) for name, value in delta.state_dict().items()} == {KEY: (3, 20)}
    loaded = dk.load(delta.save(tmp_path), delta.detach().backbone, name="again")
    assert torch.equal(loaded.backbone(ids()), wanted)
    assert loaded.num_parameters == 60


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: dk.IntrinsicPrompt(size=0), r"IntrinsicPrompt\(size=0\): expected at least 1, or None"),
        (lambda d: dk.IntrinsicPrompt(seed=-1), r"IntrinsicPrompt\(seed=-1\): expected at least 0"),
        (lambda d: dk.IntrinsicPrompt(decoder=d), r"size=10\): this decoder needs tokens=3 and size=2"),
        (lambda d: dk.attach(Transformer(), dk.IntrinsicPrompt(tokens=3, size=2, decoder=d)), "embed: the decoder has prompts of 7 features, and this embedding has 20"),
        (lambda d: dk.PromptDecoder.fit([torch.zeros(3, 7)]), r"expected at least 2 prompts .*, found 1 of shape \(3, 7\)"),
        (lambda d: dk.PromptDecoder.fit(prompts(2), steps=0), "expected at least 1 step"),
        (lambda d: dk.PromptDecoder.fit(prompts(2), size=0), r"PromptDecoder\(size=0\)"),
    ],
)  # fmt: skip
def test_bad_options(make, message):
    with pytest.raises(dk.OptionError, match=message):
        make(dk.PromptDecoder(3, 7, size=2, hidden=5))

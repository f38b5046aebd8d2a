"""LoRA that starts from data (EVA): components against a singular value decomposition in float64, and against PEFT."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.delta.principal import Components
from support.models import Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def spread(rows, size=7):
    """Vectors with a mean, whose variances differ a lot between directions."""
    turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    return torch.randn(rows, size, dtype=torch.float64) * 0.5 ** torch.arange(size) @ turn + 3


def test_batches_give_the_components_of_all_vectors():
    x = spread(101)
    found = Components(7)
    for batch in x.split([40, 0, 3, 1, 57]):
        found.add(batch)
    _, values, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.values, values, rtol=1e-10, atol=0)
    torch.testing.assert_close((found.vectors * vectors).sum(1).abs(), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(found.shares(), (values**2 / (x - x.mean(0)).square().sum()).tolist())
    few = Components(3)
    for batch in x.split(13):
        few.add(batch)
    assert few.vectors.shape == (3, 7)
    assert ((few.vectors * vectors[:3]).sum(1).abs() > 0.99).all()
    assert few.total == pytest.approx(found.total)


def inputs_of(model, path, **call):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**call)
    handle.remove()
    return seen[0]


class TestStart:
    def call(self, rows=9):
        found = torch.randint(3, 90, (rows, 11), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(found)
        mask[0, 5:] = mask[2, 2:] = 0
        return {"input_ids": found, "attention_mask": mask}

    def test_a_has_the_directions_of_the_visible_inputs(self):
        model = build("llama", tf.AutoModelForCausalLM).double().train()
        before, call = snapshot(model), self.call()
        bare = copy.deepcopy(model).eval()
        expected = bare(**call).logits
        delta = dk.attach_from_data(model, dk.LoRA(r=3, at=TARGETS), run=lambda: model(**call), rho=1)
        assert model.training
        for path, (module,) in delta.modules.items():
            x = inputs_of(bare, path, **call)[call["attention_mask"].bool()]
            _, _, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
            torch.testing.assert_close(
                (module.A @ vectors[:3].T).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-7
            )
            assert not module.B.any()
        assert torch.equal(model.eval()(**call).logits, expected)
        assert all(parameter.requires_grad for parameter in delta.parameters())
        delta.detach()
        same(before, snapshot(model.train()))

    def test_ranks_move_to_inputs_that_vary_in_more_directions(self):
        model = build("llama", tf.AutoModelForCausalLM).double().eval()
        call, budget = self.call(), 4 * 2 * 3
        delta = dk.attach_from_data(model, dk.LoRA(r=3, alpha=5, at=TARGETS), run=lambda: model(**call), rho=2.0)
        ranks = {path: module.A.shape[0] for path, (module,) in delta.modules.items()}
        assert sum(ranks.values()) == budget
        assert len(set(ranks.values())) > 1
        assert max(ranks.values()) <= 6
        shares = []
        for path in (p for p, _ in model.named_modules() if p.endswith(tuple(TARGETS))):
            x = inputs_of(model, path, **call)[call["attention_mask"].bool()]
            variances = torch.linalg.svdvals(x - x.mean(0)).square()
            shares += [(float(share), path) for share in (variances / variances.sum())[:6]]
        taken = [path for _, path in sorted(shares, reverse=True)[:budget]]
        # Queries and values have the same inputs, so either may have the last rank.
        assert sorted(ranks.values()) == sorted(taken.count(path) for path in set(taken))
        assert {method.scaling for method in delta.methods} == {5 / 3}

    def test_it_is_saved_and_loaded_like_any_other(self, tmp_path):
        model = Transformer()
        fresh = copy.deepcopy(model)
        delta = randomize(dk.attach_from_data(model, dk.LoRA(r=3), run=lambda: model(ids(7)), rho=1.7))
        delta.save(tmp_path)
        loaded = dk.load(tmp_path, fresh)
        assert torch.equal(fresh.eval()(ids()), model.eval()(ids()))
        assert loaded.num_parameters == delta.num_parameters

    def test_a_feature_slice_reads_the_input_of_the_whole(self):
        model = build("gpt2", tf.AutoModelForCausalLM).eval()
        delta = dk.attach_from_data(model, dk.LoRA(r=2), run=lambda: model(**self.call()), rho=1)
        q, v = delta.modules["transformer.h.0.attn.c_attn[q]"][0], delta.modules["transformer.h.0.attn.c_attn[v]"][0]
        assert torch.equal(q.A, v.A)

    def test_saving_it_untrained_warns(self, tmp_path):
        model = Transformer()
        delta = dk.attach_from_data(model, dk.LoRA(r=3), run=lambda: model(ids(7)))
        with pytest.warns(dk.DeltaWarning, match="saved as it was attached"):
            delta.save(tmp_path)


def test_directions_and_ranks_are_those_of_peft():
    peft = pytest.importorskip("peft")
    model = build("llama", tf.AutoModelForCausalLM).eval()
    call = {"input_ids": torch.randint(3, 90, (16, 11), generator=torch.Generator().manual_seed(3))}
    eva = peft.EvaConfig(rho=2.0, use_label_mask=False)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights="eva", eva_config=eva)
    theirs = peft.tuners.lora.get_eva_state_dict(copy.deepcopy(model), [call], config, show_progress_bar=False)
    delta = dk.attach_from_data(model, dk.LoRA(r=3, alpha=5, at=TARGETS), run=lambda: model(**call))
    ranks = {path: len(module.A) for path, (module,) in delta.modules.items()}
    assert ranks == {path: len(rows) for path, rows in theirs.items() if len(rows)}
    for path, (module,) in delta.modules.items():
        cosine = (module.A * theirs[path]).sum(1).abs()
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-3)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(5, 7), nn.Linear(5, 7)
        self.embed, self.conv = nn.Embedding(5, 7), nn.Conv1d(5, 7, 2)

    def forward(self, x):
        return self.used(x)


class TestErrors:
    def test_each_says_what_to_do_and_changes_nothing(self):
        model = Idle()
        before = snapshot(model)
        x = torch.randn(11, 5)
        cases = [
            (
                dk.LoRA(r=2, at="idle"),
                {},
                dk.StateError,
                r"idle: attach_from_data: run\(\) did not call it; call the model",
            ),
            (
                dk.LoRA(r=2, at="embed"),
                {},
                dk.TargetError,
                "embed: a start from data needs a linear layer .* is Embedding",
            ),
            (dk.LoRA(r=2, at="conv"), {}, dk.TargetError, "conv: a start from data needs a linear layer .* is Conv1d"),
            (dk.LoRA(r=2, at="used.weight"), {}, dk.TargetError, "this is a weight that is read directly"),
            (
                dk.LoRA(r=2, at="used"),
                {"run": model},
                dk.OptionError,
                "expected a function without arguments that calls",
            ),
            (dk.BitFit(at="used"), {}, dk.OptionError, "bitfit does not start from data; write LoRA"),
            (
                dk.LoRA(r=2, at="used", start="pissa"),
                {},
                dk.OptionError,
                "a start from data is another one; omit start=",
            ),
            (
                dk.LoRA(r=2, at="used"),
                {"rho": 0.5},
                dk.OptionError,
                r"attach_from_data\(rho=0.5\): expected a finite number",
            ),
            (
                dk.LoRA(r=2, at="used"),
                {"run": lambda: model(x[:2])},
                dk.StateError,
                "its 2 inputs vary in 1 directions, and its",
            ),
            (
                dk.LoRA(r=2, at="used"),
                {"run": lambda: model(x / 0)},
                dk.StateError,
                "inputs are infinite or not a number",
            ),
        ]
        for method, options, error, text in cases:
            with pytest.raises(error, match=text):
                dk.attach_from_data(model, method, **{"run": lambda: model(x), **options})
            same(before, snapshot(model))

    def test_an_error_in_run_leaves_no_hook(self):
        model = Idle().train()
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError):
            dk.attach_from_data(model, dk.LoRA(r=2, at="used"), run=lambda: 1 / 0)
        assert all(module.training for module in model.modules())
        same(before, snapshot(model))

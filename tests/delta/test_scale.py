"""Deltas at a part of their effect."""

import pytest
import torch

import deltakit as dk
from support.models import Transformer, attached, ids, randomize


class TestScale:
    """How much of its effect a delta has in forwards."""

    @pytest.mark.parametrize("method", [dk.LoRA(r=2), dk.Adapter(size=3), dk.BitFit()], ids=lambda m: m.name)
    @pytest.mark.parametrize("few", [False, True], ids=["many tokens", "one token"])
    def test_it_scales_what_one_layer_gets(self, method, few):
        model = torch.nn.Sequential(torch.nn.Linear(11, 13))
        x = torch.randn(1, 1, 11) if few else torch.randn(3, 7, 11)
        bare = model(x)
        delta = randomize(dk.attach(model, type(method)(**vars(method) | {"at": "0"})), 0.3)
        whole = model(x) - bare
        for scale in (0.5, -2.0, 0.0):
            delta.scale = scale
            torch.testing.assert_close(model(x), bare + scale * whole)
            with torch.no_grad():
                torch.testing.assert_close(model(x), bare + scale * whole)
        assert "attached, active, trainable, scale 0" in repr(delta)

    def test_on_embeddings_and_convolutions(self):
        model = torch.nn.Sequential(torch.nn.Embedding(13, 7), torch.nn.Conv1d(5, 11, 3))
        x = torch.randint(0, 13, (2, 5))
        for at in ("0", "1"):
            bare = model(x)
            delta = randomize(dk.attach(model, dk.LoRA(r=3, at=at)), 0.3)
            whole = model(x) - bare
            delta.scale = 0.5
            torch.testing.assert_close(model(x), bare + 0.5 * whole)
            delta.detach()

    def test_a_weight_patch_and_merged(self):
        model = torch.nn.TransformerEncoderLayer(12, 2, 20, dropout=0, batch_first=True).eval()
        x = torch.randn(2, 5, 12)
        delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["self_attn.in_proj_weight", "linear1"])), 0.3)
        delta.scale = 0.5
        half = model(x)
        torch.testing.assert_close(delta.merge().backbone(x), half)
        with pytest.raises(dk.StateError, match="unmerge\\(\\) it before changing scale"):
            delta.scale = 1.0
        delta.unmerge()
        combined = dk.combine(model, {"delta": 0.5}).delta
        delta.detach()
        torch.testing.assert_close(combined.attach().backbone(x), half)

    def test_by_rows(self):
        model = Transformer().eval()
        deltas = {name: randomize(dk.attach(model, dk.LoRA(r=2), name=name), 0.3) for name in "ab"}
        deltas["a"].scale, deltas["b"].scale = 0.5, -1.0
        batch = torch.cat([ids()] * 2)[:3]
        with dk.rows(model, ["a", None, "b"]):
            together = model(batch)
            with pytest.raises(
                dk.StateError, match=r"its backbone is in a rows\(\) block; leave the block before changing"
            ):
                deltas["a"].scale = 1.0
        for row, own in enumerate(["a", None, "b"]):
            for name, delta in deltas.items():
                delta.active = name == own
            torch.testing.assert_close(together[row], model(batch[row : row + 1])[0])

    def test_no_file_holds_it(self, tmp_path):
        model = Transformer().eval()
        delta = attached(model, dk.LoRA(r=2))
        delta.scale = 0.25
        with pytest.raises(
            dk.StateError,
            match=r"has the scale 0\.25, which is not saved.*for LoRA and BitFit, combine\(model, {'delta': 0\.25}\)\.delta\.save",
        ):
            delta.save(tmp_path / "it")
        assert not (tmp_path / "it").exists()
        delta.scale = 1
        delta.save(tmp_path / "it")

    @pytest.mark.parametrize(
        "method", [dk.Prefix(tokens=2), dk.SoftPrompt(tokens=2, prepend=False)], ids=lambda m: m.name
    )
    def test_what_adds_nothing_has_none(self, method):
        delta = dk.attach(Transformer().eval(), method)
        with pytest.raises(dk.StateError, match="does not add to an output, so it has no scale"):
            delta.scale = 0.5
        with pytest.raises(dk.OptionError, match="scale=inf: expected a finite number"):
            delta.scale = float("inf")
        assert delta.scale == 1
        delta.scale = 1

    def test_what_is_fully_trained_has_none(self):
        delta = dk.attach(Transformer().eval(), dk.LoRA(r=2), train="norm")
        with pytest.raises(dk.StateError, match=r"fully trains norm\.weight, whose values are in the backbone itself"):
            delta.scale = 0.5

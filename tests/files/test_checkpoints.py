"""A delta's files: what is in them, strict loading, and every way in which they can be wrong."""

import contextlib
import copy
import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.files.fingerprint import fingerprint
from deltakit.files.schema import FORMAT_VERSION
from support.backbone_inputs import hidden, inputs
from support.forged_files import forge
from support.models import Transformer, attached, ids, randomize, same, snapshot
from support.paths import CHECKPOINTS
from support.tiny_transformers import build

STORED = sorted(CHECKPOINTS.glob("format_*"))


def backbone():
    torch.manual_seed(7)
    return Transformer().eval()


@pytest.fixture
def saved(tmp_path):
    delta = dk.attach(backbone(), dk.LoRA(r=3), train="@head")
    randomize(delta)
    return delta.save(tmp_path / "saved")


def test_what_is_in_the_files(saved):
    config = json.loads((saved / "delta_config.json").read_text())
    assert config["format_version"] == 2
    (method,) = config["methods"]
    assert (method["method"], method["r"], method["at"]) == ("lora", 3, None)
    assert method["targets"] == ["layers.{0-1}.self_attn.{q_proj,v_proj}"]
    assert config["train"] == {"selectors": ["@head"], "names": ["classifier.{weight,bias}"]}
    assert config["backbone"]["class"] == "Transformer"
    names = set(load_file(saved / "delta_model.safetensors"))
    assert "layers.0.self_attn.q_proj.lora.A" in names
    assert {"classifier.weight", "classifier.bias"} < names
    assert sorted(file.name for file in saved.iterdir()) == [
        "README.md",
        "delta_config.json",
        "delta_model.safetensors",
    ]
    assert 'tags: ["deltakit", "lora"]' in (saved / "README.md").read_text()


def test_a_card_of_the_user_s_own_is_kept(saved):
    delta = dk.load(saved, backbone())
    (saved / "README.md").write_text("my words")
    delta.save(saved)
    assert (saved / "README.md").read_text() == "my words"
    assert len(list(saved.iterdir())) == 3


def test_the_card_names_a_base_on_the_hub_and_no_folder(tmp_path):
    model = build("bert")
    model.config._name_or_path = "someone/a-model"
    card = (attached(model).save(tmp_path) / "README.md").read_text()
    assert 'base_model: "someone/a-model"' in card
    for folder in ("/a/folder", "a/folder/below", "./here", "~/mine"):
        model.config._name_or_path = folder
        dk.deltas(model)[0].save(tmp_path)
        assert "base_model:" not in (tmp_path / "README.md").read_text()


def test_a_checkpoint_of_each_format_is_stored():
    assert [folder.name for folder in STORED] == [f"format_{version}" for version in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("stored", STORED, ids=lambda folder: folder.name)
def test_a_stored_checkpoint_of_each_format_still_loads(stored):
    model = backbone()
    delta = dk.load(stored, model)
    assert delta.methods[0].r == 3
    assert set(delta.state_dict()) == set(load_file(stored / "delta_model.safetensors"))
    torch.testing.assert_close(model(ids())[0], torch.tensor(json.loads((stored / "expected.json").read_text())))


BROKEN = {
    "no tensors": (lambda f: (f / "delta_model.safetensors").unlink(), "expected delta_model.safetensors"),
    "cut off": (
        lambda f: (f / "delta_model.safetensors").write_bytes((f / "delta_model.safetensors").read_bytes()[:-9]),
        "is damaged or cut off",
    ),
    "not json": (lambda f: (f / "delta_config.json").write_text("{"), "delta_config.json is damaged"),
    "newer": (lambda f: forge(f, config=lambda c: c.update(format_version=99)), "found format version 99, this deltakit reads versions up to 2; upgrade"),
    "no methods": (lambda f: forge(f, config=lambda c: c.pop("methods")), "delta_model.safetensors is damaged: object missing required field `methods`; save or download it again"),
    "no targets": (lambda f: forge(f, config=lambda c: c["methods"][0].pop("targets")), r"damaged at methods\[0\]: object missing required field `targets`"),
    "other method": (
        lambda f: forge(f, config=lambda c: c["methods"][0].update(method="magic")),
        "unknown method 'magic': expected one of adalora, adapter, adapter_fusion, ",
    ),
    "unknown option": (lambda f: forge(f, config=lambda c: c["methods"][0].update(zeta=1)), "has no option zeta"),
    "wrong method": (
        lambda f: forge(f, config=lambda c: c.update(methods=[{"method": "bitfit", "targets": ["norm"]}])),
        r"norm\.bitfit\.bias is missing.*lora\.A is unknown",
    ),
    "wrong rank": (
        lambda f: forge(f, config=lambda c: c["methods"][0].update(r=2)),
        r"q_proj\.lora\.A: the file has \(3, 20\), the backbone needs \(2, 20\)",
    ),
    "a tensor missing": (lambda f: forge(f, tensors=lambda t: t.pop("classifier.bias")), r"1 of its tensors does not fit: classifier\.bias is missing"),
    "a tensor too many": (lambda f: forge(f, tensors=lambda t: t.update(x=torch.zeros(1))), "x is unknown in this delta"),
    "turned round": (
        lambda f: forge(f, tensors=lambda t: t.update({"classifier.weight": t["classifier.weight"].T.contiguous()})),
        r"classifier\.weight: the file has \(20, 3\), the backbone needs \(3, 20\)",
    ),
    "elsewhere": (
        lambda f: forge(f, config=lambda c: c["methods"][0].update(targets=["layers.7.q"])),
        r"1 of its 1 targets are not in this backbone, such as layers\.7\.q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_change_nothing(saved, case):
    spoil, message = BROKEN[case]
    spoil(saved)
    model = backbone()
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(saved, model)
    same(before, snapshot(model))


def test_another_backbone(saved, unchecked):
    other = backbone()
    with torch.no_grad():
        other.layers[1].mlp.up_proj.weight.mul_(1.5)
    before = snapshot(other)
    with pytest.raises(
        dk.BackboneMismatch, match=r"the weights differ in 1 of \d+ tensors compared, such as layers\.1\.mlp"
    ):
        dk.load(saved, other)
    same(before, snapshot(other))
    different = backbone()
    with torch.no_grad():
        for weight in different.parameters():
            weight.add_(1)
    with pytest.raises(
        dk.BackboneMismatch, match=r"the weights differ in (\d+) of \1 tensors .* such as (\S+, ){2}\S+;"
    ):
        dk.load(saved, different)
    with pytest.warns(dk.DeltaWarning, match="this is not the backbone the delta was trained on"):
        dk.load(saved, other, check="warn")
    with pytest.raises(
        dk.BackboneMismatch, match="trained on a Transformer with .* their parameters' names or shapes differ"
    ):
        dk.load(saved, Transformer(blocks=3))
    with pytest.raises(dk.OptionError, match=r"load\(check='no'\): expected 'error' or 'warn'"):
        dk.load(saved, backbone(), check="no")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_backbone_in_half_precision_is_the_same(saved, dtype):
    model = backbone().to(dtype)
    delta = dk.load(saved, model)
    assert {parameter.dtype for parameter in delta.parameters()} == {dtype}


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(5, 3).requires_grad_(False).weight.mul_(1e-3), lambda: nn.LayerNorm(7).weight.detach()]
)
def test_small_weights_and_vectors_are_compared_too(tmp_path, make):
    """Weights near zero are not all the same, and a backbone without matrices has values too."""
    model = nn.ModuleDict({"part": nn.Linear(2, 3)})
    del model["part"].weight, model["part"].bias
    model["part"].weight = nn.Parameter(make())
    size = model["part"].weight.shape
    attached(model, dk.BitFit(at="part") if len(size) == 1 else dk.LoRA(r=2, at="part.weight")).save(tmp_path)
    dk.deltas(model)[0].detach()
    dk.load(tmp_path, model).detach()
    with torch.no_grad():
        model["part"].weight.mul_(1.5)
    with pytest.raises(dk.BackboneMismatch, match=r"differ in 1 of 1 tensors compared, such as part\.weight"):
        dk.load(tmp_path, model)


def test_a_fresh_head_that_was_not_trained_is_noticed(tmp_path):
    attached(backbone()).save(tmp_path)
    other = backbone()
    other.classifier = nn.Linear(20, 3)
    with pytest.raises(dk.BackboneMismatch, match=r"such as classifier\.weight"):
        dk.load(tmp_path, other)


def test_a_fresh_head_that_is_in_the_file_is_not(saved):
    other = backbone()
    other.classifier = nn.Linear(20, 3)
    dk.load(saved, other)


def test_of_many_tensors_the_last_ones_are_compared(tmp_path):
    """A backbone of hundreds of matrices is compared in some of them; a fresh head, which stands last, must be among these."""
    model = nn.Sequential(*(nn.Linear(3, 2, bias=False) for _ in range(307)))
    attached(model, dk.LoRA(r=1, at="0")).save(tmp_path)
    values = json.loads((tmp_path / "delta_config.json").read_text())["backbone"]["fingerprint"]["values"]
    assert 128 <= len(values) <= 256
    assert [f"{place}.weight" for place in range(299, 307)] == list(values)[-8:]
    for layer in range(299, 307):
        other = copy.deepcopy(model)
        dk.deltas(other)[0].detach()
        other[layer].reset_parameters()
        with pytest.raises(dk.BackboneMismatch, match=f"the weights differ in 1 of .* such as {layer}.weight"):
            dk.load(tmp_path, other)


def test_the_fingerprint_is_that_of_the_bare_backbone(saved, tmp_path):
    model = backbone()
    one = dk.load(saved, model)
    randomize(one)
    two = attached(model, dk.BitFit(at="norm"))
    one.merge()
    two.save(tmp_path)
    dk.load(tmp_path, backbone())


def test_load_under_a_name_and_from_where_it_was_saved(saved):
    model = backbone()
    assert dk.load(saved, model).name == "delta"
    assert dk.load(str(saved), backbone(), name="again").name == "again"
    with pytest.raises(dk.StateError, match=r"classifier\.bias: delta 'delta' fully trains it already"):
        dk.load(saved, model)
    named = attached(backbone(), dk.BitFit(), name="biases").save(saved)
    assert dk.load(named, backbone()).name == "biases"
    assert dk.load(named, backbone(), name="mine").name == "mine"


def test_paths_that_cannot_be_folded(tmp_path):
    model = nn.ModuleDict({"a,b": nn.Linear(3, 2), "0": nn.Linear(3, 2), "00": nn.Linear(3, 2)})
    delta = dk.attach(model, dk.LoRA(r=1, at="*"))
    randomize(delta)
    twin = copy.deepcopy(model)
    dk.deltas(twin)[0].detach()
    loaded = dk.load(delta.save(tmp_path), twin)
    assert list(loaded.modules) == list(delta.modules)


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    delta = dk.load(saved, backbone())
    randomize(delta)

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("deltakit.files.checkpoint.save_file", fails)
    with pytest.raises(
        dk.CheckpointError, match="could not be saved: disk full; what was saved there before is unchanged; free"
    ):
        delta.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize("first", [False, True], ids=["", "over a file of the first format"])
@pytest.mark.parametrize("replaced", range(4))
def test_an_interruption_between_two_files_leaves_no_mixture(tmp_path, monkeypatch, replaced, first):
    """The tensors of one delta under the config of another have the same names and shapes, and would be scaled wrongly."""
    old, new = (attached(backbone(), dk.LoRA(r=3, alpha=alpha)) for alpha in (5, 7))
    old.save(tmp_path)
    if first:
        old = dk.load(STORED[0], backbone())
        shutil.copytree(STORED[0], tmp_path, dirs_exist_ok=True)
    outputs = [delta.backbone(ids()) for delta in (old, new)]
    left, replace = iter(range(replaced)), Path.replace

    def interrupted(self, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        new.save(tmp_path)
    assert not list(tmp_path.glob(".*"))
    fresh = backbone()
    with pytest.warns(dk.DeltaWarning) if replaced == 1 else contextlib.nullcontext():
        dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids()), outputs[replaced > 0])


def test_transformers_loads_its_own_folder_beside_a_delta(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    attached(model).save(tmp_path)
    again = tf.AutoModel.from_pretrained(tmp_path)
    dk.load(tmp_path, again)
    shutil.rmtree(tmp_path)


def test_files_hold_feature_slices_and_parameters(tmp_path):
    for kind, at in (("bloom", "@attn.{q,v}"), ("mixtral", ["@ff.down", "@attn.v"])):
        model = build(kind)
        batch = inputs(kind, model)
        delta = randomize(dk.attach(model, dk.LoRA(r=2, at=at)))
        adapted = hidden(model(**batch))
        delta.save(tmp_path / kind)
        delta.detach()
        again = dk.load(tmp_path / kind, build(kind))
        assert torch.equal(hidden(again.backbone(**batch)), adapted)
        assert sorted(again.state_dict()) == sorted(delta.state_dict())
        with pytest.raises(dk.BackboneMismatch):
            dk.load(tmp_path / kind, build("bert"))


def test_the_card_is_lines_of_markdown(saved):
    lines = (saved / "README.md").read_text().splitlines()
    assert lines[:3] == ["---", "library_name: deltakit", 'tags: ["deltakit", "lora"]']
    assert {"# A delta for Transformer", "```python", "import deltakit as dk", "```"} <= {*lines}
    assert (
        "| `lora` | r=3, alpha=16, start=kaiming, dropout=0.0, keep=exact | `layers.{0-1}.self_attn.{q_proj,v_proj}` | 480 |"
        in lines
    )


@pytest.mark.parametrize("format", ["deltakit", "peft"])
def test_the_hub_reads_the_card(tmp_path, format):
    model = build("bert")
    model.config._name_or_path = "someone/a-model"
    delta = attached(model, dk.LoRA(r=3))
    delta.save(tmp_path, format=format, results={"accuracy": 0.93, "seed": "7|8"})
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    library = {"deltakit": "deltakit", "peft": "peft"}[format]
    assert card.data.to_dict() == {
        "library_name": library,
        "tags": list(dict.fromkeys([library, "deltakit", "lora"])),
        "base_model": "someone/a-model",
        "base_model_relation": "adapter",
        "metrics": ["accuracy", "seed"],
    }
    assert "| accuracy | 0.93 |" in card.text
    assert r"| seed | 7\\|8 |" in card.text
    # The lines to load it run, with the folder in its place and a model that is here.
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER_OR_REPOSITORY", str(tmp_path)).replace("someone/a-model", str(tmp_path / "base"))
    with delta.detached():
        model.save_pretrained(tmp_path / "base")
    names = {}
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        exec(code, names)
    found = hidden(names["model"].eval()(**inputs("bert", model)))
    torch.testing.assert_close(found, hidden(model(**inputs("bert", model))), rtol=1e-5, atol=1e-6)


def test_the_fingerprint_samples_matrices_where_there_are_any():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert fingerprint(model)["values"].keys() == {"0.weight"}
    assert fingerprint(model[1])["values"].keys() == {"weight", "bias"}
    assert fingerprint(model, leave_out=["0.weight"])["values"].keys() == {"0.bias", "1.weight", "1.bias"}


def test_a_soft_prompt_at_other_places_is_another_backbones(tmp_path):
    folder = attached(build("bert"), dk.SoftPrompt(tokens=2)).save(tmp_path / "saved")
    forge(folder, config=lambda c: c["methods"][0]["targets"].append("encoder"))
    with pytest.raises(
        dk.CheckpointError,
        match="soft_prompt has 3 targets in the file, but would have 2 on this backbone; they differ at encoder",
    ):
        dk.load(folder, build("bert"))

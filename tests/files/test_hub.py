"""Push and load through the real `huggingface_hub` client, against a Hub on loopback."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import deltakit as dk
from deltakit.cli import main
from support.loopback_hub import LoopbackHub
from support.models import Transformer, ids, randomize, same, snapshot

TOKEN = LoopbackHub.TOKEN


@pytest.fixture
def delta():
    torch.manual_seed(3)
    delta = dk.attach(Transformer().eval(), dk.LoRA(r=3), train="@head")
    randomize(delta)
    return delta


def fresh():
    torch.manual_seed(3)
    return Transformer().eval()


def test_push_and_load(hub, delta, tmp_path):
    url = delta.push("me/lora", token=TOKEN)
    assert url == f"{hub.endpoint}/me/lora"
    model = fresh()
    dk.load("me/lora", model)
    assert torch.equal(model(ids()), delta.backbone(ids()))
    files = hub.repos["me/lora"].commits[-1][1]
    saved = delta.save(tmp_path / "saved")
    for name in ("delta_model.safetensors", "delta_config.json"):
        assert (saved / name).read_bytes() == files[name]
    assert b'delta = dk.load("me/lora", model)\n' in files["README.md"]
    assert len(hub.repos["me/lora"].commits) == 1


def test_the_file_of_tensors_alone_is_a_delta(hub, delta, monkeypatch, tmp_path):
    saved = delta.save(tmp_path / "saved")
    hub.add_repo("me/bare", {"delta_model.safetensors": (saved / "delta_model.safetensors").read_bytes()})
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        model = fresh()
        dk.load("me/bare", model)
        assert torch.equal(model(ids()), delta.backbone(ids()))


def test_the_readable_copy_alone_is_none(hub, delta, tmp_path):
    saved = delta.save(tmp_path / "saved")
    hub.add_repo("me/copy", {"delta_config.json": (saved / "delta_config.json").read_bytes()})
    with pytest.raises(
        dk.HubError,
        match=r"expected delta_model\.safetensors, .* found delta_config\.json; pass the folder or repository",
    ):
        dk.load("me/copy", fresh())


def test_only_loopback_was_asked(hub, delta):
    delta.push("me/lora", token=TOKEN, private=True)
    assert hub.repos["me/lora"].private
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_revisions(hub, delta):
    delta.push("me/lora", token=TOKEN)
    first = hub.repos["me/lora"].commits[-1][0]
    before = delta.backbone(ids())
    randomize(delta)
    delta.push("me/lora", token=TOKEN, message="Second")
    one, two = fresh(), fresh()
    dk.load("me/lora", one, revision=first)
    dk.load("me/lora", two)
    assert torch.equal(one(ids()), before)
    assert torch.equal(two(ids()), delta.backbone(ids()))


def test_branches(hub, delta):
    delta.push("me/lora", token=TOKEN)
    before = delta.backbone(ids())
    randomize(delta)
    for _ in range(2):
        delta.push("me/lora", token=TOKEN, revision="next")
    one, two = fresh(), fresh()
    dk.load("me/lora", one)
    dk.load("me/lora", two, revision="next")
    assert torch.equal(one(ids()), before)
    assert torch.equal(two(ids()), delta.backbone(ids()))


def test_a_connection_cut_in_the_middle_of_a_file(hub, delta, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    delta.push("me/lora", token=TOKEN)
    hub.repos["me/lora"].cut = "delta_model.safetensors"
    model = fresh()
    before = snapshot(model)
    with pytest.raises(
        dk.HubError, match=r"^me/lora: the download of delta_model\.safetensors was cut off: load again$"
    ):
        dk.load("me/lora", model)
    same(snapshot(model), before)
    hub.repos["me/lora"].cut = ""
    dk.load("me/lora", model)
    assert torch.equal(model(ids()), delta.backbone(ids()))


def test_the_cache_serves_when_the_hub_is_gone(hub, delta):
    delta.push("me/lora", token=TOKEN)
    dk.load("me/lora", fresh())
    hub.stop()
    model = fresh()
    dk.load("me/lora", model)
    assert torch.equal(model(ids()), delta.backbone(ids()))


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        (
            "me/missing",
            {},
            r"me/missing: no local folder 'me/missing' exists, and the Hub has no such repository, or it is private: check",
        ),
        (
            "me/private",
            {},
            r"me/private: .* the Hub has no such repository, or it is private: .* log in with `hf auth login`",
        ),
        ("me/gated", {"token": LoopbackHub.READER}, r"me/gated: this repository is gated: ask for access"),
        (
            "me/other",
            {},
            r"me/other: there is no delta here: expected delta_model.safetensors, .* another library, found a.txt, b.txt; pass",
        ),
        ("me/other", {"revision": "v9"}, r"me/other: the repository has no revision 'v9'"),
        ("me/other", {"token": "hf_wrong"}, r"me/other: the token is not valid"),
    ],
)
def test_each_refusal_is_one_clear_line(hub, repo, options, message):
    hub.add_repo("me/other", {"a.txt": b"1", "b.txt": b"2"})
    hub.add_repo("me/private", {}, private=True)
    hub.add_repo("me/gated", {}, gated=True)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(dk.HubError, match=message) as caught:
        dk.load(repo, model, **options)
    assert "\n" not in str(caught.value)
    same(before, snapshot(model))


def test_no_network(hub, delta, monkeypatch):
    hub.stop()
    with pytest.raises(
        dk.HubError,
        match="me/lora: no local folder 'me/lora' exists, and the Hub cannot be reached and the cache has no copy",
    ):
        dk.load("me/lora", fresh())
    with pytest.raises(dk.HubError, match="me/lora: the Hub cannot be reached"):
        delta.push("me/lora", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(dk.HubError, match="unset HF_HUB_OFFLINE"):
        dk.load("me/lora", fresh())


def test_no_right_to_write(hub, delta):
    with pytest.raises(dk.HubError, match="me/lora: this token has no permission to write to the repository"):
        delta.push("me/lora", token=LoopbackHub.READER)
    with pytest.raises(
        dk.HubError, match="me/lora: the Hub asks for a token to write to the repository, and none was sent: log in"
    ):
        delta.push("me/lora", token=False)


@pytest.mark.parametrize(
    "source",
    [
        "my-delta",
        "./missing",
        "../missing",
        "runs/last/delta",
        "/a/b/c",
        "C:\\runs\\delta",
        "runs\\delta",
        Path("me/lora"),
    ],
)
def test_a_missing_folder_is_not_looked_up_on_the_hub(hub, source):
    with pytest.raises(
        dk.CheckpointError, match="no such folder, and this is not a Hub repository id .* check the path"
    ):
        dk.load(source, fresh())
    assert not hub.requests


def test_any_file_of_a_delta_stands_for_all(delta, tmp_path):
    saved = delta.save(tmp_path / "saved")
    model = fresh()
    dk.load(saved / "delta_config.json", model)
    assert torch.equal(model(ids()), delta.backbone(ids()))


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        dk.CheckpointError, match=r"notes\.txt: there is no delta here: .* found notes\.txt; pass the folder"
    ):
        dk.load(tmp_path / "notes.txt", fresh())


def test_from_the_cache_alone(hub, delta, tmp_path):
    delta.push("me/lora", token=TOKEN)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    with pytest.raises(dk.HubError, match=r"cache has no copy of this repository; omit local_files_only= to download"):
        dk.load("me/lora", fresh(), **options)
    dk.load("me/lora", fresh(), cache_dir=tmp_path / "cache")
    asked, model = len(hub.requests), fresh()
    dk.load("me/lora", model, **options)
    assert torch.equal(model(ids()), delta.backbone(ids()))
    assert len(hub.requests) == asked


def test_private_repository_with_a_token(hub, delta):
    delta.push("me/lora", token=TOKEN, private=True)
    model = fresh()
    dk.load("me/lora", model, token=LoopbackHub.READER)
    assert torch.equal(model(ids()), delta.backbone(ids()))


@pytest.mark.parametrize(
    ("count", "found"), [(0, "nothing"), (3, "f0, f1, f2; pass"), (12, "f0, .*, f8, f9 and 2 more; pass")]
)
def test_a_repository_of_something_else_says_what_it_holds(hub, count, found):
    hub.add_repo("me/other", {f"f{n}": b"1" for n in range(count)})
    with pytest.raises(dk.HubError, match=f"expected delta_model.safetensors, .* found {found}"):
        dk.load("me/other", fresh())


@pytest.fixture
def several(hub, delta, tmp_path):
    """A repository as PEFT and others upload them: deltas in folders, and one that is a file."""
    files = {"README.md": b"Three", "unet/config.json": b"{}"}
    for folder, format in {"style": "peft", "ours/[1]": "deltakit"}.items():
        saved = delta.save(tmp_path / format, format=format)
        files |= {f"{folder}/{path.name}": path.read_bytes() for path in saved.iterdir()}
    flat = {f"lycoris_{path.replace('.', '_')}": modules[0] for path, modules in delta.modules_of("lora").items()}
    tensors = {f"{name}.lora_down.weight": module.A for name, module in flat.items()}
    tensors |= {f"{name}.lora_up.weight": module.B for name, module in flat.items()}
    tensors |= {f"{name}.alpha": torch.tensor(16.0) for name in flat}
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    files["lora.safetensors"] = (tmp_path / "lora.safetensors").read_bytes()
    hub.add_repo("me/several", files)
    return hub


@pytest.mark.parametrize(
    "inside",
    [
        "style",
        "style/",
        "style/adapter_model.safetensors",
        "ours/[1]",
        "ours/[1]/delta_config.json",
        "lora.safetensors",
    ],
)
def test_a_folder_or_file_of_a_repository(several, delta, inside, tmp_path, monkeypatch):
    model = fresh()
    loaded = dk.load("me/several", model, subfolder=inside)
    if inside != "lora.safetensors":
        assert torch.equal(model(ids()), delta.backbone(ids()))
    for path, (module,) in loaded.modules_of("lora").items():
        assert torch.equal(module.A, delta.modules_of("lora")[path][0].A)
    assert loaded.modules.keys() == delta.modules.keys()
    assert dk.inspect("me/several", subfolder=inside).source == f"me/several/{inside}"
    wanted = {inside.strip("/").split("/")[0]}
    asked = {
        request.rpartition("/resolve/")[2].partition("/")[2] for request in several.requests if "/resolve/" in request
    }
    assert {name.replace("%5B", "[").split("/")[0] for name in asked} <= wanted


def test_a_folder_on_this_machine(delta, tmp_path):
    delta.save(tmp_path / "all" / "style")
    model = fresh()
    dk.load(tmp_path / "all", model, subfolder="style")
    assert torch.equal(model(ids()), delta.backbone(ids()))
    with pytest.raises(dk.CheckpointError, match="all: it has no other; pass the path of a folder or file in it"):
        dk.inspect(tmp_path / "all", subfolder="other")


NOT_INSIDE = ["..", "a/../../b", "/etc", "", "."]


@pytest.mark.parametrize("inside", NOT_INSIDE)
def test_subfolders_are_inside(hub, inside, tmp_path):
    for source in ("me/several", tmp_path):
        with pytest.raises(dk.OptionError, match=r"subfolder='.*': expected a folder or file in .*, such as 'style'"):
            dk.load(source, fresh(), subfolder=inside)
    assert not hub.requests


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (
            None,
            r"me/several: there is no delta here, but in folders below: ours/\[1\], style; pass one of them as the subfolder",
        ),
        ("other", r"me/several/other: the repository has no other; its folders are ours/\[1\], style, unet"),
        ("unet", "me/several/unet: there is no delta here: .* found config.json"),
        ("ours", r"me/several/ours: there is no delta here, but in folders below: \[1\]; pass"),
        ("README.md", "me/several/README.md: there is no delta here: .* found README.md"),
    ],
)
def test_what_a_repository_has_instead(several, inside, message):
    with pytest.raises(dk.HubError, match=message):
        dk.load("me/several", fresh(), subfolder=inside)


def test_a_lora_of_kohya_is_asked_for_by_name(hub):
    hub.add_repo("me/kohya", {"style.safetensors": b"1"})
    with pytest.raises(
        dk.HubError, match=r"if style.safetensors is a LoRA of kohya or LyCORIS, pass its name as the subfolder"
    ):
        dk.load("me/kohya", fresh())


def test_the_command_line_knows_subfolders(several, capsys):
    assert main(["inspect", "me/several", "--subfolder", "style"]) == 0
    assert capsys.readouterr().out.startswith("a delta in me/several/style, format peft")

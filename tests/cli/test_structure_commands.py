"""`deltakit show`, `plan`, `roles` and `methods`: models are built as their configs say, without weights."""

import json

import pytest
import transformers

import deltakit as dk
from deltakit.cli import main
from support.tiny_transformers import build


def run(capsys, *arguments, code=0):
    """What a command prints on the standard output; with another code, on the standard error."""
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


@pytest.fixture
def llama(tmp_path):
    """A folder with the config of a decoder that has a head, and no weights."""
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "llama"), transformers.LlamaConfig)
    return tmp_path / "llama"


def test_show(toy, capsys):
    assert "0-1 (BertLayer)" in run(capsys, "show", toy, "--depth", "3")


def test_the_json_of_a_tree_is_that_of_the_view(llama, capsys):
    found = json.loads(run(capsys, "show", llama, "--depth", "2", "--lora", "default", "--json"))
    model = build("llama", auto=transformers.AutoModelForCausalLM)
    dk.attach(model, dk.LoRA())
    assert found == json.loads(dk.show(model, depth=2).json())


def test_the_model_is_the_one_that_the_config_names(llama, capsys):
    for model in (llama, llama / "config.json"):
        out = run(capsys, "show", model)
        assert "lm_head (Linear)" in out
        assert "└── 0-1 (LlamaDecoderLayer)" in out
    # A path that `roles` prints is one of the model that the user has.
    roles = json.loads(run(capsys, "roles", llama, "--json"))["roles"]
    model = build("llama", auto=transformers.AutoModelForCausalLM)
    assert roles == {role: list(paths) for role, paths in dk.roles(model).items()}
    assert "lm_head" not in run(capsys, "show", llama, "--class", "LlamaModel")


def test_a_config_without_a_class_is_built_without_a_head(llama, capsys):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "architectures": ["StrangeModel"]}))
    assert main(["show", str(llama)]) == 0
    out, err = capsys.readouterr()
    assert "lm_head" not in out
    assert err == (
        f"deltakit: warning: {llama}: the class that its config names, StrangeModel, is not in transformers, so this is the "
        "model without a head; name one with --class\n"
    )


def test_a_preview_of_deltas(llama, capsys):
    out = run(capsys, "show", llama, "--lora", "@attn.q", "--lora", "@attn.v", "--ia3", "default", "--set", "lora.r=3")
    assert "+lora r=3 alpha=16  A:[3, 24] B:[32, 3]" in out
    assert "+ia3" in out
    plan = json.loads(run(capsys, "plan", llama, "--lora", "@attn.{q,v}", "--set", "lora.r=3", "--json"))
    config = build("llama", auto=transformers.AutoModelForCausalLM)
    expected = dk.plan(config, dk.LoRA(r=3, at="@attn.{q,v}"))
    (method,) = plan["methods"]
    assert (method["name"], method["summary"], method["paths"]) == ("lora", "r=3 alpha=16", list(expected.built[0]))
    assert plan["parameters"] == method["parameters"] == expected.num_parameters
    text = run(capsys, "plan", llama, "--lora", "@attn.q", "--train", "@head", "--class", "LlamaForCausalLM")
    assert "plan for LlamaForCausalLM" in text
    assert "lm_head.weight" in text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--lora", "default", "--lora", "@attn.q"], "--lora: 'default' stands for the default positions"),
        (["--lora", "default", "--set", "lora.rank=3"], "lora has no option 'rank'; it has at, of, exclude, r,"),
        (["--lora", "default", "--set", "lora.alhpa=3"], "did you mean alpha?"),
        (["--lora", "default", "--set", "lorra.r=3"], "there is no method 'lorra'; did you mean lora?"),
        (["--lora", "default", "--set", "ia3.side=input"], "add --ia3 with a selector or `default`"),
        (["--lora", "default", "--set", "r=3"], "expected METHOD.OPTION=VALUE, such as lora.r=16"),
        (["--lora", "default", "--set", "LORA.r=3"], "there is no method 'LORA'; did you mean lora?"),
        (["--lora", "default", "--set", "lora.r=0"], "r=0"),
        (["--lora", "default", "--set", "lora.r=abc"], "LoRA(r='abc'): expected a whole number"),
        (["--lora", "default", "--set", "lora.r=3", "--set", "lora.r=4"], "lora.r has a value already, 3"),
        (["--lora", "@attn.q", "--set", "lora.at=v"], "lora.at has a value already, ['@attn.q']"),
        (["--lora", "default", "--class", "Nope"], "--class Nope: transformers has no model of that name"),
    ],
)
def test_wrong_command_lines(llama, arguments, what, capsys):
    """They are wrong whatever the model is."""
    for command in ("plan", "show"):
        err = run(capsys, command, llama, *arguments, code=2)
        assert what in err
        assert err.startswith("deltakit: Invalid value: ")
        assert err.endswith(f" See deltakit {command} --help\n")
        assert err.count("\n") == 1


def test_a_tree_that_trains_without_a_delta(capsys):
    assert "add a method, such as --lora default. See" in run(capsys, "show", "nothere", "--train", "@head", code=2)


def test_a_selector_that_another_model_may_have(llama, capsys):
    err = run(capsys, "plan", llama, "--lora", "attn_q", code=1)
    assert err.startswith("deltakit: selector 'attn_q' matches none of the 32 modules of LlamaForCausalLM; ")
    assert err.count("\n") == 1


def test_options_without_a_default_have_an_example(llama, capsys):
    assert main(["plan", str(llama), "--adalora", "default"]) == 0
    assert "total_steps=" in capsys.readouterr().err


def test_a_plan_needs_a_method(llama, capsys):
    err = run(capsys, "plan", llama, code=2)
    assert err == (
        "deltakit: Invalid value: no method is given; add one or several, such as --lora default or --lora '@attn.q'. See "
        "deltakit plan --help\n"
    )


def test_targets(llama, capsys):
    found = json.loads(run(capsys, "targets", llama, "--json"))["targets"]
    assert {leaf["name"]: leaf["count"] for leaf in found}["down_proj"] == 2
    assert found == dk.targets(build("llama", auto=transformers.AutoModelForCausalLM)).to_dict()["targets"]
    assert "lm_head" in run(capsys, "targets", llama)


def test_roles(toy, capsys):
    assert "@attn.q" in run(capsys, "roles", toy)
    assert "nothing: no such folder, and this is not a Hub id" in run(capsys, "roles", toy / "nothing", code=1)


def test_a_model_that_is_nowhere(capsys):
    assert run(capsys, "show", "/nothing", code=1) == (
        "deltakit: /nothing: no such folder, and this is not a Hub id such as 'user/model'; check the path\n"
    )


def test_a_model_that_is_neither_here_nor_on_the_hub(hub, monkeypatch, capsys):
    def never(seconds):
        raise AssertionError(f"it waits {seconds} s to try again")

    monkeypatch.setattr("time.sleep", never)
    for command in (["show"], ["plan", "--lora", "default"], ["demo", "--model"]):
        err = run(capsys, *command, "user/nothere", code=1)
        assert err.startswith("deltakit: user/nothere: no local folder 'user/nothere' exists, and the Hub has no such ")
        assert err.count("\n") == 1
    # Nobody answers at a port that the system keeps for other things.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    for command in (["show"], ["demo", "--model"]):
        assert run(capsys, *command, "user/nothere", code=1) == (
            "deltakit: user/nothere: no local folder 'user/nothere' exists, and the Hub cannot be reached and the cache has "
            "no copy: check the network, or unset HF_HUB_OFFLINE\n"
        )


def test_a_folder_without_a_config_is_one_sentence(tmp_path, capsys):
    for command in ("show", "targets"):
        err = run(capsys, command, tmp_path, code=1)
        assert err == f"deltakit: {tmp_path}: there is no config.json in this folder; pass the folder of a model\n"
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    err = run(capsys, "show", tmp_path, code=1)
    assert err.endswith("no config.json in this folder; it is a delta (peft): deltakit inspect shows it\n")


@pytest.mark.parametrize(
    "command", [["show"], ["roles"], ["targets"], ["plan", "--lora", "default"], ["methods", "lora"]]
)
def test_json_and_pages(command, llama, tmp_path, capsys):
    model = [] if command[0] == "methods" else [llama]
    page = tmp_path / "page.html"
    assert main([str(a) for a in (command[0], *model, *command[1:], "--json", "--html", page)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err == f"deltakit: the page is in {page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    # The tree has a script of its own, and no page loads anything.
    assert ("<script" in text) == (command[0] == "show")
    assert " src=" not in text
    assert "lora" in text or "q_proj" in text
    err = run(capsys, command[0], *model, *command[1:], "--html", tmp_path / "no" / "page.html", code=1)
    assert "it cannot be written: No such file or directory; pass a file in a folder that is there" in err


def test_markup_in_names_is_text(tmp_path, capsys):
    config = build("bert").config
    config.save_pretrained(tmp_path / "<b>x")
    run(capsys, "roles", tmp_path / "<b>x", "--html", tmp_path / "page.html")
    assert "<b>" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_filter(llama, capsys):
    out = run(capsys, "show", llama, "--filter", "@attn.q", "--filter", "lm_head")
    assert [word for word in ("q_proj", "k_proj", "mlp", "lm_head") if word in out] == ["q_proj", "lm_head"]
    assert "left out by the filter: " in out
    err = run(capsys, "show", llama, "--filter", "q_prj", code=1)
    assert "selector 'q_prj' matches none of" in err
    assert "nearest: model.layers.0.self_attn.q_proj" in err

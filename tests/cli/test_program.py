"""The program around the commands: help, exit codes, errors of one line, completion, and what it imports."""

import gc
import inspect
import os
import runpy
import subprocess
import sys
from typing import get_args

import pytest

import deltakit as dk
from deltakit.cli import main
from deltakit.cli.app import program
from deltakit.cli.arguments import Format
from deltakit.cli.method_lines import method_lines
from deltakit.files import Written
from support.processes import in_a_process
from support.tiny_transformers import build

COMMANDS = (
    "show",
    "plan",
    "targets",
    "roles",
    "pick",
    "methods",
    "inspect",
    "convert",
    "merge",
    "push",
    "demo",
    "compare",
)


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert f" {command} " in out
    # Without a command it is a usage error, and the help says more than a line could.
    assert main([]) == 2
    assert capsys.readouterr().out.strip() == out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_and_says_how_to_debug(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"deltakit {command} " in out[out.index("Examples:") :]
    assert "--debug" in out


def test_examples_are_command_lines():
    """Each example parses: what it names is an argument or option that there is."""
    import typer

    group = typer.main.get_command(program())
    for name, command in group.commands.items():
        examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("deltakit ")]
        assert examples, name
        for example in examples:
            import shlex

            words = shlex.split(example.replace("\\[", "["))[2:]
            command.make_context(name, words, resilient_parsing=False)


def test_every_method_has_an_option(capsys):
    for command in ("show", "plan"):
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        for name in dk.METHODS:
            assert f"--{name.replace('_', '-')} " in out, name


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["shwo"], "No such command 'shwo'. Did you mean 'show'? See deltakit --help"),
        (["show"], "Missing argument 'MODEL'. See deltakit show --help"),
        (
            ["show", "x", "--adaptr", "y"],
            "No such option: --adaptr; did you mean --adapter? See deltakit show --help",
        ),
        (["show", "x", "--depth", "0"], "greater than or equal to 1. See deltakit show --help"),
        (["show", "x", "--nope"], "No such option: --nope. See deltakit show --help"),
        (["demo", "--examples", "0"], "See deltakit demo --help"),
        (["convert", "a", "b", "--to", "onnx"], "See deltakit convert --help"),
        (
            ["show", ""],
            "Invalid value for 'MODEL': it is empty; write '.' for the working directory. See deltakit show",
        ),
        (["inspect", ""], "Invalid value for 'DELTA': it is empty"),
        (["merge", "", "b", "c"], "Invalid value for 'MODEL': it is empty"),
        (["push", "a", "b/c/d"], "REPO: 'b/c/d' is no Hub id, such as user/my-delta. See deltakit push --help"),
        (
            ["compare", "a", "b", "--methods", "lorra"],
            "no method 'lorra'; did you mean lora? See deltakit compare --help",
        ),
        (["compare", "a", "b", "--methods", ","], "--methods: no method is named"),
        (
            ["compare", "a", "b", "--methods", "lora,average"],
            "--methods: average weighs other deltas, so it cannot be ",
        ),
        (["compare", "a", "b", "--text", "c", "--label", "c"], "--text and --label: both are 'c'; name two columns."),
        (["pick", "a", "--how", "terminal", "--port", "3"], "--port: only the browser has a port"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments, what, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deltakit: ")
    assert what in err
    assert err.count("\n") == 1


def test_debug_prints_the_traceback_too(capsys):
    assert main(["methods", "lorra", "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    assert main(["show", "/nothing", "--debug"]) == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert last.startswith("deltakit: /nothing: no such folder")


def test_an_error_that_nobody_expected_is_one_line(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("deltakit.cli.catalogue.method_table", broken)
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == (
        "deltakit: ZeroDivisionError: a; deltakit did not expect this: report it with what --debug prints\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "\ndeltakit: stopped\n"),
        (OSError(28, "No space left on device"), 1, "deltakit: No space left on device\n"),
        (PermissionError(13, "Permission denied", "a\nb"), 1, "deltakit: a\\nb: Permission denied\n"),
    ],
)
def test_what_the_user_or_the_machine_stops(error, code, line, monkeypatch, capsys):
    def stopped(*_):
        raise error

    monkeypatch.setattr("deltakit.cli.catalogue.method_table", stopped)
    assert main(["methods"]) == code
    assert capsys.readouterr() == ("", line)


def test_ctrl_c_while_the_command_line_is_imported():
    code = """
import sys
class Stopped:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stopped())
from deltakit.__main__ import main
sys.exit(main())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "\ndeltakit: stopped\n")


def test_the_collector_works_as_before_after_a_command(capsys):
    before = gc.get_threshold()
    assert main(["methods", "lora"]) == 0
    assert main(["inspect", "/nothing"]) == 1
    assert gc.get_threshold() == before


@pytest.mark.parametrize("arguments", [["methods", "--json"], ["--help"], ["show", "--help"]])
def test_a_reader_that_has_seen_enough(arguments):
    """As in `deltakit methods | head -1`: the pipe is closed before anything is written."""
    out, into = os.pipe()
    os.close(out)
    ran = subprocess.run(
        [sys.executable, "-m", "deltakit", *arguments], stdout=into, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(into)
    assert ran.stderr == ""


@pytest.mark.parametrize("width", [20, 40, 200])
def test_help_fits_into_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for line in ("--help", *(f"{command} --help" for command in COMMANDS)):
        assert main(line.split()) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= width, line


def test_completion(monkeypatch, capsys, tmp_path):
    """The shell gets commands, options, methods and paths."""
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)

    def completed(line):
        monkeypatch.setenv("_DELTAKIT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.split()

    assert completed("deltakit sh") == ["show"]
    assert completed("deltakit methods lo") == ["loha", "lokr", "lora", "low_rank_adapter"]
    assert completed("deltakit show m") == ["my-model/"]
    assert "--lora" in completed("deltakit plan my-model --lo")
    assert completed("deltakit convert a b --to p") == ["peft"]


@pytest.mark.parametrize(("arguments", "code"), [("--version", 0), ("demo --model nothere", 1), ("show", 2)])
def test_the_program_exits_with_the_code(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deltakit", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("deltakit", run_name="__main__")
    assert caught.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == bool(code)


def test_the_standard_error_is_quiet(tmp_path):
    """In a process of its own, where the other libraries are imported anew."""
    build("gpt2").config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "deltakit", "show", str(tmp_path), "--class", "GPT2Model"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "0-1 (GPT2Block)" in ran.stdout


def test_help_and_the_table_of_methods_import_no_torch():
    lines = ["--help", "--version", "methods", "methods lora --json", *(f"{command} --help" for command in COMMANDS)]
    code = (
        "import sys; from deltakit.cli import main; "
        f"codes = {{main(line.split()) for line in {lines}}}; print(codes, 'torch' in sys.modules)"
    )
    assert in_a_process(code) == "{0} False"


def test_what_help_knows_without_torch_is_what_torch_has():
    assert method_lines() == {
        name: " ".join(inspect.getdoc(kind).partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
        for name, kind in sorted(dk.METHODS.items())
        if kind.__module__.startswith("deltakit.methods.")
    }
    assert get_args(get_args(Format)[0]) == get_args(Written)


def test_commands_without_a_model_import_no_transformers(tmp_path):
    delta = dk.attach(__import__("torch").nn.Linear(5, 7), dk.LoRA(r=2, at="^"))
    with pytest.warns(dk.DeltaWarning):
        delta.save(tmp_path)
    code = (
        "import sys; from deltakit.cli import main; "
        f"codes = [main(line.split()) for line in ('--help', 'show --help', 'methods', 'inspect {tmp_path}')]; "
        "print([m for m in ('transformers', 'accelerate', 'peft') if m in sys.modules], codes)"
    )
    assert in_a_process(code) == "[] [0, 0, 0, 0]"

"""`deltakit show` and `deltakit roles`, and arguments that the command line refuses."""

import pytest

from deltakit.cli import main


def test_show(toy, capsys):
    assert main(["show", str(toy), "--depth", "3"]) == 0
    assert "0-1(BertLayer)" in capsys.readouterr().out


def test_roles(toy, capsys):
    assert main(["roles", str(toy)]) == 0
    assert "@attn.q" in capsys.readouterr().out
    assert main(["roles", str(toy / "nothing")]) == 1
    assert "pass a folder or Hub id with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["demo", "--examples", "0"], ["nothing"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2

"""`deltakit show` and `deltakit roles`, and arguments that the command line refuses."""

import pytest

from deltakit.cli import main


def test_show(toy, capsys):
    assert main(["show", str(toy), "--depth", "3"]) == 0
    assert "0-1 (BertLayer)" in capsys.readouterr().out


def test_roles(toy, capsys):
    assert main(["roles", str(toy)]) == 0
    assert "@attn.q" in capsys.readouterr().out
    assert main(["roles", str(toy / "nothing")]) == 1
    assert "nothing: no such folder, and this is not a Hub id" in capsys.readouterr().err


def test_a_model_that_is_nowhere(capsys):
    assert main(["show", "/nothing"]) == 1
    assert (
        "/nothing: no such folder, and this is not a Hub id such as 'user/model'; check the path"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("arguments", [[], ["demo", "--examples", "0"], ["nothing"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2

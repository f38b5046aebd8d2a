"""The wheel: what it holds, and that it works installed in a virtual environment of its own, away from these sources."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import deltakit as dk

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-index"]
INFO = f"deltakit_tuning-{dk.__version__}.dist-info"


def run(*command, cwd):
    # Only what is installed is to be found: no path from outside, no folder of the caller.
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, env=outside)
    assert ran.returncode == 0, f"{command}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of these sources, built by the hatchling that is installed, so without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture
def installed(wheel, tmp_path):
    """The folder of the programs of a new environment that has the wheel, and the tests' own for what it depends on."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=os.name != "nt")
    places = {"base": str(home), "platbase": str(home)}
    scripts, packages = (Path(sysconfig.get_path(name, "venv", places)) for name in ("scripts", "purelib"))
    run(*PIP, "--python", scripts / "python", "install", *OFFLINE, wheel, cwd=tmp_path)
    # After the wheel's own folder; the link to these sources that an editable install has is not followed from there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = message_from_bytes(archive.read(f"{INFO}/METADATA"))
        scripts = archive.read(f"{INFO}/entry_points.txt").decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deltakit").rglob("*.py")}
    data = {f"deltakit/demo/snips/{name}" for name in ("README.md", "train.tsv", "valid.tsv")} | {
        "deltakit/py.typed",
        "deltakit/cli/methods.json",
    }
    about = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert names == sources | data | about
    assert (metadata["Name"], metadata["Version"]) == ("deltakit-tuning", dk.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == ["demo", "docs", "mutation", "notebook", "test", "tui"]
    assert scripts.split() == ["[console_scripts]", "deltakit", "=", "deltakit.__main__:main"]


def test_the_wheel_works_where_it_is_installed(installed, tmp_path):
    code = (
        "import deltakit, deltakit.demo.data as d; print(deltakit.__file__, len(d.read('train')), len(d.read('valid')))"
    )
    place, *rows = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(tmp_path)
    assert rows == ["4000", "700"]
    assert run(installed / "python", "-m", "deltakit", "--version", cwd=tmp_path) == f"deltakit {dk.__version__}\n"
    config = {
        "model_type": "bert",
        "hidden_size": 6,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 11,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "0-2 (BertLayer)" in run(installed / "deltakit", "show", ".", cwd=tmp_path)

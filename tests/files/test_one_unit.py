"""A save is one unit: what is read is one of the deltas that were saved, whatever interrupts, and whoever else saves or reads."""

import contextlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltakit as dk
from deltakit.files import checkpoint, partial
from support.damaged_files import CONFIG, TENSORS, backbone, made, result
from support.forged_files import edit

NAMES = [TENSORS, CONFIG, "README.md"]
SEVERAL = (
    "belongs to another save than delta_model.safetensors, which holds the delta that was loaded; save the delta again"
)


@pytest.fixture
def folder(tmp_path):
    made(5).save(tmp_path / "saved")
    return tmp_path / "saved"


def loaded(folder):
    """Which of the two deltas a folder holds, by their alphas; None for a mixture."""
    got = result(dk.load(folder, backbone()))
    return next((alpha for alpha in (5, 7) if torch.equal(got, result(made(alpha)))), None)


def hidden(folder):
    return sorted(file.name for file in folder.glob(".*"))


KILLED = """
import os, sys
from pathlib import Path
import torch
from deltakit.files import checkpoint
from support.damaged_files import made

delta = made(7)

def dying(function, left):
    def call(*args, **kwargs):
        if not left.pop():
            os._exit(9)
        return function(*args, **kwargs)
    return call

for folder in sys.argv[1:]:
    process = os.fork()
    if process == 0:
        left = [False] + [True] * int(Path(folder).name)
        Path.mkdir, Path.replace, Path.open = (dying(f, left) for f in (Path.mkdir, Path.replace, Path.open))
        Path.write_text, Path.write_bytes, os.fsync = (dying(f, left) for f in (Path.write_text, Path.write_bytes, os.fsync))
        checkpoint.save_file = dying(checkpoint.save_file, left)
        delta.save(folder)
        os._exit(9)
    os.waitpid(process, 0)
"""


def test_a_save_that_is_killed_anywhere_leaves_one_of_the_two(tmp_path):
    """The process ends at its first, second, third ... step: no code of ours runs afterwards, as with SIGKILL."""
    folders = [tmp_path / str(step) for step in range(20)]
    for folder in folders:
        made(5).save(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*map(Path, sys.path), Path(__file__).parents[1]))),
    }
    subprocess.run([sys.executable, "-c", KILLED, *map(str, folders)], env=environment, check=True)
    found = [loaded(folder) for folder in folders]
    assert found == sorted(found, key=(5, 7).index)
    assert {*found} == {5, 7}
    assert any(map(hidden, folders))
    for folder in folders:
        made(5).save(folder)
        assert (loaded(folder), {file.name for file in folder.iterdir()}) == (5, {*NAMES})


def test_a_reader_beside_a_writer_gets_one_of_the_two_and_no_warning(folder, monkeypatch):
    delta, replace, found = made(7), Path.replace, []

    def watched(self, target):
        found.append(loaded(folder))
        replace(self, target)
        found.append(loaded(folder))

    monkeypatch.setattr(Path, "replace", watched)
    delta.save(folder)
    assert found == [5, 7, 7, 7, 7, 7]


def saving_first(function, delta, folder, times=1):
    """A function before which another delta is saved into the folder, a few times."""
    left = iter(range(times))

    def call(*args, **kwargs):
        if next(left, None) is not None:
            delta.save(folder)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("at", ["check_seal", "check_copy"])
def test_a_save_after_the_tensors_were_read_is_no_mixture(folder, monkeypatch, at):
    monkeypatch.setattr(checkpoint, at, saving_first(getattr(checkpoint, at), made(7), folder))
    assert loaded(folder) == 5


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch):
    """safetensors opens the file twice: once for the header, and once for the tensors."""
    opened, delta = checkpoint.safetensors.safe_open, made(7)

    @contextlib.contextmanager
    def mixed(file, framework):
        with opened(file, framework) as header:
            save = saving_first(lambda: None, delta, folder)
            save()
            monkeypatch.undo()
            raise checkpoint.safetensors.SafetensorError("the header of one file and the tensors of another")
            yield header

    monkeypatch.setattr(checkpoint.safetensors, "safe_open", mixed)
    assert loaded(folder) == 7


def test_of_two_writers_one_wins(folder, monkeypatch):
    """The second saves between the two renames of the first, so each has replaced one file last."""
    replace, second, left = Path.replace, made(5), iter([False, True])

    def interrupted(self, target):
        if next(left, False):
            monkeypatch.setattr(Path, "replace", replace)
            assert len(hidden(folder)) == 1
            second.save(folder)
            assert len(hidden(folder)) == 1
        replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    made(7).save(folder)
    assert not hidden(folder)
    with pytest.warns(dk.DeltaWarning, match=SEVERAL):
        assert loaded(folder) == 5
    second.save(folder)
    assert loaded(folder) == 5


def test_the_readable_copy_of_another_delta_has_no_effect(folder, tmp_path):
    other = made(7).save(tmp_path / "other")
    shutil.copy(other / CONFIG, folder / CONFIG)
    with pytest.warns(dk.DeltaWarning, match=SEVERAL):
        assert loaded(folder) == 5


def test_what_dead_saves_left_is_removed_and_what_others_are_writing_is_not(folder):
    dead = folder / f".delta-{'0' * 32}.partial"
    dead.mkdir()
    (dead / ".tmpAbCdEf").write_text("half a file")
    old = folder / f".delta_config.json.{'1' * 32}.partial"
    old.write_text("of deltakit 0.1")
    (folder / ".mine").write_text("")
    with partial.partial_folder(folder) as living:
        assert hidden(folder) == [living.name, ".mine"]
        made(7).save(folder)
        assert hidden(folder) == [living.name, ".mine"]
    assert hidden(folder) == [".mine"]


def test_without_locks_a_save_works_and_removes_nothing_of_others(folder, monkeypatch):
    """Some network drives have none."""

    def refuses(*_):
        raise OSError("no locks here")

    other = folder / f".delta-{'0' * 32}.partial"
    other.mkdir()
    monkeypatch.setattr(partial.fcntl, "flock", refuses)
    made(7).save(folder)
    assert (loaded(folder), hidden(folder)) == (7, [other.name])


def test_both_files_have_the_permissions_that_the_umask_says(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            saved = made(5).save(tmp_path / f"{mask:o}")
        finally:
            os.umask(before)
        assert {name: stat.S_IMODE((saved / name).stat().st_mode) for name in NAMES} == dict.fromkeys(NAMES, mode)


def test_files_are_on_the_disk_before_they_get_their_names(folder, monkeypatch):
    """Otherwise a loss of power can leave an empty file in the place of the old delta."""
    replace, sync, done = Path.replace, os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("to the disk"), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(to.name), replace(self, to)))
    made(7).save(folder)
    assert done == ["to the disk"] * 3 + NAMES


def test_one_delta_always_gives_the_same_bytes(folder, tmp_path):
    again = dk.load(folder, backbone()).save(tmp_path / "again")
    assert [(folder / name).read_bytes() for name in NAMES] == [(again / name).read_bytes() for name in NAMES]


# What is in the way of a save


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond 1,000 bytes, which for the process that writes is the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unchanged_after(folder, message):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    delta = made(7)
    with pytest.raises(
        dk.CheckpointError, match=rf"could not be saved: .*{message}.*what was saved there before is unchanged; free"
    ):
        yield delta
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


refused = contextlib.contextmanager(unchanged_after)


def test_a_full_disk(folder):
    with refused(folder, "File too large") as delta, full_disk():
        delta.save(folder)
    assert (loaded(folder), hidden(folder)) == (5, [])
    with refused(folder, "File too large") as delta, full_disk():
        delta.save(folder.parent / "new")
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize("call", ["mkdir", "replace", "write_text", "open"])
def test_a_folder_that_must_not_be_written(folder, monkeypatch, call):
    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    with refused(folder, "Permission denied") as delta, monkeypatch.context() as patch:
        patch.setattr(Path, call, refuses)
        delta.save(folder)
    assert (loaded(folder), hidden(folder)) == (5, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_the_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with refused(folder, f"{name} is a folder there") as delta:
        delta.save(folder)
    assert not hidden(folder)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(dk.CheckpointError, match="this is a file, and a delta is saved to a folder; pass another path"):
        made(7).save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with refused(tmp_path, "Not a directory") as delta:
        delta.save(tmp_path / "file" / "below")


def test_a_card_in_another_encoding_is_the_user_s_own(folder):
    (folder / "README.md").write_bytes("für mich".encode("latin-1"))
    made(7).save(folder)
    assert loaded(folder) == 7
    assert (folder / "README.md").read_bytes() == b"f\xfcr mich"


# The readable copy


def test_a_copy_that_was_changed_by_hand_is_an_error_that_says_what_to_do(folder):
    edit(folder, lambda config: config["methods"][0].update(alpha=70))
    with pytest.raises(
        dk.CheckpointError,
        match=r"delta_config.json was changed by hand: methods\[0\].alpha is 70 in it and 5 in delta_model.safetensors; changes "
        "in it have no effect: delete it, because delta_model.safetensors holds the same, or save the delta again; for other "
        "options attach a new delta",
    ):
        loaded(folder)
    (folder / CONFIG).unlink()
    assert loaded(folder) == 5
    made(5).save(folder)
    assert json.loads((folder / CONFIG).read_text())["methods"][0]["alpha"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("num_parameters"), "num_parameters is missing in it and 263 in delta_model"),
        (
            lambda c: c["methods"][1]["targets"].append("last"),
            r"methods\[1\].targets is \['norm', 'last'\] in it and \['norm'\] in",
        ),
        (lambda c: c.update(config_sha256="0"), "config_sha256 is '0' in it and "),
        (lambda c: c.update(mine=["x" * 99]), r"mine is \['x+\.\.\. in it and missing in"),
    ],
)
def test_the_error_names_the_first_difference(folder, change, message):
    edit(folder, change)
    with pytest.raises(dk.CheckpointError, match=f"was changed by hand: {message}"):
        loaded(folder)


def test_a_damaged_copy_may_be_deleted(folder):
    (folder / CONFIG).write_text("{")
    with pytest.raises(
        dk.CheckpointError, match="delta_config.json is damaged: Expecting property.*, or delete it, because"
    ):
        loaded(folder)
    (folder / CONFIG).unlink()
    assert loaded(folder) == 5


def test_a_copy_in_another_layout_says_the_same(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert loaded(folder) == 5


def test_links_into_a_cache_are_read_and_replaced(folder, tmp_path):
    """As the Hub's cache has them."""
    blobs, links = tmp_path / "blobs", tmp_path / "links"
    links.mkdir()
    shutil.copytree(folder, blobs)
    for name in NAMES:
        (links / name).symlink_to(blobs / name)
    assert loaded(links) == 5
    made(7).save(links)
    assert (loaded(links), loaded(blobs)) == (7, 5)

"""common/files.py: a file is whole or not there, and a folder belongs to one process."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common import files


def test_publish_replaces_whole_and_flushes_first(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name: (steps.append(name), real(*a))[1]
        )
    files.publish_text(tmp_path / "a.txt", "one\n")
    files.publish_text(tmp_path / "a.txt", "two\n")
    assert (tmp_path / "a.txt").read_text() == "two\n"
    assert steps == ["fsync", "replace", "fsync"] * 2  # the file, the rename, the folder
    assert os.listdir(tmp_path) == ["a.txt"]


def test_temporary_keeps_folder_and_extension_and_is_cleaned(tmp_path):
    left = files.temporary(tmp_path / "server_weight.h5")
    assert left.parent == tmp_path and left.suffix == ".h5"
    left.write_bytes(b"half")
    (tmp_path / "server_weight.h5").write_bytes(b"whole")
    files.clean(tmp_path)
    assert os.listdir(tmp_path) == ["server_weight.h5"]


def test_state_comes_back_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "state.json"
    assert files.load_state(path) is None
    files.save_state(path, {"round": 3})
    assert files.load_state(path) == {"round": 3}
    for text in ("{", "[]", '{"round": 3}', ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="state.json is not a state file.*move it away"):
            files.load_state(path)
        with pytest.raises(
            ValueError, match="state.json is not a state file.*: begin with --fresh$"
        ):
            files.load_state(path, remedy="begin with --fresh")
    path.write_text('{"version": 1, "round": 3}')
    assert files.load_state(path, ["round"]) == {"round": 3}
    with pytest.raises(ValueError, match="state.json is not a state file.*no trained, history"):
        files.load_state(path, ["trained", "round", "history"])
    path.write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version 99, this program writes 1.*or begin anew$"):
        files.load_state(path, remedy="begin anew")


def test_rows_are_published_only_when_they_change(tmp_path):
    path = tmp_path / "history.csv"
    rows = [{"round": 1, "loss": 0.123456789, "more": "left out"}]
    files.publish_rows(path, ["round", "loss"], rows)
    assert path.read_text() == "round,loss\n1,0.123457\n"
    before = path.stat().st_ino
    files.publish_rows(path, ["round", "loss"], rows)
    assert path.stat().st_ino == before
    path.write_bytes(path.read_text().encode("utf-16"))  # as a spreadsheet may save it
    files.publish_rows(path, ["round", "loss"], rows)
    assert path.read_text() == "round,loss\n1,0.123457\n"


def test_an_old_run_is_moved_aside_with_its_state_first(tmp_path):
    assert files.move_aside(tmp_path) is None
    (tmp_path / ".gitkeep").touch()
    assert files.move_aside(tmp_path) is None
    for number in (1, 2):
        files.save_state(tmp_path / "state.json", {"round": number})
        (tmp_path / "client001").mkdir()
        (tmp_path / "client001" / "client_weights.h5").write_bytes(b"x")
        assert files.move_aside(tmp_path) == tmp_path / f"old-{number}"
        assert files.load_state(tmp_path / f"old-{number}" / "state.json") == {"round": number}
        assert (tmp_path / f"old-{number}" / "client001" / "client_weights.h5").exists()
    assert sorted(os.listdir(tmp_path)) == [".gitkeep", "old-1", "old-2"]


def test_what_no_servers_run_wrote_is_not_moved(tmp_path):
    for name in (
        "todoServer.py",
        "index/val_set.pkl",
        "client001/state.json",
        "client001/client_weights.h5",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert files.move_aside(tmp_path) is None
    (tmp_path / "server_weight.h5").touch()
    assert files.move_aside(tmp_path) == tmp_path / "old-1"
    assert sorted(os.listdir(tmp_path)) == ["client001", "index", "old-1", "todoServer.py"]
    assert os.listdir(tmp_path / "old-1") == ["server_weight.h5"]


def test_a_folder_is_one_processs_until_that_ends_however_it_ends(tmp_path):
    folder = tmp_path / "new" / "server"
    code = """
import sys
from common import files
with files.alone_in(sys.argv[1]):
    print("there", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code, folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"there\n" and folder.is_dir()
    with pytest.raises(
        ValueError, match="another process works in .*new/server: wait until it ends, or stop it"
    ):
        with files.alone_in(folder):
            pass
    other.kill()
    other.communicate()
    for _ in range(2):
        with files.alone_in(folder):
            assert not list(folder.iterdir())


def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.alone_in(tmp_path):
        pass

"""common/files.py: a file is whole or not there.

States: test_state, test_starts. A folder that belongs to one process: test_exit_codes. Full disks
and other file systems: test_environment.
"""

import os

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

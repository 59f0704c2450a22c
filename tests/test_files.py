"""common/files.py: a file is whole or not there. Full disks and such: test_environment."""

import os

from common import files


def test_publish_replaces_whole_and_flushes_first(tmp_path, monkeypatch):
    steps = []

    def noting(name, inner):
        return lambda *arguments: (steps.append(name), inner(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    for text in ("one\n", "two\n"):
        files.publish_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == text
    assert steps == ["fsync", "replace", "fsync"] * 2  # the file, the rename, the folder
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_cleaned_and_nothing_else(tmp_path):
    left = files.temporary(tmp_path / "server_weight.h5")
    assert left.parent == tmp_path and left.suffix == ".h5"  # Keras goes by it
    for path in (left, tmp_path / "server_weight.h5", tmp_path / ".notes.tmp"):
        path.touch()
    files.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".notes.tmp", "server_weight.h5"]


def test_rows_are_published_only_when_they_change(tmp_path):
    path = tmp_path / "history.csv"

    def published():
        files.publish_rows(path, ["round", "loss"], [{"round": 1, "loss": 0.123456789, "more": 2}])
        assert path.read_text() == "round,loss\n1,0.123457\n"
        return path.stat().st_ino

    before = published()
    assert published() == before
    path.write_bytes(path.read_text().encode("utf-16"))  # as a spreadsheet may save it
    published()

"""common/files.py: a file is whole or not there, and a state is what its reader expects.

A folder that belongs to one process, full disks and old runs: test_exit_codes, test_environment,
test_starts.
"""

import os

import pytest

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


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"round": 3, "best": None, "votes": 1}, "votes"),
        ({"round": 3}, "best"),
        ({"round": "3", "best": None}, "round"),
        ({"round": True, "best": None}, "round"),
        ({"round": 3, "best": [1]}, "best"),
    ],
)
def test_a_state_comes_back_and_one_of_other_names_or_types_is_refused(tmp_path, state, named):
    """What else can be wrong with a state file is in test_state.py."""
    path, kinds = tmp_path / "state.json", {"round": int, "best": dict | None}
    assert files.load_state(path, kinds) is None
    files.save_state(path, {"round": 3, "best": {}})
    assert files.load_state(path, kinds) == {"round": 3, "best": {}}
    files.save_state(path, state)
    with pytest.raises(ValueError, match=f"state.json .*{named}.*: begin anew$"):
        files.load_state(path, kinds, "begin anew")


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

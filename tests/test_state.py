"""state.json: a spoiled one is one sentence, never a traceback, a wrong result or a silent wait.

That each state of a run comes back as it was: `test_any_order.py`.
"""

import json
import os

import pytest
from conftest import metrics, new_run, write_weights

from federation.state import RunState

A = "client001"
GONE = object()
UPLOAD = {"num_examples": 1, "sha256": "x", "file_sha256": "x"}
COUNTED = {"round": 1, **UPLOAD}
ROW = {"round": 1, "clients": 1, "missing": "", "num_examples": 1, "seconds": 1.0, **metrics()}


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("version", 1, "version 1"),
        ("votes", [], "votes"),
        ("uploads", GONE, "uploads"),  # a default in its place would be no uploads, in silence
        ("rounds", True, "rounds"),
        ("rounds", 0, "rounds"),
        ("image_size", 10**9, "image_size"),
        ("seed", -1, "seed"),
        ("run", "a\nb", "run"),  # it travels in metadata
        ("clients", [], "clients"),
        ("clients", [A, A], "clients"),
        ("clients", ["../client001"], "clients"),
        ("history", [{**ROW, "round": 2}], "history"),
        ("history", [{**ROW, "auc": "high"}], "history"),
        ("round", 9, "round"),
        ("round", 3, "merged"),  # merged and not evaluated, without what its row needs
        ("frozen", [], "frozen"),  # everyone would be told that the round is being merged
        ("uploads", {"client009": [UPLOAD]}, "uploads"),
        ("uploads", {A: []}, "uploads"),
        ("uploads", {A: [{**UPLOAD, "num_examples": 0}]}, "uploads"),
        ("uploads", {A: [{**UPLOAD, "sha256": 7}]}, "uploads"),
        ("uploads", {A: [{**UPLOAD, "scores": {"auc": "high"}}]}, "uploads"),
        ("counted", {"../x": COUNTED}, "counted"),
        ("counted", {A: {**COUNTED, "round": 7}}, "counted"),
        ("counted", {A: {**COUNTED, "update_length": "long"}}, "counted"),
        ("best", {"round": 1}, "best"),
    ],
)
def test_what_no_run_can_say_is_refused_by_name(tmp_path, name, value, named):
    path = tmp_path / "state.json"
    state = new_run([A], 2, write_weights(tmp_path / "one.h5")).changed(round=2, history=[ROW])
    state.changed(counted={A: COUNTED}).save(path)
    assert RunState.load(path).evaluated == 1
    spoiled = {**json.loads(path.read_text()), name: value}
    path.write_text(json.dumps({key: each for key, each in spoiled.items() if each is not GONE}))
    with pytest.raises(ValueError, match=rf"state\.json .*{named}.*begin anew$"):
        RunState.load(path, remedy="begin anew")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_state_file_is_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="state.json .*: .*move it away$"):
        RunState.load(path)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(ValueError, match="not a file: move it away"):
        RunState.load(tmp_path / "state.json")

"""state.py: a state file of an earlier version resumes, and one that cannot is a sentence."""

import json

import pytest
from conftest import Run, new_run, random_tensors, write_weights

from common import files
from federation.state import RunState

# As todoServer.py wrote it before RunState: with every key, in round 2, whose uploads are frozen.
# UPLOAD1 and UPLOAD2 stand for the SHA-256 of the files.
EARLIER = """{
 "version": 1,
 "run": "5f0c6a7e9b1d2c34",
 "clients": ["client001", "client002"],
 "rounds": 3,
 "arch": "drcnn",
 "image_size": 32,
 "seed": 0,
 "weights": "none",
 "round": 2,
 "weights_sha256": "",
 "uploads": {
  "client001": [{"num_examples": 5, "sha256": "UPLOAD1"}],
  "client002": [{"num_examples": 7, "sha256": "of an older one"},
                {"num_examples": 3, "sha256": "UPLOAD2"}]
 },
 "frozen": ["client001", "client002"],
 "counted": {"client001": {"round": 1, "num_examples": 5, "sha256": "earlier"}},
 "history": [{"round": 1, "clients": 1, "missing": "client002", "num_examples": 5,
              "wait_seconds": 1.0, "merge_seconds": 0.1, "loss": 0.5, "accuracy": 0.5, "auc": 0.5,
              "sensitivity": 0.5, "specificity": 0.5, "evaluate_seconds": 0.1, "seconds": 2.0}],
 "closing": {"round": 1, "clients": 1, "missing": "client002", "num_examples": 5,
             "wait_seconds": 1.0, "merge_seconds": 0.1}
}
"""


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    text = EARLIER
    for number in (1, 2):
        folder = tmp_path / f"client00{number}"
        folder.mkdir()
        upload = write_weights(folder / "client_weights.h5", number)
        text = text.replace(f"UPLOAD{number}", files.sha256_of(upload))
    run = Run(tmp_path, ["client001", "client002"])  # for its folder; then the old state comes in
    run.stop()
    (tmp_path / "state.json").write_text(text)
    run.start()
    try:
        assert run.holds(("client001", 5, 1), ("client002", 3, 2))
        assert run.rounds.state.run == "5f0c6a7e9b1d2c34"
        assert [row["round"] for row in run.rounds.state.history] == [1, 2]
        assert run.rounds.round == 3 and not run.rounds.done
    finally:
        run.stop()


@pytest.mark.parametrize("later", ["weights", "closing"])
def test_a_state_may_lack_what_was_added_later(tmp_path, later):
    content = json.loads(EARLIER)
    del content[later]
    (tmp_path / "state.json").write_text(json.dumps(content))
    state = RunState.load(tmp_path / "state.json")
    assert state.round == 2 and getattr(state, later) == {"weights": "none", "closing": None}[later]


@pytest.mark.parametrize("needed", sorted(set(json.loads(EARLIER)) - {"weights", "closing"}))
def test_a_state_that_lacks_anything_else_is_refused(tmp_path, needed):
    """A default in its place would be a wrong result in silence: round 1 again, or no uploads."""
    content = json.loads(EARLIER)
    del content[needed]
    (tmp_path / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"not a state file of this program .*{needed}"):
        RunState.load(tmp_path / "state.json")


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    files.save_state(tmp_path / "state.json", {**json.loads(EARLIER), "votes": [], "version": 1})
    with pytest.raises(ValueError, match="votes, which this program does not know.*use that one"):
        RunState.load(tmp_path / "state.json")


def test_a_state_comes_back_as_it_was_and_never_changes_in_place(tmp_path):
    weights = write_weights(tmp_path / "server_weight.h5", random_tensors(1))
    state = new_run(["client001"], 2, weights)
    later = state.changed(round=3, history=[{"round": 1}, {"round": 2}], frozen=["client001"])
    assert (state.round, state.history, state.is_over) == (1, [], False)
    assert later.is_over and later.evaluated == 2
    later.save(tmp_path / "state.json")
    assert RunState.load(tmp_path / "state.json") == later
    with pytest.raises(AttributeError):
        state.round = 2

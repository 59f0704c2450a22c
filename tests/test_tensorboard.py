"""--tensorboard: the scores of each round, and never the end of a run."""

import sys

import pytest

import model
import todoServer

NAMES = ("loss", "accuracy", "auc", "sensitivity", "specificity")


def test_the_scores_of_each_round_are_written(tmp_path):
    """Read back by TensorBoard itself; an AUC that is not defined is left out."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    model.configure(0)  # as the evaluation has; or TensorFlow has other threads in later tests
    rows = [{"round": k, **dict.fromkeys(NAMES, 1 / k)} for k in (1, 2)]
    rows[1]["auc"] = None
    for row in rows:
        todoServer.write_events(tmp_path, row)
    reader = accumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    found = {
        name: [(each.step, float(make_ndarray(each.tensor_proto))) for each in reader.Tensors(name)]
        for name in reader.Tags()["tensors"]
    }
    assert found == {name: [(1, 1.0), (2, 0.5)][: 1 if name == "auc" else 2] for name in NAMES}


def test_what_fails_there_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    todoServer.write_events(tmp_path, {})
    assert "warning: --tensorboard: " in capsys.readouterr().out

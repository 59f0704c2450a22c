"""--tensorboard: the scores of each round, and never the end of a run."""

import pytest
from conftest import client_script, holding, start_server

import model
import todoServer
from federation.state import RunState

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


def test_a_package_that_is_missing_is_named_at_start(monkeypatch, capsys):
    monkeypatch.setattr(todoServer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        todoServer.parse(["--tensorboard"])
    assert ended.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err


def test_what_fails_there_is_a_warning_and_the_run_goes_on(start, begun):
    """Here TensorFlow itself: it fails after each of the two rounds."""
    site = begun(clients=["client001"], rounds=2)
    fails = [
        "import importlib.util, standin",
        "sys.modules['model'] = standin",
        "importlib.util.find_spec = lambda name: True",
        "sys.modules['tensorflow'] = None",
    ]
    script = holding(site, "todoServer", *fails)
    server, address = start_server(start, site, "--tensorboard", script=script)
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    assert [client.wait(), server.wait()] == [0, 0], server.output
    assert server.output.count("warning: --tensorboard") == 2
    assert RunState.load(site / "server" / "state.json").is_over

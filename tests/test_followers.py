"""--on-round and --tensorboard: what else happens after a round, and never to it."""

import json
import threading
from types import SimpleNamespace

import pytest
from conftest import make_data, new_run, start_server, until

import model
from federation.followers import Follower, RoundCommand
from federation.state import RunState
from reporting.events import EventFiles

ROW = {"round": 1, "loss": 0.5, "accuracy": 0.75, "auc": float("nan"), "missing": ""}


class Said(list):
    def __call__(self, line):
        self.append(line)


@pytest.fixture
def said():
    return Said()


@pytest.fixture
def state(tmp_path):
    (tmp_path / "server_weight.h5").touch()
    return new_run(["client001"], 3, tmp_path / "server_weight.h5")


def test_the_command_gets_each_new_round_as_one_line_of_json(state, said, tmp_path):
    command = RoundCommand(f"cat >> {tmp_path}/got; echo hello", state, said)
    command.tell(state)
    assert not said  # there is no round yet
    rows = [ROW, {**ROW, "round": 2, "auc": 0.9}]
    command.tell(state.changed(history=rows))  # two at once, as after a slow command
    got = [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()]
    assert [(each["run"], each["rounds"], each["round"], each["auc"]) for each in got] == [
        ("run0", 3, 1, None),
        ("run0", 3, 2, 0.9),
    ]
    assert said == ["--on-round of round 1: hello", "--on-round of round 2: hello"]


def test_rounds_of_before_the_start_are_not_told_again(state, said, tmp_path):
    state = state.changed(history=[ROW])
    command = RoundCommand(f"cat >> {tmp_path}/got", state, said)
    command.tell(state.changed(history=[ROW, {**ROW, "round": 2}]))
    assert json.loads((tmp_path / "got").read_text())["round"] == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("exit 3", "ended with exit code 3"),
        ("no-such-command", "ended with exit code 127"),
        ("exec <&-; sleep 0.1; exit 4", "ended with exit code 4"),  # never reads
        ("sleep 600 & wait", "took more than 1 s: ended"),
        ("yes", "took more than 1 s: ended"),
    ],
)
def test_a_command_that_fails_is_a_line_in_the_log(state, said, monkeypatch, line, sentence):
    monkeypatch.setattr("federation.followers.COMMAND_S", 1)
    command = RoundCommand(line, state, said)
    command.tell(state.changed(history=[{**ROW, "missing": "x" * 200_000}]))
    assert sentence in said[-1] and said[-1].endswith("the run goes on")


def test_a_follower_tells_each_state_and_at_the_end_the_last(state, said):
    rounds = SimpleNamespace(changed=threading.Condition(), state=state, say=said)
    told, failing = [], threading.Event()

    def tell(state):
        told.append(len(state.history))
        if failing.is_set():
            raise RuntimeError("no")

    follower = Follower(rounds, tell, "--this")

    def history(number):
        with rounds.changed:
            rounds.state = state.changed(history=[ROW] * number)
            rounds.changed.notify_all()

    until(lambda: told == [0], "it tells what is there")
    history(1)
    until(lambda: told == [0, 1], "it tells what is new")
    with rounds.changed:
        rounds.changed.notify_all()  # something else changed
    failing.set()
    history(2)
    until(lambda: said, "what fails is said")
    assert said == ["warning: --this failed: RuntimeError: no; the run goes on"]
    failing.clear()
    history(3)
    follower.finish()
    assert told == [0, 1, 2, 3] and not follower.thread.is_alive()


def read_events(folder):
    """{series: {name: [(step, value)]}}, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = {}
    for series in sorted(folder.iterdir()):
        reader = EventAccumulator(str(series), size_guidance={"tensors": 0}).Reload()
        found[series.name] = {
            name: [
                (event.step, float(make_ndarray(event.tensor_proto)))
                for event in reader.Tensors(name)
            ]
            for name in reader.Tags()["tensors"]
        }
    return found


def test_event_files_have_every_round_once_wherever_the_server_was_killed(state, tmp_path):
    model.configure(0, 1)  # as the server does: TensorFlow's threads are set before it starts
    rows = [{**ROW, "round": number, "loss": 1 / number} for number in (1, 2, 3)]
    of_client = {"client": "client001", "loss": "", "auc": 0.75}
    scores = [
        {**of_client, "round": 1, "threshold": 0.5, "sensitivity": 0.25},
        {**of_client, "round": 2, "threshold": 0.01, "sensitivity": 0.875},
    ]
    first = EventFiles(tmp_path / "events")
    first.write(state.changed(history=rows[:1]))
    first.write(state.changed(history=rows[:2], client_scores=scores))
    second = EventFiles(tmp_path / "events")  # the server was killed, and is started again
    second.write(state.changed(history=rows[:2], client_scores=scores))
    second.write(state.changed(history=rows, client_scores=scores))
    found = read_events(tmp_path / "events")
    assert found["client001"] == {"auc": [(1, 0.75), (2, 0.75)], "sensitivity": [(1, 0.25)]}
    assert set(found["all"]) == {"loss", "accuracy"}  # an AUC that is not defined is left out
    assert found["all"]["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_a_run_with_both_has_every_rounds_scores(start, tmp_path):
    """Real evaluation; the clients measure too."""
    site = make_data(tmp_path / "site", clients=1, images=4, validation=6)
    command = f"cat >> {site}/got; exit 1"
    server, address = start_server(
        start,
        site,
        *["--clients", "client001", "--rounds", "2", "--image-size", "32", "--tensorboard"],
        *["--on-round", command],
    )
    client = start(
        "todoClient.py",
        *["--name", "client001", "--server", address, "--val-index", "index/val_set.pkl"],
        cwd=site,
    )
    assert [client.wait(120), server.wait(120)] == [0, 0], server.output
    got = [json.loads(line) for line in (site / "got").read_text().splitlines()]
    state = RunState.load(site / "server" / "state.json")
    assert [row["loss"] for row in got] == [row["loss"] for row in state.history]
    assert server.output.count("ended with exit code 1") == 2
    [run] = (site / "server" / "tensorboard").iterdir()
    assert run.name == state.run
    found = read_events(run)
    for name in ("loss", "accuracy", "auc", "sensitivity", "specificity"):
        values = [(row["round"], pytest.approx(row[name], abs=1e-6)) for row in state.history]
        assert found["all"][name] == values
    assert [step for step, _ in found["client001"]["auc"]] == [0, 1, 2]

    # Started again for one more round: the whole run is written anew, before TensorFlow evaluates.
    more = ["--rounds", "3", "--tensorboard"]
    server, address = start_server(start, site, *more)
    client = start("todoClient.py", "--name", "client001", "--server", address, cwd=site)
    assert [client.wait(120), server.wait(120)] == [0, 0], server.output
    assert [step for step, _ in read_events(run)["all"]["accuracy"]] == [1, 2, 3]

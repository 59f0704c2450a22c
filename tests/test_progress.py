"""`tell`: where each client is, and what it measured. Told by the clients, and never trusted.

It reaches server/status.json, server/clients.csv and a hospital's own history.csv, and counts for
nothing: a bad one is left out, one that fails is passed over.
"""

import contextlib
import csv
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import standin
from conftest import Call, client_script, holding, start_server, until

import todoClient
import todoServer
from federation import status
from federation.rounds import Refused
from generated import todo_pb2
from reporting import card as cards


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


# --- what a client tells -------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch):
    """A client tells where it is many times a second."""
    monkeypatch.setattr(todoClient, "TELL_EVERY_S", 0.05)


def trained(round_number):
    row = {"loss": 0.25, "accuracy": 0.5, "num_examples": 4, "seconds": 2.5}
    return [{"round": round_number, "epoch": 1, **row}]


def test_a_client_that_trains_is_seen_training(served, client_main, often, monkeypatch):
    run, address = served
    seen = []

    def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
        progress(2, 5, 10, 0.5)
        until(lambda: run.rounds.client_table.rows["client001"].get("epoch") == 2, "it is told")
        status.write(run.folder, status.status_of(run.rounds))
        found, _ = status.read(run.folder / "status.json")
        seen.append(found["clients"][0])
        return trained(round_number)

    monkeypatch.setattr(standin, "train", train)
    assert client_main("--server", address, "--epochs", "2")[0] == 0
    [row] = seen
    assert (row["phase"], row["epoch"], row["epochs"], row["is_done"]) == ("training", 2, 2, False)
    assert status.where(row, row["last_seen"] + 3).startswith("training, epoch 2 of 2")


def test_a_client_whose_round_was_closed_trains_no_further(served, client_main, often, monkeypatch):
    run, address = served

    def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
        run.deliver("client001", 7).result()  # as if the others had been enough
        ended = threading.Event()
        until(lambda: progress(1, 1, 1000, 0.5) or ended.is_set(), "the training is ended")

    monkeypatch.setattr(standin, "train", train)
    code, said = client_main("--server", address)
    assert code == 0 and "the round was closed without this client" in said
    assert "its result is client001/server_weight.h5" in said


def test_a_server_that_does_not_know_the_call_is_served_all_the_same(
    request, client_main, monkeypatch
):
    """Of another commit, or behind a proxy that passes two of three calls."""

    def no_such_call(*_):
        raise Refused("UNIMPLEMENTED", "no such method")

    monkeypatch.setattr(todoServer.FedMLServicer, "tell", no_such_call)
    _, address = request.getfixturevalue("served")
    code, said = client_main("--server", address, "--val-index", "index/val_set.pkl")
    assert code == 0, said


def test_the_result_is_scored_by_its_card(monkeypatch):
    """With its recalibration and its threshold, as predict.py does; before there is one, at 0.5."""
    monkeypatch.setattr(
        todoClient.model, "predict", lambda network, images: np.array([0.9, 0.8, 0.7, 0.6])
    )
    records = [{"new_label": text} for text in ("True", "True", "False", "False")]
    reporter = SimpleNamespace(at=lambda task, phase: None)
    site = SimpleNamespace(held_out=records, reporter=reporter, say=lambda line: None)
    training = SimpleNamespace(site=site, held_out_images=None, network=None)
    entry = {"calibration": [1.0, 1.0], "threshold": 0.42}  # 0.23, 0.40, 0.54, 0.64 then
    of_round = todoClient.Training.scores(training, {}, "the fetched model")
    of_result = todoClient.Training.scores(training, {}, "the result", {"tasks": {"any DR": entry}})
    names = ("threshold", "sensitivity", "specificity")
    assert [of_round[name] for name in names] == [0.5, 0, 1]
    assert [of_result[name] for name in names] == [0.42, 1, 1]


def test_reports_of_a_client_do_not_end_each_other(client_main, monkeypatch):
    """The server ends the older of two: the last word waits for one that is on its way."""
    told = []

    def told_to_the_server(message, **_):
        told.append(message.phase)
        return todo_pb2.openRound()

    monkeypatch.setattr(todoClient, "connect", lambda site: contextlib.nullcontext())
    stub = SimpleNamespace(tell=told_to_the_server)
    monkeypatch.setattr(todoClient.todo_pb2_grpc, "FedMLStub", lambda channel: stub)
    site = todoClient.Site(todoClient.parse(["--name", "client001"]))
    with site.reporter.telling:  # as its thread does
        site.reporter.at({"run": "run0", "round": 1}, "done")
        call = Call(site.reporter.tell)
        call.thread.join(0.3)
        assert not call.ended and told == []
    call.result()
    assert told == ["done"]


def test_the_scores_of_a_client_are_published_the_results_too(start, begun):
    """Of each round at 0.5, of the result at the threshold that its model card names."""
    site = begun(clients=["client001"], rounds=2)
    finds_bright_pictures = [
        "import standin",
        "sys.modules['model'] = standin",
        "standin.predict = lambda network, images: 1 - images.mean((1, 2, 3)) / 255",
    ]
    script = holding(site, "todoServer", *finds_bright_pictures)
    server, address = start_server(start, site, script=script)
    flags = ["--name", "client001", "--server", address, "--val-index", "index/val_set.pkl"]
    client = start(client_script(site), *flags, cwd=site)
    assert [client.wait(), server.wait()] == [0, 0], client.output
    assert "has not said" not in server.output  # its last word was heard
    rows = rows_of(site / "server" / "clients.csv")
    assert [(row["round"], row["client"]) for row in rows] == [
        (str(n), "client001") for n in range(3)
    ]
    assert all(row["examples"] == "4" and 0 <= float(row["auc"]) <= 1 for row in rows)
    assert [bool(row["training_loss"]) for row in rows] == [True, True, False]
    card = cards.read(site / "client001" / "server_weight.h5")
    chosen = round(card["tasks"]["any DR"]["threshold"], 4)
    assert 0.2 < chosen < 0.4
    assert [round(float(row["threshold"]), 4) for row in rows] == [0.5, 0.5, chosen]
    own = rows_of(site / "client001" / "history.csv")
    assert [row["held_out_auc"] for row in own] == [row["auc"] for row in rows[:2]]
    assert client.output.count("on this site's own held-out images: examples 4") == 3
    found, _ = status.read(site / "server" / "status.json")
    assert found["phase"] == "over" and found["clients"][0]["is_done"]

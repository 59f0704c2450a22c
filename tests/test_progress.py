"""What a client tells of itself: where it is, and what it measured.

It reaches server/status.json, server/clients.csv and the hospital's own history.csv. What the
server makes of it is test_service.py.
"""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import standin
from conftest import Call, fail_with, rows_of, until
from serving import serve

import todoClient
import todoServer
from federation import weights
from federation.rounds import Refused
from reporting import card as cards
from reporting import metrics


@pytest.fixture
def often(monkeypatch):
    """A client tells where it is many times a second."""
    monkeypatch.setattr(todoClient, "TELL_EVERY_S", 0.05)


def test_a_client_that_trains_is_seen_training(served, client_main, often, monkeypatch):
    run, address = served
    seen = run.rounds.client_table.rows["client001"]
    trains = standin.train

    def train(*arguments, progress, **options):
        progress(2, 5, 10, 0.5)
        until(lambda: seen["phase"] == "training" and seen["epoch"] == 2, "it is told")
        return trains(*arguments, **options)

    monkeypatch.setattr(standin, "train", train)
    assert client_main("--server", address, "--epochs", "2")[0] == 0


def test_a_client_whose_round_was_closed_trains_no_further(served, client_main, often, monkeypatch):
    run, address = served

    def train(*arguments, progress, **options):
        run.deliver("client001", 7).result()  # as if the others had been enough
        until(lambda: progress(1, 1, 1000, 0.5), "the training is ended")

    monkeypatch.setattr(standin, "train", train)
    code, said = client_main("--server", address)
    assert code == 0 and "the round was closed without this client" in said
    assert "its result is client001/server_weight.h5" in said
    assert Path("client001/server_weight.h5").read_bytes() == run.weights.read_bytes()


def test_a_client_that_waits_says_for_what(served, client_main, often, monkeypatch):
    run, address = served
    said, evaluate = [], run.evaluate
    monkeypatch.setattr(todoClient, "say", lambda name, line: said.append(line))
    monkeypatch.setattr(todoClient, "REPORT_EVERY_S", 0)

    def evaluated():
        waits = "round 1/1: waiting for the server's answer for"
        until(lambda: any(line.startswith(waits) for line in said), "it is said")
        return evaluate()

    run.evaluate = evaluated
    assert client_main("--server", address)[0] == 0


def test_a_transfer_that_moves_is_not_ended_though_no_report_is_answered(
    request, client_main, often, monkeypatch
):
    """On a slow line the reports wait behind it."""
    now, reports, messages_of = [0.0], [], weights.blob_messages
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)

    def not_answered(*_):
        reports.append(now[0])
        raise Refused("UNAVAILABLE", "it comes too late")

    def slowly(*file_and_client):
        for message in messages_of(*file_and_client):
            if len(file_and_client) > 1 or run.rounds.state.is_over:  # upload, or the result
                now[0] += todoClient.UNANSWERED_S / 4
                enough = len(reports) + 2
                until(lambda: len(reports) >= enough, "the client has looked")  # noqa: B023
            yield message

    monkeypatch.setattr(todoServer.FedMLServicer, "tell", not_answered)
    run, address = request.getfixturevalue("served")
    monkeypatch.setattr(todoClient, "time", clock)
    monkeypatch.setattr(weights, "blob_messages", slowly)
    monkeypatch.setattr(weights, "BLOB_BYTES", 1000)
    code, said = client_main("--server", address)
    assert code == 0 and "it answered nothing" not in said, said


def test_a_server_that_does_not_know_the_call_is_served_all_the_same(
    request, client_main, monkeypatch
):
    """Of another commit, or behind a proxy that passes two of three calls."""
    no_such_call = fail_with(Refused("UNIMPLEMENTED", "no such method"))
    monkeypatch.setattr(todoServer.FedMLServicer, "tell", no_such_call)
    _, address = request.getfixturevalue("served")
    code, said = client_main("--server", address, "--val-index", "index/val_set.pkl")
    assert code == 0, said


def test_the_result_is_scored_by_its_card(monkeypatch):
    """With its recalibration and its threshold, as predict.py does; before there is one, at 0.5.

    A model that answers NaN is not scored.
    """
    answers, said = [0.9, 0.8, 0.7, 0.6], []
    monkeypatch.setattr(todoClient.model, "predict", lambda network, images: np.array(answers))
    records = [{"new_label": text} for text in ("True", "True", "False", "False")]
    reporter = SimpleNamespace(at=lambda task, phase: None)
    site = SimpleNamespace(held_out=records, reporter=reporter, say=said.append)
    training = SimpleNamespace(site=site, held_out_images=None, network=None)
    entry = {"calibration": [1.0, 1.0], "threshold": 0.42}  # 0.23, 0.40, 0.54, 0.64 then
    of_round = todoClient.Training.scores(training, {}, "the fetched model")
    of_result = todoClient.Training.scores(training, {}, "the result", {"tasks": {"any DR": entry}})
    names = ("threshold", "sensitivity", "specificity")
    assert [of_round[name] for name in names] == [0.5, 0, 1]
    assert [of_result[name] for name in names] == [0.42, 1, 1]
    answers[1] = np.nan
    of_nan = todoClient.Training.scores(training, {}, "the fetched model")
    assert of_nan == {"examples": 4, "threshold": 0.5}
    assert "must not be used: it answers NaN for 1 of 4 images" in said[-2]


def test_reports_of_a_client_do_not_end_each_other(client_main, served):
    """The server ends the older of two: the last word waits for one that is on its way."""
    site = todoClient.Site(todoClient.parse(["--name", "client001", "--server", served[1]]))
    with site.reporter.telling:  # as its thread does
        site.reporter.at({"run": "run0", "round": 1}, "done")
        call = Call(site.reporter.tell)
        call.thread.join(0.3)
        assert not call.ended
    assert call.result() is None  # nothing went wrong


def test_the_scores_of_a_client_are_published_the_results_too(client_main, make_run, monkeypatch):
    """The result's by its card; one that is of other weights is left out."""

    def finds_bright_pictures(network, images):
        return 1 - images.mean((1, 2, 3)) / 255

    monkeypatch.setattr(standin, "predict", finds_bright_pictures)
    monkeypatch.setattr(todoServer, "model", standin)
    evaluator = todoServer.Evaluator(todoServer.parse([]))
    run = make_run(
        clients=["client001"], rounds=2, publish_result=lambda *it: evaluator.publish_result(*it)
    )
    evaluator.open(run.rounds.state)
    run.evaluate = evaluator.evaluate
    server, address = serve(run.rounds, card_text=lambda: evaluator.card_text())
    code, said = client_main("--server", address, "--val-index", "index/val_set.pkl")
    assert code == 0 and said.count("on this site's own held-out images: examples 4") == 3
    rows = rows_of(run.folder / "clients.csv")
    found = [(row["round"], row["examples"], bool(row["training_loss"])) for row in rows]
    assert found == [("0", "4", True), ("1", "4", True), ("2", "4", False)]
    own = rows_of("client001/history.csv")
    assert [row["held_out_auc"] for row in own] == [row["auc"] for row in rows[:2]] != ["", ""]
    card = cards.read(Path("client001/server_weight.h5"))
    chosen = cards.used_threshold(card, metrics.LEARNT)
    assert [float(row["threshold"]) for row in rows] == [0.5, 0.5, round(chosen, 6)]
    assert chosen != 0.5
    assert run.rounds.done_clients == {"client001"}
    text = evaluator.card_text().replace(card["weights_sha256"], "0" * 64)
    evaluator.card_text = lambda: text
    code, said = client_main("--server", address)
    server.stop(0)
    assert code == 0 and "model card is left out: it describes other weights" in said
    assert not Path("client001/server_weight.json").exists()

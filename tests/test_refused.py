"""What a client does with a refusal, and with a training that ended in NaN.

A late client learns that the run is over.
The client's own main() in this process, without TensorFlow.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import grpc
import h5py
import numpy as np
import pytest
import standin
from conftest import free_port, new_run, start_server
from serving import serve

import todoClient
import todoServer
from common import files


@pytest.fixture
def trainings(monkeypatch):
    """A list: what the trainings to come end in ("good" or "nan"); then all are good.

    Bad ones are not noticed by the client.
    """
    to_come = []
    write_tensors = todoClient.weights.write_tensors

    def write(path, layout, arrays):
        digest = write_tensors(path, layout, arrays)
        outcome = to_come.pop(0) if to_come else "good"
        if outcome != "good":
            with open(path, "r+b") as file:
                file.seek(layout.tensors[0].begin)
                file.write(np.float32(outcome).tobytes())
            digest = files.sha256_of(path)
        return digest

    monkeypatch.setattr(todoClient.weights, "write_tensors", write)
    return to_come


# --- a server of another version ------------------------------------------------------------------


def drcnn_of(*layers):
    """What a file says of a network of these layers, as Keras writes it."""
    described = [{"class_name": name, "config": {"name": name.lower()}} for name in layers]
    return json.dumps({"class_name": "Functional", "config": {"layers": described}})


@pytest.mark.parametrize(
    "its_layers, refused",
    [(("Rescaling", "Conv2D"), False), (("Conv2D",), True), (None, False)],
)
def test_the_file_of_a_network_with_other_layers_is_refused(
    client_main, make_run, monkeypatch, its_layers, refused
):
    """Its tensors are the same: in silence, each network would answer otherwise than trained."""
    run = make_run(clients=["client001"], rounds=1)
    run.stop()
    if its_layers:
        with h5py.File(run.weights, "r+") as file:
            file.attrs["model_config"] = drcnn_of(*its_layers)
    new_run(["client001"], 1, run.weights).save(run.folder / "state.json")
    run.start()
    build = standin.build

    def built(*arguments):
        network = build(*arguments)
        network.to_json = lambda: drcnn_of("Rescaling", "Conv2D")
        return network

    monkeypatch.setattr(standin, "build", built)
    server, address = serve(run.rounds)
    code, said = client_main("--server", address)
    server.stop(0)
    assert code == refused and ("this server runs another version" in said) == refused
    assert run.rounds.state.evaluated == (not refused)


# --- uploads that the server rejects -------------------------------------------------------------


def test_a_rejected_upload_ends_the_client_with_1_and_the_next_start_trains_again(
    client_main, served, trainings
):
    """Training is deterministic: without a change of its user's it would end in the same."""
    run, address = served
    trainings[:] = ["nan"]
    code, said = client_main("--server", address)
    assert code == 1 and said.count("training now") == 1
    last = said.splitlines()[-1]
    assert "nan: only finite numbers" in last
    code, said = client_main("--server", address)
    assert code == 0 and said.count("training now") == 1
    assert run.rounds.state.evaluated == 1


def test_a_fault_of_the_server_is_said_there_and_tried_again(request, client_main, monkeypatch):
    """gRPC would tell nobody: the client would try for ever, and the server's log say nothing."""
    inner, faults = todoServer.FedMLServicer.sendWeight, [KeyError("a mistake of ours")]

    def fails_once(*arguments):
        if faults:
            raise faults.pop()
        return inner(*arguments)

    monkeypatch.setattr(todoServer.FedMLServicer, "sendWeight", fails_once)
    run, address = request.getfixturevalue("served")
    code, said = client_main("--server", address, "--give-up-after", "60")
    assert code == 0 and said.count("training now") == 1
    assert any("KeyError: 'a mistake of ours'" in line for line in run.said)


def test_a_fault_of_the_clients_own_machine_is_tried_again(client_main, served, monkeypatch):
    """The process that reads the first file of a run was killed, for example: no memory."""
    inner, faults = todoClient.convert.contents_of, [ChildProcessError("it was killed")]

    def fails_once(path):
        if faults:
            raise faults.pop()
        return inner(path)

    monkeypatch.setattr(todoClient.convert, "contents_of", fails_once)
    code, said = client_main("--server", served[1], "--give-up-after", "60")
    assert code == 0 and "it was killed" in said


def test_a_server_that_stays_away_is_exit_4(client_main):
    code, said = client_main("--server", f"localhost:{free_port()}", "--give-up-after", "0.5")
    assert code == 4 and "did not answer for 0.5 s; what was trained is kept" in said


# --- a straggler ---------------------------------------------------------------------------------


def test_a_straggler_learns_that_the_run_is_over_and_gets_the_result(
    client_main, served, trainings
):
    run, address = served
    trainings[:] = ["good"]
    inner = todoClient.ClientsendWeight

    def late(stub, site):
        if not run.rounds.state.is_over:
            assert run.deliver("client001", 7).result() is None  # others of the run were enough
        return inner(stub, site)

    todoClient.ClientsendWeight = late
    try:
        code, said = client_main("--server", address)
    finally:
        todoClient.ClientsendWeight = inner
    assert code == 0 and "upload rejected" in said
    assert "over after 1 rounds; its result is client001/server_weight.h5" in said
    assert Path("client001/server_weight.h5").read_bytes() == run.weights.read_bytes()
    assert run.rounds.done_clients == {"client001"}


@pytest.mark.parametrize(
    ("run", "round_number", "trained", "sent", "code", "words"),
    [
        ("r", 3, {"a": 1}, True, 5, "delivered and never answered"),
        ("r", 3, {"a": 1}, False, 4, "round 3 was the last, so the run may be over"),
        ("r", 3, None, True, 4, "round 3 was the last, so the run may be over"),
        ("r", 2, {"a": 1}, True, 4, "what was trained is kept"),
        ("", 3, {"a": 1}, True, 4, "what was trained is kept"),
        (None, 0, None, False, 4, "what was trained is kept"),
    ],
)
def test_who_gives_up_says_what_is_lost(run, round_number, trained, sent, code, words):
    state = {"run": run, "round": round_number, "rounds": 3, "trained": trained}
    arguments = SimpleNamespace(server="here:1", give_up_after=9)
    error = todoClient.gave_up(SimpleNamespace(state=state, sent=sent, arguments=arguments))
    assert error.args[1] == code and words in error.args[0]
    assert "did not answer for 9 s" in error.args[0]


class Unavailable(grpc.RpcError):
    """Unavailable(details) of a call."""

    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return self.args[0]


@pytest.mark.parametrize(
    ("details", "sent"),
    [("Socket closed", True), ("Received http2 header with status: 504", False)],
)
def test_what_a_proxy_has_answered_was_not_delivered(tmp_path, monkeypatch, details, sent):
    def send(messages, metadata):
        assert list(messages)
        return SimpleNamespace(result=lambda: fail(details))

    def fail(details):
        raise Unavailable(details)

    reporter = SimpleNamespace(at=lambda *_: None, waiting=lambda *_: contextlib.nullcontext())
    trained = {"num_examples": 4, "sha256": ""}
    site = SimpleNamespace(
        state={"run": "r", "round": 1, "rounds": 1, "trained": trained},
        weights_path=standin.write_weights(tmp_path / "client_weights.h5"),
        **{"name": "client001", "sent": False, "reporter": reporter},
    )
    stub = SimpleNamespace(sendWeight=SimpleNamespace(future=send))
    with pytest.raises(grpc.RpcError):
        todoClient.ClientsendWeight(stub, site)
    assert site.sent == sent


def test_an_upload_waits_until_what_was_measured_is_told():
    """A server that starts just then would count it without."""
    reporter = SimpleNamespace(at=lambda *_: None, tell=lambda: False)
    state = {"run": "r", "round": 1, "rounds": 1, "trained": {"scores": {"auc": 0.9}}}
    with pytest.raises(ConnectionError, match="the server does not answer"):
        todoClient.ClientsendWeight(None, SimpleNamespace(state=state, reporter=reporter))


@pytest.mark.parametrize(("call_s", "gives_up_s"), [(5, 10), (60, 70)])
def test_the_time_to_give_up_begins_anew_after_a_call_that_was_served(
    monkeypatch, call_s, gives_up_s
):
    now, calls = [0.0], [0, 0, call_s]

    def wait(s):
        now[0] += s

    def attempt(stub, site):
        wait(calls.pop(0) if calls else 0)
        raise Unavailable("Socket closed")

    monkeypatch.setattr(todoClient, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))
    monkeypatch.setattr(todoClient, "connect", lambda site: grpc.insecure_channel("here:1"))
    site = SimpleNamespace(
        arguments=SimpleNamespace(server="here:1", give_up_after=10, tls_ca=None, tls_cert=None),
        state=dict(todoClient.NEW_STATE),
        say=lambda line: None,
    )
    with pytest.raises(todoClient.GaveUp):
        todoClient.keep_trying(attempt, site)
    assert gives_up_s <= now[0] < gives_up_s + 2


# --- training that ends in NaN -------------------------------------------------------------------

NAN = "Training ended in numbers that are not finite"


def folder_is_gone(*arguments, **options):
    Path("client001").rename("moved")
    return [{"round": 1, "epoch": 1, "loss": 0.5, "accuracy": 1, "num_examples": 4, "seconds": 1}]


def with_nan(network):
    return [np.full(shape, np.nan, "f4") for _, shape in standin.SHAPES]


def of_other_shapes(network):
    return [np.zeros((9, 9), "f4") for _ in standin.SHAPES]


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ({"tensors": with_nan}, "round 1/1: layer 'conv1' holds nan"),
        ({"tensors": of_other_shapes}, "layer 'conv1' has shape (9, 9)"),
        ({"train": folder_is_gone}, "client001/client_weights.h5 cannot be used"),
    ],
)
def test_a_training_that_failed_is_one_sentence_and_is_not_kept(
    client_main, served, monkeypatch, patches, words
):
    run, address = served
    with monkeypatch.context() as patched:
        for name, patch in patches.items():
            patched.setattr(standin, name, patch)
        code, said = client_main("--server", address, "--epochs", "4")
    last = said.splitlines()[-1]
    assert code == 1 and words in last and "Traceback" not in said
    assert (NAN in last) == ("nan" in words)  # said of NaN, and of nothing else
    assert run.rounds.uploads == {}
    assert client_main("--server", address, "--epochs", "4")[0] == 0  # it trains again


@pytest.mark.slow
def test_a_real_network_whose_learning_rate_is_far_too_large(start, site):
    server, address = start_server(start, site, "--rounds", "1", "--image-size", "32")
    flags = ["--name", "client001", "--server", address, "--epochs", "3"]
    client = start("todoClient.py", *flags, "--learning-rate", "1e30", cwd=site)
    assert client.wait(120) == 1, client.output
    assert "finite" in client.lines[-1] and "Traceback" not in client.output
    assert "delivered" not in server.output

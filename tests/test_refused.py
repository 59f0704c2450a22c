"""What a client does when it is refused, when nobody answers, and when its training failed.

The client's own main() in this process, without TensorFlow.
"""

import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import h5py
import numpy as np
import pytest
import standin
from conftest import fails_once, new_run
from serving import serve

import todoClient
import todoServer
from federation.rounds import Refused

# --- refused --------------------------------------------------------------------------------------


def test_the_file_of_a_network_with_other_layers_is_refused(client_main, make_run, monkeypatch):
    """Its tensors are the same: in silence, each network would answer otherwise than trained."""

    def drcnn_of(*layers):
        described = [{"class_name": name, "config": {}} for name in layers]
        return json.dumps({"config": {"layers": described}})

    run = make_run(clients=["client001"], rounds=1)
    run.stop()
    with h5py.File(run.weights, "r+") as file:
        file.attrs["model_config"] = drcnn_of("Conv2D")
    new_run(["client001"], 1, run.weights).save(run.folder / "state.json")
    run.start()
    network = standin.build("drcnn", 32)
    network.to_json = lambda: drcnn_of("Rescaling", "Conv2D")
    monkeypatch.setattr(standin, "build", lambda *_: network)
    server, address = serve(run.rounds)
    code, said = client_main("--server", address)
    server.stop(0)
    assert code == 1 and "this server runs another version" in said


def test_a_rejected_upload_ends_the_client_with_1_and_the_next_start_trains_again(
    client_main, make_run
):
    """Training is deterministic: without a change of its user's it would end in the same."""
    run = make_run(clients=["client001"], rounds=1)
    for max_examples, ends_with in ((1, 1), (10, 0)):
        server, address = serve(run.rounds, max_examples=max_examples)
        code, said = client_main("--server", address)
        server.stop(0)
        assert code == ends_with and said.count("training now") == 1
        assert ("client001 says it has 4 examples, expected 1 to 1" in said) == bool(code)


# --- tried again ----------------------------------------------------------------------------------


def test_a_fault_of_the_server_is_said_there_and_tried_again(request, client_main, monkeypatch):
    """gRPC would tell nobody: the client would try for ever, and the server's log say nothing."""
    fails_once(monkeypatch, todoServer.FedMLServicer, "sendWeight", KeyError("a mistake of ours"))
    run, address = request.getfixturevalue("served")
    code, said = client_main("--server", address, "--give-up-after", "60")
    assert code == 0 and said.count("training now") == 1
    assert any("KeyError: 'a mistake of ours'" in line for line in run.said)


def test_a_fault_of_the_clients_own_machine_is_tried_again(client_main, served, monkeypatch):
    """The process that reads the first file of a run was killed, for example: no memory."""
    fails_once(monkeypatch, todoClient.convert, "contents_of", ChildProcessError("it was killed"))
    code, said = client_main("--server", served[1], "--give-up-after", "60")
    assert code == 0 and "it was killed" in said


class Unavailable(grpc.RpcError):
    def __init__(self, details="Socket closed"):
        self.details = lambda: details

    def code(self):
        return grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("details", "error", "words"),
    [
        (
            "failed to connect to remote host: Connection refused",
            ConnectionError,
            "no server answers there yet",
        ),
        ("Deadline Exceeded", ConnectionError, "nothing comes back from there"),
        (
            "failed to connect: unable to get local issuer certificate",
            ValueError,
            "did not sign it",
        ),
    ],
)
def test_an_upload_waits_until_what_was_measured_is_told(details, error, words):
    """A server that starts just then would count it without. Why it is away is said as ever."""
    reporter = SimpleNamespace(at=lambda *_: None, tell=lambda: Unavailable(details))
    state = {"run": "r", "round": 1, "rounds": 1, "trained": {"scores": {"auc": 0.9}}}
    arguments = todoClient.parse(["--name", "client001"])
    site = SimpleNamespace(state=state, reporter=reporter, arguments=arguments)
    with pytest.raises(error, match=words):
        todoClient.ClientsendWeight(None, site)


# --- given up -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("details", "rounds", "code", "words"),
    [
        ("Socket closed", 1, 5, "weights were delivered and never answered"),
        ("the server is stopping", 1, 4, "so the run may be over"),
        ("Received http2 header with status: 504", 1, 4, "so the run may be over"),  # a proxy's
        ("Socket closed", 2, 4, "what was trained is kept"),
    ],
)
def test_who_gives_up_says_what_is_lost(
    client_main, make_run, monkeypatch, details, rounds, code, words
):
    def fails(servicer, request_iterator, context):
        list(request_iterator)
        if details == "Socket closed":  # gRPC's own words have no metadata
            context.set_trailing_metadata = lambda _: None
        raise Refused("UNAVAILABLE", details)

    monkeypatch.setattr(todoServer.FedMLServicer, "sendWeight", fails)
    server, address = serve(make_run(clients=["client001"], rounds=rounds).rounds)
    ended, said = client_main("--server", address)
    server.stop(0)
    assert ended == code and words in said
    assert re.search(rf"has not served this client for 0 s \(({details}|a proxy before)", said)


@pytest.mark.parametrize(
    ("error", "call_s", "answered_s", "gives_up_s"),
    [
        (Unavailable, 5, 0, 10),
        (Unavailable, 60, 0, 70),
        (ConnectionError, 60, 0, 60),  # the server was deaf all the time
        (ConnectionError, 90, 30, 100),  # for the last minute
    ],
)
def test_the_time_to_give_up_begins_anew_after_a_call_that_was_served(
    monkeypatch, error, call_s, answered_s, gives_up_s
):
    """And all the time a line every 30 s says whom it waits for."""
    now, calls, said = [0.0], [0, 0, call_s], []

    def wait(s):
        if threading.current_thread() is threading.main_thread():
            now[0] += s
        else:  # a reporter of an earlier test's client
            time.sleep(s)

    def attempt(stub, site):
        call_s = calls.pop(0) if calls else 0
        site.reporter.answered_at = now[0] + (answered_s if call_s else 0)
        wait(call_s)
        raise error

    monkeypatch.setattr(todoClient, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))
    monkeypatch.setattr(todoClient, "connect", lambda site: grpc.insecure_channel("here:1"))
    site = SimpleNamespace(
        arguments=SimpleNamespace(server="here:1", give_up_after=10, tls_ca=None, tls_cert=None),
        state=dict(todoClient.NEW_STATE),
        say=said.append,
        reporter=SimpleNamespace(answered_at=0.0),
    )
    with pytest.raises(todoClient.GaveUp):
        todoClient.keep_trying(attempt, site)
    assert gives_up_s <= now[0] < gives_up_s + 2
    assert (
        said[0].startswith("waiting for the server at here:1 (") and "giving up in 10 s" in said[0]
    )


# --- training that failed -------------------------------------------------------------------------

NAN = "Training ended in numbers that are not finite"


def with_nan(network):
    return [np.full(shape, np.nan, "f4") for _, shape in standin.SHAPES]


def folder_is_gone(*arguments, train=standin.train, **options):
    Path("client001").rename("moved")
    return train(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "patch", "words"),
    [
        ("tensors", with_nan, f"round 1/1: layer 'conv1' holds nan.*{NAN}"),
        ("train", folder_is_gone, "client001/client_weights.h5"),
    ],
)
def test_a_training_that_failed_is_one_sentence_and_is_not_kept(
    client_main, served, monkeypatch, name, patch, words
):
    run, address = served
    with monkeypatch.context() as patched:
        patched.setattr(standin, name, patch)
        code, said = client_main("--server", address)
    last = said.splitlines()[-1]
    assert code == 1 and re.search(words, last) and (NAN in last) == (patch is with_nan)
    assert run.rounds.uploads == {}
    assert client_main("--server", address)[0] == 0  # it trains again

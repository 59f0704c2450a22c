"""Who is alive, and what each client measured: told by the clients, and never trusted."""

import contextlib
import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys

import grpc
import pytest
from conftest import client_script, holding, server_script, start_server, write_weights
from serving import serve

from common import files
from federation import progress, weights
from generated import todo_pb2, todo_pb2_grpc
from reporting import card as cards

# --- what is not as expected is left out by name -------------------------------------------------


@pytest.mark.parametrize(
    ("text", "good", "problem"),
    [
        ('{"phase": "training", "epoch": 3, "epochs": 9}', {"phase": "training"}, None),
        ('{"phase": "sleeping"}', {}, "phase is none of loading, training"),
        ('{"phase": ["training"]}', {}, "phase is none of"),
        ('{"phase": "training", "epoch": "3"}', {"phase": "training"}, "epoch is '3'"),
        ('{"phase": "training", "epochs": 0}', {"phase": "training"}, "epochs is 0"),
        ('{"phase": "training", "x": 1}', {"phase": "training"}, "'x' is not known"),
        (
            '{"phase": "training", "seconds_left": NaN}',
            {"phase": "training"},
            "seconds_left is nan",
        ),
        ("[1]", {}, "no JSON object"),
        ("[" * 299, {}, "no JSON"),
        ("{", {}, "no JSON"),
        ('"' + 400 * "x" + '"', {}, "402 bytes, expected at most 300"),
    ],
)
def test_progress_that_is_not_as_expected(text, good, problem):
    parsed, problems = progress.parse_progress(text)
    assert {name: parsed[name] for name in good} == good
    assert set(parsed) <= {"phase", *progress.PROGRESS_LIMITS}
    assert (not problems) if problem is None else any(problem in each for each in problems)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"auc": NaN}', "auc is nan, expected 0 to 1"),
        ('{"auc": 1.5}', "auc is 1.5"),
        ('{"loss": 1e9}', "loss is 1000000000.0"),
        ('{"loss": "<b>"}', "loss is '<b>'"),
        ('{"examples": true}', "examples is True"),
        (json.dumps({f"key{number}": 1 for number in range(50)}), "'key0' is not known"),
        ('{"loss": 1' + 700 * "0" + "}", "bytes, expected at most 600"),
    ],
)
def test_metrics_that_are_not_as_expected(text, problem):
    parsed, problems = progress.parse_metrics(text)
    assert parsed == {}
    assert any(problem in each for each in problems), problems


@pytest.mark.parametrize("text", ['{"auc": NaN}', '{"loss": 1e9}', "letters", "[" * 590])
def test_a_round_goes_on_with_bad_metrics_in_an_upload(make_run, tmp_path, text):
    run = make_run(clients=["client001"], rounds=1)
    server, address = serve(run.rounds)
    try:
        assert upload(address, run, tmp_path, ("fedml-metrics", text)).result().value == 1
    finally:
        server.stop(0)
    assert any("client001 says what is left out here: " in line for line in run.said)
    assert run.rounds.state.client_scores == []


def test_metrics_of_10_kb_are_refused_and_the_round_goes_on(make_run, tmp_path):
    run = make_run(clients=["client001"], rounds=1)
    server, address = serve(run.rounds)
    try:
        with pytest.raises(grpc.RpcError):
            upload(address, run, tmp_path, ("fedml-metrics", "x" * 10_000)).result()
        assert upload(address, run, tmp_path).result().value == 1
    finally:
        server.stop(0)


def upload(address, run, folder, *more_metadata):
    path = write_weights(files.temporary(folder / "upload.h5"), 1)
    metadata = (
        ("fedml-client", "client001"),
        ("fedml-run", "run0"),
        ("fedml-round", str(run.rounds.round)),
        ("fedml-sha256", files.sha256_of(path)),
        *more_metadata,
    )
    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))
    messages = weights.blob_messages(path, "client001", 3)
    return stub.sendWeight.future(messages, metadata=metadata, timeout=60)


def test_progress_is_no_fetch_ends_no_call_and_is_answered_while_others_wait(make_run, tmp_path):
    run = make_run(clients=["client001", "client002"], rounds=1)
    server, address = serve(run.rounds)
    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))
    try:
        waiting = upload(address, run, tmp_path)
        for _ in range(20):
            metadata = (
                ("fedml-client", "client001"),
                ("fedml-progress", '{"phase": "waiting"}'),
            )
            call = stub.getWeight(todo_pb2.void(), metadata=metadata, timeout=10)
            assert list(call) == []
            assert dict(call.initial_metadata())["fedml-round"] == "1"
        assert not waiting.done()
        assert not any("fetches" in line for line in run.said)
        stranger = (("fedml-client", "stranger"), ("fedml-progress", "{}"))
        with pytest.raises(grpc.RpcError, match="not one of this run"):
            list(stub.getWeight(todo_pb2.void(), metadata=stranger, timeout=10))
    finally:
        server.stop(0)


# --- real processes ------------------------------------------------------------------------------

OFTEN = """
from federation import progress, rounds
progress.TELL_EVERY_S = 0.3
progress.QUIET_S = 3
rounds.REPORT_EVERY_S = 0.5
"""
STEPS = """
import standin
def train(network, batches, round_number, epochs, report, progress=None):
    for step in range(1, 1001):
        if round_number > 1:
            break
        progress(3, step, 1000, 0.5)
        if step == 1: standin.say("standin", "training now")
        time.sleep(0.1)
    return [{"round": round_number, "epoch": 1, "loss": 0.5, "accuracy": 0.5, "num_examples": 4,
             "seconds": 0.1}]
standin.train = train
"""


def often(site, script, *patches):
    """A script of ours, without TensorFlow, that tells and reports many times a second."""
    return holding(
        site, script, OFTEN, *patches, "import standin", 'sys.modules["model"] = standin'
    )


def test_a_busy_client_is_told_from_a_stopped_one(start, begun):
    site = begun(rounds=1)
    server, address = start_server(start, site, script=often(site, "todoServer"))
    script = often(site, "todoClient", STEPS)
    arguments = ["--name", "client002", "--server", address, "--epochs", "4"]
    client = start(script, *arguments, cwd=site)
    server.wait_for(
        r"waiting for .*client002 \(training, epoch 3 of 4, \d+ s to go, heard [0-3] s ago\)"
    )
    client.signal(signal.SIGSTOP)
    server.wait_for(r"client002 \(not heard for [4-9] s\)")
    client.signal(signal.SIGCONT)
    before = len(server.lines)
    server.wait_for(r"client002 \(training, epoch 3 of 4", start=before)
    assert server.output.count("fetches the weights") == 1


@pytest.mark.slow
def test_a_client_whose_round_was_closed_trains_no_further(start, begun):
    site = begun(rounds=2)
    limit = ["--round-timeout", "25", "--min-clients", "1"]  # a busy machine starts slowly
    server, address = start_server(start, site, *limit, script=often(site, "todoServer"))
    script = often(site, "todoClient", STEPS)
    late = start(script, "--name", "client002", "--server", address, "--epochs", "3", cwd=site)
    quick_script = client_script(site.joinpath("server"))
    quick = start(quick_script, "--name", "client001", "--server", address, cwd=site)
    late.wait_for("training now")
    late.wait_for(
        "round 1/2: the round was closed without this client; what was trained is dropped"
    )
    assert [late.wait(), quick.wait(), server.wait()] == [0, 0, 0], late.output
    rows = list(csv.DictReader((site / "server" / "history.csv").read_text().splitlines()))
    assert [row["missing"] for row in rows] == ["client002", ""]


def test_the_scores_of_the_clients_are_published_the_results_too(start, begun):
    site = begun(rounds=2)
    finds_bright_pictures = holding(
        site,
        "todoServer",
        "import standin",
        'sys.modules["model"] = standin',
        "standin.predict = lambda network, images: 1 - images.mean((1, 2, 3)) / 255",
    )
    server, address = start_server(start, site, script=finds_bright_pictures)
    clients = [
        start(
            client_script(site),
            *["--name", name, "--server", address, "--val-index", "index/val_set.pkl"],
            cwd=site,
        )
        for name in ("client001", "client002")
    ]
    assert [each.wait() for each in [*clients, server]] == [0, 0, 0], clients[0].output
    rows = list(csv.DictReader((site / "server" / "clients.csv").read_text().splitlines()))
    assert [(row["round"], row["client"]) for row in rows[:4]] == [
        (str(number), name) for number in (0, 1) for name in ("client001", "client002")
    ]
    assert {(row["round"], row["client"]) for row in rows[4:]} == {
        ("2", "client001"),
        ("2", "client002"),
    }
    for row in rows:
        assert row["examples"] == "4" and 0 <= float(row["auc"]) <= 1
    # a round is scored at 0.5; the result at the threshold that its model card names
    card = cards.read(site / "client001" / "server_weight.h5")
    chosen = round(cards.threshold_of(card, "any DR"), 4)
    assert 0.2 < chosen < 0.4
    assert [round(float(row["threshold"]), 4) for row in rows] == 4 * [0.5] + 2 * [chosen]
    assert "client001 scored the result: examples 4, loss " in server.output
    assert "the result on this site's own held-out images: examples 4" in clients[0].output
    assert "fetched the result" not in server.lines[-2]  # nobody was waited for in vain


def test_where_it_is_goes_to_a_launcher(start, begun):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    pipe = site / "progress"
    opened = (
        f"import os\nos.environ['FEDML_PROGRESS_FD'] = str(os.open({str(pipe)!r}, os.O_WRONLY))"
    )
    steps = STEPS.replace("range(1, 1001)", "range(1, 11)").replace("1000,", "10,")
    pipe.touch()
    script = often(site, "todoClient", steps, opened)
    client = start(script, "--name", "client001", "--server", address, cwd=site)
    assert client.wait() == 0 == server.wait(), client.output
    told = [json.loads(line) for line in pipe.read_text().splitlines()]
    assert [each["phase"] for each in told[:2]] == ["loading", "training"]
    assert told[-1]["phase"] == "waiting"
    last = [each for each in told if "step" in each][-1]
    assert (last["phase"], last["round"], last["rounds"]) == ("training", 1, 1)
    assert (last["step"], last["steps"], last["loss"]) == (10, 10, 0.5)


def test_on_a_terminal_a_bar_is_drawn_below_the_lines(begun, start):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    steps = STEPS.replace("range(1, 1001)", "range(1, 21)").replace("1000,", "20,")
    script = often(site, "todoClient", steps)
    terminal, own_end = pty.openpty()
    client = subprocess.Popen(
        [sys.executable, script, "--name", "client001", "--server", address, "--epochs", "3"],
        cwd=site,
        stdin=subprocess.DEVNULL,
        stdout=own_end,
        stderr=own_end,
    )
    os.close(own_end)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the client has ended
        while True:
            said += os.read(terminal, 1 << 12)
    os.close(terminal)
    assert client.wait(60) == 0 == server.wait()
    bars = re.findall(rb"round 1/1: training, epoch 3 of 3, \d+ s to go  \[(#*)\.*\]  loss", said)
    assert len(bars) > 3 and sorted(bars) == bars
    # what stays when each bar is erased: whole lines, each with its date
    left = re.sub(rb"[^\r\n]*\r\x1b\[K", b"", said).decode().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d ", line) for line in left if line), left

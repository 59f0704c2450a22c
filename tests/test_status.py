"""server/status.json and status.py: where a run is, while it runs and afterwards."""

import json
import os
import pty
import signal
import sys
import time

import grpc
import pytest
from conftest import ROOT, server_script, start_server, until

import status as script
from federation import status
from generated import todo_pb2, todo_pb2_grpc

NOW = 1_000_000
UNSEEN = {"last_seen": None, **status.NOWHERE}
SEEN = {**UNSEEN, "last_seen": NOW - 14}
TRAINING = {"phase": "training", "epoch": 2, "epochs": 5, "seconds_left": 180}
TOLD = {"last_seen": NOW - 4, **TRAINING}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (UNSEEN, "not seen yet"),
        (SEEN, "last seen 14 s ago"),
        ({**SEEN, "phase": status.FETCHED}, "working, fetched 14 s ago"),  # and told nothing yet
        (TOLD, "training, epoch 2 of 5, 3 min to go, heard 4 s ago"),
        ({**TOLD, "last_seen": NOW - 7200}, "not heard for 2 h"),
        ({**TOLD, "num_examples": 30}, "delivered"),
        ({**TOLD, "num_examples": 30, "is_done": True}, "has the result"),
    ],
)
def test_where_a_client_is(row, words):
    assert status.where(row, NOW) == words


def test_a_new_round_forgets_what_was_told_of_the_one_before(make_run):
    run = make_run(clients=["client001", "client002"], rounds=2)
    run.rounds.fetch("client001")[2].close()
    assert "client001 (working, fetched 0 s ago)" in run.rounds.describe()
    run.rounds.hear("client001", "run0", 1, TRAINING, {})
    assert "training, epoch 2 of 5" in run.rounds.describe()
    calls = [run.deliver(name, 1) for name in ("client001", "client002")]
    assert [call.result() for call in calls] == [None, None]
    assert "client001 (last seen" in run.rounds.describe()


def shown(path, capsys, *flags):
    """What status.py says of this file, and with which code it ends."""
    code = script.main([str(path), "--once", *flags])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_it_shows_the_clients_and_the_scores_of_the_rounds(make_run, capsys):
    run = make_run(clients=["client001", "client002"], rounds=1)
    path = run.folder / "status.json"
    call = run.delivered("client001", 1, num_examples=42)
    status.write(run.folder, status.status_of(run.rounds))
    code, text = shown(path, capsys)
    assert not code and "run run0: drcnn, round 1/1 is open" in text
    for words in ("client001", "delivered", "42", "client002", "not seen yet"):
        assert words in text
    run.deliver("client002", 2).result()
    call.result()
    status.write(run.folder, status.status_of(run.rounds))
    _, text = shown(path, capsys)
    assert "the run is over" in text and all(word in text for word in ("0.875", "0.750", "auc"))
    assert max(map(len, text.splitlines())) <= 80


def test_it_is_kept_up_to_date_and_says_that_the_server_was_stopped(start, begun, capsys):
    site = begun()
    path = site / "server" / "status.json"
    server, address = start_server(start, site, script=server_script(site))
    until(path.exists, "the status is there")
    assert "not seen yet" in shown(path, capsys)[1]
    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))
    list(stub.getWeight(todo_pb2.void(), metadata=[("fedml-client", "client001")], timeout=30))
    until(lambda: "working, fetched" in shown(path, capsys)[1], "the fetch is in the file")
    minute_ago = time.time() - 60
    server.signal(signal.SIGSTOP)
    os.utime(path, (minute_ago, minute_ago))
    assert "the server is gone, or this is a copy" in shown(path, capsys)[1]
    server.signal(signal.SIGCONT)
    server.signal(signal.SIGTERM)
    assert server.wait() == 143
    assert "round 1/2 was open when the server stopped" in shown(path, capsys)[1]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"version": 99}',
        json.dumps({"version": status.STATUS_VERSION}),
        "\xff",
    ],
)
def test_what_is_no_status_is_a_sentence(tmp_path, capsys, text):
    path = tmp_path / "status.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    code, said = shown(path, capsys)
    assert code == 1 and str(path) in said.replace("\n", "") and len(said.splitlines()) == 1


def test_what_stands_in_a_copy_from_elsewhere_stays_text(make_run, capsys):
    run = make_run(clients=["client001"])
    found = status.status_of(run.rounds)
    found["arch"] = found["clients"][0]["name"] = "\x1b[2J[red]x"
    (run.folder / "copied.json").write_text(json.dumps(found))
    code, said = shown(run.folder / "copied.json", capsys)
    assert not code and "\x1b" not in said and "[red]x" in said


def test_a_terminal_is_redrawn_until_the_run_is_over(tmp_path, make_run):
    run = make_run(clients=["client001"], rounds=2)
    run.rounds.hear("client001", "run0", 1, TRAINING, {})
    status.write(run.folder, status.status_of(run.rounds))
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="81", LINES="20")
        path = str(run.folder / "status.json")
        os.execv(sys.executable, [sys.executable, str(ROOT / "status.py"), path])
    said = ""
    try:
        while "3 min to go" not in said:
            said += os.read(terminal, 4096).decode()
        for seed in (1, 2):
            run.deliver("client001", seed).result()
        status.write(run.folder, status.status_of(run.rounds))
        while True:
            said += os.read(terminal, 4096).decode()
    except OSError:  # so a terminal says that nobody holds its other end
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "the run is over" in said.split("3 min to go")[-1]

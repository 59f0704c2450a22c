"""server/status.json and status.py: where a run is, while it runs and afterwards."""

import json
import os
import signal
import sys
import time

import pytest
from conftest import DEADLINE_S, ROOT, holding, start_server, until
from serving import Peer, connection

import status as script
from federation import status

NOW = 1_000_000
SEEN = {**status.NOWHERE, "last_seen": NOW - 14}
TRAINING = {"phase": "training", "epoch": 2, "epochs": 5, "seconds_left": 180}
TOLD = {"last_seen": NOW - 4, **TRAINING}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"last_seen": None}, "not seen yet"),
        (SEEN, "last seen 14 s ago"),
        ({**SEEN, "phase": status.FETCHED}, "working, fetched 14 s ago"),  # and told nothing yet
        (TOLD, "training, epoch 2 of 5, 3 min to go, heard 4 s ago"),
        ({**TOLD, "last_seen": NOW - 7200}, "not heard for 2 h"),
        ({**TOLD, "num_examples": 30}, "delivered"),
        ({**TOLD, "num_examples": 30, "is_done": True}, "has the result"),
    ],
)
def test_where_a_client_is(row, words):
    assert status.in_words(row, NOW) == words


def test_of_names_that_nobody_knows_one_is_told():
    """A report has room for 130,000."""
    unknown = {f"score{number}": 0.5 for number in range(9)}
    within = status.within({**unknown, "auc": 0.9}, status.SCORES)
    assert within == ({"auc": 0.9}, ["'score0' is not known"])


def shown(path, capsys):
    """What status.py says of this file, and with which code it ends."""
    code = script.main([str(path), "--once"])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_it_shows_the_clients_the_phases_and_the_scores_of_the_rounds(make_run, capsys):
    """A new round forgets what was told of the one before."""
    run = make_run(clients=["client001", "client002"], rounds=2)

    def written():
        status.write(run.folder, status.status_of(run.rounds))
        code, text = shown(run.folder / "status.json", capsys)
        assert not code and max(map(len, text.splitlines())) <= 80
        return text

    phases = []
    merge, evaluate = run.merge, run.evaluate
    run.merge = lambda *given: phases.append(written()) or merge(*given)
    run.evaluate = lambda: phases.append(written()) or evaluate()
    run.rounds.fetch("client001")[2].close()
    assert "client001  working, fetched" in written()
    run.rounds.hear("client001", "run0", 1, TRAINING, {})
    opened = written()
    assert "run run0: drcnn, round 1/2 is open" in opened
    for words in ("client001  training, epoch 2 of 5", "client002  not seen yet"):
        assert words in opened
    call = run.delivered("client001", 1, num_examples=42)
    assert "client001  delivered     42" in written()
    run.deliver("client002", 2).result()
    call.result()
    for words, text in zip(("is being merged", "is being evaluated"), phases[:2], strict=True):
        assert f"round 1/2 {words}" in text  # until its scores are there
    second = written()
    assert "round 2/2 is open" in second and "client001  last seen" in second
    assert "at a score of 0.5" in second and "0.5" not in opened
    calls = [run.deliver(name, 3) for name in ("client001", "client002")]
    assert [each.result() for each in calls] == [None, None]
    over = written()
    assert "the run is over" in over and all(word in over for word in ("0.875", "0.750", "auc"))


def test_it_is_kept_up_to_date_and_says_that_the_server_was_stopped(start, begun, capsys):
    site = begun()
    path = site / "server" / "status.json"
    server, address = start_server(start, site, script=holding(site, "todoServer"))
    until(path.exists, "the status is there")
    list(Peer(connection(address), "client001").fetch())
    until(lambda: "working, fetched" in shown(path, capsys)[1], "the fetch is in the file")
    server.signal(signal.SIGTERM)
    assert server.wait() == 143
    assert "round 1/2 was open when the server stopped" in shown(path, capsys)[1]


def test_a_copy_is_told_and_what_stands_in_it_stays_text(make_run, capsys):
    run = make_run(clients=["client001"])
    found = status.status_of(run.rounds)
    found["arch"] = found["clients"][0]["name"] = "\x1b[2J[red]x"
    copy = run.folder / "copied.json"
    copy.write_text(json.dumps(found))
    minute_ago = time.time() - 60
    os.utime(copy, (minute_ago, minute_ago))
    code, said = shown(copy, capsys)
    assert not code and "\x1b" not in said and "[red]x" in said
    assert "the server is gone, or this is a copy" in said


@pytest.mark.parametrize("text", [None, "{", "[]", '{"phase": "open"}'])
def test_what_is_no_status_is_a_sentence(tmp_path, capsys, text):
    path = tmp_path / "status.json"
    if text is not None:
        path.write_text(text)
    code, said = shown(path, capsys)
    assert code == 1 and str(path) in said.replace("\n", "") and len(said.splitlines()) == 1


def test_a_terminal_is_redrawn_until_the_run_is_over(make_run, on_a_terminal):
    run = make_run(clients=["client001"], rounds=1)
    status.write(run.folder, status.status_of(run.rounds))
    command = [sys.executable, ROOT / "status.py", "status.json"]
    process, terminal = on_a_terminal(command, run.folder, COLUMNS="81", LINES="20")
    said = b""  # a read may end within a character
    try:
        while b"not seen yet" not in said:
            said += os.read(terminal, 4096)
        run.deliver("client001", 1).result()
        status.write(run.folder, status.status_of(run.rounds))
        while True:
            said += os.read(terminal, 4096)
    except OSError:  # so a terminal says that nobody holds its other end
        pass
    os.close(terminal)
    assert process.wait(DEADLINE_S) == 0
    assert b"the run is over" in said

"""How server and client end: with a sentence, with their code, their files kept.

Exit codes: 0 the run is over, 1 refused or an error, 2 usage, 3 too few clients, 4 gave up,
5 never answered, 130 Ctrl-C, 143 SIGTERM. What a start refuses stands in test_starts.py.
"""

import contextlib
import signal
from pathlib import Path

import pytest
from conftest import Call, holding, start_server, until, write_weights
from serving import Peer, connection, refusal, serve

import todoClient
import todoServer
from common import files
from federation.state import RunState

TWO = ("client001", "client002")
STANDS_STILL = "lambda *_, **__: print('here', flush=True) or time.sleep(99)"


def peer(address):
    return Peer(connection(address), "client001")


def deliver(address, site):
    """A future of the answer to client001's upload."""
    return peer(address).send(write_weights(site / "upload.h5", 1))


def state_of(site):
    return RunState.load(site / "server" / "state.json")


# --- the server ----------------------------------------------------------------------------------


def test_a_signal_ends_a_server_that_loads_its_images(start, begun):
    site = begun()
    script = holding(site, "todoServer", f"import data\ndata.load_images = {STANDS_STILL}")
    server = start(script, "--listen", "localhost:0", cwd=site)
    server.wait_for("here")
    server.signal(signal.SIGINT)
    assert server.wait() == 130 and "start it again" in server.lines[-1]


@pytest.mark.parametrize(
    ("clients", "while_it", "number", "code"),
    [
        (TWO, "waiting for client002", signal.SIGTERM, 143),
        (TWO[:1], "here", signal.SIGINT, 130),  # it evaluates
    ],
)
def test_a_signal_ends_the_server_and_what_has_arrived_is_kept(
    start, begun, clients, while_it, number, code
):
    site = begun(clients)
    script = holding(site, "todoServer", f"standin.predict = {STANDS_STILL}")
    server, address = start_server(start, site, script=script)
    call = deliver(address, site)
    server.wait_for(while_it)
    server.signal(number)
    assert server.wait() == code and "Traceback" not in server.output
    status_code, sentence = refusal(call)
    assert status_code == "UNAVAILABLE" and "goes on when it is started again" in sentence
    kept = state_of(site)
    assert kept.uploads if clients == TWO else kept.round == 2


def test_two_signals_at_once_end_a_server(start, begun):
    """Ctrl-C reaches the server by the terminal, and a unit's stop by SIGTERM."""
    folder = begun()
    for _ in range(4):
        server, _ = start_server(start, folder)
        server.signal(signal.SIGINT)
        server.signal(signal.SIGTERM)
        assert server.wait() in (130, 143)
        assert "what has arrived is kept" in server.lines[-1]


FULL_DISK = """
from federation import weights
def fedavg(*_, **__):
    raise OSError(28, "No space left on device", "server/server_weight.h5")
weights.fedavg = fedavg
"""
LIMIT_WHEN_ONE_HAS_DELIVERED = """
from federation import rounds
def wait(run, inner=rounds.Rounds._wait_for_clients):
    run.changed.wait_for(lambda: run.uploads)
    run.opened_at -= 60
    inner(run)
rounds.Rounds._wait_for_clients = wait
"""


@pytest.mark.parametrize(
    ("clients", "flags", "code", "status_code", "words"),
    [
        (TWO, "--round-timeout 60 --min-clients 2", 3, "UNAVAILABLE", "1 of at least 2"),
        (TWO[:1], "", 1, "INTERNAL", "No space left on device: 'server/server_weight.h5'"),
    ],
)
def test_a_server_that_cannot_close_its_round_tells_all_who_wait_and_keeps_its_state(
    start, begun, clients, flags, code, status_code, words
):
    site = begun(clients)
    script = holding(site, "todoServer", FULL_DISK, LIMIT_WHEN_ONE_HAS_DELIVERED)
    server, address = start_server(start, site, *flags.split(), script=script)
    found, sentence = refusal(deliver(address, site))
    assert found == status_code and words in sentence
    assert server.wait() == code and words in server.lines[-1]
    assert list(state_of(site).uploads) == ["client001"]


def test_a_thread_that_dies_ends_the_server_with_exit_1(start, begun):
    """With one less it would look alive, and serve nobody; started again, it goes on."""
    site = begun()
    dies = """
import os
from federation import status
def write(*_):
    if os.path.exists("die"):
        raise RuntimeError("this thread dies")
status.write, status.LONGEST_PAUSE_S = write, 0
"""
    server, _ = start_server(start, site, script=holding(site, "todoServer", dies))
    (site / "die").touch()
    assert server.wait() == 1 and "start it again" in server.lines[-1]


def test_a_server_whose_run_is_over_gives_the_result_and_ends_with_the_last_word(start, begun):
    site = begun(["client001"])
    scores = dict.fromkeys(("loss", "accuracy", "auc", "sensitivity", "specificity"), 0.5)
    row = {"round": 1, "clients": 1, "missing": "", "num_examples": 3, "seconds": 1.0, **scores}
    over = state_of(site).changed(rounds=1, round=2, history=[row])
    over.save(site / "server" / "state.json")
    (site / "server" / "server_weight.json").write_text("damaged")
    server, address = start_server(start, site)
    assert "is over" in server.output and "--rounds N goes on" in server.output
    assert list(peer(address).fetch())
    server.wait_for("goes out without its model card")
    peer(address).tell("done", round_number=2)
    assert server.wait() == 0 and "client001 has not said" not in server.output


# --- the client ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [(signal.SIGINT, 130, "here"), (signal.SIGTERM, 143, "waiting for the server at")],
)
def test_a_signal_ends_the_client_with_its_files_whole(start, begun, number, code, where):
    site = begun()
    address = "localhost:1"  # where nobody listens
    if where == "here":
        _, address = start_server(start, site)
    script = holding(site, "todoClient", f"standin.train = {STANDS_STILL}")
    client = start(script, "--name", "client001", "--server", address, cwd=site)
    client.wait_for(where)
    client.signal(number)
    assert client.wait() == code
    assert "start it again" in client.lines[-1] and "Traceback" not in client.output
    assert not list((site / "client001").glob(".*.tmp*"))


@pytest.fixture
def two(make_run):
    """(Run, its address): one round of client001 and client002, served by this process."""
    run = make_run(clients=TWO, rounds=1)
    server, address = serve(run.rounds)
    yield run, address
    server.stop(0)


def waits(client_main, two, *flags):
    """A Call of client001, which has delivered and waits for client002."""
    run, address = two
    call = Call(client_main, "--server", address, *flags)
    until(lambda: run.rounds.waiting.get("client001"), "client001 has delivered")
    return call


@pytest.fixture
def deaf(two, monkeypatch):
    """deaf(): in it the server answers pings, and no call: each waits for a lock."""
    monkeypatch.setattr(todoClient, "TELL_EVERY_S", 0.2)

    @contextlib.contextmanager
    def is_deaf():
        with two[0].rounds.changed, monkeypatch.context() as patch:
            # only here: a busy one may take longer
            patch.setattr(todoClient, "TELL_TIMEOUT_S", 1)
            patch.setattr(todoClient, "UNANSWERED_S", 2)
            yield

    return is_deaf


def test_a_last_upload_that_was_never_answered_is_exit_5_and_the_next_start_delivers_it(
    client_main, two, deaf
):
    call = waits(client_main, two, "--give-up-after", "1")
    with deaf():
        code, said = call.result()
    assert code == 5 and "delivered and never answered" in said
    two[0].stop()  # both are started again
    two[0].start()
    server, address = serve(two[0].rounds)
    call = waits(client_main, (two[0], address))
    two[0].deliver("client002", 2).result()
    code, said = call.result()
    server.stop(0)
    assert code == 0 and "training now" not in said


def test_a_deaf_server_is_given_up_by_who_fetches(client_main, two, deaf):
    Path("client001").mkdir()  # a client that was started again, and knows the run
    files.save_state(Path("client001/state.json"), {**todoClient.NEW_STATE, "run": "run0"})
    with deaf():
        code, said = Call(client_main, "--server", two[1], "--give-up-after", "1").result()
    assert code == 4 and "it answered nothing for 2 s" in said


def test_a_second_client_of_the_name_ends_the_first_with_a_sentence(client_main, two):
    call = waits(client_main, two)
    two[0].delivered("client001", 7)
    code, said = call.result()
    assert code == 1 and "client001 has delivered again on another connection" in said


# --- wrong usage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        (todoServer, "--rounds 0", "at least 1"),
        (todoServer, "--min-clients 2", "--round-timeout"),
        (todoServer, "--round-timeout -1", "number of seconds"),
        (todoServer, "--clients a,a", "different"),
        (todoServer, "--clients a,../b", "letters"),
        (todoServer, "--clients client001,state.json", "cannot be called"),
        (todoServer, "--weights nowhere.h5", "no file here"),
        (todoServer, "--tensorboard", "pip install tensorboard"),
        (todoClient, "--name hospital", "--index"),
    ],
)
def test_wrong_usage_is_exit_2_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, script, arguments, word
):
    monkeypatch.setattr(todoServer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        script.main(arguments.split())
    assert ended.value.code == 2 and word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""How server and client end: within seconds, with a sentence, with their code, the port free.

Exit codes: 0 the run is over, 1 refused or an error, 2 usage, 3 too few clients, 4 gave up,
5 never answered, 130 Ctrl-C, 143 SIGTERM. What a start refuses stands in test_starts.py.
"""

import shutil
import signal
from pathlib import Path

import grpc
import pytest
from conftest import (
    Call,
    client_script,
    free_port,
    holding,
    start_server,
    until,
    write_weights,
)
from serving import serve

import todoClient
import todoServer
from common import files
from federation import weights
from federation.state import RunState
from generated import todo_pb2, todo_pb2_grpc


def deliver(address, site, client, seed=1, round_number=1):
    """A future of the answer, as a client of ours sends."""
    path = write_weights(site / f"{client}-{seed}.h5", seed)
    named = (
        ("fedml-client", client),
        ("fedml-run", "run0"),
        ("fedml-round", str(round_number)),
        ("fedml-sha256", files.sha256_of(path)),
    )
    messages = weights.blob_messages(path, client, 3)
    return stub_of(address).sendWeight.future(messages, metadata=named, timeout=60)


def stub_of(address):
    return todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))


def state_of(site):
    return RunState.load(site / "server" / "state.json")


def take_part(start, site, address, name="client001", *arguments, training_s=0):
    script = client_script(site, training_s)
    return start(script, "--name", name, "--server", address, *arguments, cwd=site)


def is_refused(call, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert caught.value.code().name == code and words in caught.value.details()


# --- the server: signals -------------------------------------------------------------------------


def while_it_loads(start, site):
    slow = "import data\ndata.load_images = lambda *_: print('here', flush=True) or time.sleep(99)"
    server = start(holding(site, "todoServer", slow), "--listen", "localhost:0", cwd=site)
    server.wait_for("here")
    return server, None


def while_clients_wait(start, site):
    server, address = start_server(start, site)
    call = deliver(address, site, "client001")
    server.wait_for("client001 delivered .* waiting for client002 .not seen yet")
    return server, call


def while_it_evaluates(start, site):
    RunState.save(state_of(site).changed(clients=["client001"]), site / "server" / "state.json")
    slow = "standin.predict = lambda *_: print('here', flush=True) or time.sleep(99)"
    script = holding(site, "todoServer", "import standin", "sys.modules['model'] = standin", slow)
    server = start(script, "--listen", "localhost:0", cwd=site)
    call = deliver(server.wait_for(r"listening on (\S+)")[1], site, "client001")
    server.wait_for("here")
    assert state_of(site).round == 2  # merged and committed, and not answered
    return server, call


def end_run(site, **changes):
    """The run in this folder had one round, and is over."""
    scores = dict.fromkeys(("loss", "accuracy", "auc", "sensitivity", "specificity"), 0.5)
    row = {"round": 1, "clients": 1, "missing": "", "num_examples": 3, "seconds": 1.0, **scores}
    over = {"clients": ["client001"], "rounds": 1, "round": 2, "history": [row]}
    state_of(site).changed(**over, **changes).save(site / "server" / "state.json")
    server = site / "server"
    (server / "server_weight.json").write_text("{}")


@pytest.mark.parametrize(
    ("set_up", "number", "code"),
    [
        (while_it_loads, signal.SIGINT, 130),
        (while_clients_wait, signal.SIGINT, 130),
        (while_clients_wait, signal.SIGTERM, 143),
        (while_it_evaluates, signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_the_server_wherever_it_is(start, begun, set_up, number, code):
    site = begun()
    server, call = set_up(start, site)
    server.signal(number)
    assert server.wait() == code and "Traceback" not in server.output
    if set_up is while_clients_wait:
        is_refused(call, "UNAVAILABLE", "goes on when it is started again")
        assert "kept" in server.lines[-1]
        server, address = start_server(start, site)  # what had arrived is there
        call = deliver(address, site, "client002", 2)
        server.wait_for("client002 delivered .* have all")
        call.cancel()
    elif call is not None:
        assert isinstance(call.exception(60), grpc.RpcError)


# --- the server: its own ends --------------------------------------------------------------------


def test_too_few_clients_within_the_limit_is_exit_3(start, begun):
    site = begun(clients=["client001", "client002", "client003"])
    limits = ("--round-timeout", "2", "--min-clients", "2")
    server, address = start_server(start, site, *limits)
    call = deliver(address, site, "client002")
    assert server.wait() == 3
    assert "1 of at least 2" in server.lines[-1] and "client003 (not seen yet)" in server.lines[-1]
    is_refused(call, "UNAVAILABLE", "1 of at least 2")
    assert list(state_of(site).uploads) == ["client002"]


FULL_DISK = """
import standin
sys.modules["model"] = standin
from federation import weights
def fedavg(*_, **__):
    raise OSError(28, "No space left on device", "server/server_weight.h5")
weights.fedavg = fedavg
"""


def test_a_merge_that_fails_is_exit_1_and_everyone_is_told(start, begun):
    site = begun(clients=["client001"])
    script = holding(site, "todoServer", FULL_DISK)
    server, address = start_server(start, site, script=script)
    is_refused(deliver(address, site, "client001"), "INTERNAL", "server/server_weight.h5")
    assert server.wait() == 1 and "No space left on device" in server.output
    assert state_of(site).frozen == ["client001"]
    # started again while the cause is still there: a sentence, before anyone is served
    server = start(script, "--listen", "localhost:0", cwd=site)
    assert server.wait() == 1 and "No space left on device" in server.lines[-1]
    assert "listening" not in server.output


def test_a_thread_that_dies_ends_the_server_with_exit_1(start, begun):
    """With one less it would look alive, and serve nobody; started again, it goes on."""
    site = begun()
    dies = """
import os
from federation import status
def write(*_):
    if os.path.exists("die"):
        raise RuntimeError("this thread dies")
status.write = write
"""
    server, _ = start_server(start, site, script=holding(site, "todoServer", dies))
    (site / "die").touch()
    assert server.wait() == 1 and "start it again" in server.lines[-1]


# --- the server: the end of the run --------------------------------------------------------------


@pytest.mark.parametrize("last_word", [True, False])
def test_a_server_whose_run_is_over_ends_with_the_last_word_or_the_last_wait(
    start, begun, last_word
):
    site = begun()
    end_run(site)
    patch = f"import todoServer\ntodoServer.LAST_ANSWER_S = {300 if last_word else 1}"
    server, address = start_server(start, site, script=holding(site, "todoServer", patch))
    assert "is over" in server.output and "--rounds N goes on" in server.output
    is_me = [("fedml-client", "client001")]
    stub = stub_of(address)
    assert list(stub.getWeight(todo_pb2.void(), metadata=is_me, timeout=30))
    server.wait_for("goes out without its model card")  # it is damaged
    if last_word:
        done = todo_pb2.clientStatus(run="run0", round=2, phase="done")
        assert stub.tell(done, metadata=is_me, timeout=30).round == 2
    assert server.wait() == 0 and "finished after 1 rounds" in server.output
    assert ("client001 has not said" in server.output) == (not last_word)


# --- the client ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (signal.SIGINT, 130, "training"),
        (signal.SIGTERM, 143, "training"),
        (signal.SIGINT, 130, "waiting for the answer"),
        (signal.SIGTERM, 143, "waiting for the server"),
    ],
)
def test_a_signal_ends_the_client_with_its_files_whole(start, begun, number, code, where):
    site = begun()
    address = f"localhost:{free_port()}"
    if where != "waiting for the server":
        server, address = start_server(start, site)
    client = take_part(start, site, address, training_s=1000 * (where == "training"))
    if where == "training":
        client.wait_for("training now")
    elif where == "waiting for the answer":
        server.wait_for("client001 delivered")
    else:
        client.wait_for("waiting for the server at")
    client.signal(number)
    assert client.wait() == code
    assert "start it again" in client.lines[-1] and "Traceback" not in client.output
    assert not list((site / "client001").glob(".*.tmp*"))
    layout = weights.Layout(site / "server" / "server_weight.h5")
    assert all(weights.fits(path, layout) for path in (site / "client001").glob("*.h5"))


def test_a_last_upload_that_was_never_answered_is_exit_5_and_delivered_by_the_next_start(
    start, begun
):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    client = take_part(start, site, address, "client001", "--give-up-after", "1")
    server.wait_for("client001 delivered")
    server.kill()
    assert client.wait() == 5 and "delivered and never answered" in client.lines[-1]
    # both come back: it is delivered again, not trained again
    server, address = start_server(start, site, port=address.rpartition(":")[2])
    client = take_part(start, site, address, training_s=1000)
    server.wait_for("client001 delivered .* again")
    assert "training" not in client.output


IMPATIENT = {"UNANSWERED_S": 2, "TELL_EVERY_S": 0.5, "TELL_TIMEOUT_S": 1, "LONGEST_PAUSE_S": 0.1}


@pytest.mark.parametrize(("waits_for", "code"), [("its answer", 5), ("the weights", 4)])
def test_a_server_that_answers_pings_only_is_noticed_and_given_up(
    client_main, make_run, monkeypatch, waits_for, code
):
    """As one whose serving thread died: connections are fine, and no call is ever answered."""
    for name, value in IMPATIENT.items():
        monkeypatch.setattr(todoClient, name, value)
    run = make_run(clients=["client001", "client002"], rounds=1)
    server, address = serve(run.rounds)
    if waits_for == "the weights":  # a client that was started again
        Path("client001").mkdir()
        files.save_state(Path("client001/state.json"), {**todoClient.NEW_STATE, "run": "run0"})
        run.rounds.changed.acquire()
    call = Call(client_main, "--server", address, "--give-up-after", "3")
    if waits_for == "its answer":
        until(lambda: "client001" in run.rounds.uploads, "client001 has delivered")
        run.rounds.changed.acquire()
    try:
        ended, said = call.result()
    finally:
        run.rounds.changed.release()  # for which every call waited
        server.stop(0)
    assert ended == code and "did not answer for 3 s" in said


# --- two of them ---------------------------------------------------------------------------------


def test_a_second_client_of_the_name_ends_the_first_with_a_sentence(start, begun):
    site = begun()
    server, address = start_server(start, site)
    first = take_part(start, site, address)
    server.wait_for("client001 delivered")
    second = take_part(start, site, address, "client001", "--client-dir", "elsewhere")
    assert first.wait() == 1
    assert "client001 has delivered again on another connection" in first.lines[-1]
    assert second.process.poll() is None


def test_a_port_that_is_taken_on_one_address_of_the_host_is_taken(start, begun):
    """localhost is 127.0.0.1 and ::1: the second would have got half of the clients, in silence."""
    site = begun()
    shutil.copytree(site / "server", site / "other")
    port = free_port()
    start("todoServer.py", "--listen", f"127.0.0.1:{port}", cwd=site).wait_for("listening on")
    arguments = ["--listen", f"localhost:{port}", "--server-dir", "other"]
    second = start("todoServer.py", *arguments, cwd=site)
    assert second.wait() == 1 and "is another server running there" in second.lines[-1]


def test_a_second_server_or_client_in_ones_folder_is_exit_1_and_disturbs_nothing(start, begun):
    site = begun()
    server, address = start_server(start, site)
    client = take_part(start, site, address)
    server.wait_for("client001 delivered")
    left_alone = files.temporary(site / "server" / "client002" / "upload.h5")
    left_alone.touch()  # as an upload that is on its way

    def written():
        """{path: when it was written}, but for status.json."""
        paths = [*(site / "server").rglob("*.*"), *(site / "client001").rglob("*.*")]
        return {path: path.stat().st_mtime_ns for path in paths if "status" not in path.name}

    before = written()
    for second in (
        start("todoServer.py", "--listen", "localhost:0", "--fresh", cwd=site),
        take_part(start, site, address),
        # with --server-dir . a server would share client001/ with the client that works there
        start("todoServer.py", "--server-dir", ".", "--rounds", "1", cwd=site),
    ):
        assert second.wait() == 1 and "another process works in" in second.lines[-1]
    assert before == written() and left_alone.exists()
    assert client.process.poll() is None and server.process.poll() is None


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
        (todoServer, "--clients tensorboard", "cannot be called"),
        (todoClient, "", "--name"),
        (todoClient, "--name hospital", "--index"),
        (todoClient, "--name ../x1", "letters"),
        (todoClient, "--name a1 --epochs 0", "at least 1"),
    ],
)
def test_wrong_usage_is_exit_2_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, script, arguments, word
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        script.main(arguments.split())
    assert ended.value.code == 2 and word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

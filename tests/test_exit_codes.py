"""How server and client end: within seconds, with a sentence, and with the port free.

Exit codes: 0 finished, 1 refused or an error, 2 usage, 3 too few clients, 4 gave up,
5 never answered, 130 Ctrl-C, 143 SIGTERM.
"""

import re
import shutil
import signal
import sys
import threading
import time

import grpc
import pytest
from conftest import (
    ROOT,
    client_script,
    free_port,
    holding,
    port_is_free,
    server_script,
    start_server,
    until,
    write_weights,
)
from serving import serve

import todoClient
import todoServer
from common import files
from federation import weights
from generated import todo_pb2, todo_pb2_grpc

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def deliver(address, site, client, seed=1, round_number=1):
    """A future of the answer, as a client of ours sends."""
    path = write_weights(site / f"{client}-{seed}.h5", seed)
    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))
    named = (
        ("fedml-client", client),
        ("fedml-run", "run0"),
        ("fedml-round", str(round_number)),
        ("fedml-sha256", files.sha256_of(path)),
    )
    return stub.sendWeight.future(
        weights.blob_messages(path, client, 3), metadata=named, timeout=60
    )


def ended(process, code, timeout_s):
    """Assert that the process ends with this code in time; twice the time, for a busy machine."""
    started = time.monotonic()
    assert process.wait(4 * timeout_s + 5) == code, process.output
    assert time.monotonic() - started < 2 * timeout_s, process.output


# --- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_the_server_while_clients_wait(start, begun, number, code):
    site = begun()
    server, address = start_server(start, site)
    call = deliver(address, site, "client001")
    server.wait_for("client001 delivered .* waiting for client002, not seen yet")
    server.signal(number)
    ended(server, code, 2)
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert (
        caught.value.code() == grpc.StatusCode.UNAVAILABLE
        and "goes on when it is started again" in caught.value.details()
    )
    assert (
        port_is_free(int(address.rpartition(":")[2]))
        and "kept" in server.lines[-1]
        and "Traceback" not in server.output
    )
    server, address = start_server(start, site)  # what had arrived is there
    call = deliver(address, site, "client002", 2)
    server.wait_for("client002 delivered .* have all")
    call.cancel()


HOLD_EVALUATE = """
import model
def evaluate(*_):
    print("holding: evaluate", flush=True)
    while True: time.sleep(0.1)
model.predict = evaluate
model.configure = model.build = model.load = lambda *_: 0
"""


def test_a_signal_ends_the_server_while_it_evaluates(start, begun):
    site = begun(clients=["client001"])
    server = start(holding(site, "todoServer", HOLD_EVALUATE), "--listen", "localhost:0", cwd=site)
    address = server.wait_for(r"listening on (\S+)")[1]
    call = deliver(address, site, "client001")
    server.wait_for("holding: evaluate")
    server.signal(signal.SIGTERM)
    ended(server, 143, 2)
    with pytest.raises(grpc.RpcError):
        call.result()
    assert (
        files.load_state(site / "server" / "state.json")["round"] == 2
    )  # merged and committed, not yet answered
    assert port_is_free(int(address.rpartition(":")[2]))


def test_a_signal_ends_the_server_before_it_listens(start, begun):
    site = begun(clients=["client001"])
    server = start(
        holding(
            site,
            "todoServer",
            "import data\ndef slow(*_):\n    print('holding: data', flush=True)\n"
            "    time.sleep(1000)\ndata.load_images = slow",
        ),
        cwd=site,
    )
    server.wait_for("holding: data")
    server.signal(signal.SIGINT)
    ended(server, 130, 2)
    assert "Traceback" not in server.output


def test_a_signal_while_a_stalled_client_uploads(start, begun):
    site, go_on = begun(), threading.Event()
    server, address = start_server(start, site)

    def half():
        yield todo_pb2.modelWeight(clientname="client001", clientsize=3, blob=b"\x89HDF" * 2500)
        go_on.wait(60)

    call = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address)).sendWeight.future(
        half(), timeout=60
    )
    until(lambda: list((site / "server" / "client001").glob(".*.tmp*")), "the first half is there")
    server.signal(signal.SIGTERM)
    ended(server, 143, 2)
    go_on.set()
    assert isinstance(call.exception(60), grpc.RpcError)
    start_server(start, site)
    left_over = [path.name for path in (site / "server").rglob(".*.tmp*")]
    assert not [name for name in left_over if not name.startswith(".status.")]  # written just now


def test_too_few_clients_within_the_limit_is_exit_3(start, begun):
    site = begun(clients=["client001", "client002", "client003"])
    server, address = start_server(start, site, "--round-timeout", "2", "--min-clients", "2")
    call = deliver(address, site, "client002")
    assert server.wait(30) == 3
    assert (
        "have client002; waiting for client001, not seen yet; client003, not seen yet; "
        "1 of at least 2" in server.output
    )
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert (
        caught.value.code() == grpc.StatusCode.UNAVAILABLE
        and "1 of at least 2" in caught.value.details()
    )
    assert port_is_free(int(address.rpartition(":")[2]))
    assert list(files.load_state(site / "server" / "state.json")["uploads"]) == ["client002"]


def test_with_all_gone_and_a_limit_the_server_is_gone_too(start, begun):
    site = begun()
    server, address = start_server(start, site, "--round-timeout", "1")
    assert (
        server.wait(30) == 3
        and "no uploads yet; waiting for client001, not seen yet; client002, not seen yet"
        in server.output
    )
    assert port_is_free(int(address.rpartition(":")[2]))


def test_a_merge_that_fails_is_exit_1_and_everyone_is_told(start, begun):
    site = begun(clients=["client001"])
    full = """
from federation import weights
def fedavg(*_, **__):
    raise OSError(28, "No space left on device")
weights.fedavg = fedavg
"""
    server = start(holding(site, "todoServer", full), "--listen", "localhost:0", cwd=site)
    address = server.wait_for(r"listening on (\S+)")[1]
    with pytest.raises(grpc.RpcError) as caught:
        deliver(address, site, "client001").result()
    assert (
        caught.value.code() == grpc.StatusCode.INTERNAL
        and "No space left" in caught.value.details()
    )
    assert (
        server.wait(20) == 1
        and "No space left on device" in server.lines[-1]
        and "Traceback" not in server.output
    )
    state = files.load_state(site / "server" / "state.json")
    assert state["frozen"] == ["client001"] and state["round"] == 1
    # started again while the cause is still there: a sentence and exit 1, before anyone is served
    server = start(holding(site, "todoServer", full), "--listen", "localhost:0", cwd=site)
    assert (
        server.wait(20) == 1
        and "No space left on device" in server.lines[-1]
        and "listening" not in server.output
    )


@pytest.fixture
def serve_in_vain(tmp_path, monkeypatch, capsys):
    """A function: what a server says that ends with exit 1 before it listens."""

    def serve(arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(todoServer, "exit_on_signals", lambda *_: None)
        assert todoServer.main(arguments) == 1
        return capsys.readouterr().err

    return serve


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arch", "vgg16"], "--arch is vgg16, but the run in server has drcnn"),
        (["--image-size", "64"], "--image-size is 64, but the run in server has 32"),
        (["--seed", "7"], "--seed is 7, but the run in server has 0"),
        (
            ["--round-timeout", "5", "--min-clients", "3"],
            "--min-clients 3 is more than the run's 2 clients",
        ),
        (["--index-dir", "nowhere"], "nowhere/val_set.pkl is missing"),
    ],
)
def test_a_state_that_does_not_fit_the_flags_is_exit_1(serve_in_vain, begun, arguments, sentence):
    site = begun()
    before = (site / "server" / "state.json").read_bytes()
    output = serve_in_vain(arguments)
    assert sentence in output
    if "the run in server has" in sentence:
        assert "--fresh" in output
    assert (site / "server" / "state.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["not json", '{"version": 99}', '{"a": 1}', "[]"])
def test_a_damaged_state_is_exit_1_and_stays(serve_in_vain, begun, damage):
    site = begun()
    (site / "server" / "state.json").write_text(damage)
    assert "--fresh" in serve_in_vain([])
    assert (site / "server" / "state.json").read_text() == damage


def test_weights_that_are_gone_are_exit_1(serve_in_vain, begun):
    site = begun()
    (site / "server" / "server_weight.h5").unlink()
    output = serve_in_vain([])
    assert "server_weight.h5 is missing" in output and "--fresh" in output


def test_another_model_in_its_place_is_exit_1(serve_in_vain, begun):
    site = begun()
    write_weights(site / "server" / "server_weight.h5", 7)
    output = serve_in_vain([])
    assert (
        "server_weight.h5 is not the model of round 1 of the run in server/state.json" in output
        and "--fresh" in output
    )


def test_a_state_of_the_other_side_is_exit_1(serve_in_vain, begun, monkeypatch, capsys):
    monkeypatch.chdir(begun())
    monkeypatch.setattr(todoClient, "exit_on_signals", lambda *_: None)
    assert todoClient.main(["--name", "client001", "--client-dir", "server"]) == 1
    said = capsys.readouterr().err
    assert "server/state.json is not a state file of this program" in said
    assert "--fresh" not in said  # a client has no such flag
    files.save_state("server/state.json", {})
    assert "server/state.json is not a state file of this program" in serve_in_vain([])


def test_fresh_moves_nothing_before_the_new_run_has_all_that_it_needs(serve_in_vain, begun):
    site = begun()
    before = sorted(path.name for path in (site / "server").iterdir())
    assert "nowhere/val_set.pkl is missing" in serve_in_vain(["--fresh", "--index-dir", "nowhere"])
    assert sorted(path.name for path in (site / "server").iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--min-clients", "2"],
        ["--rounds", "0"],
        ["--clients", "a,a"],
        ["--clients", "../a"],
        ["--round-timeout", "-1"],
        ["--listen"],
        ["--listen", "here"],
        ["--listen", "localhost:abc"],
    ],
)
def test_wrong_usage_is_exit_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        todoServer.main(arguments)
    assert ended.value.code == 2
    assert not list(tmp_path.iterdir())


def test_fresh_moves_the_old_run_aside_and_says_where(start, begun):
    site = begun()
    old = (site / "server" / "state.json").read_bytes()
    (site / "server" / ".gitkeep").touch()
    script = holding(
        site,
        "todoServer",
        "import model\nfrom conftest import write_weights",
        "model.configure = model.build = model.initialize = lambda *_: 0",
        "model.save = lambda network, path: write_weights(path, 5)",
    )
    server = start(script, "--fresh", "--listen", "localhost:0", "--rounds", "3", cwd=site)
    server.wait_for("listening on")
    assert "the old run's files are in server/old-1" in server.output
    assert (site / "server" / "old-1" / "state.json").read_bytes() == old and (
        site / "server" / ".gitkeep"
    ).exists()
    state = files.load_state(site / "server" / "state.json")
    assert state["run"] != "run0" and state["rounds"] == 3 and state["round"] == 1
    server.kill()
    server = start(script, "--fresh", "--listen", "localhost:0", cwd=site)
    server.wait_for("listening on")
    assert (site / "server" / "old-2").exists() and (
        site / "server" / "old-1" / "state.json"
    ).read_bytes() == old
    server.kill()
    (
        site / "server" / "state.json"
    ).unlink()  # or a --fresh that was killed in the middle: nothing is written over
    model = (site / "server" / "server_weight.h5").read_bytes()
    server = start(script, "--listen", "localhost:0", cwd=site)
    server.wait_for("listening on")
    assert (site / "server" / "old-3" / "server_weight.h5").read_bytes() == model


def test_a_finished_server_says_so_answers_repeats_and_is_exit_0(start, begun):
    site = begun(clients=["client001"], rounds=1)
    path = write_weights(site / "client001-1.h5", 1)
    row = {"round": 1, "loss": 0.5}
    files.save_state(
        site / "server" / "state.json",
        {
            **files.load_state(site / "server" / "state.json"),
            "round": 2,
            "history": [row],
            "counted": {
                "client001": {"round": 1, "num_examples": 3, "sha256": files.sha256_of(path)}
            },
        },
    )
    server, address = start_server(start, site)
    assert (
        "run run0 is finished (1 rounds); --rounds N goes on, --fresh begins a new one"
        in server.output
    )
    call = deliver(address, site, "client001")
    assert call.result().value == 1 and dict(call.trailing_metadata())["fedml-done"] == "1"
    assert server.process.poll() is None  # a new client fetches the result, too
    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))
    list(stub.getWeight(todo_pb2.void(), metadata=[("fedml-client", "client001")], timeout=60))
    assert server.wait(10) == 0 and "finished after 1 rounds" in server.output
    assert "Traceback" not in server.output
    server, address = start_server(start, site, "--rounds", "2")  # it is extended
    assert "resuming run run0 at round 2/2 from server/state.json" in server.output


def test_a_run_whose_last_evaluation_was_interrupted_is_not_called_finished(start, begun):
    site = begun(clients=["client001"], rounds=1)
    closing = {
        "round": 1,
        "clients": 1,
        "missing": "",
        "num_examples": 3,
        "wait_seconds": 1,
        "merge_seconds": 1,
    }
    files.save_state(
        site / "server" / "state.json",
        {**files.load_state(site / "server" / "state.json"), "round": 2, "closing": closing},
    )
    server, _ = start_server(start, site, script=server_script(site))
    resuming, evaluated, *_ = server.lines
    assert resuming.endswith(" server: resuming run run0 at round 1/1 from server/state.json")
    assert " server: round 1/1: loss " in evaluated


# --- the client ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (*SIGNALS[0], "training"),
        (*SIGNALS[1], "training"),
        (*SIGNALS[1], "waiting for the answer"),
        (*SIGNALS[0], "waiting for the server"),
    ],
)
def test_a_signal_ends_the_client_with_its_files_whole(start, begun, number, code, where):
    site = begun()
    address = f"localhost:{free_port()}"
    if where != "waiting for the server":
        server, address = start_server(start, site)
    client = start(
        client_script(site, 1000 * (where == "training")),
        "--name",
        "client001",
        "--server",
        address,
        cwd=site,
    )
    if where == "training":
        client.wait_for("training now")
    elif where == "waiting for the answer":
        server.wait_for("client001 delivered")
    else:
        client.wait_for("no server answers there yet")
    client.signal(number)
    ended(client, code, 2)
    assert "start it again" in client.lines[-1] and "Traceback" not in client.output
    assert not list((site / "client001").glob(".*.tmp*"))
    for path in (site / "client001").glob("*.h5"):
        weights.check(path, weights.shapes_of(site / "server" / "server_weight.h5"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--name", "client009", "--index", "index/worker1.pkl"],
            "server refused: client 'client009' is not one of this run's",
        ),
        (["--name", "client001", "--index", "index/worker9.pkl"], "index/worker9.pkl is missing"),
    ],
)
def test_a_client_that_is_refused_or_has_no_images_is_exit_1(start, begun, arguments, sentence):
    site = begun()
    _, address = start_server(start, site)
    client = start(client_script(site), *arguments, "--server", address, cwd=site)
    assert (
        client.wait(30) == 1 and sentence in client.lines[-1] and "Traceback" not in client.output
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("image_size", "large", "'large' is not a whole number of at least 16"),
        ("arch", "resnet", "'resnet'"),
        ("image_size", 10**9, "1000000000 is too large, expected at most 4096"),
        ("round", -19, "'-19' is not a whole number"),
    ],
)
def test_a_server_whose_words_make_no_sense_is_exit_1(make_run, start, site, name, value, reason):
    run = make_run()
    run.rounds.state = run.rounds.state.changed(**{name: value})
    server, address = serve(run.rounds)
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    assert client.wait(30) == 1 and len(client.lines) == 1
    assert (
        "error: the server names a run, but not its network and round as expected ("
        in client.lines[0]
    )
    assert reason in client.lines[0]
    server.stop(0)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--name", "hospital"],
        ["--name", "../x1"],
        ["--name", "a1", "--epochs", "0"],
        ["--name", "a1", "--server", "localhost"],
    ],
)
def test_wrong_usage_of_the_client_is_exit_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        todoClient.main(arguments)
    assert ended.value.code == 2
    assert not list(tmp_path.iterdir())


def test_a_server_that_stays_away_is_exit_4(start, begun):
    site = begun()
    client = start(
        client_script(site),
        "--name",
        "client001",
        "--server",
        f"localhost:{free_port()}",
        "--give-up-after",
        "1",
        cwd=site,
    )
    assert client.wait(30) == 4 and "did not answer for 1 s" in client.lines[-1]


def test_a_last_upload_that_was_never_answered_is_exit_5_and_delivered_by_the_next_start(
    start, begun
):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    client = start(
        client_script(site),
        "--name",
        "client001",
        "--server",
        address,
        "--give-up-after",
        "1",
        cwd=site,
    )
    server.wait_for("client001 delivered")
    server.kill()
    assert client.wait(30) == 5 and "delivered and never answered" in client.lines[-1]
    # both come back: it is delivered again, not trained again
    server, address = start_server(start, site, port=address.rpartition(":")[2])
    client = start(client_script(site, 1000), "--name", "client001", "--server", address, cwd=site)
    server.wait_for("client001 delivered .* again, the same weights")
    assert "training" not in client.output


def test_a_client_with_other_threads_trains_again_and_says_so(start, begun):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    for threads, words in (
        (1, "training on 4 images"),
        (2, "trained before with other settings (threads was 1, is 2)"),
    ):
        client = start(
            client_script(site),
            "--name",
            "client001",
            "--server",
            address,
            "--threads",
            threads,
            cwd=site,
        )
        before = len(server.lines)
        server.wait_for("client001 delivered", start=before)
        client.kill()
        assert words in client.output and "training now" in client.output


def test_what_another_client_trained_is_not_delivered_as_ones_own(start, begun):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    for name in ("client001", "client002"):
        client = start(
            client_script(site),
            "--name",
            name,
            "--client-dir",
            "shared",
            "--index",
            "index/worker1.pkl",
            "--server",
            address,
            cwd=site,
        )
        server.wait_for(f"{name} delivered")
        if name == "client001":
            client.kill()
    assert "other settings (name was client001, is client002): training again" in client.output


def test_weights_of_another_run_are_dropped_with_a_line(start, begun):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    server.wait_for("client001 delivered")
    client.kill()
    path = site / "client001" / "state.json"
    files.save_state(path, {**files.load_state(path), "run": "another"})
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    server.wait_for("client001 delivered .* again")
    assert "upload rejected: client001 delivers for run 'another'" in client.output
    assert "round 1/1: training on 4 images" in client.output


def test_a_second_client_of_the_name_ends_the_first_with_a_sentence(start, begun):
    site = begun()
    server, address = start_server(start, site)
    first = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    server.wait_for("client001 delivered")
    second = start(
        client_script(site),
        "--name",
        "client001",
        "--server",
        address,
        "--client-dir",
        "elsewhere",
        cwd=site,
    )
    assert (
        first.wait(30) == 1
        and "client001 has delivered again on another connection" in first.lines[-1]
    )
    assert second.process.poll() is None


def test_a_busy_port_is_exit_1(start, begun):
    site = begun()
    shutil.copytree(site / "server", site / "other")
    _, address = start_server(start, site)
    second = start("todoServer.py", "--listen", address, "--server-dir", "other", cwd=site)
    assert second.wait(30) == 1 and "is another server running there" in second.lines[-1]


def test_a_port_that_is_taken_on_one_address_of_the_host_is_taken(start, begun):
    """localhost is 127.0.0.1 and ::1: the second would have got half of the clients, in silence."""
    site = begun()
    shutil.copytree(site / "server", site / "other")
    port = free_port()
    start("todoServer.py", "--listen", f"127.0.0.1:{port}", cwd=site).wait_for("listening on")
    second = start(
        "todoServer.py", "--listen", f"localhost:{port}", "--server-dir", "other", cwd=site
    )
    assert second.wait(30) == 1 and "is another server running there" in second.lines[-1]


def test_a_server_that_keeps_uploads_where_a_client_works_is_told(start, begun):
    """--server-dir . on the demo's machine: server and client would share client001/."""
    site = begun()
    for path in (site / "server").iterdir():
        path.rename(site / path.name)
    server, address = start_server(start, site, "--server-dir", ".")
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    assert client.wait(30) == 1 and "another process works in client001" in client.lines[-1]
    assert server.process.poll() is None


def test_a_signal_ends_a_finished_server_whose_client_does_not_read(start, begun):
    site, large = begun(clients=["client001"], rounds=1), [("big", (1_500_000,))]
    digest = files.sha256_of(write_weights(site / "server" / "server_weight.h5", 1, large))
    path = site / "server" / "state.json"
    files.save_state(
        path,
        {**files.load_state(path), "weights_sha256": digest, "round": 2, "history": [{"round": 1}]},
    )
    server, address = start_server(start, site)
    call = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address)).getWeight(
        todo_pb2.void(), metadata=[("fedml-client", "client001"), ("fedml-accept", "blob")]
    )
    assert dict(call.initial_metadata())["fedml-round"] == "2"
    server.wait_for("client001 fetches the result")
    server.signal(signal.SIGTERM)
    ended(server, 143, 2)
    call.cancel()


def test_a_second_server_or_client_in_ones_folder_is_exit_1_and_disturbs_nothing(start, begun):
    site, go_on = begun(), threading.Event()
    server, address = start_server(start, site)
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    server.wait_for("client001 delivered")

    def half():
        yield todo_pb2.modelWeight(clientname="client002", clientsize=3, blob=b"\x89HDF" * 2500)
        go_on.wait(60)

    call = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address)).sendWeight.future(
        half(), timeout=60
    )

    def arrived():
        return [path.stat().st_size for path in (site / "server" / "client002").glob(".*.tmp*")]

    until(lambda: arrived() == [10_000], "the first half is there")

    def written():
        """{path: when it was written}; status.json is written anew whenever something happens."""
        paths = [*(site / "server").rglob("*"), *(site / "client001").rglob("*")]
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()} | {
            site / "server" / "status.json": None
        }

    before = written()
    for second in (
        start("todoServer.py", "--listen", "localhost:0", cwd=site),
        start("todoServer.py", "--listen", "localhost:0", "--fresh", cwd=site),
        start(client_script(site), "--name", "client001", "--server", address, cwd=site),
    ):
        assert second.wait(30) == 1 and len(second.lines) == 1
        assert re.search(
            r"(server|client001): error: another process works in \1: wait until it ends",
            second.lines[0],
        )
    assert before == written()
    assert client.process.poll() is None and not call.done()
    go_on.set()


def test_no_script_loads_tensorflow_before_it_needs_it(start, begun):
    begun()
    import subprocess

    code = """
import sys
import federation.service, todoClient, todoServer
assert not {"tensorflow", "keras"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0

"""Files of another layout, converted by a process that bounds itself; and whose fault it is."""

import collections
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from conftest import (
    ROOT,
    Call,
    averaged,
    processes_in,
    read_weights,
    same_bits,
    server_script,
    start_server,
    until,
)
from hostile import HOSTILE, replace_converter
from standin import SHAPES, random_tensors, write_weights

from common.files import sha256_of
from federation import convert, weights
from federation.state import RunState
from generated import todo_pb2_grpc

SHAPES_1_MB = [("conv1", (3, 3, 3, 2)), ("dense", (250_000,)), ("healthy", (1,))]


@pytest.fixture
def converters(tmp_path, monkeypatch):
    """Of a server whose file lies in tmp_path, where its processes are found too."""
    monkeypatch.chdir(tmp_path)
    own = write_weights(tmp_path / "server_weight.h5", 0)
    return convert.Converters(weights.Layout(own))


def running_in(folder):
    """The processes that `replace_converter` put in place of the converter."""
    return [pid for pid, line in processes_in(folder).items() if "converter_of_the_test" in line]


def test_another_layout_becomes_the_servers(converters, tmp_path):
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    digest = converters.convert("client001", upload)
    assert upload.read_bytes() == write_weights(tmp_path / "expected.h5", 5).read_bytes()
    assert digest == sha256_of(upload)
    assert {path.name for path in tmp_path.iterdir()} == {
        "server_weight.h5",
        "upload.h5",
        "expected.h5",
    }


def test_other_names_of_the_layers_become_the_servers(converters, tmp_path):
    shapes = [(f"model_2_{layer}", shape) for layer, shape in SHAPES]
    upload = write_weights(tmp_path / "upload.h5", 5, shapes)
    converters.convert("client001", upload)
    assert upload.read_bytes() == write_weights(tmp_path / "expected.h5", 5).read_bytes()


def test_what_it_says_about_the_file_is_a_refusal_and_the_file_stays(converters, tmp_path):
    tensors = random_tensors(5)
    tensors[1][0] = np.nan
    upload = write_weights(tmp_path / "upload.h5", tensors, root="model_weights")
    before = upload.read_bytes()
    with pytest.raises(ValueError, match="norm1.*holds nan: only finite numbers"):
        converters.convert("client001", upload)
    assert upload.read_bytes() == before
    (tmp_path / "text.h5").write_text("hello " * 999)
    with pytest.raises(ValueError, match="not a whole HDF5 weight file"):
        converters.convert("client001", tmp_path / "text.h5")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("many names", "lists more than 10,000 tensors"),
        ("many empty layers", "cannot be read within 2 s|the file has 0 tensors"),
        ("one text many times", "memory allocation failed"),
    ],
)
def test_a_small_file_that_costs_much_is_refused_at_a_bounded_price(
    tmp_path, monkeypatch, kind, sentence
):
    """The bound on memory is one that such a file would go far beyond."""
    monkeypatch.setattr(convert, "MEMORY_BYTES", 64 << 20)
    monkeypatch.setattr(convert, "CPU_S", 2)
    own = write_weights(tmp_path / "server_weight.h5", 0, SHAPES_1_MB)
    converters = convert.Converters(weights.Layout(own))
    HOSTILE[kind](tmp_path / "upload.h5")
    assert (tmp_path / "upload.h5").stat().st_size < 1.1 * own.stat().st_size
    used = os.times()
    with pytest.raises(ValueError) as caught:
        converters.convert("client001", tmp_path / "upload.h5")
    spent = os.times()
    cpu_s = sum(spent[2:4]) - sum(used[2:4])
    assert cpu_s < 6, f"{cpu_s} s of processor time"
    assert re.search(sentence, str(caught.value)), caught.value


def test_a_process_beyond_its_processor_time_is_the_files_fault(converters, monkeypatch, tmp_path):
    monkeypatch.setattr(converters, "cpu_s", 1)
    replace_converter(
        monkeypatch,
        tmp_path,
        "from federation import weights\n"
        "weights.check = lambda *_: [0 for _ in iter(int, 1)]  # for ever",
    )
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    with pytest.raises(ValueError, match="cannot be read within 1 s and 268 MB"):
        converters.convert("client001", upload)


def test_a_process_beyond_its_memory_is_the_files_fault(converters, monkeypatch, tmp_path):
    replace_converter(
        monkeypatch,
        tmp_path,
        "from federation import weights\nweights.check = lambda *_: bytearray(300_000_000)",
    )
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    with pytest.raises(ValueError, match="cannot be read within 5 s and 268 MB"):
        converters.convert("client001", upload)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT"])
def test_a_crash_is_tried_once_more(converters, monkeypatch, tmp_path, name):
    die = f"os.kill(os.getpid(), signal.{name})"
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    replace_converter(monkeypatch, tmp_path, die)
    with pytest.raises(ValueError, match="the library that reads it crashed, twice"):
        converters.convert("client001", upload)
    once = f"if not os.path.exists('seen'): open('seen', 'w'); {die}"
    replace_converter(monkeypatch, tmp_path, once)
    converters.convert("client001", upload)
    assert upload.read_bytes() == write_weights(tmp_path / "expected.h5", 5).read_bytes()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "ended by SIGTERM"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "stands still"),
        ("sys.exit(7)", "exit code 7"),
        ("raise MemoryError", "exit code 1"),
    ],
)
def test_what_is_not_the_files_fault_is_ours(converters, monkeypatch, tmp_path, code, sentence):
    monkeypatch.setattr(convert, "WALL_S", 1 if "SIGSTOP" in code else 300)
    monkeypatch.setattr(converters, "cpu_s", 0)
    replace_converter(monkeypatch, tmp_path, code)
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    before = upload.read_bytes()
    with pytest.raises(ChildProcessError, match=sentence):
        converters.convert("client001", upload)
    assert upload.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_process_that_cannot_be_started_is_our_fault(converters, monkeypatch, tmp_path):
    def start():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(convert, "start", start)
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    with pytest.raises(ChildProcessError, match="no process could be started .*temporarily"):
        converters.convert("client001", upload)


def test_a_full_disk_is_our_fault(converters, monkeypatch, tmp_path):
    replace_converter(
        monkeypatch,
        tmp_path,
        "from federation import convert\n"
        "convert.set_bounds = lambda *_: None\n"
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))",
    )
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    with pytest.raises(ChildProcessError, match="failed with exit code 1"):
        converters.convert("client001", upload)


def test_one_conversion_a_client_and_two_in_all(converters, monkeypatch, tmp_path):
    replace_converter(
        monkeypatch,
        tmp_path,
        "while not os.path.exists('go'): time.sleep(0.01)",
    )
    names = ["client001", "client001", "client002", "client003"]
    uploads = [
        write_weights(tmp_path / f"upload{number}.h5", number, root="model_weights")
        for number in range(len(names))
    ]
    calls = []
    for name, upload in zip(names, uploads, strict=True):
        calls.append(Call(converters.convert, name, upload))
        expected = {"client001"} if len(calls) < 3 else {"client001", "client002"}
        until(lambda: converters.busy == expected, "it is converted")  # noqa: B023
    until(lambda: len(running_in(tmp_path)) == 2, "two processes run")
    (tmp_path / "go").touch()
    for call in calls:
        call.result()
    assert converters.busy == set()


def test_a_conversion_that_nobody_waits_for_ends(converters, monkeypatch, tmp_path):
    replace_converter(monkeypatch, tmp_path, "time.sleep(1000)")
    upload = write_weights(tmp_path / "upload.h5", 5, root="model_weights")
    awaited = [True]
    first = Call(converters.convert, "client001", upload, lambda: awaited[0])
    until(lambda: converters.busy, "it began")
    second = Call(converters.convert, "client001", upload, lambda: awaited[0])
    awaited.clear()
    awaited.append(False)
    for call in (first, second):
        with pytest.raises(ChildProcessError, match="nobody waits"):
            call.result(20)
    assert not running_in(tmp_path)


def bounded_converter(folder):
    """(process id, its limits by name) once it has bounded itself; None before."""
    for pid, line in processes_in(folder).items():
        if "federation.convert" in line:
            rows = open(f"/proc/{pid}/limits").read().splitlines()
            limits = {row[:26].strip(): row[26:].split()[0] for row in rows}
            if limits["Max file size"] != "unlimited":
                return pid, limits
    return None


@pytest.mark.parametrize("stopped", [False, True])
def test_a_conversion_ends_with_the_server(tmp_path, stopped):
    """The server is killed, its converter may even be stopped: nothing is left."""
    own = write_weights(tmp_path / "server_weight.h5", 0)
    os.mkfifo(tmp_path / "upload.h5")  # who opens it waits for ever
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from federation import convert, weights
from federation.state import RunState
from generated import todo_pb2_grpc
converters = convert.Converters(weights.Layout({str(own)!r}))
converters.convert("client001", {str(tmp_path / "upload.h5")!r})
"""
    server = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    try:
        pid, _ = until(lambda: bounded_converter(tmp_path), "the converter has bounded itself")
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        server.kill()
        server.wait()
        until(lambda: not os.path.exists(f"/proc/{pid}"), "the converter ends", 10)
    finally:
        server.kill()
        server.wait()


def test_it_bounds_itself_before_it_opens_the_file(converters, tmp_path):
    os.mkfifo(tmp_path / "upload.h5")  # who opens it waits: so the limits below came before
    awaited = [True]
    call = Call(converters.convert, "client001", tmp_path / "upload.h5", lambda: bool(awaited))
    _, limits = until(lambda: bounded_converter(tmp_path), "the bounds are set")
    awaited.clear()
    with pytest.raises(ChildProcessError):
        call.result()
    assert limits["Max core file size"] == "0"
    assert 5 <= int(limits["Max cpu time"]) <= 9
    assert 268e6 < int(limits["Max address space"]) < 2e9
    size = (tmp_path / "server_weight.h5").stat().st_size
    assert int(limits["Max file size"]) == int(1.1 * size)


# --- at a server's start -------------------------------------------------------------------------


def deliver(address, path, client):
    """The answer to an upload for round 1, sent by a new peer."""
    with grpc.insecure_channel(address) as channel:
        metadata = {"fedml-client": client, "fedml-run": "run0", "fedml-round": "1"}
        metadata["fedml-sha256"] = sha256_of(path)
        messages = weights.blob_messages(path, client, 3)
        stub = todo_pb2_grpc.FedMLStub(channel)
        return stub.sendWeight(messages, metadata=list(metadata.items()), timeout=60).value


def store_upload(site, client, tensors, root):
    """As a server of an earlier version kept it: as it was sent, whatever its layout."""
    folder = site / "server" / client
    folder.mkdir()
    path = write_weights(folder / "client_weights.h5", tensors, root=root)
    state = RunState.load(site / "server" / "state.json")
    upload = {"num_examples": 3, "sha256": sha256_of(path)}
    state.changed(uploads={**state.uploads, client: [upload]}).save(site / "server" / "state.json")
    return upload["sha256"]


def test_a_stored_upload_of_another_layout_is_converted_at_the_start(start, begun, tmp_path):
    site = begun(rounds=1)
    sha256 = store_upload(site, "client001", random_tensors(5), "model_weights")
    server, address = start_server(start, site, script=server_script(site))
    server.wait_for("client001/client_weights.h5 had another layout than the server's file")
    stored = site / "server" / "client001" / "client_weights.h5"
    assert stored.read_bytes() == write_weights(tmp_path / "expected.h5", 5).read_bytes()
    upload = RunState.load(site / "server" / "state.json").uploads["client001"][-1]
    expected = {"num_examples": 3, "sha256": sha256, "file_sha256": sha256_of(stored)}
    assert upload == expected
    server.kill()  # the converted file is found again, and nothing is converted twice
    server, address = start_server(start, site, script=server_script(site))
    assert "another layout" not in server.output
    own = write_weights(tmp_path / "own.h5", 6)
    assert deliver(address, own, "client002") == 1
    merged = read_weights(site / "server" / "server_weight.h5")
    uploads = [("client001", 3, random_tensors(5)), ("client002", 3, random_tensors(6))]
    assert same_bits(merged, averaged(uploads))
    # the client that sent it and never got its answer sends the same again
    sent = write_weights(tmp_path / "sent.h5", 5, root="model_weights")
    assert sha256_of(sent) == sha256 and deliver(address, sent, "client001") == 1


def test_a_stored_upload_that_cannot_count_is_rejected_at_the_start(start, begun, tmp_path):
    site = begun(rounds=1)
    tensors = random_tensors(5)
    tensors[1][0] = np.inf
    store_upload(site, "client001", tensors, "")
    server, address = start_server(start, site, script=server_script(site))
    server.wait_for("upload rejected: client001: layer 'norm1' holds inf")
    calls = [
        Call(deliver, address, write_weights(tmp_path / f"{name}.h5", seed), name)
        for name, seed in (("client001", 7), ("client002", 8))
    ]
    assert [call.result() for call in calls] == [1, 1]
    merged = read_weights(site / "server" / "server_weight.h5")
    uploads = [("client001", 3, random_tensors(7)), ("client002", 3, random_tensors(8))]
    assert same_bits(merged, averaged(uploads))


# --- an attack -----------------------------------------------------------------------------------


def send(address, path, client):
    """A new peer's upload for round 1; returns (its future, its channel)."""
    channel = grpc.insecure_channel(address)
    metadata = {"fedml-client": client, "fedml-run": "run0", "fedml-round": "1"}
    metadata["fedml-sha256"] = sha256_of(path)
    messages = weights.blob_messages(path, client, 3)
    stub = todo_pb2_grpc.FedMLStub(channel)
    return stub.sendWeight.future(messages, metadata=list(metadata.items()), timeout=120), channel


def seconds_until_accepted(server, address, paths, client):
    """Of each upload, one after the other: from its beginning until the server's log has it."""
    seconds = []
    for path in paths:
        lines = len(server.lines)
        started = time.monotonic()
        _, channel = send(address, path, client)
        server.wait_for(f"{client} delivered", 60, start=lines)
        seconds.append(time.monotonic() - started)
        channel.close()
    return seconds


@pytest.mark.alone
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_of_two_clients_cost_the_others_less_than_a_second(
    start, begun, tmp_path, kind
):
    """Both may convert all the time; the server's memory stays within 150 MB and 4 MB a client."""
    site = begun(clients=["client001", "client002", "client003", "client004"])
    own = write_weights(site / "server" / "server_weight.h5", 0, SHAPES_1_MB)
    state = RunState.load(site / "server" / "state.json")
    state.changed(weights_sha256=sha256_of(own)).save(site / "server" / "state.json")
    server, address = start_server(start, site, script=server_script(site))
    HOSTILE[kind](tmp_path / "hostile.h5")
    assert (tmp_path / "hostile.h5").stat().st_size < 1.1 * own.stat().st_size
    good = [write_weights(tmp_path / f"{seed}.h5", seed, SHAPES_1_MB) for seed in range(5)]
    calm = seconds_until_accepted(server, address, good, "client003")
    over = threading.Event()
    answers = collections.Counter()

    def attack(client):
        while not over.is_set():
            call, channel = send(address, tmp_path / "hostile.h5", client)
            answers[call.code()] += 1
            channel.close()

    attackers = [Call(attack, name) for name in ("client001", "client002")]
    until(lambda: sum(answers.values()) >= 2, "the attack has begun", 120)
    attacked = seconds_until_accepted(server, address, good, "client004")
    over.set()
    for attacker in attackers:
        attacker.result(120)
    assert set(answers) == {grpc.StatusCode.INVALID_ARGUMENT}, answers
    assert statistics.median(attacked) < statistics.median(calm) + 1, (calm, attacked)
    peak = int(open(f"/proc/{server.pid}/status").read().split("VmHWM:")[1].split()[0]) * 1024
    assert peak < 150e6 + 4 * 4e6, f"{peak / 1e6:.0f} MB"

"""Output holds up no round and no signal, changes no exit code, and what others write stays text.

Real servers and clients without TensorFlow, and the log by itself.
"""

import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios

import pytest
from conftest import (
    DEADLINE_S,
    ROOT,
    client_script,
    free_port,
    holding,
    server_script,
    start_server,
    until,
)

import todoServer
from common import log
from federation.rounds import Refused

XOFF = b"\x13"  # Ctrl-S


@pytest.fixture
def running():
    """running(command, cwd=folder, stdout=...) -> Popen; none outlives its test."""
    all_running = []

    def begin(command, **options):
        command = [sys.executable, *map(str, command)]
        all_running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, **options))
        return all_running[-1]

    yield begin
    for each in all_running:
        each.kill()
        each.wait()


# --- nobody reads --------------------------------------------------------------------------------


@contextlib.contextmanager
def full_pipe():
    """(read end, write end) of a pipe into which not one byte more goes."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    os.set_blocking(writer, True)
    yield reader, writer
    os.close(writer)
    os.close(reader)


@contextlib.contextmanager
def stopped_terminal():
    """(master, slave) of a terminal at which someone pressed Ctrl-S."""
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[0] |= termios.IXON
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    os.write(master, XOFF)
    yield master, slave
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    ("stop", "ends"),
    [
        (full_pipe, "by itself"),
        (stopped_terminal, "by itself"),
        (stopped_terminal, "by signals"),
    ],
)
def test_a_run_goes_on_and_ends_though_nobody_reads(running, begun, stop, ends):
    site = begun(rounds=3)
    port = free_port()
    with stop() as (_, out):
        streams = {"stdout": out, "stderr": out, "cwd": site}
        server = running([server_script(site), "--listen", f"localhost:{port}"], **streams)

        def client(name):
            arguments = ["--name", name, "--server", f"localhost:{port}"]
            return running([client_script(site), *arguments], **streams)

        first = client("client001")
        if ends == "by itself":
            codes = [each.wait(DEADLINE_S) for each in (first, client("client002"), server)]
            assert codes == [0, 0, 0]
            assert len((site / "server" / "history.csv").read_text().splitlines()) == 4
            return
        until((site / "server" / "client001" / "client_weights.h5").exists, "it has delivered")
        for each, number, code in ((first, signal.SIGINT, 130), (server, signal.SIGTERM, 143)):
            each.send_signal(number)
            assert each.wait(DEADLINE_S) == code


@pytest.mark.parametrize("closed", [">&- 2>&- <&-", ">&-", "2>&-"])
def test_closed_outputs_change_neither_result_nor_exit_code(begun, closed):
    """The next file that is opened would get that number."""
    site = begun(clients=["client001"], rounds=1)
    port = free_port()
    commands = [
        f"{server_script(site)} --listen localhost:{port}",
        f"{client_script(site)} --name client001 --server localhost:{port}",
    ]
    both = [
        subprocess.Popen(
            ["bash", "-c", f"exec {sys.executable} {command} {closed}"],
            **{"cwd": site, "stdout": subprocess.PIPE, "text": True},
        )
        for command in commands
    ]
    try:
        said = [each.communicate(timeout=DEADLINE_S)[0] for each in both]
    finally:
        for each in both:
            each.kill()
    assert [each.returncode for each in both] == [0, 0]
    assert ("the run is over" in said[1]) == (closed == "2>&-")
    for path in site.rglob("*.*"):
        assert not path.is_file() or b"client001: round" not in path.read_bytes(), path


STEPS = """
import standin
def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
    for step in range(1, 21):
        progress(3, step, 20, 0.5)
        if step % 5 == 0: standin.say("standin", "a line in between")
        time.sleep(0.02)
    row = {"epoch": 1, "loss": 0.5, "accuracy": 0.5, "num_examples": 4, "seconds": 0.1}
    return [{"round": round_number, **row}]
standin.train = train
sys.modules["model"] = standin
"""


@pytest.mark.parametrize("ends", ["by itself", "the terminal goes away", "Ctrl-C"])
def test_on_a_terminal_a_bar_is_drawn_below_the_lines(begun, start, running, ends):
    """A terminal that goes away ends no client, and the cursor comes back at Ctrl-C."""
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    terminal, own_end = pty.openpty()
    command = [holding(site, "todoClient", STEPS), "--name", "client001", "--server", address]
    client = running(
        [*command, "--epochs", "3"],
        **{"cwd": site, "stdout": own_end, "stderr": own_end},
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(own_end)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the client has ended
        while not (ends == "the terminal goes away" and b"step" in said):
            said += os.read(terminal, 1 << 12)
            if ends == "Ctrl-C" and b"step" in said:
                client.send_signal(signal.SIGINT)
    os.close(terminal)
    assert b"round 1/1: epoch 3/3, step" in said
    if ends == "Ctrl-C":
        assert client.wait(DEADLINE_S) == 130 and said.endswith(b"\x1b[?25h\r\n")
        return
    assert client.wait(DEADLINE_S) == 0 == server.wait()
    if ends == "by itself":
        whole = re.findall(rb"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d standin: a line in between\r\n", said)
        assert len(whole) == 4


# --- the log by itself ---------------------------------------------------------------------------

SAY_MANY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.script import end_script, start_script
from common import log
start_script(never_waits=True)
for number in range(int(sys.argv[1])):
    log.say("test", f"line {{number}}")
os.write(2, b"all said\\n")
sys.stdin.readline()
end_script(7)
"""


def say_many(count, **streams):
    """A process that has said so many lines, and ends once it is sent a line."""
    command = [sys.executable, "-c", SAY_MANY, str(count)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **streams
    )
    assert process.stderr.readline() == "all said\n"
    return process


def test_the_queue_keeps_the_newest_lines_and_counts_the_others():
    more = 500
    with full_pipe() as (reader, writer):
        process = say_many(log.MAX_TEXTS + more, stdout=writer)
        assert os.read(reader, 1 << 20) == 4096 * b"x"  # what the pipe was filled with
        said = b""
        while f"line {log.MAX_TEXTS + more - 1}\n".encode() not in said:
            said += os.read(reader, 1 << 16)
        process.communicate("\n")
    first, left_out, *others = said.decode().splitlines()
    assert first.endswith("test: line 0")  # which the thread was writing all the time
    assert int(re.search(r"\d+", left_out)[0]) == more - 1
    numbers = [int(line.rpartition(" ")[2]) for line in others]
    assert numbers == list(range(more, log.MAX_TEXTS + more))


def test_lines_that_are_read_late_are_all_there_and_those_that_nobody_reads_are_not_waited_for():
    process = say_many(5000, stdout=subprocess.PIPE)
    out, _ = process.communicate("\n")
    assert (process.returncode, len(out.splitlines())) == (7, 5000)
    with full_pipe() as (_, writer):
        process = say_many(3, stdout=writer)
        process.communicate("\n", timeout=20)
        assert process.returncode == 7


def test_a_file_name_that_is_no_text_is_said(tmp_path, start):
    index = os.fsdecode(b"caf\xe9\x1b[2J.pkl")
    client = start("todoClient.py", "--name", "client001", "--index", index, cwd=tmp_path)
    assert client.wait() == 1 and r"caf\udce9\x1b[2J.pkl is missing" in client.lines[-1]


# --- what others write ---------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b[H\r2026-01-01 00:00:00 client001: all is well\n\x07\x9b5m" + "x" * 5000


def test_what_a_server_says_does_not_reach_the_terminal_raw(request, client_main, monkeypatch):
    def refuses(*_):
        raise Refused("PERMISSION_DENIED", HOSTILE)
        yield

    monkeypatch.setattr(todoServer.FedMLServicer, "getWeight", refuses)
    run, address = request.getfixturevalue("served")
    code, said = client_main("--server", address)
    assert code == 1
    for text in (
        said,
        log._escaped(HOSTILE),
    ):
        assert text.rstrip("\n").isprintable()
    assert len(said) < 500


def test_lines_that_one_peer_can_cause_are_said_once_a_minute_with_a_count(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    say = log.OncePerMinute(said.append)
    for _ in range(3):
        say("a", "from a")
    say("b", "from b")
    now[0] = 61
    say("a", "from a")
    assert said == ["from a", "from b", "from a (and 2 more in the minute before)"]
    for number in range(2 * log.MAX_KEYS):  # it does not grow for ever
        say(number, "x")
    assert len(say.said) <= log.MAX_KEYS


def test_who_speaks_no_grpc_is_no_line_in_the_log(start, begun):
    server, address = start_server(start, begun())
    for _ in range(20):
        with socket.create_connection(("localhost", int(address.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.recv(100)
    server.signal(signal.SIGTERM)
    assert server.wait() == 143
    assert all(" server: " in line for line in server.lines)

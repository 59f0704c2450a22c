"""Output holds up no round and no signal, and what others write stays text."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import (
    DEADLINE_S,
    ROOT,
    STARTS_S,
    free_port,
    holding,
    start_server,
    until,
)

import todoServer
from common import log
from federation.rounds import Refused


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


@pytest.fixture
def full_pipe():
    """(read end, write end) of a pipe into which not one byte more goes."""
    ends = os.pipe()
    reader, writer = open(ends[0], "rb", 0), open(ends[1], "wb", 0)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    writer.write(4096 * b"x")
    yield reader, writer
    writer.close()
    reader.close()


def test_scripts_whose_lines_nobody_reads_go_on_and_end(running, begun, full_pipe):
    site = begun()
    address = f"localhost:{free_port()}"
    streams = {"stdout": full_pipe[1], "stderr": full_pipe[1], "cwd": site}
    server = running([ROOT / "todoServer.py", "--listen", address], **streams)
    arguments = ["--name", "client001", "--server", address]
    client = running([ROOT / "todoClient.py", *arguments], **streams)
    fetched = site / "client001" / "client_weights.h5"
    until(fetched.exists, "the client has fetched", 2 * STARTS_S)
    for each, number, code in ((client, signal.SIGINT, 130), (server, signal.SIGTERM, 143)):
        each.send_signal(number)
        assert each.wait(DEADLINE_S) == code


STEPS = """
import os
trains = standin.train
def train(*arguments, progress, **options):
    for step in range(1, 21):
        progress(3, step, 20, 0.5)
        if step % 5 == 0: standin.say("standin", "a line in between")
        time.sleep(0.02)
    while not os.path.exists("go"): time.sleep(0.02)
    return trains(*arguments, **options)
standin.train = train
"""
XOFF = b"\x13"  # Ctrl-S


@pytest.mark.parametrize("then", ["is read", "stands still", "goes away", "Ctrl-C"])
def test_on_a_terminal_a_bar_is_drawn_below_the_lines(begun, start, on_a_terminal, then):
    """A terminal that goes away or stands still holds no client; Ctrl-C gives the cursor back."""
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=holding(site, "todoServer"))
    command = [sys.executable, holding(site, "todoClient", STEPS), "--name", "client001"]
    client, terminal = on_a_terminal([*command, "--server", address, "--epochs", "3"], site)
    said = b""
    while b"round 1/1: epoch 3/3, step" not in said:
        try:
            said += os.read(terminal, 1 << 12)
        except OSError:  # the client has ended
            pytest.fail(f"{client.wait(DEADLINE_S)}: {said.decode(errors='replace')}")
    if then == "stands still":
        os.write(terminal, XOFF)
    if then == "goes away":
        os.close(terminal)
    if then == "Ctrl-C":
        client.send_signal(signal.SIGINT)
    else:
        (site / "go").touch()
    if then in ("is read", "Ctrl-C"):
        with contextlib.suppress(OSError):  # EIO: the client has ended
            while True:
                said += os.read(terminal, 1 << 12)
        os.close(terminal)
    assert client.wait(DEADLINE_S) == (130 if then == "Ctrl-C" else 0)
    if then == "Ctrl-C":
        assert said.rfind(b"\x1b[?25h") > said.rfind(b"\x1b[?25l")  # shown after it was hidden
    if then == "is read":
        whole = re.findall(rb"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d standin: a line in between\r\n", said)
        assert len(whole) == 4


# --- the log by itself ---------------------------------------------------------------------------


def test_the_queue_keeps_the_newest_lines_and_counts_the_others(full_pipe, monkeypatch):
    reader, writer = full_pipe
    monkeypatch.setattr(log.Queued, "outputs", [])
    queued = log.Queued(writer.fileno())
    queued.write("line 0\n")
    until(queued.texts.empty, "the thread has it, and waits for a reader")
    more = 500
    lines = [f"line {number}" for number in range(1, log.MAX_TEXTS + more + 1)]
    for line in lines:
        queued.write(line + "\n")
    assert reader.read(1 << 20) == 4096 * b"x"  # what the pipe was filled with
    said = b""
    while f"{lines[-1]}\n".encode() not in said:
        said += reader.read(1 << 16)
    first, left_out, *others = said.decode().splitlines()
    assert (first, others) == ("line 0", lines[more:])
    assert left_out.startswith(f"... {more} lines are left out")
    reader.close()  # as of `todoServer.py | head`
    queued.write("for nobody\n")
    until(lambda: not queued.texts.unfinished_tasks, "it is dropped")


SAYS_MANY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.script import end_script, start_script
from common import log
start_script(never_waits=True)
file = open(os.devnull)
for number in range(5000):
    log.say("test", f"line {{number}}")
end_script(file.fileno())
"""


def test_all_lines_are_written_before_the_end():
    ended = subprocess.run([sys.executable, "-c", SAYS_MANY], stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout.count(b"\n")) == (3, 5000)


def test_a_closed_output_is_no_other_file():
    """The next file that is opened would get its number, and the lines."""
    command = ["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-c", SAYS_MANY]
    assert subprocess.run(command).returncode == 3


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
    code, said = client_main("--server", request.getfixturevalue("served")[1])
    assert code == 1 and said.rstrip("\n").isprintable() and len(said) < 500


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


def test_a_handshake_that_fails_is_no_line_in_the_log(start, begun):
    """gRPC says one for each, and anyone who reaches the port can cause them."""
    site = begun()
    make_certs = [ROOT / "make_certs.sh", site / "certs", "localhost", "client001"]
    subprocess.run(make_certs, check=True, capture_output=True)
    flags = ["--tls-cert", "certs/server.pem", "--tls-key", "certs/server.key"]
    server, address = start_server(start, site, *flags)
    for _ in range(20):
        with socket.create_connection(("localhost", int(address.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.recv(100)
    server.signal(signal.SIGTERM)
    assert server.wait() == 143
    assert all(" server: " in line for line in server.lines), server.output

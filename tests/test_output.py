"""Output holds up no round and no signal, and whoever stops to read it changes no exit code.

Real servers and clients, without TensorFlow unless a test says so.
"""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time

import pytest
from conftest import (
    ROOT,
    client_script,
    free_port,
    port_is_free,
    server_script,
    start_server,
    until,
)

from common import files, log

ENDS_S = 90  # three rounds, on a busy machine
XOFF = b"\x13"  # Ctrl-S


class Running:
    """A process with the given stdin, stdout and stderr, which the test need not read."""

    def __init__(self, command, cwd, **streams):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=cwd, stdin=subprocess.DEVNULL, **streams
        )

    def ends(self, timeout_s=ENDS_S):
        """(exit code, seconds until then)."""
        started = time.monotonic()
        return self.process.wait(timeout_s), time.monotonic() - started


@pytest.fixture
def running():
    """running(command, cwd=folder, stdout=...) -> Running; none outlives its test."""
    all_running = []

    def begin(*arguments, **options):
        all_running.append(Running(*arguments, **options))
        return all_running[-1]

    yield begin
    for each in all_running:
        each.process.kill()
        each.process.wait()


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


@contextlib.contextmanager
def no_reader():
    """The write end of a pipe whose reader went away."""
    reader, writer = os.pipe()
    os.close(reader)
    yield None, writer
    os.close(writer)


STOPS = {"a full pipe": full_pipe, "Ctrl-S": stopped_terminal, "no reader": no_reader}


@pytest.mark.parametrize("stop", STOPS)
def test_three_rounds_end_though_nobody_reads(running, begun, stop):
    site = begun(rounds=3)
    port = free_port()
    with STOPS[stop]() as (_, out):
        streams = {"stdout": out, "stderr": out, "cwd": site}
        server = running([server_script(site), "--listen", f"localhost:{port}"], **streams)
        clients = [
            running(
                [client_script(site), "--name", name, "--server", f"localhost:{port}"], **streams
            )
            for name in ("client001", "client002")
        ]
        assert [each.ends()[0] for each in [*clients, server]] == [0, 0, 0]
    assert len((site / "server" / "history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_both_though_nobody_reads(running, start, begun, stop, number, code):
    site = begun()
    port = free_port()
    with STOPS[stop]() as (_, out):
        streams = {"stdout": out, "stderr": out, "cwd": site}
        server = running([server_script(site), "--listen", f"localhost:{port}"], **streams)
        arguments = ["--name", "client001", "--server", f"localhost:{port}"]
        client = running([client_script(site), *arguments], **streams)
        uploads = site / "server" / "client001" / "client_weights.h5"
        until(uploads.exists, "client001 has delivered")
        for each in (client, server):
            each.process.send_signal(number)
            ended, seconds = each.ends()
            assert ended == code
            assert seconds < 4  # 2, and as much again for a busy machine


@pytest.mark.skipif(not shutil.which("less"), reason="needs the command less")
def test_three_rounds_end_behind_less_and_sigterm_ends_the_server(start, begun):
    """less shows its first screen, and reads no more until someone scrolls."""
    site = begun(clients=["client001"], rounds=3)
    port = free_port()
    screen, terminal = pty.openpty()
    script = server_script(site)
    script.write_text(script.read_text().replace("import todoServer", TALKATIVE))
    command = f"({sys.executable} {script} --listen localhost:{port} & echo $! > pid; wait $!; "
    command += "echo $? > code) | less"
    shell = subprocess.Popen(
        ["bash", "-c", command],
        cwd=site,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "vt100"},
    )
    try:
        arguments = ["--name", "client001", "--server", f"localhost:{port}"]
        client = start(client_script(site), *arguments, cwd=site)
        assert client.wait(ENDS_S) == 0, client.output
        until((site / "code").exists, "the server ends")
        assert (site / "code").read_text() == "0\n"
        assert shell.poll() is None  # less is still there, and shows the beginning
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        os.close(screen)
        os.close(terminal)


TALKATIVE = """
from common import log
def talkative(*arguments):
    for _ in range(2000):  # far more than a pipe and a screen hold
        log.say("server", "a line that fills the pipe " + 40 * "x")
    return standin.metrics()
standin.evaluate = talkative
import todoServer"""


def test_closed_outputs_change_neither_result_nor_exit_code(begun, start):
    """`>&-` and `2>&-`: the next file that is opened would get that number."""
    site = begun(clients=["client001"], rounds=2)
    port = free_port()
    arguments = f"--name client001 --server localhost:{port}"
    commands = [
        f"exec {sys.executable} {server_script(site)} --listen localhost:{port} >&- 2>&- <&-",
        f"exec {sys.executable} {client_script(site)} {arguments} >&- 2>&- <&-",
    ]
    both = [subprocess.Popen(["bash", "-c", command], cwd=site) for command in commands]
    try:
        assert [each.wait(ENDS_S) for each in both] == [0, 0]
    finally:
        for each in both:
            each.kill()
    for path in site.rglob("*"):
        if path.is_file() and path.suffix in (".h5", ".json", ".csv"):
            assert b"client001: round" not in path.read_bytes(), path


@pytest.mark.parametrize("stream", [">&-", "2>&-"])
def test_one_closed_output(begun, start, stream):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    command = f"{sys.executable} {client_script(site)} --name client001 --server {address} {stream}"
    done = subprocess.run(["bash", "-c", command], cwd=site, capture_output=True, text=True)
    assert done.returncode == 0 == server.wait()
    assert ("the run is over" in done.stdout) == (stream == "2>&-")


def test_grpcs_own_lines_hold_no_thread(running, start, begun, tmp_path):
    """gRPC says on stderr, from the threads that serve, why a handshake failed."""
    certs = tmp_path / "certs"
    subprocess.run([ROOT / "make_certs.sh", certs, "localhost", "client001"], check=True)
    site = begun(clients=["client001"], rounds=1)
    port = free_port()

    def flags(name):
        given = {
            "ca": certs / "ca.pem",
            "cert": certs / f"{name}.pem",
            "key": certs / f"{name}.key",
        }
        return [word for kind, path in given.items() for word in (f"--tls-{kind}", path)]

    with full_pipe() as (_, err):
        command = [server_script(site), "--listen", f"localhost:{port}", *flags("server")]
        server = running(command, cwd=site, stdout=subprocess.DEVNULL, stderr=err)
        until(lambda: not port_is_free(port), "the server listens")
        for _ in range(50):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(b"no TLS at all\r\n\r\n")
                stranger.recv(100)
        arguments = ["--name", "client001", "--server", f"localhost:{port}", *flags("client001")]
        client = start(client_script(site), *arguments, cwd=site)
        assert client.wait() == 0, client.output
        assert server.ends()[0] == 0


# --- the log by itself ---------------------------------------------------------------------------


def test_each_line_begins_with_date_and_time(start, begun):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    arguments = ["--name", "client001", "--server", address]
    client = start(client_script(site), *arguments, cwd=site)
    assert client.wait() == server.wait() == 0
    missing = start("todoClient.py", *arguments, "--index", "nowhere.pkl", cwd=site)
    assert missing.wait() == 1
    for process, who in ((server, "server"), (client, "client001"), (missing, "client001")):
        assert process.lines
        for line in process.lines:
            assert re.match(rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d ({who}|standin): \S", line)


SAY_MANY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.script import end_script, start_script
from common import log
start_script()
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


def numbers_in(lines):
    return [int(line.rpartition(" ")[2]) for line in lines]


def test_the_queue_keeps_the_newest_lines_and_counts_the_others():
    more = 500
    with full_pipe() as (reader, writer):
        process = say_many(log.MAX_LINES + more, stdout=writer)
        assert os.read(reader, 1 << 20) == 4096 * b"x"  # what the pipe was filled with
        said = b""
        while f"line {log.MAX_LINES + more - 1}\n".encode() not in said:
            said += os.read(reader, 1 << 16)
        process.communicate("\n")
        assert process.returncode == 7
    first, left_out, *others = said.decode().splitlines()
    assert first.endswith("test: line 0")  # which the thread was writing all the time
    left_out = int(re.fullmatch(r"\.\.\. (\d+) lines are left out here: .*", left_out)[1])
    assert left_out == more - 1
    assert numbers_in(others) == list(range(more, log.MAX_LINES + more))


def test_at_the_end_it_waits_a_second_at_most():
    with full_pipe() as (_, writer):
        process = say_many(3, stdout=writer)
        started = time.monotonic()
        process.communicate("\n")
        assert process.returncode == 7
        assert time.monotonic() - started < 2 * log.FLUSH_S + 1


def test_lines_that_are_read_late_are_all_there():
    done = subprocess.run(
        [sys.executable, "-c", SAY_MANY, "5000"], input="\n", capture_output=True, text=True
    )
    assert done.returncode == 7
    assert numbers_in(done.stdout.splitlines()) == list(range(5000))


def test_a_file_name_that_is_no_text_is_said(tmp_path):
    name = os.fsdecode(b"caf\xe9.pkl")
    done = subprocess.run(
        [sys.executable, ROOT / "todoClient.py", "--name", "client001", "--index", name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert r"caf\udce9.pkl is missing" in done.stderr


# --- a terminal that goes away -------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_that_is_gone_ends_no_client_and_changes_no_bit(start, site, tmp_path):
    """With real training: Keras's progress bar failed with EIO, and ended the client."""
    results = []
    for folder, gone in ((site, False), (shutil.copytree(site, tmp_path / "gone"), True)):
        names = ("client001",)
        server, address = start_server(
            start, folder, "--rounds", "2", "--image-size", "32", "--clients", *names
        )
        master, slave = pty.openpty()
        arguments = ["--name", "client001", "--server", address, "--threads", "1"]
        client = subprocess.Popen(
            [sys.executable, ROOT / "todoClient.py", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
        os.close(slave)
        said = b""
        while b"training on" not in said:
            said += os.read(master, 1 << 12)
        if gone:
            os.close(master)
        else:
            with contextlib.suppress(OSError):  # EIO: the client has ended
                while True:
                    os.read(master, 1 << 12)
        assert client.wait(120) == 0 == server.wait()
        results.append(files.sha256_of(folder / "server" / "server_weight.h5"))
    assert results[0] == results[1]

"""One client, or someone without a name, does what it can to hold up the others.

Each attack goes on against a real server process: the honest clients' rounds are closed meanwhile,
and the server's memory stays within its bound. What that costs them in seconds is no test's.
"""

import contextlib
import re
import resource
import selectors
import socket
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from conftest import DEADLINE_S, Call, Started, holding
from hostile import HOSTILE, RawConnection
from standin import shapes_of_size, write_weights

from common.files import sha256_of
from federation import service, weights
from federation.state import RunState
from generated import todo_pb2, todo_pb2_grpc

HONEST = ["client001", "client002"]
# Enrolled, and they deliver in each round, beside what else they do.
ATTACKERS = ["client003", "client004"]
ATTACKER = ATTACKERS[0]
CLIENTS = HONEST + ATTACKERS
MEGABYTES = 4  # so much that a download which nobody reads does not fit into buffers
# Whom an attack holds up is free again when the server ends what stands still, and not before.
HELD_UP_S = service.STALL_S - 5
BOUND_BYTES = 150e6 + 4e6 * len(CLIENTS)  # of the server's memory, without TensorFlow
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # a client of ours tries again


class Federation:
    """A server in a process of its own, and what the honest clients do."""

    def __init__(self, site):
        own = write_weights(site / "server" / "server_weight.h5", 1, shapes_of_size(MEGABYTES))
        state = RunState.load(site / "server" / "state.json")
        state = state.changed(rounds=1000, weights_sha256=sha256_of(own))
        state.save(site / "server" / "state.json")
        script = holding(site, "todoServer", "import standin", 'sys.modules["model"] = standin')
        self.server = Started([sys.executable, str(script), "--listen", "localhost:0"], site)
        self.address = self.server.wait_for(r"listening on (\S+)")[1]
        self.round = 1
        self.upload = write_weights(site / "upload.h5", 2, shapes_of_size(MEGABYTES))

    def channel(self, *options):
        """A connection of its own."""
        own = ("grpc.use_local_subchannel_pool", 1)
        return grpc.insecure_channel(self.address, [own, *options])

    def fetch(self, stub, client):
        for _ in stub.getWeight(todo_pb2.void(), metadata=named(client), timeout=DEADLINE_S):
            pass

    def deliver(self, stub, client):
        metadata = [*named(client), ("fedml-run", "run0"), ("fedml-round", str(self.round))]
        messages = weights.blob_messages(self.upload, client, 3)
        return stub.sendWeight(messages, metadata=metadata, timeout=DEADLINE_S)

    def keep_trying(self, step, client):
        """As a client of ours does: each time on a new connection."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                with self.channel() as channel:
                    return step(todo_pb2_grpc.FedMLStub(channel), client)
            except grpc.RpcError as error:
                if error.code() not in AGAIN or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def take_part(self, client):
        self.keep_trying(self.fetch, client)
        self.keep_trying(self.deliver, client)

    def close_a_round(self, attack):
        """The honest clients' calls end while attack(self), a context manager, goes on.

        The attackers have delivered before: the round does not wait for their own fault.
        """
        attackers = [Call(self.keep_trying, self.deliver, name) for name in ATTACKERS]
        for name in ATTACKERS:
            self.server.wait_for(f"round {self.round}: {name} delivered")
        with attack(self):
            for call in [Call(self.take_part, name) for name in HONEST]:
                call.result(HELD_UP_S)
        for call in attackers:
            call.result()
        self.round += 1

    def peak_bytes(self):
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


@pytest.fixture
def run(begun):
    """A Federation; its server does not outlive the test, nor do connections to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_000, hard), hard))
    made = Federation(begun(CLIENTS, rounds=1000))
    yield made
    if made.server.process.poll() is None:
        made.server.kill()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def named(client):
    return [("fedml-client", client), ("fedml-accept", "blob")] if client else []


@contextlib.contextmanager
def going_on(attack, threads=1):
    """attack() again and again in so many threads, while the body runs."""
    over = threading.Event()

    def repeat():
        while not over.is_set():
            with contextlib.suppress(grpc.RpcError, OSError):
                attack(over)

    calls = [Call(repeat) for _ in range(threads)]
    try:
        yield
    finally:
        over.set()
        for call in calls:
            call.result()


# --- calls ---------------------------------------------------------------------------------------


def unread_downloads(client):
    @contextlib.contextmanager
    def attack(run):
        # With a small window, or gRPC would take whole files into its buffers.
        small = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
        channels = [run.channel(*small) for _ in range(30)]
        stubs = [todo_pb2_grpc.FedMLStub(channel) for channel in channels]
        calls = [stub.getWeight(todo_pb2.void(), metadata=named(client)) for stub in stubs * 10]
        yield
        assert not any(call.done() and call.exception() is None for call in calls)
        for channel in channels:
            channel.close()

    return attack


def uploads(messages, connections, client=ATTACKER):
    """messages(over) gives the messages of an upload behind the first."""

    def attack(run):
        def upload(over):
            def stream():
                yield todo_pb2.modelWeight(clientname=ATTACKER, clientsize=3)
                yield from messages(over)

            with run.channel() as channel:
                call = todo_pb2_grpc.FedMLStub(channel).sendWeight.future(
                    stream(), metadata=named(client)
                )
                while not (call.done() or over.wait(0.05)):
                    pass
                call.cancel()

        return going_on(upload, connections)

    return attack


def endless(over):
    while not over.is_set():
        yield todo_pb2.modelWeight()


def bytewise(over):
    while not over.wait(1.5):
        yield todo_pb2.modelWeight(blob=b"x")


def hostile_files(kind):
    """Both attackers' files are read by the bounded process all the time."""

    @contextlib.contextmanager
    def attack(run):
        path = run.upload.with_name("hostile.h5")
        HOSTILE[kind](path)

        def upload(name):
            def send(over):
                with run.channel() as channel:
                    metadata = [("fedml-client", name)]
                    messages = weights.blob_messages(path, name, 3)
                    stub = todo_pb2_grpc.FedMLStub(channel)
                    call = stub.sendWeight.future(messages, metadata=metadata)
                    while not (call.done() or over.wait(0.05)):
                        pass
                    assert over.is_set() or call.code() == grpc.StatusCode.INVALID_ARGUMENT
                    call.cancel()

            return send

        with contextlib.ExitStack() as stack:
            for name in ATTACKERS:
                stack.enter_context(going_on(upload(name)))
            yield

    return attack


def half_open(method, client, connections=200, streams=30):
    """6,000 calls that never send a message; a connection may have four at a time."""

    @contextlib.contextmanager
    def attack(run):
        made = []
        for _ in range(connections):
            with contextlib.suppress(OSError):
                made.append(RawConnection(run.address))
                made[-1].open_streams(method, client, streams)
        yield
        for each in made:
            each.close()

    return attack


def resets(method, client):
    """Streams that are opened and cancelled at once: 30,000, and as fast as they are taken."""

    def attack(run):
        def reset(over):
            connection = RawConnection(run.address)
            try:
                while not over.is_set() and connection.next_stream < 20_000:
                    connection.open_streams(method, client, 100, reset=True)
            finally:
                connection.close()

        return going_on(reset, 3)

    return attack


# --- connections ---------------------------------------------------------------------------------


def connect_silently(run, count):
    host, _, port = run.address.rpartition(":")
    made = []
    for number in range(count):
        with contextlib.suppress(OSError):
            made.append(socket.create_connection((("127.0.0.1", "::1")[number % 2], port), 5))
    return made


@contextlib.contextmanager
def silent_connections(run):
    made = connect_silently(run, 2000)
    yield
    for each in made:
        each.close()


def silent_connections_again_and_again(run):
    """Each is opened anew as soon as the server closes it."""

    def connect(over):
        made = connect_silently(run, 2000)
        with selectors.DefaultSelector() as closed:
            for each in made:
                closed.register(each, selectors.EVENT_READ)
            while not over.is_set():
                for key, _ in closed.select(0.1):
                    closed.unregister(key.fileobj)
                    key.fileobj.close()
                    for each in connect_silently(run, 1):
                        closed.register(each, selectors.EVENT_READ)
            for key in list(closed.get_map().values()):
                key.fileobj.close()

    return going_on(connect)


ATTACKS = {
    "300 downloads that nobody reads": unread_downloads(ATTACKER),
    "300 downloads that nobody reads, without a name": unread_downloads(None),
    "endless empty messages": uploads(endless, 1),
    "endless empty messages, 4 connections": uploads(endless, 4),
    "a byte every 1.5 s": uploads(bytewise, 1),
    "a byte every 1.5 s, without a name": uploads(bytewise, 8, client=None),
    **{f"files of {kind}": hostile_files(kind) for kind in HOSTILE},
    "half-open getWeight": half_open("getWeight", ATTACKER),
    "half-open getWeight, without a name": half_open("getWeight", None),
    "half-open sendWeight": half_open("sendWeight", ATTACKER),
    "half-open sendWeight, without a name": half_open("sendWeight", None),
    "half-open tell": half_open("tell", ATTACKER),
    "half-open tell, without a name": half_open("tell", None),
    "rapid resets of getWeight": resets("getWeight", ATTACKER),
    "rapid resets of sendWeight, without a name": resets("sendWeight", None),
    "2,000 silent connections": silent_connections,
    "2,000 silent connections again and again": silent_connections_again_and_again,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_holds_up_nobody_else(run, attack):
    for _ in range(2):
        run.close_a_round(ATTACKS[attack])
    assert run.peak_bytes() <= BOUND_BYTES
    assert "Traceback" not in run.server.output, run.server.output
    assert len(run.server.lines) < 300, "lines that one peer can cause are said once a minute"

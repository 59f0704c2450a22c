"""One client, or someone without a name, does what it can to hold up the others.

Each attack goes on against a real server process: the honest clients' rounds are closed meanwhile,
and the server's memory stays within its bound. What that costs them in seconds is no test's.
"""

import contextlib
import re
import resource
import selectors
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from conftest import Call, holding, start_server
from serving import connection
from standin import shapes_of_size, write_weights

from common.files import sha256_of
from federation import weights
from federation.state import RunState
from generated import todo_pb2, todo_pb2_grpc

HONEST = ["client001", "client002"]
ATTACKER = "client003"  # enrolled, and it delivers in each round, beside what else it does
CLIENTS = [*HONEST, ATTACKER]
SHAPES = shapes_of_size(megabytes=4)  # a download that nobody reads does not fit into buffers
# Whom an attack holds up would be free again when the server ends what stands still: much later.
HELD_UP_S = 400
STALL_S = 1000
# Of the server's memory, without TensorFlow and beside what connections cost (docs/security.md).
BOUND_BYTES = 150e6 + 4e6 * len(CLIENTS)
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # a client of ours tries again


class Federation:
    """A server in a process of its own, and what the clients do."""

    def __init__(self, server, address, upload):
        self.server, self.address, self.upload = server, address, upload
        self.round = 1

    def fetch(self, stub, client):
        list(stub.getWeight(todo_pb2.void(), metadata=named(client), timeout=HELD_UP_S))

    def deliver(self, stub, client):
        metadata = [*named(client), ("fedml-run", "run0"), ("fedml-round", str(self.round))]
        messages = weights.blob_messages(self.upload, client, 3)
        return stub.sendWeight(messages, metadata=metadata, timeout=HELD_UP_S)

    def take_part(self, client, *steps):
        """As a client of ours does: it tries again, each time on a new connection."""
        deadline = time.monotonic() + HELD_UP_S
        to_do = list(steps)
        while to_do:
            try:
                with connection(self.address) as channel:
                    to_do[0](todo_pb2_grpc.FedMLStub(channel), client)
                del to_do[0]
            except grpc.RpcError as error:
                if error.code() not in AGAIN or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def close_a_round(self, attack):
        """The honest clients' calls end while attack(self), a context manager, goes on.

        The attacker has delivered before: the round does not wait for its own fault.
        """
        attacker = Call(self.take_part, ATTACKER, self.deliver)
        self.server.wait_for(f"round {self.round}: {ATTACKER} delivered")
        with attack(self):
            calls = [Call(self.take_part, name, self.fetch, self.deliver) for name in HONEST]
            for call in calls:
                call.result(HELD_UP_S)
        attacker.result(HELD_UP_S)
        self.round += 1


@pytest.fixture
def run(begun, start):
    """A Federation. This process may hold thousands of connections to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_000, hard), hard))
    site = begun(CLIENTS, rounds=1000)
    own = write_weights(site / "server" / "server_weight.h5", 1, SHAPES)
    state = RunState.load(site / "server" / "state.json").changed(weights_sha256=sha256_of(own))
    state.save(site / "server" / "state.json")
    upload = write_weights(site / "upload.h5", 2, SHAPES)
    patch = f"from federation import service; service.STALL_S = {STALL_S}"
    script = holding(site, "todoServer", patch)
    yield Federation(*start_server(start, site, script=script), upload)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def named(client):
    return [("fedml-client", client), ("fedml-accept", "blob")]


# --- the attacks ---------------------------------------------------------------------------------


def unread_downloads(client):
    """6,000 calls whose request never ends and whose answer nobody reads."""

    @contextlib.contextmanager
    def attack(run):
        with contextlib.ExitStack() as made:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    connection = made.enter_context(connected(run.address))
                    connection.sendall(begun_downloads(client, 30))
            yield

    return attack


def connected(address, host="localhost"):
    return socket.create_connection((host, int(address.rpartition(":")[2])), 5)


def begun_downloads(client, count):
    """HTTP/2 by hand, for thousands of streams that cost this side nothing."""
    headers = {":method": "POST", ":scheme": "http", ":path": "/todoPackage.FedML/getWeight"}
    headers |= {":authority": "localhost", "content-type": "application/grpc", "te": "trailers"}
    if client:
        headers["fedml-client"] = client
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    # settings: ours, which are empty, and that we have read theirs
    settings = frame(4, 0, 0, b"") + frame(4, 1, 0, b"")
    calls = b"".join(frame(1, 4, stream, block) for stream in range(1, 2 * count, 2))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + calls


def frame(kind, flags, stream, content):
    """A frame of HTTP/2: 1 is HEADERS, 4 SETTINGS."""
    head = len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + content


@contextlib.contextmanager
def silent_connections(run):
    """2,000, and each is opened anew as soon as the server closes it."""
    over, made = threading.Event(), selectors.DefaultSelector()

    def open_one(host):
        with contextlib.suppress(OSError):
            made.register(connected(run.address, host), selectors.EVENT_READ, host)

    def keep_open():
        while not over.is_set():
            for key, _ in made.select(0.1):
                made.unregister(key.fileobj)
                key.fileobj.close()
                open_one(key.data)
        for key in list(made.get_map().values()):
            key.fileobj.close()

    for number in range(2000):
        open_one(("127.0.0.1", "::1")[number % 2])
    keeper = Call(keep_open)
    yield
    over.set()
    keeper.result()


@pytest.mark.parametrize(
    ("attack", "cost"),
    [
        pytest.param(unread_downloads(ATTACKER), 200 * 90e3, id="unread downloads"),
        pytest.param(unread_downloads(None), 200 * 90e3, id="unread downloads without a name"),
        pytest.param(silent_connections, 2000 * 46e3, id="silent connections"),
    ],
)
def test_an_attack_holds_up_nobody_else(run, attack, cost):
    for _ in range(2):
        run.close_a_round(attack)
    status = Path(f"/proc/{run.server.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 <= BOUND_BYTES + cost
    assert "Traceback" not in run.server.output, run.server.output
    assert len(run.server.lines) < 300, "lines that one peer can cause are said once a minute"

"""A run that lasts: behind a proxy that drops connections, loses answers or goes silent.

And its memory is flat.
"""

import contextlib
import select
import socket
import threading

import grpc
import pytest
from conftest import client_script, make_data, server_script, start_server, until, write_weights
from serving import serve

from common import files
from federation import streams, weights
from generated import todo_pb2, todo_pb2_grpc


class Proxy:
    """A TCP proxy at `address` to localhost:port, which drops connections idle for idle_s."""

    def __init__(self, port, idle_s=None):
        self.port, self.idle_s, self.dropped, self.pairs = port, idle_s, 0, []
        self.listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self.listener.getsockname()[1]}"
        self.frozen = False
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.pairs.append((client, socket.create_connection(("localhost", self.port))))
                threading.Thread(target=self.pump, args=self.pairs[-1], daemon=True).start()

    def pump(self, *pair):
        with contextlib.suppress(OSError, ValueError):
            while True:
                readable = select.select(pair, [], [], self.idle_s)[0]
                if not readable:
                    self.dropped += 1
                    break
                for one in readable:
                    data = one.recv(1 << 16)
                    if not data:
                        return self.close(pair)
                    if pair[0] not in self.silent:
                        pair[one is pair[0]].sendall(data)
        self.close(pair)

    @property
    def silent(self):
        """The connections that are open and carry nothing any more."""
        return self._silent if self.frozen else ()

    def freeze(self):
        """What is open now goes silent; new connections work."""
        self._silent, self.frozen = [pair[0] for pair in self.pairs], True

    def close(self, pair):
        for one in pair:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def drop_all(self):
        for pair in self.pairs:
            self.close(pair)

    def stop(self):
        self.listener.close()
        self.drop_all()


@pytest.fixture
def behind_a_proxy(start, begun):
    """behind_a_proxy(idle_s, **run) -> site, server, proxy."""
    proxies = []

    def make(idle_s=None, **run):
        site = begun(**run)
        server, address = start_server(start, site, script=server_script(site))
        proxies.append(Proxy(int(address.rpartition(":")[2]), idle_s))
        return site, server, proxies[-1]

    yield make
    for proxy in proxies:
        proxy.stop()


def take_part(start, site, proxy, name, training_s=0):
    return start(
        client_script(site, training_s), "--name", name, "--server", proxy.address, cwd=site
    )


def test_a_lost_answer_is_fetched_by_delivering_again(start, behind_a_proxy):
    site, server, proxy = behind_a_proxy(rounds=1)
    first = take_part(start, site, proxy, "client001")
    server.wait_for("client001 delivered")
    for _ in range(3):
        before = len(server.lines)
        proxy.drop_all()
        server.wait_for("client001 delivered .* again", start=before)
    second = take_part(start, site, proxy, "client002")
    assert [first.wait(), second.wait(), server.wait()] == [0, 0, 0], first.output
    assert first.output.count("training now") == 1
    state = files.load_state(site / "server" / "state.json")
    assert [(row["clients"], row["num_examples"]) for row in state["history"]] == [(2, 10)]


@pytest.mark.slow
def test_a_proxy_that_drops_idle_connections_is_not_noticed(start, behind_a_proxy):
    """One client trains longer than 20 s, the other waits longer than that, for two rounds."""
    site, server, proxy = behind_a_proxy(idle_s=20)
    clients = [
        take_part(start, site, proxy, "client001"),
        take_part(start, site, proxy, "client002", training_s=25),
    ]
    assert [client.wait(150) for client in clients] == [0, 0], clients[0].output
    assert server.wait() == 0
    assert (
        server.output.count("delivered") == 4
        and "again" not in server.output
        and "went away" not in server.output
    )
    assert proxy.dropped == 0, "keepalive should have kept the waiting call's connection busy"


@pytest.mark.slow
def test_a_server_that_takes_the_connection_and_says_nothing_is_given_up(start, begun):
    site = begun()
    with socket.create_server(("localhost", 0)) as listener:
        client = start(
            client_script(site),
            "--name",
            "client001",
            "--server",
            f"localhost:{listener.getsockname()[1]}",
            "--give-up-after",
            "15",
            cwd=site,
        )
        assert client.wait(90) == 4 and "did not answer for 15 s" in client.lines[-1]


@pytest.mark.slow
def test_a_connection_that_goes_silent_is_left_for_a_new_one(start, behind_a_proxy):
    site, server, proxy = behind_a_proxy(rounds=1)
    first = take_part(start, site, proxy, "client001")
    server.wait_for("client001 delivered")
    proxy.freeze()
    server.wait_for(
        "client001 delivered .* again", 120
    )  # gRPC gives up on an unanswered ping after a minute
    second = take_part(start, site, proxy, "client002")
    assert [first.wait(), second.wait(), server.wait()] == [0, 0, 0], first.output


@pytest.mark.slow
def test_a_stalled_upload_is_ended_after_30_s_and_meanwhile_the_others_go_on(start, begun):
    assert streams.STALL_S == 30
    site, go_on = (
        begun(clients=["client001", "client002", "client003"], rounds=1),
        threading.Event(),
    )
    server, address = start_server(
        start, site, "--round-timeout", "60", "--min-clients", "2", script=server_script(site)
    )

    def half():
        yield todo_pb2.modelWeight(clientname="client003", clientsize=3, blob=b"\x89HDF" * 2500)
        go_on.wait(100)

    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))
    call = stub.sendWeight.future(half(), metadata=[("fedml-client", "client003")], timeout=100)
    others = [
        start(client_script(site), "--name", name, "--server", address, cwd=site)
        for name in ("client001", "client002")
    ]
    server.wait_for("have client001, client002; waiting for client003, last seen", 25)
    server.wait_for("client003 made no progress for 30 s: ended", 40)
    assert call.exception(10).code() == grpc.StatusCode.CANCELLED
    assert [other.wait(60) for other in others] == [0, 0] and "without client003" in server.output
    server.kill()
    go_on.set()


@pytest.mark.slow
def test_memory_is_flat_over_100_rounds(start, tmp_path):
    """Real training of the real network on tiny images.

    Resident memory in round 100 is within 5 % of that in round 10.
    """
    site = make_data(tmp_path / "site", clients=2, images=4, validation=4)
    server, address = start_server(
        start, site, "--clients", "client001,client002", "--rounds", "101", "--image-size", "32"
    )
    clients = [
        start("todoClient.py", "--name", name, "--server", address, "--threads", "1", cwd=site)
        for name in ("client001", "client002")
    ]
    used = {}
    for number in (10, 50, 100):
        server.wait_for(f"round {number}/101: loss", 300)
        for name, process in [
            ("server", server),
            ("client001", clients[0]),
            ("client002", clients[1]),
        ]:
            used[name, number] = process.memory_bytes()
    print({key: f"{value / 1e6:.1f} MB" for key, value in used.items()})
    for name in ("server", "client001", "client002"):
        assert used[name, 100] <= 1.05 * used[name, 10], used
    assert [process.wait(60) for process in [*clients, server]] == [0, 0, 0]


def test_calls_that_wait_leave_threads_for_downloads_and_for_the_last_upload(make_run):
    """All but one client wait, and deliver once more: the last one still fetches and delivers."""
    names = [f"client{number:03}" for number in range(1, 9)]
    run = make_run(clients=names, rounds=1)
    server, address = serve(run.rounds)
    with grpc.insecure_channel(address) as channel:
        stub = todo_pb2_grpc.FedMLStub(channel)
        path = write_weights(run.folder / "upload.h5", 1)

        def send(name):
            named = (("fedml-client", name), ("fedml-run", "run0"), ("fedml-round", "1"))
            return stub.sendWeight.future(
                weights.blob_messages(path, name, 1), metadata=named, timeout=60
            )

        calls = []
        for _ in range(2):
            before = set(run.rounds.waiting.values())
            calls = [send(name) for name in names[:-1]]
            until(lambda: len(set(run.rounds.waiting.values()) - before) == 7, "they wait")  # noqa: B023
        assert list(
            stub.getWeight(todo_pb2.void(), metadata=(("fedml-client", names[-1]),), timeout=30)
        )
        assert send(names[-1]).result().value == 1
        assert [call.result().value for call in calls] == [1] * 7
    server.stop(0).wait()

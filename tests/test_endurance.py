"""A run that lasts: behind a proxy that drops connections, loses answers or goes silent.

And its memory is flat.
"""

import contextlib
import re
import select
import socket
import threading
from pathlib import Path

import pytest
from conftest import (
    Call,
    holding,
    make_data,
    start_server,
    until,
    write_weights,
)
from serving import Peer, connection, serve

import todoClient
import todoServer
from federation.state import RunState
from generated import todo_pb2


class Proxy:
    """A TCP proxy at `address` to localhost:port, which drops connections idle for idle_s."""

    def __init__(self, port, idle_s=None):
        self.port, self.idle_s = port, idle_s
        self.dropped = 0
        self.pairs = []
        self.silent = []  # connections that are open and carry nothing any more
        self.listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.pairs.append((client, socket.create_connection(("localhost", self.port))))
                threading.Thread(target=self.pump, args=[self.pairs[-1]], daemon=True).start()

    def pump(self, pair):
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
                    if pair not in self.silent:
                        pair[one is pair[0]].sendall(data)
        self.close(pair)

    def go_silent(self):
        """What is open now carries nothing any more; new connections work."""
        self.silent = list(self.pairs)

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


TRIES_SOON = "import todoClient as it; it.FIRST_PAUSE_S = it.LONGEST_PAUSE_S = 0.05"


@pytest.fixture
def behind_a_proxy(start, begun):
    """behind_a_proxy(idle_s) -> site, server, proxy, take_part(name, script); one round."""
    proxies = []

    def make(idle_s=None):
        site = begun(rounds=1)
        server, address = start_server(start, site, script=holding(site, "todoServer"))
        proxies.append(Proxy(int(address.rpartition(":")[2]), idle_s))

        def take_part(name, script=None):
            arguments = ["--name", name, "--server", proxies[-1].address]
            return start(script or holding(site, "todoClient", TRIES_SOON), *arguments, cwd=site)

        return site, server, proxies[-1], take_part

    yield make
    for proxy in proxies:
        proxy.stop()


@pytest.mark.parametrize(
    ("how", "times"),
    [("drop_all", 3), pytest.param("go_silent", 1, marks=pytest.mark.slow)],  # noticed by a ping
)
def test_a_lost_answer_is_fetched_by_delivering_again(behind_a_proxy, how, times):
    site, server, proxy, take_part = behind_a_proxy()
    first = take_part("client001")
    server.wait_for("client001 delivered")
    for _ in range(times):
        connections = len(proxy.pairs)
        getattr(proxy, how)()
        until(lambda: len(proxy.pairs) > connections, "it connects again", 120)  # noqa: B023
    server.wait_for("client001 delivered .* again", 300)  # gRPC leaves a silent line after a minute
    second = take_part("client002")
    assert [first.wait(), second.wait(), server.wait()] == [0, 0, 0], first.output
    assert first.output.count("training now") == 1
    [row] = RunState.load(site / "server" / "state.json").history
    assert (row["clients"], row["num_examples"]) == (2, 10)


@pytest.mark.slow
def test_a_first_fetch_on_a_line_that_goes_silent_is_tried_again(client_main, served, monkeypatch):
    """Of a server that this client does not know yet, and tells nothing: a ping notices, too."""
    proxy = Proxy(int(served[1].rpartition(":")[2]))
    get_weight = todoServer.FedMLServicer.getWeight

    def on_a_line_that_goes_silent(*call):
        if not proxy.silent:
            proxy.go_silent()
        yield from get_weight(*call)

    monkeypatch.setattr(todoServer.FedMLServicer, "getWeight", on_a_line_that_goes_silent)
    monkeypatch.setattr(todoClient, "RARE_PING_S", 5)
    call = Call(client_main, "--server", proxy.address, "--give-up-after", "60")
    code, said = call.result(200)  # gRPC leaves a silent line after a minute
    proxy.stop()
    assert code == 0 and "waiting for the server at" in said  # gRPC has several words for it


LONG_TRAINING = """
def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
    for step in range(1, 361):  # three minutes
        progress(1, step, 360, 0.5)
        time.sleep(0.5)
    return [{"round": round_number, "epoch": 1, "loss": 0.5, "accuracy": 0.5, "num_examples": 4,
             "seconds": 180}]
standin.train = train
"""


@pytest.mark.slow
def test_a_long_round_through_a_proxy_that_drops_idle_connections(behind_a_proxy):
    """One client waits for three minutes while the other trains, and the line stays busy.

    gRPC's own limit is two pings in five minutes: at 8 s a ping, it would show after 32 s.
    """
    site, server, proxy, take_part = behind_a_proxy(idle_s=20)
    waits = take_part("client001")
    server.wait_for("client001 delivered")
    trains = take_part("client002", holding(site, "todoClient", LONG_TRAINING))
    assert [trains.wait(300), waits.wait(), server.wait()] == [0, 0, 0], trains.output
    assert re.search(r"answer for 1\d\d s", waits.output), waits.output
    heard = re.findall(r"client002 \(training, .* to go, heard \d+ s ago\)", server.output)
    assert len(heard) >= 5 and "not heard" not in server.output, server.output
    assert server.output.count("delivered") == 2 and proxy.dropped == 0, server.output
    assert "went away" not in server.output


def test_calls_that_wait_leave_threads_for_a_download_and_for_the_last_upload(make_run):
    """All clients but one wait, and half of another upload of each: that one gets its turn."""
    names = [f"client{number:03}" for number in range(1, 9)]
    run, over = make_run(clients=names, rounds=1), threading.Event()
    server, address = serve(run.rounds)
    path = write_weights(run.folder / "upload.h5", 1)
    *others, last = [Peer(connection(address), name) for name in names]
    calls = [peer.send(path) for peer in others]
    until(lambda: len(run.rounds.waiting) == 7, "they wait")

    def half(peer):
        yield todo_pb2.modelWeight(blob=b"half", clientname=peer.name, clientsize=3)
        over.wait(60)

    halves = [peer.stub.sendWeight.future(half(peer), metadata=peer.is_me) for peer in others]
    until(lambda: len([*run.folder.rglob(".*.tmp*")]) == 7, "half of each is there")
    assert [peer.tell("waiting").round for peer in (*others, last)] == [1] * 8
    assert list(last.fetch())
    assert last.send(path).result().value == 1
    assert [call.result().value for call in calls] == [1] * 7
    assert not any(call.done() for call in halves)
    over.set()
    server.stop(0).wait()


@pytest.mark.slow
def test_memory_is_flat_over_100_rounds(start, tmp_path):
    """Real training of the real network: memory in round 100 is within 5 % of that in round 10."""
    site = make_data(tmp_path / "site", clients=2, images=4, validation=4)
    names = ["client001", "client002"]
    flags = ["--clients", ",".join(names), "--rounds", "1000", "--image-size", "32"]
    server, address = start_server(start, site, *flags)
    processes = {"server": server}
    for name in names:
        arguments = ["--name", name, "--server", address, "--threads", "1"]
        processes[name] = start("todoClient.py", *arguments, cwd=site)
    used = {}
    for number in (10, 100):
        server.wait_for(f"round {number}/1000: AUC", 400)
        for name, process in processes.items():
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]  # resident
            used[name, number] = int(pages)
    for name in processes:
        assert used[name, 100] <= 1.05 * used[name, 10], used

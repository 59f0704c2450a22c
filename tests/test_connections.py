"""A client that waits is left alone: one upload, however long the others take."""

import re
import socket
import threading
from pathlib import Path

import grpc._cython.cygrpc
import pytest
from conftest import ROOT, client_script, holding, server_script, start_server

WAITS_S = 100  # gRPC's own limit is two pings in five minutes: at 8 s a ping, it shows after 32 s
OPTION = re.compile(r'"(grpc\.[a-z0-9_.]+)"')


def option_names():
    """{name: file} of all gRPC options that this project gives."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("federation/*.py"), *ROOT.glob("benchmarks/*.py")]
    return {
        name: path.name
        for path in scripts
        for name in OPTION.findall(path.read_text(encoding="utf-8"))
    }


def test_grpc_knows_every_option_that_it_is_given():
    """It passes over a name that it does not know, in silence."""
    library = Path(grpc._cython.cygrpc.__file__).read_bytes()
    names = option_names()
    assert len(names) > 10
    # a C text, which is no other one's end
    known = [rb"(?<![a-z._])" + re.escape(name).encode() + rb"\0" for name in names]
    unknown = [
        f"{name} in {file}"
        for (name, file), text in zip(names.items(), known, strict=True)
        if not re.search(text, library)
    ]
    assert not unknown


class Relay:
    """Passes connections on to HOST:PORT, and closes what is silent for long, as routers do."""

    def __init__(self, target, drop_idle_s):
        self.drop_idle_s = drop_idle_s
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                incoming, _ = self.listener.accept()
            except OSError:
                return  # the test is over
            incoming.settimeout(self.drop_idle_s)
            try:
                outgoing = socket.create_connection(self.target)
            except OSError:
                incoming.close()  # the server has ended
                continue
            for source, sink in ((incoming, outgoing), (outgoing, incoming)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source, sink):
        try:
            while content := source.recv(1 << 16):
                sink.sendall(content)
        except OSError:
            pass
        sink.close()

    def close(self):
        self.listener.close()


@pytest.mark.slow
def test_a_client_that_waits_for_long_uploads_once(start, begun):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    client = start(client_script(site), "--name", "client001", "--server", address, cwd=site)
    # it says so every half a minute or so
    client.wait_for(r"answer for 1\d\d s", 2 * WAITS_S)
    assert server.output.count("client001 delivered") == 1, server.output
    assert "waiting for the server at" not in client.output


LONG_TRAINING = """
import standin
def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
    for step in range(1, 361):  # three minutes
        progress(1, step, 360, 0.5)
        time.sleep(0.5)
    return [{"round": round_number, "epoch": 1, "loss": 0.5, "accuracy": 0.5, "num_examples": 4,
             "seconds": 180}]
standin.train = train
sys.modules["model"] = standin
"""


@pytest.mark.slow
def test_a_client_that_trains_for_long_is_heard_through_a_proxy_that_drops_idle_connections(
    start, begun
):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    relay = Relay(address, drop_idle_s=20)
    script = holding(site, "todoClient", LONG_TRAINING)
    client = start(script, "--name", "client001", "--server", relay.address, cwd=site)
    assert client.wait(300) == 0 == server.wait(), client.output
    heard = re.findall(
        r"client001 \(training, epoch 1 of 1, .* to go, heard (\d+) s ago\)", server.output
    )
    assert len(heard) >= 5 and all(int(seconds) <= 35 for seconds in heard), server.output
    assert "not heard" not in server.output
    relay.close()

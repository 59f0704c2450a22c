"""Only clients with the right certificate are served.

A client that cannot be served hears why and ends; the round goes on.
"""

import os
import re
import socket
import statistics
import subprocess
import threading
import time

import grpc
import pytest
import serving
from conftest import ROOT, Run, make_data, until, write_weights
from seed_peer import LIMITS, cut

import todoClient
import todoServer
from common import files
from federation import probe, tls, weights
from generated import todo_pb2, todo_pb2_grpc


def make_certs(folder, *arguments, **environment):
    return subprocess.run(
        [ROOT / "make_certs.sh", folder, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def openssl(command, cwd):
    subprocess.run(["openssl", *command.split()], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    """good/ and other/ by make_certs.sh for localhost.

    good/ also has expired certificates, one without a SAN, and another host's.
    """
    folder = tmp_path_factory.mktemp("certs")
    for name in ("good", "other"):
        assert (
            make_certs(folder / name, "localhost", "client001", "client002", "stranger").returncode
            == 0
        )
    for name, subject, days in (
        ("expired", "client001", -1),
        ("only-cn", "client002", 1),
        ("old-server", "localhost", -1),
        ("elsewhere", "fl.example", 1),
    ):
        openssl(
            "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
            f"-keyout {name}.key -subj /CN={subject} -out {name}.csr",
            folder / "good",
        )
        openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -days {days} -out {name}.pem",
            folder / "good",
        )
    return folder


def flags(certs, ca="good", own="good/client001"):
    """--tls-* of the files in `certs`; none where `ca` is None, no certificate where `own` is."""
    found = ["--tls-ca", certs / ca / "ca.pem"] if ca else []
    found += ["--tls-cert", certs / f"{own}.pem", "--tls-key", certs / f"{own}.key"] if own else []
    return [str(each) for each in found]


class Served:
    """A run for client001 and client002 behind a real server with these flags."""

    def __init__(self, folder, *flags, rounds=1, **options):
        self.run = Run(folder / "server", ["client001", "client002"], rounds=rounds)
        credentials = tls.server_credentials(todoServer.parse(list(flags)))
        self.server, self.address = serving.serve(
            self.run.rounds, credentials=credentials, **options
        )

    def stub(self, *flags):
        arguments = todoClient.parse(["--name", "client001", "--server", self.address, *flags])
        return todo_pb2_grpc.FedMLStub(
            tls.channel(arguments, [("grpc.use_local_subchannel_pool", 1), *LIMITS[1:]])
        )

    def send(self, path, client, *flags, old=False):
        named = (
            []
            if old
            else [
                ("fedml-client", client),
                ("fedml-run", "run0"),
                ("fedml-round", str(self.run.rounds.round)),
                ("fedml-sha256", files.sha256_of(path)),
            ]
        )
        messages = cut(path.read_bytes(), clientname=f"{client}/client_weights.h5", clientsize=3)
        return self.stub(*flags).sendWeight.future(messages, metadata=named, timeout=60)

    def close(self):
        self.run.stop()
        self.server.stop(0).wait()


@pytest.fixture
def serve(tmp_path):
    served = []

    def start(*flags, **options):
        served.append(Served(tmp_path / f"served{len(served)}", *flags, **options))
        return served[-1]

    yield start
    for each in served:
        each.close()


def client_ends(address, *flags):
    """(exit code, seconds) of todoClient's main() here: none of these comes as far as training."""
    started = time.monotonic()
    return todoClient.main(
        ["--name", "client001", "--server", address, *flags]
    ), time.monotonic() - started


@pytest.fixture
def in_a_site(tmp_path, monkeypatch):
    monkeypatch.chdir(make_data(tmp_path / "site"))
    monkeypatch.setattr(todoClient, "exit_on_signals", lambda *_: None)


WRONG = {  # row: (server's flags, client's flags, sentence)
    "none": ({}, {"own": None}, "wants a certificate from this client: give --tls-cert"),
    "another CA": (
        {},
        {"own": "other/client001"},
        "does not accept .*other/client001.pem: the CA in .*good/ca.pem did not sign it",
    ),
    "expired": ({}, {"own": "good/expired"}, "does not accept .*expired.pem: it has expired"),
    "another client's name": (
        {},
        {"own": "good/client002"},
        "'client001' came with the certificate of client002",
    ),
    "a stranger's": (
        {},
        {"own": "good/stranger"},
        "'client001' came with the certificate of stranger",
    ),
    "a server of another CA": (
        {},
        {"ca": "other", "own": "other/client001"},
        "CA in .*other/ca.pem did not sign it",
    ),
    "an expired server": (
        {"own": "good/old-server"},
        {},
        "certificate of localhost:.* is not accepted: .*expired",
    ),
    "a server of another name": (
        {"own": "good/elsewhere"},
        {},
        "is not accepted: Hostname mismatch",
    ),
    "plaintext to a TLS port": (
        {},
        {"ca": None, "own": None},
        "speaks TLS, this client plaintext: give --tls-ca",
    ),
    "plaintext to a TLS port without a CA": (
        {"ca": None},
        {"ca": None, "own": None},
        "speaks TLS, this client plaintext",
    ),
    "TLS to a plaintext port": ({"ca": None, "own": None}, {}, "speaks plaintext, this client TLS"),
}


@pytest.mark.parametrize("row", WRONG)
def test_a_client_that_cannot_be_served_is_told_why_and_the_round_goes_on(
    serve, certs, in_a_site, capfd, tmp_path, row
):
    there, here, sentence = WRONG[row]
    served = serve(*flags(certs, **{"own": "good/server", **there}))
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (1, 2)]
    others = (
        {"ca": None, "own": None} if "own" in there else {}
    )  # how the others speak to this server, if they can
    own = [flags(certs, **{"own": f"good/{name}", **others}) for name in ("client001", "client002")]
    goes_on = there.get("own") is None
    if goes_on:
        first = served.send(good[0], "client001", *own[0])
        until(lambda: served.run.rounds.uploads, "client001 is counted")
    code, seconds = client_ends(served.address, *flags(certs, **here))
    said = capfd.readouterr()
    assert code == 1 and seconds < 10, said
    assert re.search(rf"client001: error: .*{sentence}", said.err), said.err
    if goes_on:
        second = served.send(good[1], "client002", *own[1])
        assert first.result().value == second.result().value == 1
        assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


def test_a_server_that_is_merely_away_is_waited_for(certs, in_a_site, capfd):
    code, _ = client_ends("localhost:1", *flags(certs), "--give-up-after", "1")
    assert code == 4 and "no server answers there yet" in capfd.readouterr().out


def test_an_old_client_is_known_by_its_certificate(serve, certs, tmp_path):
    served = serve(*flags(certs, own="good/server"), serve_unnamed=False)
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (1, 2)]
    fetched = b"".join(
        piece.blob or weights.base64.b64decode(piece.model)
        for piece in served.stub(*flags(certs)).getWeight(todo_pb2.void())
    )
    assert fetched == served.run.weights.read_bytes()
    with pytest.raises(grpc.RpcError, match="client001 sent weights in the name of client002"):
        served.send(good[1], "client002", *flags(certs), old=True).result()
    calls = [
        served.send(good[0], "client001", *flags(certs), old=True),
        served.send(good[1], "client002", *flags(certs, own="good/only-cn"), old=True),
    ]
    assert [call.result().value for call in calls] == [1, 1]
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


@pytest.mark.parametrize(
    "server, client, served_too, code",
    [
        ({"own": "good/server"}, {"own": "good/stranger"}, True, "PERMISSION_DENIED"),
        ({"own": "good/server", "ca": None}, {"own": None}, False, "UNAUTHENTICATED"),
        ({"own": None, "ca": None}, {"own": None, "ca": None}, False, "UNAUTHENTICATED"),
        ({"own": None, "ca": None}, {"own": None, "ca": None}, True, None),
    ],
)
def test_who_names_nobody(serve, certs, tmp_path, server, client, served_too, code):
    served = serve(*flags(certs, **server), serve_unnamed=served_too)
    stub = served.stub(*flags(certs, **client))
    for call in (
        lambda: list(stub.getWeight(todo_pb2.void(), timeout=60)),
        lambda: stub.sendWeight(
            iter([todo_pb2.modelWeight(clientname="client001", clientsize=0)]), timeout=60
        ),
    ):
        try:
            call()
            assert code is None
        except grpc.RpcError as error:
            assert error.code().name == code or (
                code is None and "0 examples" in error.details()
            ), error


def test_fetching_needs_ones_own_certificate_too(serve, certs):
    served = serve(*flags(certs, own="good/server"))
    with pytest.raises(grpc.RpcError, match="'client002' came with the certificate of client001"):
        list(
            served.stub(*flags(certs)).getWeight(
                todo_pb2.void(), metadata=[("fedml-client", "client002")], timeout=60
            )
        )


@pytest.mark.parametrize(
    "script, given, sentence",
    [
        (todoServer, ["--listen", "0.0.0.0:0"], "plaintext stays within this machine"),
        (todoServer, ["--listen", "[::]:0"], "plaintext stays within this machine"),
        (todoServer, ["--listen", "192.0.2.1:0"], "plaintext stays within this machine"),
        (todoServer, ["--tls-ca", "CERTS/ca.pem"], "belong together"),
        (todoServer, ["--tls-cert", "CERTS/server.pem"], "belong together"),
        (
            todoServer,
            ["--tls-cert", "CERTS/server.pem", "--tls-key", "CERTS/ca.key"],
            "key values mismatch",
        ),
        (
            todoServer,
            ["--tls-cert", "CERTS/server.key", "--tls-key", "CERTS/server.key"],
            "expected PEM files",
        ),
        (
            todoClient,
            ["--name", "c1", "--server", "192.0.2.1:1"],
            "plaintext stays within this machine",
        ),
        (
            todoClient,
            ["--name", "c1", "--server", "nowhere.invalid:1"],
            "plaintext stays within this machine",
        ),
        (
            todoClient,
            ["--name", "c1", "--tls-cert", "CERTS/c.pem", "--tls-key", "CERTS/c.key"],
            "a client --tls-ca",
        ),
        (todoClient, ["--name", "c1", "--tls-ca", "missing.pem"], "missing.pem.*No such file"),
    ],
)
def test_wrong_usage(certs, capsys, script, given, sentence):
    with pytest.raises(SystemExit) as ended:
        script.parse([each.replace("CERTS", str(certs / "good")) for each in given])
    assert ended.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    "address, local",
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        (":1", False),
        ("192.0.2.1:1", False),
        ("[::ffff:192.0.2.1]:1", False),
        ("nowhere.invalid:1", False),
    ],
)
def test_what_is_this_machine(address, local):
    assert tls.is_this_machine(address) is local


def test_insecure_is_allowed_and_warned_about(start, tmp_path):
    make_data(tmp_path / "site")
    write_weights(tmp_path / "start.h5")
    server = start(
        "tests/standin.py",
        "todoServer",
        "--listen",
        "0.0.0.0:0",
        "--insecure",
        "--image-size",
        "32",
        cwd=tmp_path / "site",
        env={"STANDIN_WEIGHTS": str(tmp_path / "start.h5")},
    )
    server.wait_for("listening on 0.0.0.0:")
    assert "server: warning: plaintext: " in server.output


def test_two_rounds_under_mutual_tls(start, certs, tmp_path):
    """The scripts as they are started, but for TensorFlow."""
    site = make_data(tmp_path / "site")
    write_weights(tmp_path / "start.h5", 0, [("layer", (25_000,))])
    environment = {"STANDIN_WEIGHTS": str(tmp_path / "start.h5")}
    server = start(
        "tests/standin.py",
        "todoServer",
        "--listen",
        "localhost:0",
        "--image-size",
        "32",
        "--rounds",
        "2",
        "--clients",
        "client001,client002",
        *flags(certs, own="good/server"),
        cwd=site,
        env=environment,
    )
    address = server.wait_for(r"listening on (\S+)")[1]
    clients = [
        start(
            "tests/standin.py",
            "todoClient",
            "--name",
            name,
            "--server",
            address,
            *flags(certs, own=f"good/{name}"),
            cwd=site,
            env=environment,
        )
        for name in ("client001", "client002")
    ]
    assert [process.wait() for process in [*clients, server]] == [0, 0, 0], server.output
    assert "warning" not in server.output


# --- a flood -------------------------------------------------------------------------------------


class Flood:
    """200 silent connections, half of them not even HTTP/2, and 50 half-open calls of strangers."""

    def __init__(self, address):
        host, _, port = address.rpartition(":")
        self.idle = [socket.create_connection((host, int(port)), 10) for _ in range(200)]
        for connection in self.idle[::2]:
            connection.sendall(probe.CLIENT_PREFACE)
        self.channels = []
        self.calls = []
        self.over = threading.Event()
        for number in range(50):
            self.channels.append(
                grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
            )
            method = ("sendWeight", "getWeight")[number % 5 == 0]
            call = self.channels[-1].stream_stream(f"/todoPackage.FedML/{method}")(
                self.nothing(), timeout=60
            )
            self.calls.append(call)

    def nothing(self):
        self.over.wait(60)
        yield from ()

    def close(self):
        self.over.set()
        for each in [*self.calls, *self.channels, *self.idle]:
            if hasattr(each, "cancel"):
                each.cancel()
            else:
                each.close()


@pytest.mark.alone
def test_a_flood_of_unknown_peers_does_not_delay_a_round(serve, tmp_path):
    served = serve(rounds=10_000)
    large = [("conv", (1000, 1000)), ("dense", (1000, 3))]
    write_weights(served.run.weights, 0, large)
    served.close()
    state = files.load_state(served.run.folder / "state.json")
    files.save_state(
        served.run.folder / "state.json",
        {**state, "weights_sha256": files.sha256_of(served.run.weights)},
    )
    served.run.start()
    served.server, served.address = serving.serve(served.run.rounds)
    good = [write_weights(tmp_path / f"{seed}.h5", seed, large) for seed in (1, 2)]

    def one_round():
        started = time.monotonic()
        for name in ("client001", "client002"):
            for _ in served.stub().getWeight(
                todo_pb2.void(), metadata=[("fedml-client", name)], timeout=60
            ):
                pass
        calls = [
            served.send(path, name)
            for path, name in zip(good, ("client001", "client002"), strict=True)
        ]
        assert [call.result().value for call in calls] == [1, 1]
        return time.monotonic() - started

    one_round()
    pairs = []
    for _ in range(7):
        quiet, flood = one_round(), Flood(served.address)
        until(lambda flood=flood: any(call.done() for call in flood.calls), "the flood has arrived")
        pairs.append((quiet, one_round()))
        flood.close()
    quiet, flooded = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"quiet {quiet:.3f} s, flooded {flooded:.3f} s, ratio {ratio:.2f}")
    assert flooded <= 1.1 * quiet + 0.1, pairs
    assert any("peers that name nobody are here already" in line for line in served.run.said)


# --- make_certs.sh -------------------------------------------------------------------------------


def test_make_certs(tmp_path):
    made = make_certs(tmp_path / "certs", "192.0.2.7", "client001", DAYS="90")
    assert made.returncode == 0 and made.stdout.count("is valid until") == 3
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "certs").glob("*.key")
    } == dict.fromkeys(["ca.key", "server.key", "client001.key"], "0o600")
    text = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "certs" / "server.pem", "-noout", "-text"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "IP Address:192.0.2.7" in text and "DNS:localhost" in text
    before = {path: path.read_bytes() for path in (tmp_path / "certs").iterdir()}
    again = make_certs(tmp_path / "certs", "192.0.2.7", "client001")
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "certs").iterdir()} == before
    assert (
        make_certs(tmp_path / "certs", "192.0.2.7", "client002").returncode == 0
    )  # one more, of the same CA
    assert (
        before.items()
        <= {path: path.read_bytes() for path in (tmp_path / "certs").iterdir()}.items()
    )
    for name in (
        "server.pem",
        "server.key",
        "client001.pem",
        "client001.key",
    ):  # renewed, by the same CA
        (tmp_path / "certs" / name).rename(tmp_path / name)
    renewed = make_certs(tmp_path / "certs", "192.0.2.7", "client001")
    assert renewed.returncode == 0 and renewed.stdout.count("is valid until") == 3
    openssl("verify -CAfile certs/ca.pem certs/server.pem certs/client001.pem server.pem", tmp_path)
    assert (tmp_path / "certs" / "server.pem").read_bytes() != (
        tmp_path / "server.pem"
    ).read_bytes()
    for wrong in (
        ["certs"],
        ["certs", "host", "../x"],
        ["certs", "192.0.2.7:50051", "client003"],
        ["certs", "a b", "client003"],
        ["certs", "host", "server"],
    ):
        assert make_certs(tmp_path / wrong[0], *wrong[1:]).returncode == 2, wrong

"""Only clients with the right certificate are served; who cannot connect is told why."""

import base64
import contextlib
import re
import shutil
import socket
import subprocess
import threading
from types import SimpleNamespace
from typing import NamedTuple

import grpc
import pytest
import serving
from conftest import ROOT, fails_once, free_port, write_weights
from seed_peer import LIMITS, cut

import todoClient
import todoServer
from federation import tls
from generated import todo_pb2, todo_pb2_grpc

# --- certificates --------------------------------------------------------------------------------

CA_SETTINGS = """
[ca]
default_ca = ours
[ours]
database = db.txt
serial = serial
copy_extensions = copy
unique_subject = no
policy = any
[any]
commonName = supplied
"""
SIGN = "ca -batch -config settings -cert ca.pem -keyfile ca.key -md sha256 -create_serial -outdir ."
PAST = ("20200101000000Z", "20210101000000Z")
PRESENT = ("20200101000000Z", "20490101000000Z")
FUTURE = ("20480101000000Z", "20490101000000Z")
P256 = "ec -pkeyopt ec_paramgen_curve:P-256"
CLIENT = ["subjectAltName=DNS:client001", "extendedKeyUsage=clientAuth"]
SERVER = ["subjectAltName=DNS:localhost", "extendedKeyUsage=serverAuth"]
MADE = {  # name: (common name, key, extensions, (from, to))
    "only-cn": ("client002", P256, [], PRESENT),
    "expired": ("client001", P256, CLIENT, PAST),
    "future": ("client001", P256, CLIENT, FUTURE),
    "p521": ("client001", P256.replace("256", "521"), CLIENT, PRESENT),
    "server-elsewhere": ("fl.example", P256, [], PRESENT),
    "server-expired": ("localhost", P256, SERVER, PAST),
    "server-future": ("localhost", P256, SERVER, FUTURE),
}


def make_certs(folder, *arguments):
    command = [ROOT / "make_certs.sh", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    """A folder of NAME.pem and NAME.key of the CA ca.pem; below it other/, of another CA."""
    folder = tmp_path_factory.mktemp("certs")
    for each in (folder, folder / "other"):
        made = make_certs(each, "localhost", "client001", "client002", "client009")
        assert made.returncode == 0, made.stderr
    (folder / "settings").write_text(CA_SETTINGS)
    (folder / "db.txt").touch()
    for name, (subject, key, extensions, (start, end)) in MADE.items():
        request = f"req -new -newkey {key} -nodes -keyout {name}.key -out {name}.csr"
        added = "".join(f" -addext {each}" for each in extensions)
        for command in (
            f"{request} -subj /CN={subject}{added}",
            f"{SIGN} -startdate {start} -enddate {end} -notext -in {name}.csr -out {name}.pem",
        ):
            command = ["openssl", *command.split()]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def flags(certs, own="client001", ca="ca"):
    """--tls-* of the files in `certs`; no certificate where `own` is None, no CA where `ca` is."""
    given = ["--tls-ca", certs / f"{ca}.pem"] if ca else []
    if own:
        given += ["--tls-cert", certs / f"{own}.pem", "--tls-key", certs / f"{own}.key"]
    return [str(each) for each in given]


# --- who is served -------------------------------------------------------------------------------


@pytest.fixture
def serve(make_run, monkeypatch):
    """serve(*flags, **options) -> (Run of client001 and client002, its address)."""
    servers = []

    def start(*given, **options):
        run = make_run(clients=["client001", "client002"], rounds=1)
        with monkeypatch.context() as patch:  # a certificate may be one that expires while it runs
            patch.setattr(tls, "check_own_certificate", lambda *_: None)
            credentials = tls.server_credentials(todoServer.parse(list(given)))
        server, address = serving.serve(run.rounds, credentials=credentials, **options)
        servers.append(server)
        return run, address

    yield start
    for server in servers:
        server.stop(0).wait()


def stub_of(address, *given, name="client001"):
    arguments = todoClient.parse(["--name", name, "--server", address, *given])
    options = [("grpc.use_local_subchannel_pool", 1), *LIMITS[1:]]
    return todo_pb2_grpc.FedMLStub(tls.channel(arguments, options))


def fetch(stub, *metadata):
    pieces = stub.getWeight(todo_pb2.void(), metadata=metadata, timeout=60)
    return b"".join(base64.b64decode(piece.model) for piece in pieces)


def test_an_old_client_is_known_by_its_certificate(serve, certs, tmp_path):
    run, address = serve(*flags(certs, "server"), serve_unnamed=False)
    first = stub_of(address, *flags(certs))
    second = stub_of(address, *flags(certs, "only-cn"), name="client002")
    assert fetch(first) == run.weights.read_bytes()

    def send(stub, client, seed):
        content = write_weights(tmp_path / f"{seed}.h5", seed).read_bytes()
        named = {"clientname": f"{client}/client_weights.h5", "clientsize": 3}
        return stub.sendWeight.future(cut(content, **named), timeout=60)

    with pytest.raises(grpc.RpcError, match="client001 sent weights in the name of client002"):
        send(first, "client002", 2).result()
    calls = [send(first, "client001", 1), send(second, "client002", 2)]
    assert [call.result().value for call in calls] == [1, 1]
    assert run.holds(("client001", 3, 1), ("client002", 3, 2))


@pytest.mark.parametrize(
    ("client", "says", "words"),
    [
        ("client001", "client002", "'client002' came with the certificate of client001"),
        ("client009", "client009", "PERMISSION_DENIED"),  # of the CA, and not of the run
    ],
)
def test_who_is_not_the_client_that_it_says_gets_no_weights(serve, certs, client, says, words):
    _, address = serve(*flags(certs, "server"))
    with pytest.raises(grpc.RpcError, match=words):
        fetch(stub_of(address, *flags(certs, client), name=client), ("fedml-client", says))


@pytest.mark.parametrize(
    ("own", "warning", "refusal"),
    [
        (None, "warning: plaintext", None),
        ("server", "warning: without --tls-ca", "UNAUTHENTICATED"),
    ],
)
def test_beyond_this_machine_a_server_warns_and_serves_unnamed_peers_if_insecure(
    make_run, certs, capsys, own, warning, refusal
):
    """Who has no certificate and names nobody, as a peer of 2020."""
    run = make_run(clients=["client001"], rounds=1)
    given = ["--listen", "0.0.0.0:0", *(flags(certs, own, ca=None) if own else ["--insecure"])]
    evaluator = SimpleNamespace(card_text=str)
    server = todoServer.listen(todoServer.parse(given), run.rounds, evaluator)
    said = capsys.readouterr().out
    assert warning in said
    address = "localhost:" + re.search(r"listening on .*:(\d+)", said)[1]
    expected = pytest.raises(grpc.RpcError, match=refusal) if refusal else contextlib.nullcontext()
    with expected:
        fetch(stub_of(address, *(flags(certs, None) if own else [])))
    server.stop(0).wait()


# --- what is wrong at start ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        (todoServer, "--listen 0.0.0.0:0", "plaintext stays within"),
        (todoServer, "--tls-ca ca.pem", "belong together"),
        (todoServer, "--tls-cert server.pem", "belong together"),
        (todoServer, "--tls-cert server.pem --tls-key ca.key", "mismatch"),
        (todoServer, "--tls-cert client001.pem --tls-key client001.key", "no server's certificate"),
        (todoClient, "--server nowhere.invalid:1", "plaintext stays within"),
        (todoClient, "--tls-ca missing.pem", "No such file"),
        (todoClient, "--tls-ca client001.key", "expected PEM files"),
        (todoClient, "--server localhost", "not HOST:PORT"),
        (todoClient, "--server localhost:99999", "not HOST:PORT"),
        (todoClient, "--server 2001:db8::1", "not HOST:PORT"),
        (todoClient, "--server ::1:50051", r"\[::1\]:50051"),
    ],
)
def test_wrong_usage(certs, capsys, monkeypatch, script, given, words):
    monkeypatch.chdir(certs)
    name = ["--name", "client001"] if script is todoClient else []
    with pytest.raises(SystemExit, match="2"):
        script.parse([*name, *given.split()])
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("address", ["127.9.9.9:1", "[::1]:1"])
def test_plaintext_is_for_this_machine(address):
    assert todoClient.parse(["--name", "client001", "--server", address]).server == address


# --- the table of docs/hospitals.md: who cannot connect -----------------------------------------


def rows():
    """{what is wrong: (what is said, who does what)}, from docs/hospitals.md."""
    text = (ROOT / "docs" / "hospitals.md").read_text(encoding="utf-8")
    [table] = re.findall(r"^\| what is wrong \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    cells = [line[1:-1].split("|") for line in table.splitlines()]
    return {wrong.strip(): (said.strip(" `"), what.strip()) for wrong, said, what in cells}


class Setup(NamedTuple):
    """Who has which certificate; None: plaintext, "": TLS without one."""

    client: str | None = "client001"
    server: str | None = "server"
    ca: str = "ca"  # that the client trusts
    host: str = "localhost"
    before: str | None = None  # which HTTP status is answered in its place
    proxy: str | None = None  # the same, as https_proxy
    details: str | None = None  # what gRPC says then, which no test makes happen


NOBODY = "nobody"
HTTP2 = "Received http2 header with status: "
SETUPS = {
    "the client's certificate has expired": Setup(client="expired"),
    "the client's certificate is not valid yet": Setup(client="future"),
    "the client's certificate is a server's": Setup(client="server"),
    "the client's certificate is another client's": Setup(client="client002"),
    "the client's key is P-521 or Ed25519": Setup(client="p521"),
    "the client's certificate is of another CA": Setup(client="other/client001"),
    "the client has no certificate": Setup(client=""),
    "the client speaks plaintext": Setup(client=None),
    "the server speaks plaintext": Setup(server=None),
    "the server's certificate expires while it runs": Setup(server="server-expired"),
    "the client's clock is behind": Setup(server="server-future"),
    "the server's certificate is of another CA, or the proxy opens TLS": Setup(ca="other/ca"),
    "the server's certificate is of another host": Setup(server="server-elsewhere"),
    "nobody listens": Setup(before=NOBODY),
    "a firewall drops what is sent": Setup(details="failed to connect: connect() timed out"),
    "the server is killed while a client waits": Setup(
        details="Stream removed (recvmsg:Connection reset by peer (104))"
    ),
    "the server's name is unknown": Setup(host="nowhere.invalid"),
    "the server behind a forwarded port is away": Setup(before=""),
    "another program has the port": Setup(client=None, before="400 Bad Request"),
    "the proxy wants a password": Setup(proxy="407 Proxy Authentication Required"),
    "the proxy forbids the connection": Setup(proxy="403 Forbidden"),
    "the proxy finds no server": Setup(proxy="502 Bad Gateway"),
    "the proxy is down": Setup(proxy=NOBODY),
    "a proxy before the server refuses large uploads": Setup(details=HTTP2 + "413"),
    "a proxy before the server does not wait for a round": Setup(details=HTTP2 + "504"),
    "a proxy before the server finds it away": Setup(details=HTTP2 + "502"),
}


@pytest.fixture
def answering():
    """answering(status) -> a port where each connection gets this HTTP status; "": nothing."""
    listeners = []

    def start(status):
        if status == NOBODY:
            return free_port()
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve():
            with contextlib.suppress(OSError):  # the test is over
                while True:
                    incoming, _ = listener.accept()
                    with incoming, contextlib.suppress(OSError):  # the client hangs up, too
                        incoming.recv(1 << 12)
                        if status:
                            incoming.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for each in listeners:
        each.close()


@pytest.mark.parametrize("wrong", rows())
def test_who_cannot_connect_is_told_why(certs, answering, serve, capsys, monkeypatch, wrong):
    expected, does = rows()[wrong]
    setup = SETUPS[wrong]
    for name in (*tls.PROXY_VARIABLES, "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if setup.proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{answering(setup.proxy)}")
    own = ["--insecure"] if setup.client is None else flags(certs, setup.client, setup.ca)
    client_flags = ["--name", "client001", *own]
    if does == "the client ends with 2":
        with pytest.raises(SystemExit, match="2"):
            todoClient.parse(client_flags)
        said = capsys.readouterr().err
    else:
        address = "localhost:1"
        if setup.before is not None:
            address = f"127.0.0.1:{answering(setup.before)}"
        elif not setup.details:
            _, address = serve(*(flags(certs, setup.server) if setup.server else []))
            address = address.replace("localhost", setup.host)
        arguments = todoClient.parse([*client_flags, "--server", address])
        details = setup.details or why_a_call_fails(arguments)
        said, can_retry = tls.explain(details, arguments)
        assert can_retry is (does == "the client waits")
    assert re.search(re.sub("SERVER|FILE", r"\\S+", re.escape(expected)), said), said


def why_a_call_fails(arguments):
    """gRPC's words."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.min_reconnect_backoff_ms", 3000)]
    with tls.channel(arguments, options) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            todo_pb2_grpc.FedMLStub(channel).sendWeight(iter([todo_pb2.modelWeight()]), timeout=30)
    return failed.value.details()


@pytest.mark.parametrize(
    ("details", "words", "can_retry"),
    [
        (
            "VERIFY_FAILED: unsupported certificate purpose: OK",
            "not accepted: unsup.*purpose",
            False,
        ),
        ("Failed to create security handshaker", "expected PEM files", False),
        ("Received http2 header with status: 302", "HTTP status 302.*let gRPC pass", False),
        ("something new", "^failed to connect to all addresses; something new$", True),
    ],
)
def test_what_no_row_makes_happen_is_explained_too(certs, details, words, can_retry):
    arguments = todoClient.parse(["--name", "client001", *flags(certs)])
    said, may_help = tls.explain(f"failed to connect to all addresses; {details}", arguments)
    assert re.search(words, said) and may_help is can_retry


def test_what_the_server_itself_says_is_not_explained(certs):
    arguments = todoClient.parse(["--name", "client001", *flags(certs)])
    details = "client001: unable to get local issuer; Socket closed"
    assert tls.explain(details, arguments) == (details, True)


# --- the scripts as they are started -------------------------------------------------------------


def test_a_client_ends_where_waiting_is_in_vain(certs, served, client_main):
    code, said = client_main("--server", served[1], *flags(certs))
    assert code == 1 and "speaks plaintext" in said


def test_files_that_change_while_they_are_read_are_not_used(certs, tmp_path, monkeypatch):
    """gRPC would end the process on an empty key."""
    own = shutil.copytree(certs, tmp_path / "own")
    arguments = todoClient.parse(["--name", "client001", *flags(own)])
    changing = (own / "client001.key").write_bytes
    monkeypatch.setattr(tls, "check_own_certificate", lambda *_: changing(b""))
    with pytest.raises(tls.FilesNotReady, match="renewed"):
        tls.channel(arguments, [])


def test_files_that_are_being_renewed_are_waited_for(served, client_main, monkeypatch):
    fails_once(monkeypatch, tls, "channel", tls.FilesNotReady("they are being renewed"))
    code, said = client_main("--server", served[1], "--give-up-after", "60")
    assert code == 0 and "they are being renewed" in said


# --- make_certs.sh -------------------------------------------------------------------------------


def test_make_certs_makes_what_is_not_there_and_writes_nothing_over(tmp_path):
    """So what was moved out is renewed."""
    folder = tmp_path / "certs"

    def contents():
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert make_certs(folder, "192.0.2.7", "client001").returncode == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.glob("*.key")}
    assert modes == dict.fromkeys(["ca.key", "server.key", "client001.key"], 0o600)
    before = contents()
    again = make_certs(folder, "192.0.2.7", "client001")
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr
    assert contents() == before
    for name in ("server.pem", "server.key"):
        (folder / name).rename(tmp_path / name)
    assert make_certs(folder, "192.0.2.7", "client002").returncode == 0
    assert before.items() - contents().items() == {
        (name, before[name]) for name in ("server.pem", "server.key")
    }
    command = ["openssl", "verify", "-verify_ip", "192.0.2.7", "-CAfile", folder / "ca.pem"]
    subprocess.run([*command, tmp_path / "server.pem", folder / "server.pem"], check=True)


def test_an_openssl_that_does_not_work_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "own.cnf").write_text("[[")
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "own.cnf"))
    made = make_certs(tmp_path / "certs", "localhost", "client001")
    assert made.returncode == 1 and "openssl could not make" in made.stderr


@pytest.mark.parametrize("wrong", ["", "host ../x", "192.0.2.7:50051 client003", "host server"])
def test_make_certs_refuses(tmp_path, wrong):
    assert make_certs(tmp_path / "certs", *wrong.split()).returncode == 2

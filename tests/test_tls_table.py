"""HOSPITALS.md's table of who cannot connect, row by row, with real certificates and processes."""

import re
import socket
import ssl
import subprocess
import threading
import time
from typing import NamedTuple

import pytest
from conftest import ROOT, client_script, free_port, holding, start_server

GIVE_UP_S = 2
BUSY = 3  # times the table's seconds: other tests may run on this machine


class Row(NamedTuple):
    """A line of the table."""

    wrong: str
    client_says: str
    client_exit: str
    server_says: str
    server_does: str
    within: str


def rows():
    """{what is wrong: Row}, from HOSPITALS.md."""
    text = (ROOT / "HOSPITALS.md").read_text(encoding="utf-8")
    [table] = re.findall(r"^\| what is wrong \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    cells = [
        [cell.strip().strip("`") for cell in line[1:-1].split("|")]
        for line in table.split("\n")[:-1]
    ]
    return {line[0]: Row(*line) for line in cells}


class Setup(NamedTuple):
    """Who has which certificate, by name; None: speaks plaintext. proxy: what one does."""

    client: str | None = "client001"
    server: str | None = "server"
    ca: str = "good"  # that the client trusts
    proxy: str | None = None


SETUPS = {
    "the client has no certificate": Setup(client="none"),
    "the client's certificate is of another CA": Setup(client="of-another-ca"),
    "the client's certificate has expired": Setup(client="expired"),
    "the client's certificate is not valid yet": Setup(client="future"),
    "the client's certificate is a server's": Setup(client="wrong-purpose"),
    "the client's certificate is another client's": Setup(client="client002"),
    "the client's certificate is a stranger's": Setup(client="stranger"),
    "the client's key is P-521": Setup(client="p521"),
    "the client's key is Ed25519": Setup(client="ed25519"),
    "the client speaks plaintext": Setup(client=None),
    "the server speaks plaintext": Setup(server=None),
    "the server's certificate is of another CA": Setup(ca="other"),
    "the server's certificate is of another host": Setup(server="server-elsewhere"),
    "the server's certificate expires while it runs": Setup(server="server-expires"),
    "the server's certificate has expired": Setup(server="server-expired"),
    "the server's certificate is not valid yet": Setup(server="server-future"),
    "the server's certificate is a client's": Setup(server="server-wrong-purpose"),
    "the server's key is P-521": Setup(server="server-p521"),
    "the server's key is Ed25519": Setup(server="server-ed25519"),
    "the proxy wants a password": Setup(proxy="407 Proxy Authentication Required"),
    "the proxy forbids the connection": Setup(proxy="403 Forbidden"),
    "the proxy opens TLS": Setup(proxy="opens TLS"),
    "behind a proxy, the server's certificate is of another CA": Setup(
        ca="other", client="of-another-ca", proxy="tunnel"
    ),
    "behind a proxy, the server's certificate expires while it runs": Setup(
        server="server-expires", proxy="tunnel"
    ),
    "behind a proxy, the client's certificate has expired": Setup(client="expired", proxy="tunnel"),
    "the proxy is down": Setup(proxy="down"),
    "the proxy finds no server": Setup(proxy="502 Bad Gateway"),
}


# --- certificates --------------------------------------------------------------------------------

CA_SETTINGS = """
[ca]
default_ca = ours
[ours]
database = db.txt
serial = serial
new_certs_dir = .
certificate = ca.pem
private_key = ca.key
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""
PAST = ("20200101000000Z", "20210101000000Z")
PRESENT = ("20200101000000Z", "20490101000000Z")
FUTURE = ("20480101000000Z", "20490101000000Z")
P256 = "ec -pkeyopt ec_paramgen_curve:P-256"
P521 = "ec -pkeyopt ec_paramgen_curve:P-521"
MADE = {  # name: (common name, key, usage, (from, to))
    "expired": ("client001", P256, "clientAuth", PAST),
    "future": ("client001", P256, "clientAuth", FUTURE),
    "wrong-purpose": ("client001", P256, "serverAuth", PRESENT),
    "p521": ("client001", P521, "clientAuth", PRESENT),
    "ed25519": ("client001", "ed25519", "clientAuth", PRESENT),
    "server-elsewhere": ("fl.example", P256, "serverAuth", PRESENT),
    "server-expired": ("localhost", P256, "serverAuth", PAST),
    "server-expires": ("localhost", P256, "serverAuth", PAST),
    "server-future": ("localhost", P256, "serverAuth", FUTURE),
    "server-wrong-purpose": ("localhost", P256, "clientAuth", PRESENT),
    "server-p521": ("localhost", P521, "serverAuth", PRESENT),
    "server-ed25519": ("localhost", "ed25519", "serverAuth", PRESENT),
}


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    """A folder of NAME.pem and NAME.key, with the CAs good.pem and other.pem."""
    folder = tmp_path_factory.mktemp("certs")

    def run(*command):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    run(ROOT / "make_certs.sh", folder, "localhost", "client001", "client002", "stranger")
    run(ROOT / "make_certs.sh", folder / "other", "localhost", "client001")
    (folder / "good.pem").write_bytes((folder / "ca.pem").read_bytes())
    (folder / "other.pem").write_bytes((folder / "other" / "ca.pem").read_bytes())
    for end in ("pem", "key"):
        content = (folder / "other" / f"client001.{end}").read_bytes()
        (folder / f"of-another-ca.{end}").write_bytes(content)
    (folder / "settings").write_text(CA_SETTINGS)
    (folder / "db.txt").touch()
    (folder / "serial").write_text("1000")
    for name, (subject, key, usage, (start, end)) in MADE.items():
        request = f"req -new -newkey {key} -nodes -keyout {name}.key -out {name}.csr"
        extensions = [f"subjectAltName=DNS:{subject}", f"extendedKeyUsage={usage}"]
        added = [word for each in extensions for word in ("-addext", each)]
        run("openssl", *request.split(), "-subj", f"/CN={subject}", *added)
        sign = f"ca -batch -config settings -startdate {start} -enddate {end} -notext"
        run("openssl", *sign.split(), "-in", f"{name}.csr", "-out", f"{name}.pem")
    return folder


def flags(certs, ca, name):
    """The TLS flags of a script whose certificate has this name."""
    if name is None:
        return []
    given = ["--tls-ca", certs / f"{ca}.pem"]
    if name != "none":
        given += ["--tls-cert", certs / f"{name}.pem", "--tls-key", certs / f"{name}.key"]
    return given


# --- a proxy -------------------------------------------------------------------------------------


class Proxy:
    """Takes CONNECT, and does what its name says: tunnel, opens TLS, down, or an HTTP status."""

    def __init__(self, does, certs):
        self.does = does
        self.certs = certs
        self.listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self.listener.getsockname()[1]}"
        if does == "down":
            self.listener.close()
        else:
            threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                incoming, _ = self.listener.accept()
            except OSError:
                return  # the test is over
            threading.Thread(target=self._serve, args=[incoming], daemon=True).start()

    def _serve(self, incoming):
        request = b""
        while b"\r\n\r\n" not in request:
            received = incoming.recv(1 << 12)
            if not received:
                return  # the client has gone
            request += received
        host, port = request.split(b" ")[1].decode().rsplit(":", 1)
        if self.does not in ("tunnel", "opens TLS"):
            incoming.sendall(f"HTTP/1.1 {self.does}\r\nContent-Length: 0\r\n\r\n".encode())
            incoming.close()
            return
        incoming.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        if self.does == "opens TLS":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            other = self.certs / "other"
            context.load_cert_chain(other / "server.pem", other / "server.key")
            try:
                context.wrap_socket(incoming, server_side=True).recv(1)
            except OSError:
                pass  # the client does not accept it
            return
        outgoing = socket.create_connection((host, int(port)))
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


# --- the rows ------------------------------------------------------------------------------------


def test_each_row_has_its_test():
    assert list(rows()) == list(SETUPS)


def pattern(sentence):
    """A regular expression: SERVER, FILE and PROXY stand for an address or a path."""
    return re.sub("SERVER|FILE|PROXY", r"\\S+", re.escape(sentence))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", SETUPS)
def test_row(start, begun, certs, monkeypatch, wrong):
    row, setup = rows()[wrong], SETUPS[wrong]
    site = begun()
    script = "todoServer.py"
    if setup.server == "server-expires":  # at its start nothing is wrong yet
        patch = "from federation import probe\nprobe.check_server_certificate = lambda _: None"
        script = holding(site, "todoServer", patch)
    server_flags = flags(certs, "good", setup.server)
    if row.server_does == "goes on":
        server, address = start_server(start, site, *server_flags, script=script)
    else:
        address = f"localhost:{free_port()}"
        server = start(script, "--listen", address, *server_flags, cwd=site)
        assert f"exits with {server.wait()}" == row.server_does, server.output
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    proxy = Proxy(setup.proxy, certs) if setup.proxy else None
    environment = {"https_proxy": f"http://{proxy.address}"} if proxy else {}
    began = time.monotonic()
    client = start(
        client_script(site),
        *["--name", "client001", "--server", address, "--give-up-after", GIVE_UP_S],
        *flags(certs, setup.ca, setup.client),
        cwd=site,
        env=environment,
    )
    assert client.wait() == int(row.client_exit), client.output
    assert time.monotonic() - began < BUSY * int(row.within.removesuffix(" s"))
    assert re.search(pattern(row.client_says), client.output), client.output
    assert "Traceback" not in client.output + server.output
    if row.server_says:
        server.wait_for(pattern(row.server_says))
    if row.server_does == "goes on":
        assert server.process.poll() is None
    if proxy:
        proxy.close()

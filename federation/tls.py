"""TLS and addresses: the flags and the credentials of both scripts, and plaintext only at home.

gRPC says little when a connection fails: every failed handshake is UNAVAILABLE, and a port of which
another server holds one address is "bound". This module looks with Python's own sockets and ssl.
"""

import enum
import errno
import ipaddress
import socket
import ssl
import time
from pathlib import Path

# How an HTTP/2 client begins: the fixed text, and an empty SETTINGS frame (RFC 9113, section 3.4).
CLIENT_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
FRAME_HEADER_BYTES = 9
FRAME_TYPE_SETTINGS = 4  # the type is the fourth byte of a frame's header
PROBE_S = 2  # for each step of a probe: connect, handshake, read

# OpenSSL's X509_V_ERR_*: the chain is self-signed, or leads to a CA that is not the given one.
UNKNOWN_CA_CODES = range(18, 22)


class Greeting(enum.Enum):
    """How the other end answers a client that speaks HTTP/2."""

    HTTP2 = "it answers with HTTP/2"
    REFUSED = "it takes the connection and then hangs up, or says something else"
    NOBODY = "nobody is there, or nobody answers"


# --- flags ---------------------------------------------------------------------------------------


def add_arguments(add, ca_help, cert_help):
    """Add the TLS flags; `add` is an ArgumentParser's add_argument."""
    add("--tls-ca", type=Path, metavar="FILE", help=ca_help)
    add("--tls-cert", type=Path, metavar="FILE", help=cert_help)
    add("--tls-key", type=Path, metavar="FILE", help="the private key of --tls-cert")
    add(
        "--insecure",
        action="store_true",
        help="plaintext with other machines: anyone on the network path can read and change "
        "everything",
    )


def check_arguments(parser, arguments, address, encrypted):
    """End the script, as wrong usage, where address and TLS flags do not work together.

    That is: no HOST:PORT, files that TLS cannot use, or plaintext that would leave this machine.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"{address!r} is not HOST:PORT, as in localhost:50051")
    half_a_pair = bool(arguments.tls_cert) != bool(arguments.tls_key)
    any_file = bool(arguments.tls_cert or arguments.tls_ca)
    if half_a_pair or (any_file and not encrypted):
        parser.error(
            "--tls-cert and --tls-key belong together; a server needs these two at least, "
            "a client --tls-ca"
        )
    if not (encrypted or arguments.insecure or is_this_machine(address)):
        parser.error(
            f"{address} is not (only) a loopback address, and plaintext stays within this machine: "
            "give --tls-ca, --tls-cert and --tls-key (./make_certs.sh makes them), or --insecure"
        )
    try:
        ssl_context(arguments)
    except OSError as error:  # ssl.SSLError is an OSError, too
        parser.error(
            f"--tls-ca {arguments.tls_ca}, --tls-cert {arguments.tls_cert}, "
            f"--tls-key {arguments.tls_key}: {error.strerror or error}; "
            "expected PEM files, the key without a password and of that certificate"
        )


# --- addresses -----------------------------------------------------------------------------------


def is_this_machine(address):
    """Whether HOST:PORT stands for loopback addresses only; an unknown host does not."""
    host = address.rpartition(":")[0].strip("[]") or "0.0.0.0"
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    numbers = [socket_address[0].partition("%")[0] for *_, socket_address in found]
    return all(ipaddress.ip_address(number).is_loopback for number in numbers)


def is_taken(host, port):
    """Whether a server listens already on that port, on any address of the host.

    gRPC binds those addresses that are free and is content with one of them: of localhost's two,
    127.0.0.1 and ::1, each of two servers would serve half of the clients.
    """
    if port == "0":  # any free port
        return False
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, *_, socket_address in found:
        try:
            socket.create_server(socket_address, family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
    return False


# --- credentials ---------------------------------------------------------------------------------


def server_credentials(arguments):
    """The files as gRPC takes them; None for plaintext.

    With --tls-ca the server demands a certificate that this CA signed from every client.
    """
    import grpc  # here, because --help does not need it

    if not arguments.tls_cert:
        return None
    key_and_certificate = (arguments.tls_key.read_bytes(), arguments.tls_cert.read_bytes())
    ca = _content(arguments.tls_ca)
    return grpc.ssl_server_credentials([key_and_certificate], ca, require_client_auth=bool(ca))


def channel(arguments, options):
    """A gRPC channel to --server, with these options.

    The files are read each time, so that renewed ones count from the next connection on.
    """
    import grpc

    if not arguments.tls_ca:
        # Plaintext is for this machine or a trusted network, and must not leave it by a proxy.
        no_proxy = [*options, ("grpc.enable_http_proxy", 0)]
        return grpc.insecure_channel(arguments.server, no_proxy)
    credentials = grpc.ssl_channel_credentials(
        _content(arguments.tls_ca), _content(arguments.tls_key), _content(arguments.tls_cert)
    )
    return grpc.secure_channel(arguments.server, credentials, options)


def _content(path):
    """The bytes of a file that a flag names, None where the flag was not given."""
    return path.read_bytes() if path else None


def ssl_context(arguments, verify=True):
    """The same files in Python's own ssl. Raises OSError where ssl cannot use them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])  # what gRPC asks for
    if not verify:
        context.check_hostname = False  # first: ssl keeps to this order
        context.verify_mode = ssl.CERT_NONE
    if arguments.tls_ca:
        context.load_verify_locations(arguments.tls_ca)
    if arguments.tls_cert:
        # An empty password: otherwise OpenSSL would ask for one on the terminal.
        context.load_cert_chain(arguments.tls_cert, arguments.tls_key, password="")
    return context


# --- why a client cannot speak to its server -----------------------------------------------------


def explain(arguments):
    """Say in one sentence why --server cannot be spoken to, and what to do.

    Returns None where the server is merely away: then trying again can help.
    """
    if arguments.tls_ca:
        return _explain_encrypted(arguments)
    return _explain_plaintext(arguments)


def _explain_plaintext(arguments):
    server = arguments.server
    try:
        if greet(server) is not Greeting.REFUSED:
            return None
        if greet(server, ssl_context(arguments, verify=False)) is Greeting.NOBODY:
            return None
    except ssl.SSLError:
        return None
    return f"{server} speaks TLS, this client plaintext: give --tls-ca, --tls-cert and --tls-key"


def _explain_encrypted(arguments):
    server = arguments.server
    try:
        # A server that hung up because it was being stopped is gone at the second attempt.
        for _ in range(2):
            if greet(server, ssl_context(arguments)) is not Greeting.REFUSED:
                return None
            time.sleep(0.5)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message
        if error.verify_code in UNKNOWN_CA_CODES:
            reason = f"the CA in {arguments.tls_ca} did not sign it"
        return f"the certificate of {server} is not accepted: {reason}"
    except ssl.SSLError:  # the other end does not speak TLS
        if greet(server) is Greeting.HTTP2:
            return f"{server} speaks plaintext, this client TLS"
        return None
    return _explain_own_certificate(arguments)


def _explain_own_certificate(arguments):
    """Say why a server with a good certificate hangs up: it does not accept the client's."""
    server, certificate = arguments.server, arguments.tls_cert
    if not certificate:
        return f"{server} wants a certificate from this client: give --tls-cert and --tls-key"
    # Python's ssl has no public function that reads a certificate from a file.
    not_after = ssl._ssl._test_decode_cert(str(certificate))["notAfter"]
    if ssl.cert_time_to_seconds(not_after) < time.time():
        return f"{server} does not accept {certificate}: it has expired"
    return f"{server} does not accept {certificate}: the server's --tls-ca did not sign it"


def greet(server, context=None):
    """Connect to HOST:PORT, begin HTTP/2 there, and return the Greeting.

    context: an ssl.SSLContext, to greet behind a TLS handshake; ssl.SSLError where that fails.
    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    try:
        connection = socket.create_connection((host, port), timeout=PROBE_S)
        if context:
            connection = context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLError:
        raise
    except OSError:
        return Greeting.NOBODY
    with connection:
        try:
            return _exchange_prefaces(connection)
        except ssl.SSLError:
            raise
        except ConnectionError:  # a reset: how one hangs up on what one has not read
            return Greeting.REFUSED
        except OSError:  # nothing was said within the time
            return Greeting.NOBODY


def _exchange_prefaces(connection):
    """Begin HTTP/2; a server begins with a SETTINGS frame before it has read anything."""
    connection.sendall(CLIENT_PREFACE)
    header = b""
    while len(header) < FRAME_HEADER_BYTES:
        received = connection.recv(FRAME_HEADER_BYTES - len(header))
        if not received:
            break
        header += received
    if header[3:4] == bytes([FRAME_TYPE_SETTINGS]):
        return Greeting.HTTP2
    return Greeting.REFUSED

"""TLS and addresses: the flags and the credentials of both scripts; plaintext stays on one machine.

What can never work is told at start, by `check_arguments`; why a connection fails, by `explain`.
"""

import argparse
import contextlib
import ipaddress
import os
import re
import socket
import ssl
from pathlib import Path

import grpc

# The kinds of keys that gRPC can use, each as the certificate's AlgorithmIdentifier has it (DER;
# RFC 3279, 5480): no other part of a certificate holds these bytes. gRPC comes with BoringSSL,
# which offers no other kind, so a server with one listens and serves nobody.
USABLE_KEYS = {
    "RSA": "300d06092a864886f70d0101010500",
    "ECDSA on P-256": "301306072a8648ce3d020106082a8648ce3d030107",
    "ECDSA on P-384": "301006072a8648ce3d020106052b81040022",
}

# What is wrong with an own certificate, by OpenSSL's X509_V_ERR_* (SSLCertVerificationError has it
# as verify_code). {side} is server or client.
OWN_FAULTS = {
    9: "is not valid yet: is the clock of this machine right?",
    10: "or its CA has expired: make new ones, or set the clock of this machine",
    26: "is no {side}'s certificate (extendedKeyUsage lacks {side}Auth)",
}

# How gRPC begins what it says itself about a call; anything else is the server's own sentence.
SAID_BY_A_PROXY = "Received http2 header"  # an answer came, and not from the server
SAID_BY_GRPC = re.compile(
    "failed to connect|connections to all|errors resolving|DNS resolution|Deadline Exceeded|"
    "Stream removed|" + SAID_BY_A_PROXY
)
# What it says (grpcio 1.81 to 1.85), what that means, and whether trying again may help: not where
# somebody has to change flags or files, or a setting of a proxy, before this client can be served.
# The first row holds whose words are found; {found} is what is in parentheses there.
FAILURES = [
    (
        "unable to get local issuer|self.signed",
        "the certificate of {server} is not accepted: the CA in {ca} did not sign it, expected the "
        "ca.pem that was made with it (a proxy that opens TLS to look inside is refused like this)",
        False,
    ),
    (
        "certificate has expired",
        "the certificate of {server} or its CA has expired: it has to be renewed there, or the "
        "clock of this machine is wrong",
        True,
    ),
    (
        "certificate is not yet valid",
        "the certificate of {server} is not valid yet: is the clock of this machine right?",
        True,
    ),
    (
        "Hostname Verification",
        "the certificate of {server} is not accepted: it is of another host, expected the name or "
        "address in --server",
        False,
    ),
    (
        "VERIFY_FAILED: (.+?)(?:: OK)?$",
        "the certificate of {server} is not accepted: {found}",
        False,
    ),
    ("WRONG_VERSION_NUMBER", "{server} speaks plaintext, this client TLS", False),
    (
        "Failed to create security handshaker",
        "gRPC cannot use the files of --tls-ca, --tls-cert and --tls-key: expected PEM files, as "
        "./make_certs.sh makes them",
        False,
    ),
    (
        "response code 407",
        "the proxy wants a user and a password (HTTP status 407): set "
        "https_proxy=http://USER:PASSWORD@HOST:PORT",
        False,
    ),
    (
        r"response code (4\d\d)",
        "the proxy does not let this client connect to {server} (HTTP status {found}): ask its "
        "administrators to allow that address and port",
        False,
    ),
    (r"response code (\d+)", "the proxy finds no server there (HTTP status {found})", True),
    (
        "header with status: 413",
        "a proxy before {server} refuses uploads of this size (HTTP status 413): its "
        "administrators have to allow more than the size of the model (in nginx: "
        "client_max_body_size); what was trained is kept, start this client again then",
        False,
    ),
    (
        "header with status: 504",
        "a proxy before {server} does not wait for the answer (HTTP status 504): its "
        "administrators have to let it wait as long as a round takes (in nginx: grpc_read_timeout)",
        True,
    ),
    (
        r"header with status: (5\d\d|429)",
        "a proxy before {server} answers in its place (HTTP status {found}): is the server away?",
        True,
    ),
    (
        r"header with status: (\d+)",
        "a proxy before {server} refuses the call (HTTP status {found}): ask its administrators to "
        "let gRPC pass",
        False,
    ),
    (
        "Handshake read failed|before receiving SETTINGS",
        "who takes the connection there hangs up or says nothing: a server that starts or stops, "
        "or one that forwards to a server that is away",
        True,
    ),
    ("Stream removed", "the connection broke off: the server or the line went away", True),
    ("Failed parsing HTTP/2", "who answers there is no gRPC server: is the port right?", True),
    ("resolving|DNS", "its name is not known here", True),
    (
        r"handshaker shutdown|connect\(\) timed out|Deadline Exceeded",
        "nothing comes back from there: does a firewall drop it?",
        True,
    ),
    ("to remote host: (.+)", "no server answers there yet: {found}", True),
]
# A connection that is closed when HTTP/2 begins, after any TLS handshake. gRPC's server does that
# to who speaks plaintext to its TLS, and to a certificate that it does not accept; others do it
# where the server behind them is away.
CLOSED = "Socket closed|Connection reset|Broken pipe"
CLOSED_TO_PLAINTEXT = (
    "{server} hangs up: if it speaks TLS, this client plaintext, give --tls-ca, --tls-cert and "
    "--tls-key; else it is starting or stopping"
)
CLOSED_TO_NOBODY = (
    "{server} hangs up after the TLS handshake: it probably wants a certificate from this client, "
    "give --tls-cert and --tls-key"
)
CLOSED_TO_CERTIFICATE = (
    "{server} hangs up after the TLS handshake: it probably does not accept --tls-cert {own}, "
    "expected one made with the CA in the server's --tls-ca"
)
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in the order in which gRPC looks


class FilesNotReady(ValueError):
    """The files of the TLS flags cannot be used, as they are at this moment; the text says why.

    A start ends with it. But a client that runs treats it like a server that is away, and tries
    again: the files may just be being renewed.
    """


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


def check_arguments(parser, arguments, address, encrypted, name=None):
    """End the script, as wrong usage, where address and TLS flags do not work together.

    That is: plaintext that would leave this machine, files that TLS cannot use, or a certificate
    that the other end will not accept. `name` is the client's, None for the server.
    """
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
        read_files(arguments, name)
    except FilesNotReady as error:
        parser.error(str(error))


# --- addresses -----------------------------------------------------------------------------------


def address(text):
    """An argparse type: HOST:PORT as gRPC reads it.

    gRPC takes ::1:50051 for a host's name, and compares an IPv6 address with the one in a
    certificate as text: only the short form is found there.
    """
    host, _, port = text.rpartition(":")
    remedy = f"{text!r} is not HOST:PORT, as in localhost:50051 or [::1]:50051"
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise argparse.ArgumentTypeError(remedy)
    if ":" in host:
        try:
            expected = f"[{ipaddress.IPv6Address(host.strip('[]'))}]:{port}"
        except ValueError:
            raise argparse.ArgumentTypeError(remedy) from None
        if text != expected:
            raise argparse.ArgumentTypeError(f"write the address {text} as {expected}")
    return text


def is_this_machine(address):
    """Whether HOST:PORT stands for loopback addresses only; an unknown host does not."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    numbers = [socket_address[0].partition("%")[0] for *_, socket_address in found]
    return all(ipaddress.ip_address(number).is_loopback for number in numbers)


def check_free(listen):
    """Raises ValueError where a server listens already at HOST:PORT, on any address of the host.

    gRPC binds those addresses that are free and is content with one of them: of localhost's two,
    127.0.0.1 and ::1, each of two servers would serve half of the clients.
    """
    host, _, port = listen.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), port), timeout=1).close()
    except OSError:
        return
    raise ValueError(
        f"cannot listen on {listen}: is another server running there? Choose another --listen "
        "HOST:PORT"
    )


# --- credentials ---------------------------------------------------------------------------------


def server_credentials(arguments):
    """The files as gRPC takes them; None for plaintext. Raises FilesNotReady.

    With --tls-ca the server demands a certificate that this CA signed from every client.
    """
    if not arguments.tls_cert:
        return None
    ca, key, certificate = read_files(arguments, None)
    return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=bool(ca))


def channel(arguments, options):
    """A gRPC channel to --server, with these options. Raises FilesNotReady.

    The files are read each time, so that renewed ones count from the next connection on.
    """
    if not arguments.tls_ca:
        # Plaintext is for this machine or a trusted network, and must not leave it by a proxy.
        no_proxy = [*options, ("grpc.enable_http_proxy", 0)]
        return grpc.insecure_channel(arguments.server, no_proxy)
    credentials = grpc.ssl_channel_credentials(*read_files(arguments, arguments.name))
    return grpc.secure_channel(arguments.server, credentials, options)


def read_files(arguments, name):
    """The bytes of CA, key and certificate, None for a flag that was not given.

    `name` is the client's, which its certificate must have; None for the server.
    Raises FilesNotReady. gRPC must not see files that are wrong: it ends the process (SIGABRT) on
    an empty key, and takes an empty CA for all CAs of the system.
    """
    paths = (arguments.tls_ca, arguments.tls_key, arguments.tls_cert)
    try:
        contents = [path and path.read_bytes() for path in paths]
        if arguments.tls_ca:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(arguments.tls_ca)
        if arguments.tls_cert:
            check_own_certificate(arguments, name)
        if contents != [path and path.read_bytes() for path in paths]:
            raise FilesNotReady("the files of the --tls flags are being renewed at this moment")
    except OSError as error:  # ssl.SSLError is an OSError, too
        raise FilesNotReady(
            f"--tls-ca {arguments.tls_ca}, --tls-cert {arguments.tls_cert}, "
            f"--tls-key {arguments.tls_key}: {error.strerror or error}; "
            "expected PEM files, the key without a password and of that certificate"
        ) from None
    return contents


def check_own_certificate(arguments, name):
    """Raises FilesNotReady where the other end will not accept --tls-cert, OSError."""
    own = f"--tls-cert {arguments.tls_cert}"
    side = "server" if name is None else "client"
    try:
        other_end = show_to_oneself(arguments, of_server=name is None)
    except ssl.SSLCertVerificationError as error:
        fault = OWN_FAULTS.get(error.verify_code, error.verify_message).format(side=side)
        raise FilesNotReady(f"{own} {fault}") from None
    certificate = other_end.getpeercert(binary_form=True)
    if not any(bytes.fromhex(kind) in certificate for kind in USABLE_KEYS.values()):
        raise FilesNotReady(
            f"gRPC cannot use the key of {own}: expected one of {', '.join(USABLE_KEYS)} "
            "(./make_certs.sh makes ECDSA on P-256)"
        )
    names = names_in(other_end.getpeercert())
    if name not in (None, *names):
        raise FilesNotReady(
            f"{own} is of {', '.join(names) or 'nobody'}, expected one of --name {name}"
        )


def names_in(certificate):
    """By which names the server knows a client: the DNS names, else the common name.

    certificate  as ssl's getpeercert gives it
    """
    dns_names = [text for kind, text in certificate.get("subjectAltName", ()) if kind == "DNS"]
    subject = [pair for group in certificate["subject"] for pair in group]
    return dns_names or [text for kind, text in subject if kind == "commonName"]


def show_to_oneself(arguments, of_server):
    """Shake hands in memory, one side with --tls-cert, the other verifying as the other end will.

    Returns the side that has verified. Raises ssl.SSLCertVerificationError.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for context in (client, server):
        # An empty password: otherwise OpenSSL would ask for one on the terminal.
        context.load_cert_chain(arguments.tls_cert, arguments.tls_key, password="")
    verifier = client if of_server else server
    verifier.verify_mode = ssl.CERT_REQUIRED
    # The certificate itself is trusted: that --tls-ca signed it is not said anywhere. A server
    # gives the clients' CA there, a client the server's.
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    verifier.load_verify_locations(arguments.tls_cert)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_end = client.wrap_bio(to_client, to_server)
    server_end = server.wrap_bio(to_server, to_client, server_side=True)
    for end in 4 * [client_end, server_end]:  # more flights than any handshake has
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return client_end if of_server else server_end


# --- failures ------------------------------------------------------------------------------------


def explain(details, arguments):
    """Say why a call to --server failed: (one sentence, whether trying again may help).

    details    RpcError.details(), whatever the status code: what the server itself said, and what
               is not known here, is returned as it is, and True
    arguments  the client's
    """
    if not SAID_BY_GRPC.match(details):
        return details, True
    proxy = next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)
    behind = ""
    if proxy and arguments.tls_ca:
        behind = f" ({proxy} is set: the proxy may be what answers)"
    known = {"server": arguments.server, "ca": arguments.tls_ca, "own": arguments.tls_cert}
    closed_to = CLOSED_TO_CERTIFICATE if arguments.tls_cert else CLOSED_TO_NOBODY
    closed = (CLOSED, closed_to if arguments.tls_ca else CLOSED_TO_PLAINTEXT, True)
    for words, sentence, can_retry in [*FAILURES, closed]:
        match = re.search(words, details)
        if match:
            found = match[match.lastindex or 0]
            return sentence.format(found=found, **known) + behind, can_retry
    return details, True

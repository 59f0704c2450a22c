"""TLS and addresses: the flags and the credentials of both scripts, and plaintext only at home."""

import errno
import ipaddress
import re
import socket
import ssl
from pathlib import Path

# The kinds of keys that gRPC can use, each as the certificate's AlgorithmIdentifier has it (DER;
# RFC 3279, 5480): no other part of a certificate holds these bytes. gRPC comes with BoringSSL,
# which offers no other kind, so a server with one listens and serves nobody.
USABLE_KEYS = {
    "RSA": "300d06092a864886f70d0101010500",
    "ECDSA on P-256": "301306072a8648ce3d020106082a8648ce3d030107",
    "ECDSA on P-384": "301006072a8648ce3d020106052b81040022",
}

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
    if arguments.tls_cert and not has_usable_key(arguments.tls_cert):
        parser.error(
            f"gRPC cannot use the key of --tls-cert {arguments.tls_cert}: expected one of "
            f"{', '.join(USABLE_KEYS)} (./make_certs.sh makes ECDSA on P-256)"
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


def has_usable_key(certificate):
    """Whether gRPC can use the key of this certificate, the first one of a PEM file."""
    pem = re.search(
        r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", _text(certificate), re.S
    )
    der = ssl.PEM_cert_to_DER_cert(pem[0])
    return any(bytes.fromhex(kind) in der for kind in USABLE_KEYS.values())


def _text(path):
    return path.read_text(encoding="latin-1")  # a PEM file may have any comments


class NotReady(OSError):
    """Placeholder until the tls branch is merged."""


def explain(details, arguments):
    return details or "", True

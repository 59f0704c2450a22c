"""TLS and addresses: flags and credentials, plaintext only within this machine, and what gRPC says nothing of: a port that is
half taken, and why a handshake failed."""

import errno
import ipaddress
import socket
import ssl
import time
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # how an HTTP/2 client begins, with empty settings


def add_arguments(add, ca, cert):
    add("--tls-ca", type=Path, metavar="FILE", help=ca)
    add("--tls-cert", type=Path, metavar="FILE", help=cert)
    add("--tls-key", type=Path, metavar="FILE", help="the private key of --tls-cert")
    add(
        "--insecure",
        action="store_true",
        help="plaintext with other machines: who is on the way reads and changes all",
    )


def check_arguments(parser, arguments, address, encrypted):
    """Ends the script, as wrong usage: no HOST:PORT, files that TLS cannot use, or plaintext that would leave this machine."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"{address!r} is not HOST:PORT, as in localhost:50051")
    if (
        bool(arguments.tls_cert) != bool(arguments.tls_key)
        or (arguments.tls_cert or arguments.tls_ca)
        and not encrypted
    ):
        parser.error(
            "--tls-cert and --tls-key belong together; a server needs these two at least, a client --tls-ca"
        )
    if not (encrypted or arguments.insecure or is_this_machine(address)):
        parser.error(
            f"{address} is not (only) a loopback address, and plaintext stays within this machine: give --tls-ca, "
            "--tls-cert and --tls-key (./make_certs.sh makes them), or --insecure"
        )
    try:
        context(arguments)
    except OSError as error:  # ssl.SSLError is one, too
        parser.error(
            f"--tls-ca {arguments.tls_ca}, --tls-cert {arguments.tls_cert}, --tls-key {arguments.tls_key}: "
            f"{error.strerror or error}; expected PEM files, the key without a password and of that certificate"
        )


def is_this_machine(address):
    """Whether HOST:PORT stands for loopback addresses only."""
    try:
        found = socket.getaddrinfo(address.rpartition(":")[0].strip("[]") or "0.0.0.0", None)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(place[4][0].partition("%")[0]).is_loopback for place in found)


def is_taken(host, port):
    """Whether someone listens there on one of the host's addresses: gRPC would be content with another one."""
    try:
        places = (
            socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            if port != "0"
            else ()
        )
    except OSError:
        return False
    for family, *_, place in places:
        try:
            socket.create_server(place, family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
    return False


def credentials(arguments, of_server=False):
    """The files as gRPC wants them, None for plaintext. A server with a CA demands certificates that it signed."""
    import grpc  # not for --help

    ca, cert, key = (
        path and path.read_bytes()
        for path in (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    )
    if of_server:
        return cert and grpc.ssl_server_credentials(
            [(key, cert)], ca, require_client_auth=ca is not None
        )
    return ca and grpc.ssl_channel_credentials(ca, key, cert)


def channel(arguments, options):
    """To --server; the files are read anew, so that renewed ones count."""
    import grpc

    if secure := credentials(arguments):
        return grpc.secure_channel(arguments.server, secure, options)
    return grpc.insecure_channel(
        arguments.server, [*options, ("grpc.enable_http_proxy", 0)]
    )  # nor out through a proxy


def context(arguments, verify=True):
    """The same files in Python's own ssl."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_alpn_protocols(["h2"])
    made.check_hostname, made.verify_mode = verify, ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if arguments.tls_ca:
        made.load_verify_locations(arguments.tls_ca)
    if arguments.tls_cert:
        made.load_cert_chain(arguments.tls_cert, arguments.tls_key, password="")
    return made


def explain(arguments):
    """Why --server cannot be spoken to, and what to do; None where it is merely away."""
    server, own = arguments.server, arguments.tls_cert
    try:
        if not arguments.tls_ca:
            tls = (
                greets(server) is False
                and greets(server, context(arguments, verify=False)) is not None
            )
            return (
                f"{server} speaks TLS, this client plaintext: give --tls-ca, --tls-cert and --tls-key"
                if tls
                else None
            )
        for _ in range(
            2
        ):  # a server that hung up because it was being stopped is gone by the second time
            if greets(server, context(arguments)) is not False:
                return None
            time.sleep(0.5)
    except (
        ssl.SSLCertVerificationError
    ) as error:  # 18 to 21: X509_V_ERR_* of a chain that leads elsewhere
        why = (
            f"the CA in {arguments.tls_ca} did not sign it"
            if 18 <= error.verify_code <= 21
            else error.verify_message
        )
        return f"the certificate of {server} is not accepted: {why}"
    except ssl.SSLError:
        return (
            f"{server} speaks plaintext, this client TLS"
            if arguments.tls_ca and greets(server)
            else None
        )
    if not own:
        return f"{server} wants a certificate from this client: give --tls-cert and --tls-key"
    expired = (
        ssl.cert_time_to_seconds(ssl._ssl._test_decode_cert(str(own))["notAfter"]) < time.time()
    )
    return f"{server} does not accept {own}: " + (
        "it has expired" if expired else "the server's --tls-ca did not sign it"
    )


def greets(server, context=None):
    """Whether the server begins with HTTP/2 (with a context: behind a TLS handshake) or hangs up; None where nobody is."""
    host, _, port = server.rpartition(":")
    host, greeting = host.strip("[]"), None
    try:
        with socket.create_connection((host, port), timeout=2) as plain:
            connection = context.wrap_socket(plain, server_hostname=host) if context else plain
            greeting = b""
            connection.sendall(PREFACE)
            while len(greeting) < 4 and (piece := connection.recv(9)):
                greeting += piece
    except ssl.SSLError:
        raise
    except OSError as error:  # a reset is how one hangs up on what one has not read
        return None if greeting is None or not isinstance(error, ConnectionError) else False
    return greeting[3:4] == b"\4"  # a SETTINGS frame

"""Why a client cannot speak to its server: what gRPC does not say.

To gRPC every failed connection is UNAVAILABLE. So the client connects once more, with Python's own
sockets and ssl, on the way that gRPC takes (through the proxy, where there is one), and looks.
"""

import base64
import enum
import os
import socket
import ssl
import time
from urllib.parse import unquote, urlsplit

from federation import tls

# How an HTTP/2 client begins: the fixed text, and an empty SETTINGS frame (RFC 9113, section 3.4).
CLIENT_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
FRAME_HEADER_BYTES = 9
FRAME_TYPE_SETTINGS = 4  # the type is the fourth byte of a frame's header

STEP_S = 2  # for each step: connect, the proxy's answer, the handshake, the greeting
PROXY_ANSWER_BYTES = 16_384
DEFAULT_PROXY_PORT = 443  # gRPC's own

# OpenSSL's X509_V_ERR_*, as SSLCertVerificationError.verify_code has them
NOT_YET_VALID = 9
HAS_EXPIRED = 10
UNKNOWN_CA = range(18, 22)  # the chain is self-signed, or leads to a CA that is not the given one
WRONG_PURPOSE = 26


class Greeting(enum.Enum):
    """What the other end does when a client begins to speak HTTP/2."""

    HTTP2 = "it answers with HTTP/2"
    REFUSED = "it hangs up, or says something else"
    SILENT = "it takes the connection and says nothing"


class Away(Exception):
    """Nobody is there who could speak: trying again may help. The text is the reason."""


def explain(arguments):
    """Say why --server cannot be spoken to.

    Returns a reason to wait and to try again; None where the server answers here, but not to gRPC.
    Raises ValueError, with one sentence, where trying again does not help.
    """
    try:
        if arguments.tls_ca:
            return _explain_encrypted(arguments)
        return _explain_plaintext(arguments)
    except Away as reason:
        return str(reason)


def _explain_plaintext(arguments):
    server = arguments.server
    greeting = greet(server)
    if greeting is not Greeting.REFUSED:
        return _reason(greeting)
    try:
        greet(server, tls.ssl_context(arguments, verify=False))
    except ssl.SSLError:
        return _reason(greeting)
    raise ValueError(
        f"{server} speaks TLS, this client plaintext: give --tls-ca, --tls-cert and --tls-key"
    )


def _explain_encrypted(arguments):
    server = arguments.server
    proxy = proxy_of(server)
    try:
        # A server that hung up because it was being stopped is gone at the second attempt.
        for _ in range(2):
            greeting = greet(server, tls.ssl_context(arguments), proxy)
            if greeting is not Greeting.REFUSED:
                return _reason(greeting)
            time.sleep(0.5)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(_why_not_accepted(arguments, proxy, error)) from None
    except ssl.SSLError as error:
        if greet(server, proxy=proxy) is Greeting.HTTP2:
            raise ValueError(f"{server} speaks plaintext, this client TLS") from None
        return f"the TLS handshake fails: {error.reason or error}"
    raise ValueError(_why_hung_up(arguments))


def _reason(greeting):
    """The reason to wait that a greeting gives, None where it gives none."""
    return None if greeting is Greeting.HTTP2 else f"at that port {greeting.value}"


# --- the way to the server -----------------------------------------------------------------------


def proxy_of(server):
    """The proxy through which gRPC connects to HOST:PORT, as urllib's SplitResult; None for none.

    gRPC takes the first of these variables that is set, speaks http:// to the proxy, and compares
    the ends of host names (gRPC's doc/environment_variables.md).
    """
    url = _first_set("grpc_proxy", "https_proxy", "http_proxy")
    if not url.startswith("http://"):  # gRPC passes over anything else, and connects directly
        return None
    host = _split(server)[0].lower()
    excepted = _first_set("no_grpc_proxy", "no_proxy").lower().split(",")
    if any(name.strip() and host.endswith(name.strip()) for name in excepted):
        return None
    proxy = urlsplit(url)
    return proxy if proxy.hostname else None


def _first_set(*variables):
    # to gRPC, a variable that is set to nothing is set
    return next((os.environ[name] for name in variables if name in os.environ), "")


def connect(server, proxy=None):
    """A socket on which HOST:PORT is heard, also through a proxy. Raises Away, ValueError."""
    host, port = _split(server)
    if proxy is None:
        try:
            return socket.create_connection((host, port), timeout=STEP_S)
        except socket.gaierror as error:
            raise Away(f"its name is not known here: {error.strerror}") from None
        except OSError:
            raise Away("no server answers there yet") from None
    named = f"the proxy {proxy.hostname}:{proxy.port or DEFAULT_PROXY_PORT} (https_proxy)"
    try:
        connection = socket.create_connection(
            (proxy.hostname, proxy.port or DEFAULT_PROXY_PORT), timeout=STEP_S
        )
    except OSError as error:
        raise Away(f"{named} does not answer: {error.strerror or error}") from None
    try:
        _ask_proxy(connection, server, proxy, named)
    except BaseException:
        connection.close()
        raise
    return connection


def _ask_proxy(connection, server, proxy, named):
    """Have the proxy open a tunnel (RFC 9110, section 9.3.6). Raises Away, ValueError."""
    request = f"CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n"
    if proxy.username:
        user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        request += f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n"
    answer = b""
    try:
        connection.sendall(request.encode() + b"\r\n")
        # Byte by byte, because what comes behind the empty line is the server's already.
        while not answer.endswith(b"\r\n\r\n") and len(answer) < PROXY_ANSWER_BYTES:
            received = connection.recv(1)
            if not received:
                break
            answer += received
    except OSError as error:
        raise Away(f"{named} does not answer: {error.strerror or error}") from None
    status = answer.split(b"\r\n")[0].decode("latin-1").split(" ", 1)[-1].strip()
    code = status[:3]
    if code.startswith("2"):
        return
    if code == "407":
        raise ValueError(
            f"{named} wants a user and a password ({status}): "
            "set https_proxy=http://USER:PASSWORD@HOST:PORT"
        )
    if code.startswith("4"):
        raise ValueError(
            f"{named} does not let this client connect to {server} ({status}): "
            "ask its administrators to allow that address and port"
        )
    raise Away(f"{named} finds no server there ({status or 'it hung up'})")


def greet(server, context=None, proxy=None):
    """Connect to HOST:PORT, begin HTTP/2 there, and return the Greeting.

    context  an ssl.SSLContext, to greet behind a TLS handshake; ssl.SSLError where that fails
    proxy    from `proxy_of`
    Raises Away where nobody is there, ValueError where the proxy refuses.
    """
    connection = connect(server, proxy)
    try:
        if context:
            connection = context.wrap_socket(connection, server_hostname=_split(server)[0])
    except ssl.SSLError:
        raise
    except OSError as error:
        connection.close()
        raise Away(f"no TLS handshake there: {error.strerror or error}") from None
    with connection:
        try:
            return _exchange_prefaces(connection)
        except ssl.SSLError:
            raise
        except ConnectionError:  # a reset: how one hangs up on what one has not read
            return Greeting.REFUSED
        except OSError:
            return Greeting.SILENT


def _exchange_prefaces(connection):
    """Begin HTTP/2; a server begins with a SETTINGS frame, before it has read anything."""
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


def _split(server):
    """(host, port) of HOST:PORT, without the brackets of an IPv6 address."""
    host, _, port = server.rpartition(":")
    return host.strip("[]"), port


# --- certificates --------------------------------------------------------------------------------


def _why_not_accepted(arguments, proxy, error):
    """The sentence for a server's certificate that this client does not accept."""
    reason = _fault_of(error)
    if error.verify_code in UNKNOWN_CA:
        reason = f"the CA in {arguments.tls_ca} did not sign it"
        if proxy is not None:
            reason += (
                f"; the proxy {proxy.hostname} may open TLS to look inside: "
                f"ask its administrators to leave {arguments.server} closed"
            )
    return f"the certificate of {arguments.server} is not accepted: {reason}"


def _why_hung_up(arguments):
    """The sentence for a server that is accepted, and hangs up on this client's certificate.

    A server of gRPC does not say why, so this client's own certificate is looked at.
    """
    server, certificate = arguments.server, arguments.tls_cert
    if not certificate:
        return f"{server} wants a certificate from this client: give --tls-cert and --tls-key"
    reason = own_certificate_fault(arguments)
    if reason is None:
        reason = (
            f"nothing is wrong with it here; the server's --tls-ca may be another CA than "
            f"{arguments.tls_ca}, or the server's clock wrong"
        )
    return f"{server} does not accept {certificate}: {reason}"


def check_server_certificate(arguments):
    """Raise ValueError where no client will accept --tls-cert: such a server serves nobody."""
    if not arguments.tls_cert:
        return
    fault = own_certificate_fault(arguments, of_server=True)
    if fault:
        raise ValueError(f"no client will accept --tls-cert {arguments.tls_cert}: {fault}")


def own_certificate_fault(arguments, of_server=False):
    """What the other end will find wrong with --tls-cert, as text; None where nothing is.

    OpenSSL finds it: two contexts shake hands in memory, one of which verifies as the other end
    will. First it trusts the certificate itself, so that a wrong date or purpose is told before
    the CA; then it trusts --tls-ca.
    """
    for trusted in (arguments.tls_cert, arguments.tls_ca):
        if trusted is None:
            continue
        try:
            _verify_in_memory(arguments.tls_cert, arguments.tls_key, trusted, of_server)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == WRONG_PURPOSE:
                side = "server" if of_server else "client"
                return f"it is no {side}'s certificate (extendedKeyUsage lacks {side}Auth)"
            if error.verify_code not in UNKNOWN_CA:
                return _fault_of(error)
            if not of_server:  # a server's --tls-ca is the clients' CA, and need not be its own
                return (
                    f"the CA in {arguments.tls_ca} did not sign it, and the server's --tls-ca "
                    "probably neither: take the certificate that was made with that CA"
                )
    return None


def _verify_in_memory(certificate, key, trusted, of_server):
    """Shake hands with oneself, verifying the server's side or the client's.

    Raises ssl.SSLCertVerificationError.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for context in (client, server):
        context.load_cert_chain(certificate, key, password="")
    verifier = client if of_server else server
    verifier.verify_mode = ssl.CERT_REQUIRED
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # `trusted` need not be a CA
    verifier.load_verify_locations(trusted)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):  # more flights than any handshake has
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass


def _fault_of(error):
    """An SSLCertVerificationError in plain words, with what to do."""
    if error.verify_code == NOT_YET_VALID:
        return "it is not valid yet: is the clock of this machine right?"
    if error.verify_code == HAS_EXPIRED:
        return "it has expired: make a new one, or set the clock of this machine"
    if error.verify_code == WRONG_PURPOSE:
        return "it is no server's certificate (extendedKeyUsage lacks serverAuth)"
    return error.verify_message

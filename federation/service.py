"""The gRPC side of the server: its port, who calls, what a call brings, and how it is answered.

The two calls themselves, step by step, are `todoServer.FedMLServicer`; what counts is decided in
`federation.rounds`.
"""

import functools
import itertools
import threading
import time
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from common import files
from federation import streams, tls, weights
from federation.rounds import Refused
from federation.streams import Stream, Streams
from generated import todo_pb2, todo_pb2_grpc

# A peer that has not said who it is, and has fetched nothing, may hold a thread for so long.
FIRST_MESSAGE_S = 1
# A connection without a call is closed after this; the thesis demo's client keeps its own while it
# trains.
IDLE_S = 3600
MESSAGE_BYTES = 2 << 20  # of one message
METADATA_BYTES = 8 << 10  # of one call
CALLS_PER_CONNECTION = 16
REMEMBERED_CONNECTIONS = 1000
SENTENCE_CHARACTERS = 2000  # of a refusal; gRPC drops a longer answer, its status code included


def create_server(servicer, listen, credentials=None):
    """A started gRPC server with this FedMLServicer, and the HOST:PORT that it is bound to.

    listen       HOST:PORT; port 0 takes a free one
    credentials  from tls.server_credentials; None is plaintext
    Raises ValueError where it cannot listen there.
    """
    calls = servicer.calls
    server = grpc.server(
        futures.ThreadPoolExecutor(calls.max_threads),
        interceptors=[CallInterceptor(calls)],
        options=[
            # Without this a second server would share the port, and neither would say so.
            ("grpc.so_reuseport", 0),
            ("grpc.http2.bdp_probe", 0),
            # Otherwise each connection that once was fast, or waits for its turn, keeps 1 MB.
            ("grpc.http2.lookahead_bytes", 1024),
            ("grpc.experimental.tcp_max_read_buffer_size", 8192),
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES),
            ("grpc.max_connection_idle_ms", IDLE_S * 1000),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 4000),
        ],
    )
    todo_pb2_grpc.add_FedMLServicer_to_server(servicer, server)
    address = bind(server, listen, credentials)
    server.start()
    threading.Thread(target=calls.streams.run_watchdog, daemon=True).start()
    return server, address


def bind(server, listen, credentials):
    """Bind the server; returns HOST:PORT with the number of its port. Raises ValueError."""
    host, _, port = listen.rpartition(":")
    bound = 0
    # gRPC is content when one of the host's addresses is free: look at all of them first.
    if not tls.is_taken(host, port):
        try:
            if credentials:
                bound = server.add_secure_port(listen, credentials)
            else:
                bound = server.add_insecure_port(listen)
        except RuntimeError:
            pass  # what gRPC raises where it cannot bind, and only "0" in older versions
    if not bound:
        raise ValueError(
            f"cannot listen on {listen}: is another server running there? "
            "Choose another --listen HOST:PORT"
        )
    return f"{host}:{bound}"


class CallInterceptor(grpc.ServerInterceptor):
    """What gRPC does differently for every call of the servicer, whatever rpcs todo.proto has.

    - A `Refused` that a method raises is the caller's gRPC status.
    - A call with one request and a streamed answer (getWeight) is served as a stream, and its
      method gets an empty request at once. By itself gRPC holds a thread until the request has
      arrived: who opens such calls and says nothing would hold all threads. The request is never
      read, so it must be one that says nothing, as `void` is.
    """

    def __init__(self, calls):
        self.calls = calls

    def intercept_service(self, continuation, handler_call_details):
        handler = continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        parser = handler.request_deserializer
        serializer = handler.response_serializer
        if handler.unary_stream:
            request = parser(b"")
            method = self.streaming(handler.unary_stream, request)
            return grpc.stream_stream_rpc_method_handler(method, parser, serializer)
        if handler.stream_stream:
            method = self.streaming(handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(method, parser, serializer)
        if handler.stream_unary:
            method = self.answering(handler.stream_unary)
            return grpc.stream_unary_rpc_method_handler(method, parser, serializer)
        method = self.answering(handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(method, parser, serializer)

    def streaming(self, method, empty_request=None):
        """The method, of a streamed answer; with `empty_request` in place of what is sent."""

        @functools.wraps(method)
        def serve(requests, context):
            if empty_request is not None:
                requests = empty_request
            with self.calls.refusals(context):
                yield from method(requests, context)

        return serve

    def answering(self, method):
        """The method, of one answer."""

        @functools.wraps(method)
        def serve(request_or_requests, context):
            with self.calls.refusals(context):
                return method(request_or_requests, context)

        return serve


@dataclass(frozen=True)
class Caller:
    """Who calls, as far as its metadata and its certificate say it."""

    client: str | None  # one of this run's clients; None: a peer that names nobody
    metadata: dict
    connection: str

    @property
    def is_new(self):
        """Whether it knows our metadata: a client of this project, not one of 2020."""
        return "fedml-client" in self.metadata


@dataclass(frozen=True)
class Upload:
    """An upload whose first message has arrived."""

    client: str
    num_examples: int
    messages: object  # an iterator over all of them, the first included
    run: str | None  # as a new peer names it
    round_number: int | None  # named, or last fetched on the same connection; None: unknown
    announced_sha256: str | None


class Calls:
    """What all calls of one server share: its limits, who is here, and what is moving."""

    def __init__(self, rounds, max_examples, serve_unnamed):
        self.rounds = rounds
        self.max_examples = max_examples
        self.serve_unnamed = serve_unnamed
        self.say = rounds.say
        self.streams = Streams(rounds.say)
        self.check = weights.Checker(weights.shapes_of(rounds.weights_path))
        self.max_bytes = int(1.1 * rounds.weights_path.stat().st_size)
        self.lock = threading.Lock()
        # What the thesis demo's clients last fetched: connection -> round, the oldest first.
        self.fetched = {}
        # Peers that name nobody get few threads, and of their own: who takes all of them delays no
        # one who is enrolled.
        self.max_unnamed = len(rounds.clients) + 1
        self.unnamed = threading.Semaphore(self.max_unnamed)

    @property
    def max_threads(self):
        """For each client a call that waits and one that takes over, for downloads, for unnamed."""
        return 2 * len(self.rounds.clients) + 4 + self.max_unnamed

    @contextmanager
    def refusals(self, context):
        """Tell the caller and the log what the body raises."""
        try:
            yield
        except Refused as error:
            self.refuse(context, error.code, error.sentence)
        except OSError as error:
            sentence = f"the server could not read or store a file: {error}; try again"
            self.refuse(context, "INTERNAL", sentence)

    def refuse(self, context, code, sentence):
        if len(sentence) > SENTENCE_CHARACTERS:
            sentence = sentence[:SENTENCE_CHARACTERS] + " ..."
        if not self.rounds.over:  # a server that stops says the same to everyone
            self.say(f"refused: {sentence} ({code})")
        context.abort(grpc.StatusCode[code], sentence)

    # --- who calls -------------------------------------------------------------------------------

    def identify(self, context):
        """The Caller: one of this run's clients, or where they are served a peer without a name.

        A client is named by its metadata or its certificate, by both only if they say the same.
        Raises Refused.
        """
        metadata = dict(context.invocation_metadata())
        name = metadata.get("fedml-client")
        certified = certified_names(context)
        if certified is not None:
            if name is None:
                own = [each for each in certified if each in self.rounds.clients]
                name = [*own, *certified, ""][0]
            if name not in certified:
                raise Refused(
                    "PERMISSION_DENIED",
                    f"{name[:80]!r} came with the certificate of {', '.join(certified)[:200]}, "
                    "expected one in its own name",
                )
        if name is not None:
            self.check_enrolled(name)
        elif not self.serve_unnamed:
            raise Refused(
                "UNAUTHENTICATED",
                "a peer that names nobody is served only on the server's own machine, with "
                "--insecure, or by its certificate (--tls-ca)",
            )
        return Caller(name, metadata, context.peer())

    def check_enrolled(self, client):
        if client not in self.rounds.clients:
            raise Refused(
                "PERMISSION_DENIED",
                f"client {client[:80]!r} is not one of this run's: expected "
                f"{', '.join(self.rounds.clients)} (--clients)",
            )
        self.rounds.last_seen[client] = time.monotonic()

    @contextmanager
    def thread_for(self, caller):
        """The body runs in one of the few threads for peers without a name, where it is one."""
        if caller.client is not None:
            yield
            return
        if not self.unnamed.acquire(blocking=False):
            raise Refused(
                "RESOURCE_EXHAUSTED",
                f"{self.max_unnamed} peers that name nobody are here already: try again later",
            )
        try:
            yield
        finally:
            self.unnamed.release()

    # --- getWeight -------------------------------------------------------------------------------

    def send_weights(self, caller, context):
        """The messages of a download: the weights of the open round, once one is open."""
        with self.thread_for(caller):
            round_number, sha256, file = self.rounds.fetch(caller.client)
            with file, Stream(self.streams, context, streams.STALL_S) as stream:
                if caller.is_new:
                    self.announce(caller, round_number, sha256, context)
                else:
                    self.remember_fetch(caller, round_number)
                messages = weights.base64_messages(file)
                if caller.metadata.get("fedml-accept") == "blob":
                    messages = weights.blob_messages(file)
                yield from stream.pass_on(messages, in_turns=caller.client is not None)

    def announce(self, caller, round_number, sha256, context):
        """Tell a new peer, before the weights, what they are and what to train with them."""
        what = f"weights of round {round_number}"
        if self.rounds.done:
            what = "result"
        self.say(f"{caller.client} fetches the {what}")
        state = self.rounds.state
        context.send_initial_metadata(
            (
                ("fedml-run", state.run),
                ("fedml-round", str(round_number)),
                ("fedml-rounds", str(state.rounds)),
                ("fedml-sha256", sha256),
                ("fedml-arch", state.arch),
                ("fedml-image-size", str(state.image_size)),
            )
        )

    def remember_fetch(self, caller, round_number):
        """A client of 2020 names no round: its upload is for what its connection last fetched."""
        with self.lock:
            self.fetched.pop(caller.connection, None)  # so that it is the newest again
            self.fetched[caller.connection] = round_number
            if len(self.fetched) > REMEMBERED_CONNECTIONS:
                oldest = next(iter(self.fetched))
                del self.fetched[oldest]

    # --- sendWeight ------------------------------------------------------------------------------

    def begin_upload(self, caller, request_iterator, context):
        """The Upload, of which only the first message was read; nothing is stored yet.

        Raises Refused, also for one that cannot count any more.
        """
        run, round_number = named_round(caller.metadata)
        if run is None:
            round_number = self.fetched.get(caller.connection)
        with self.thread_for(caller):
            first = self.first_message(caller, request_iterator, context)
        try:
            client = weights.client_of(first.clientname)
        except ValueError as error:
            raise Refused("INVALID_ARGUMENT", str(error)) from None
        self.check_enrolled(client)
        if caller.client not in (None, client):
            raise Refused(
                "PERMISSION_DENIED", f"{caller.client} sent weights in the name of {client}"
            )
        if not 1 <= first.clientsize <= self.max_examples:
            raise Refused(
                "INVALID_ARGUMENT",
                f"{client} says it has {first.clientsize} examples, expected 1 to "
                f"{self.max_examples} (--max-examples)",
            )
        announced_sha256 = caller.metadata.get("fedml-sha256")
        self.rounds.admit(client, run, round_number, announced_sha256)
        return Upload(
            client,
            first.clientsize,
            itertools.chain([first], request_iterator),
            run,
            round_number,
            announced_sha256,
        )

    def first_message(self, caller, request_iterator, context):
        """Wait for the first message, which names the client. Raises Refused."""
        limit_s = streams.STALL_S
        if caller.client is None and caller.connection not in self.fetched:
            limit_s = FIRST_MESSAGE_S
        who = caller.client or caller.connection
        with Stream(self.streams, context, limit_s, caller.client):
            try:
                first = next(request_iterator, None)
            except grpc.RpcError:
                raise Refused("CANCELLED", f"{who} went away before it sent anything") from None
        if first is None:
            raise Refused("INVALID_ARGUMENT", f"{who} sent an empty stream, expected weights")
        return first

    @contextmanager
    def received(self, upload, context):
        """Receive an upload into a temporary file and check it: (path, SHA-256) for the body.

        The file is gone after the body, unless that has put it somewhere. Raises Refused.
        """
        path = files.temporary(self.rounds.upload_path(upload.client))
        try:
            sha256 = self.receive(upload, path, context)
            # A client that goes away wakes the call that waits for its round.
            context.add_callback(self.rounds.wake)
            yield path, sha256
        finally:
            path.unlink(missing_ok=True)

    def receive(self, upload, path, context):
        """Write the upload to `path` as it arrives, and check it; returns its SHA-256."""
        client = upload.client
        try:
            with Stream(self.streams, context, streams.STALL_S, client) as stream:
                sha256 = weights.spool(stream.pass_on(upload.messages), path, self.max_bytes)
            announced = upload.announced_sha256
            if announced not in (None, sha256):
                raise ValueError(
                    f"what arrived has SHA-256 {sha256[:16]}..., announced was {announced[:16]}..."
                )
            self.check(path)
            return sha256
        except Exception as error:
            # Whatever a broken connection led to, it is not a fault of the file.
            if isinstance(error, grpc.RpcError) or not context.is_active():
                sentence = f"{client} went away in the middle of its upload"
                raise Refused("CANCELLED", sentence) from None
            if isinstance(error, ValueError):
                raise Refused("INVALID_ARGUMENT", f"{client}: {error}") from None
            if isinstance(error, OSError):
                sentence = f"{client}: the server could not store the upload: {error}; send again"
                raise Refused("INTERNAL", sentence) from None
            raise

    def answer(self, context, is_last):
        """The answer to a counted upload whose round is merged, evaluated and on disk."""
        trailing_metadata = [("fedml-round", str(self.rounds.round))]
        if is_last:
            trailing_metadata.append(("fedml-done", "1"))
        context.set_trailing_metadata(trailing_metadata)
        return todo_pb2.myResponse(value=1)


def certified_names(context):
    """The names in the caller's certificate: its SAN's DNS names, else its CN; None without one.

    gRPC has verified it against --tls-ca before the call comes here.
    """
    properties = context.auth_context()
    if "x509_pem_cert" not in properties:
        return None
    names = properties.get("peer_dns") or properties.get("x509_common_name", [])
    return [name.decode("utf-8", "replace") for name in names]


def named_round(metadata):
    """(run, round number) that a new peer names in its metadata; (None, None) of an old one."""
    run = metadata.get("fedml-run")
    if run is None:
        return None, None
    text = metadata.get("fedml-round", "")
    if not text.isdecimal() or len(text) > 9:
        raise Refused(
            "INVALID_ARGUMENT",
            f"metadata fedml-round is {text[:20]!r}, expected a number beside fedml-run",
        )
    return run, int(text)

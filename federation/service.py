"""The gRPC side of the server: its port, who calls, what a call brings, and how it is answered.

The two calls themselves, step by step, are `todoServer.FedMLServicer`; what counts is decided in
`federation.rounds`.
"""

import contextlib
import ctypes
import functools
import itertools
import resource
import socket
import threading
import time
from concurrent import futures
from dataclasses import dataclass

import grpc

from common import files
from federation import convert, progress, streams, tls, weights
from federation.rounds import Refused
from federation.streams import Stream, Streams
from generated import todo_pb2, todo_pb2_grpc

# A peer that has not said who it is, and has fetched nothing, may hold a thread for so long.
FIRST_MESSAGE_S = 1
# Who connects and then says nothing is sent away after this.
HANDSHAKE_S = 5
# A connection without a call is closed after this. Where peers of the thesis demo are served it
# must be longer: they keep their connection while they train, and their upload is for the round
# that they fetched on it.
IDLE_S = 60
IDLE_WITH_SEED_PEERS_S = 3600
# Connections leave so many descriptors for files, and for what the libraries open.
SPARE_DESCRIPTORS = 64
DESCRIPTORS_PER_CLIENT = 4  # a download, two uploads, and its upload in the merge
MESSAGE_BYTES = 2 << 20  # of one message
METADATA_BYTES = 8 << 10  # of one call
CALLS_PER_CONNECTION = 16
REMEMBERED_CONNECTIONS = 1000
M_ARENA_MAX = -8  # of glibc's malloc.h: how many heaps
SEED_ARCH = "vgg16"  # the thesis demo's network; its peers know no other
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
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES),
            # Descriptors for connections are limited; these three get them back.
            ("grpc.max_allowed_incoming_connections", max_connections(calls, listen)),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
            ("grpc.max_connection_idle_ms", calls.idle_s * 1000),
            # A client that waits or trains sends pings; gRPC would hang up on it by itself.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 4000),
        ],
    )
    todo_pb2_grpc.add_FedMLServicer_to_server(servicer, server)
    address = bind(server, listen, credentials)
    server.start()
    threading.Thread(target=calls.streams.run_watchdog, daemon=True).start()
    return server, address


def raise_descriptor_limit():
    """Allow this process as many open files as the system lets it have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_one_heap():
    """Let glibc serve all threads from one heap.

    By itself it makes a heap for every few threads, and messages of 1 MiB leave holes in all of
    them: with 48 clients of 10 MB the server took 289 MB on an idle machine and 382 MB on a busy
    one, with one heap 261 and 250 MB. Other C libraries have no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def max_connections(calls, listen):
    """How many connections leave enough descriptors for the server itself.

    gRPC closes those above it at once. It counts for each address that it listens on.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    needed = SPARE_DESCRIPTORS + DESCRIPTORS_PER_CLIENT * len(calls.rounds.clients)
    at_least = 2 * len(calls.rounds.clients)  # or no round could be closed at all
    return max(at_least, (limit - needed) // count_addresses(listen))


def count_addresses(listen):
    """How many addresses gRPC may listen on for HOST:PORT, at least 2.

    It takes localhost as 127.0.0.1 and ::1, whatever the system's own tables say.
    """
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return max(2, len(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))
    except OSError:
        return 2  # binding it says what is wrong


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
    metrics: dict  # what the client measured, {} where it says nothing


class Calls:
    """What all calls of one server share: its limits, who is here, and what is moving."""

    def __init__(self, rounds, max_examples, serve_unnamed, card_text, preprocessing):
        self.rounds = rounds
        self.card_text = card_text
        self.preprocessing = preprocessing
        self.max_examples = max_examples
        self.serve_unnamed = serve_unnamed
        self.say = rounds.say
        self.streams = Streams(rounds.say)
        self.layout = weights.Layout(rounds.weights_path)
        self.converters = convert.Converters(self.layout)
        self.max_bytes = int(1.1 * self.layout.size)
        self.lock = threading.Lock()
        # What the thesis demo's clients last fetched: connection -> round, the oldest first.
        self.fetched = {}
        # Peers that name nobody get few threads, and of their own: who takes all of them delays no
        # one who is enrolled.
        self.max_unnamed = len(rounds.clients) + 1
        self.unnamed = threading.Semaphore(self.max_unnamed)

    @property
    def idle_s(self):
        return IDLE_WITH_SEED_PEERS_S if self.serve_unnamed else IDLE_S

    @property
    def max_threads(self):
        """Enough for all calls that can hold one, and four for those that are just ending.

        A client holds three at most: a download, an upload, and a complete upload that waits.
        """
        known = len(self.rounds.clients) + len(self.rounds.state.left)
        return 3 * known + self.max_unnamed + 4

    @contextlib.contextmanager
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
                own = [each for each in certified if self.takes_part(each)]
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

    def takes_part(self, client):
        """Whether it does, or did: who has left may still ask for its last answer."""
        return client in self.rounds.clients or client in self.rounds.state.left

    def check_enrolled(self, client):
        if not self.takes_part(client):
            raise Refused(
                "PERMISSION_DENIED",
                f"client {client[:80]!r} is not one of this run's: expected "
                f"{', '.join(self.rounds.clients)} (--clients)",
            )
        self.rounds.last_seen[client] = time.monotonic()

    @contextlib.contextmanager
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
        if caller.is_new and "fedml-progress" in caller.metadata:
            self.take_progress(caller, context)
            return
        with (
            self.thread_for(caller),
            Stream(self.streams, context, "download", caller.client) as stream,
        ):
            # A client that goes away wakes its call, where that waits for a merge.
            context.add_callback(self.rounds.wake)
            round_number, sha256, file = self.rounds.fetch(caller.client, context.is_active)
            with file:
                self.log_fetch(caller, round_number)
                if caller.is_new:
                    self.announce(round_number, sha256, context)
                else:
                    self.remember_fetch(caller, round_number)
                messages = weights.base64_messages(file)
                if caller.metadata.get("fedml-accept") == "blob":
                    messages = weights.blob_messages(file)
                for message in stream.pass_on(messages, self.max_bytes):
                    yield message
                    self.rounds.note_progress()
            if caller.is_new and round_number > self.rounds.state.rounds:
                if not self.rounds.will_score_result(caller.client):
                    self.rounds.leave(caller.client)

    def log_fetch(self, caller, round_number):
        who = caller.client or f"a peer without a name ({caller.connection})"
        what = f"weights of round {round_number}"
        if self.rounds.done:
            what = "result"
        self.say(f"{who} fetches the {what}")
        arch = self.rounds.state.arch
        if not caller.is_new and arch != SEED_ARCH:
            self.say(
                f"warning: {who} names no round, as a peer of 2020 does; such a peer can load the "
                f"weights of --arch {SEED_ARCH} only, and this run's are {arch}"
            )

    def take_progress(self, caller, context):
        """Note where a client is, and what it measured of the result; tell it the open round.

        That is a call of getWeight without weights: it waits for nothing and ends no other call.
        """
        client = caller.client
        self.rounds.check_has_not_left(client)
        told, problems = progress.parse_progress(caller.metadata["fedml-progress"])
        self.rounds.note_heard(client, told)
        metrics_text = caller.metadata.get("fedml-metrics")
        if metrics_text is not None:
            metrics, more_problems = progress.parse_metrics(metrics_text)
            problems += more_problems
            if self.rounds.done and caller.metadata.get("fedml-run") == self.rounds.state.run:
                self.rounds.note_result_scores(client, metrics)
        self.say_problems(client, problems)
        state = self.rounds.state
        context.send_initial_metadata([("fedml-run", state.run), ("fedml-round", str(state.round))])

    def metrics_of(self, client, caller):
        """What a client measured before this upload (dict); {} where it says nothing."""
        text = caller.metadata.get("fedml-metrics")
        if text is None:
            return {}
        metrics, problems = progress.parse_metrics(text)
        self.say_problems(client, problems)
        return metrics

    def say_problems(self, client, problems):
        for problem in problems[:3]:
            self.say(f"{client} says what is left out here: {problem}")

    def announce(self, round_number, sha256, context):
        """Tell a new peer, before the weights, what they are and what to train with them."""
        state = self.rounds.state
        initial_metadata = [
            ("fedml-run", state.run),
            ("fedml-round", str(round_number)),
            ("fedml-rounds", str(state.rounds)),
            ("fedml-sha256", sha256),
            ("fedml-arch", state.arch),
            ("fedml-image-size", str(state.image_size)),
            ("fedml-progress", "1"),
        ]
        if state.freezes_base:
            initial_metadata.append(("fedml-freeze-base", "1"))
        if self.preprocessing:
            initial_metadata.append(("fedml-preprocessing", self.preprocessing))
        if self.rounds.done:
            card_text = self.card_text()
            if card_text:
                initial_metadata.append(("fedml-card", card_text))
        context.send_initial_metadata(initial_metadata)

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
            self.metrics_of(client, caller),
        )

    def first_message(self, caller, request_iterator, context):
        """Wait for the first message, which names the client. Raises Refused."""
        limit_s = streams.STALL_S
        if caller.client is None and caller.connection not in self.fetched:
            limit_s = FIRST_MESSAGE_S
        who = caller.client or caller.connection
        with Stream(self.streams, context, "upload", caller.client) as stream:
            stream.limit(limit_s)
            try:
                first = next(request_iterator, None)
            except grpc.RpcError:
                raise Refused("CANCELLED", f"{who} went away before it sent anything") from None
        if first is None:
            raise Refused("INVALID_ARGUMENT", f"{who} sent an empty stream, expected weights")
        return first

    @contextlib.contextmanager
    def received(self, upload, context):
        """Receive an upload into a temporary file and check it: (path, SHA-256) for the body.

        The file is gone after the body, unless that has put it somewhere. Raises Refused.
        """
        path = files.temporary(self.rounds.upload_path(upload.client))
        try:
            sha256, file_sha256 = self.receive(upload, path, context)
            # A client that goes away wakes the call that waits for its round.
            context.add_callback(self.rounds.wake)
            yield path, sha256, file_sha256
        finally:
            path.unlink(missing_ok=True)

    def receive(self, upload, path, context):
        """Write the upload to `path` and check it as it arrives; in the server's layout it stays.

        Returns the SHA-256 of what was sent, and that of the file.
        """
        client = upload.client
        inspection = weights.Inspection(self.layout)
        try:
            with Stream(self.streams, context, "upload", client) as stream:
                messages = stream.pass_on(upload.messages, self.max_bytes)
                sha256 = weights.spool(messages, path, self.max_bytes, inspection.look)
                announced = upload.announced_sha256
                if announced not in (None, sha256):
                    raise ValueError(
                        f"what arrived has SHA-256 {sha256[:16]}..., announced was "
                        f"{announced[:16]}..."
                    )
                if inspection.fits():
                    return sha256, sha256
                # A newer upload of this client ends this one also while it is converted.
                self.say(f"{client} sent a file of another layout than the server's: converting it")
                return sha256, self.converters.convert(client, path, context.is_active)
        except Refused:
            raise
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

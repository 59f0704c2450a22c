"""The gRPC service: reads, checks and stores what comes over the wire, and leaves every decision to `Rounds`."""

import itertools
import threading
import time
from concurrent import futures
from contextlib import contextmanager, nullcontext

import grpc

from common import files
from federation import tls, weights
from federation.rounds import Refused
from generated import todo_pb2, todo_pb2_grpc

STALL_S = 30  # an upload or download without progress for so long is ended
FIRST_MESSAGE_S = (
    1  # a peer that has not said who it is, and has fetched nothing, may hold a thread no longer
)
IDLE_S = 3600  # a connection without a call; the thesis demo's client keeps its own while it trains
MESSAGE_BYTES, METADATA_BYTES, STREAMS = (
    2 << 20,
    8 << 10,
    16,
)  # of one message, of one call, of one connection
TURNS, TURN_S = (
    2,
    0.5,
)  # fast streams that move a piece at the same time; how long they wait for one that stands still
FAST_S = 0.1  # a piece that takes longer, on a network below 10 MB/s, needs no turn
REMEMBERED_CONNECTIONS = 1000
SENTENCE = 2000  # characters of a refusal; gRPC drops a longer answer, its code included


def create_server(rounds, listen, max_examples=10_000_000, credentials=None, serve_unnamed=True):
    """A started gRPC server and the HOST:PORT it is bound to. Raises ValueError where it cannot bind.

    credentials    from tls.server_credentials; None is plaintext
    serve_unnamed  whether peers are served that name nobody, neither in metadata nor by a certificate (the thesis demo's)
    """
    host, _, port = listen.rpartition(":")
    servicer = FedMLServicer(rounds, max_examples, serve_unnamed)
    workers = (
        2 * len(rounds.clients) + 4 + servicer.places
    )  # waiters, take-overs, downloads; and who names nobody
    server = grpc.server(
        futures.ThreadPoolExecutor(workers),
        options=[
            ("grpc.so_reuseport", 0),  # or a second server would share the port in silence
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 1024),  # or streams that wait for their turn, and
            (
                "grpc.experimental.tcp_max_read_buffer_size",
                8192,
            ),  # connections that once were fast, would keep 1 MB each
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", STREAMS),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES),
            ("grpc.max_connection_idle_ms", IDLE_S * 1000),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 4000),
        ],
    )
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "todoPackage.FedML",
                {
                    "sendWeight": grpc.stream_unary_rpc_method_handler(
                        servicer.sendWeight,
                        todo_pb2.modelWeight.FromString,
                        todo_pb2.myResponse.SerializeToString,
                    ),
                    # as a stream, or gRPC itself would hold a thread until the one message comes, which says nothing
                    "getWeight": grpc.stream_stream_rpc_method_handler(
                        servicer.getWeight,
                        todo_pb2.void.FromString,
                        todo_pb2.modelWeight.SerializeToString,
                    ),
                },
            )
        ]
    )
    try:
        if bound := not tls.is_taken(host, port):
            bound = (
                server.add_secure_port(listen, credentials)
                if credentials
                else server.add_insecure_port(listen)
            )
    except RuntimeError:
        bound = 0
    if not bound:
        raise ValueError(
            f"cannot listen on {listen}: is another server running there? Choose another --listen HOST:PORT"
        )
    server.start()
    threading.Thread(target=watch_streams, args=[servicer], daemon=True).start()
    return server, f"{host}:{bound}"


class FedMLServicer(todo_pb2_grpc.FedMLServicer):
    def __init__(self, rounds, max_examples, serve_unnamed):
        self.rounds, self.max_examples, self.serve_unnamed, self.say = (
            rounds,
            max_examples,
            serve_unnamed,
            rounds.say,
        )
        self.path = rounds.folder / "server_weight.h5"
        self.check = weights.Checker(weights.shapes_of(self.path))
        self.max_bytes = int(1.1 * self.path.stat().st_size)
        self.fetched = {}  # connection of an old peer -> round that it last fetched; the oldest first
        self.streams = set()  # that are moving bytes now
        self.uploading = {}  # client -> its newest half-sent Stream
        self.turns, self.moved = threading.Semaphore(TURNS), time.monotonic()
        self.places = len(rounds.clients) + 1
        self.unnamed = threading.Semaphore(self.places)
        self.lock = threading.Lock()

    def getWeight(self, requests, context):
        asked = dict(context.invocation_metadata())
        with (
            self.refusals(context),
            self.place(client := self.identify(context, asked.get("fedml-client"))),
        ):
            yield from self.download(client, asked, context)

    def download(self, client, asked, context):
        number, digest, file = self.rounds.fetch(self.path, client)
        with file, Stream(self, context, STALL_S) as stream:
            if "fedml-client" in asked:
                state = self.rounds.state
                self.say(
                    f"{client} fetches the {'result' if self.rounds.done else f'weights of round {number}'}"
                )
                context.send_initial_metadata(
                    (
                        ("fedml-run", state["run"]),
                        ("fedml-round", str(number)),
                        ("fedml-rounds", str(state["rounds"])),
                        ("fedml-sha256", digest),
                        ("fedml-arch", state["arch"]),
                        ("fedml-image-size", str(state["image_size"])),
                    )
                )
            else:
                self.remember(context.peer(), number)
            cut = (
                weights.blob_messages
                if asked.get("fedml-accept") == "blob"
                else weights.base64_messages
            )
            yield from stream.watch(cut(file), polite=client is not None)

    def remember(self, connection, number):
        """The thesis demo's client names no round: its upload belongs to what the same connection last fetched."""
        with self.lock:
            self.fetched.pop(connection, None)
            self.fetched[connection] = number
            if len(self.fetched) > REMEMBERED_CONNECTIONS:
                del self.fetched[next(iter(self.fetched))]

    def sendWeight(self, request_iterator, context):
        asked = dict(context.invocation_metadata())
        with self.refusals(context):
            named = self.identify(context, asked.get("fedml-client"))
            run, number = named_round(asked)
            number = self.fetched.get(context.peer()) if run is None else number
            with self.place(named):
                client, num_examples, messages = self.first_message(
                    request_iterator, context, named
                )
            announced = asked.get("fedml-sha256")
            self.rounds.admit(client, run, number, announced)
            written, digest = self.store(client, messages, context, announced)
            try:
                context.add_callback(
                    self.rounds.wake
                )  # a client that goes away wakes the call that waits for it
                done = self.rounds.deliver(
                    client, num_examples, digest, written, run, number, context.is_active
                )
            finally:
                written.unlink(missing_ok=True)
        context.set_trailing_metadata(
            (("fedml-round", str(self.rounds.round)), *[("fedml-done", "1")] * done)
        )
        return todo_pb2.myResponse(value=1)

    @contextmanager
    def refusals(self, context):
        try:
            yield
        except (Refused, OSError) as error:
            code, sentence = (
                "INTERNAL",
                f"the server could not read or store a file: {error}; try again",
            )
            if isinstance(error, Refused):
                code, sentence = error.code, error.sentence
            if len(sentence) > SENTENCE:
                sentence = sentence[:SENTENCE] + " ..."
            if not self.rounds.over:  # once the server stops, everyone is told the same
                self.say(f"refused: {sentence} ({code})")
            context.abort(grpc.StatusCode[code], sentence)

    def identify(self, context, named):
        """Who calls: the enrolled client that its metadata or its certificate names, and both the same; None of a peer that
        names nobody."""
        shown = context.auth_context()
        if "x509_pem_cert" in shown:  # and gRPC found it good: the names in its SAN, else its CN
            certified = [
                name.decode("utf-8", "replace")
                for name in shown.get("peer_dns") or shown.get("x509_common_name", [])
            ]
            named = named or next(
                (name for name in certified if name in self.rounds.clients), "".join(certified[:1])
            )
            if named not in certified:
                raise Refused(
                    "PERMISSION_DENIED",
                    f"{named[:80]!r} came with the certificate of {', '.join(certified)[:200]}, "
                    "expected one in its own name",
                )
        if named is not None:
            self.enrolled(named)
        elif not self.serve_unnamed:
            raise Refused(
                "UNAUTHENTICATED",
                "a peer that names nobody is served only on the server's own machine, with "
                "--insecure, or by its certificate (--tls-ca)",
            )
        return named

    @contextmanager
    def place(self, client):
        """Peers that name nobody have places of their own, and few: who takes them all delays no one who is enrolled."""
        if client is None and not self.unnamed.acquire(blocking=False):
            raise Refused(
                "RESOURCE_EXHAUSTED",
                f"{self.places} peers that name nobody are here already: try again later",
            )
        try:
            yield
        finally:
            if client is None:
                self.unnamed.release()

    def enrolled(self, client):
        if client not in self.rounds.clients:
            raise Refused(
                "PERMISSION_DENIED",
                f"client {client[:80]!r} is not one of this run's: expected "
                f"{', '.join(self.rounds.clients)} (--clients)",
            )
        self.rounds.last_seen[client] = time.monotonic()

    def first_message(self, request_iterator, context, named):
        """(client, num_examples, all messages) of an upload by an enrolled client, before anything is stored."""
        limit_s = (
            FIRST_MESSAGE_S if named is None and context.peer() not in self.fetched else STALL_S
        )
        with Stream(self, context, limit_s, named):
            try:
                first = next(request_iterator, None)
            except grpc.RpcError:
                raise Refused(
                    "CANCELLED", f"{named or context.peer()} went away before it sent anything"
                ) from None
        if first is None:
            raise Refused(
                "INVALID_ARGUMENT",
                f"{named or context.peer()} sent an empty stream, expected weights",
            )
        try:
            client = weights.client_of(first.clientname)
        except ValueError as error:
            raise Refused("INVALID_ARGUMENT", str(error)) from None
        self.enrolled(client)
        if named not in (None, client):
            raise Refused("PERMISSION_DENIED", f"{named} sent weights in the name of {client}")
        if not 1 <= first.clientsize <= self.max_examples:
            raise Refused(
                "INVALID_ARGUMENT",
                f"{client} says it has {first.clientsize} examples, expected 1 to "
                f"{self.max_examples} (--max-examples)",
            )
        return client, first.clientsize, itertools.chain([first], request_iterator)

    def store(self, client, messages, context, announced):
        """Spools an upload beside its place and checks it: (path, SHA-256). Raises Refused; then nothing is left."""
        written = files.temporary(self.rounds.upload_path(client))
        try:
            with Stream(self, context, STALL_S, client) as stream:
                digest = weights.spool(stream.watch(messages), written, self.max_bytes)
            if announced not in (None, digest):
                raise ValueError(
                    f"what arrived has SHA-256 {digest[:16]}..., announced was {announced[:16]}..."
                )
            self.check(written)
            return written, digest
        except BaseException as error:
            written.unlink(missing_ok=True)
            if isinstance(error, grpc.RpcError) or not context.is_active():
                raise Refused(
                    "CANCELLED", f"{client} went away in the middle of its upload"
                ) from None
            if isinstance(error, ValueError):
                raise Refused("INVALID_ARGUMENT", f"{client}: {error}") from None
            if isinstance(error, OSError):
                raise Refused(
                    "INTERNAL",
                    f"{client}: the server could not store the upload: {error}; send again",
                ) from None
            raise


def named_round(asked):
    """(run, round number) that a new peer names in its metadata; (None, None) of an old one."""
    run, text = asked.get("fedml-run"), asked.get("fedml-round", "")
    if run is None:
        return None, None
    if not text.isdecimal() or len(text) > 9:
        raise Refused(
            "INVALID_ARGUMENT",
            f"metadata fedml-round is {text[:20]!r}, expected a number beside fedml-run",
        )
    return run, int(text)


class Stream:
    """One upload or download while it moves bytes. The watchdog ends it when it stands still, and a newer upload of the
    same client ends an older, half-sent one."""

    def __init__(self, servicer, context, limit_s, client=None):
        self.servicer, self.context, self.limit_s, self.client = servicer, context, limit_s, client
        self.last = time.monotonic()

    def __enter__(self):
        older = None
        with self.servicer.lock:
            self.servicer.streams.add(self)
            if self.client is not None:
                older = self.servicer.uploading.get(self.client)
                self.servicer.uploading[self.client] = self
        if older is not None:
            self.servicer.say(f"{self.client} began a new upload: its half-sent one is ended")
            older.context.cancel()
        return self

    def __exit__(self, *_):
        with self.servicer.lock:
            self.servicer.streams.discard(self)
            if self.servicer.uploading.get(self.client) is self:
                del self.servicer.uploading[self.client]

    @contextmanager
    def turn(self):
        """Few fast streams move a piece at the same time: 48 would fill the memory and win nothing. A turn is a courtesy:
        once who has one stands still, no one waits."""
        servicer = self.servicer
        had_turn = servicer.turns.acquire(blocking=False)
        while not had_turn and (left_s := servicer.moved + TURN_S - time.monotonic()) > 0:
            had_turn, self.last = servicer.turns.acquire(timeout=left_s), time.monotonic()
        if not had_turn:
            yield
            return
        servicer.moved = time.monotonic()
        try:
            yield
        finally:
            servicer.moved = time.monotonic()
            servicer.turns.release()

    def watch(self, messages, polite=True):
        """The same messages, each within a turn."""
        messages, fast = iter(messages), True
        while True:
            with self.turn() if polite and fast else nullcontext():
                self.last = started = time.monotonic()
                if (message := next(messages, None)) is None:
                    return
                self.last = time.monotonic()
                yield message
                message = None  # or each stream that waits for its turn would keep one
            fast = time.monotonic() - started < FAST_S


def watch_streams(servicer):
    """Ends streams that stand still; a thread of its own, for ever."""
    while True:
        time.sleep(0.25)
        with servicer.lock:
            stalled = [
                stream
                for stream in servicer.streams
                if time.monotonic() - stream.last > stream.limit_s
            ]
        for stream in stalled:
            servicer.say(
                f"{stream.client or stream.context.peer()} made no progress for {stream.limit_s} s: ended"
            )
            stream.context.cancel()

"""The gRPC side of the server: its port, who calls, what is moving, and how a call is answered.

The three calls themselves, step by step, are `todoServer.FedMLServicer`. Nothing here decides what
counts, which is `federation.rounds`, and nothing opens a file from outside with HDF5.
"""

import collections
import contextlib
import ctypes
import itertools
import resource
import threading
import time
from concurrent import futures
from dataclasses import dataclass

import grpc

from common import files, log
from federation import convert, status, tls, weights
from federation.rounds import Refused, Upload
from generated import todo_pb2

STALL_S = 30  # a call that moves no bytes for so long is ended
# A `tell`, or a call of which nobody knows whose it is, has so long until its first message:
FIRST_MESSAGE_S = 1
# A call of a peer without a name may take as long as the model takes on a line of 10 kB/s, and a
# minute.
SLOWEST_BYTES_PER_S = 10_000
EXTRA_S = 60
LOOK_EVERY_S = 0.25  # how often the watchdog looks
# An upload comes in pieces of 75 kB (the thesis demo) or more. Each message costs some time of the
# server's processor, however small it is, so their number is limited as well as their bytes.
SMALLEST_PIECE_BYTES = 10_000
EXTRA_MESSAGES = 100
# Who connects and then says nothing is sent away after this.
HANDSHAKE_S = 5
# A connection without a call is closed after this. Where peers of the thesis demo are served it
# must be longer: they keep their connection while they train, and their upload is for the round
# that they fetched on it.
IDLE_S = 60
IDLE_WITH_OLD_PEERS_S = 3600
# On each address that the server listens on. Who holds all of them, and opens each anew as soon as
# it is closed, keeps everyone out: so there are far more than clients. A silent one costs 13 kB,
# one within a TLS handshake 46 kB, one that speaks HTTP/2 30 kB, and each call on it some 15 kB.
CONNECTIONS = 1024  # and for each client:
CONNECTIONS_PER_CLIENT = 16
METADATA_BYTES = 8 << 10  # of one call
CALLS_PER_CONNECTION = 4  # a client opens one or two
REMEMBERED_CONNECTIONS = 1000
M_ARENA_MAX = -8  # of glibc's malloc.h: how many heaps
OLD_PEERS_ARCH = "vgg16"  # the thesis demo's network; its peers know no other
SENTENCE_CHARACTERS = 2000  # of a refusal; gRPC drops a longer answer, its status code included
NEVER = float("inf")


def create_server(servicer, listen, credentials=None):
    """A started gRPC server with this FedMLServicer, and the HOST:PORT that it is bound to.

    listen       HOST:PORT; port 0 takes a free one
    credentials  from tls.server_credentials; None is plaintext
    Raises ValueError where it cannot listen there.
    """
    service = servicer.service
    connections = CONNECTIONS + CONNECTIONS_PER_CLIENT * len(service.rounds.state.clients)
    idle_s = IDLE_WITH_OLD_PEERS_S if service.serve_unnamed else IDLE_S
    server = grpc.server(
        started_pool(service.num_threads),
        options=[
            # Without this a second server would share the port, and neither would say so.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", weights.MOST_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES),
            # What is above is closed at once; the next two make room again.
            ("grpc.max_allowed_incoming_connections", connections),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
            ("grpc.max_connection_idle_ms", idle_s * 1000),
            # A client that waits or trains sends pings; gRPC would hang up on it by itself.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 4000),
        ],
    )
    add_to_server(servicer, server)
    address = bind(server, listen, credentials)
    server.start()
    threading.Thread(target=service.run_watchdog, daemon=True).start()
    return server, address


def started_pool(num_threads):
    """A thread pool, all threads of which run already.

    By itself it starts one when a call needs it, in gRPC's only serving thread. Where the machine
    has no thread to give for a moment, that one dies, and the server is deaf with its port open.
    """
    pool = futures.ThreadPoolExecutor(num_threads)
    all_run = threading.Barrier(num_threads)
    for each in [pool.submit(all_run.wait) for _ in range(num_threads)]:
        each.result()
    return pool


def add_to_server(servicer, server):
    """Register the three methods, each as a stream of requests.

    On the wire a single request is a stream of one. But registered as a single one, it holds a
    thread of the pool until it has arrived, before any code of ours runs: who opens such calls and
    says nothing would hold all threads.
    """
    service = servicer.service

    def get_weight(requests, context):
        with service.refusals(context):
            yield from servicer.getWeight(todo_pb2.void(), context)  # `void` says nothing

    def with_one_answer(method):
        def serve(requests, context):
            with service.refusals(context):
                return method(requests, context)

        return serve

    handlers = {
        "getWeight": grpc.stream_stream_rpc_method_handler(
            get_weight,
            todo_pb2.void.FromString,
            todo_pb2.modelWeight.SerializeToString,
        ),
        "sendWeight": grpc.stream_unary_rpc_method_handler(
            with_one_answer(servicer.sendWeight),
            todo_pb2.modelWeight.FromString,
            todo_pb2.myResponse.SerializeToString,
        ),
        "tell": grpc.stream_unary_rpc_method_handler(
            with_one_answer(servicer.tell),
            todo_pb2.clientStatus.FromString,
            todo_pb2.openRound.SerializeToString,
        ),
    }
    generic = grpc.method_handlers_generic_handler("todoPackage.FedML", handlers)
    server.add_generic_rpc_handlers((generic,))


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


def bind(server, listen, credentials):
    """Bind the server; returns HOST:PORT with the number of its port. Raises ValueError."""
    tls.check_free(listen)
    try:
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError:
        raise ValueError(
            f"cannot listen on {listen}: expected an address of this machine, and a port that this "
            "user may take"
        ) from None
    return f"{listen.rpartition(':')[0]}:{port}"


@dataclass(frozen=True)
class Caller:
    """Who calls, as far as its metadata and its certificate say it."""

    client: str | None  # one that this run knows; None: a peer that names nobody
    metadata: dict
    connection: str
    is_new: bool  # whether it knows our metadata: a client of this project, not one of 2020


class Transfer:
    """One call while it moves bytes, which the watchdog ends when it does not.

    client   whose it is; None: a peer without a name
    what     "upload", "download" or "report"
    stall_s  how long it may move nothing
    total_s  how long it may take in all
    """

    def __init__(self, client, what, context, stall_s, total_s):
        self.client = client
        self.what = what
        self.context = context
        self.stall_s = stall_s
        self.ends_at = time.monotonic() + total_s
        self.is_ended = False  # by the server, though its thread may not be there yet
        self.note_progress()

    def note_progress(self):
        self.last_progress_at = time.monotonic()


class Service:
    """What all calls of one server share: its limits, who is here, and what is moving.

    rounds         Rounds
    max_examples   a client that says it has more is refused
    serve_unnamed  whether peers are served that name nobody, neither in metadata nor by a
                   certificate, as the thesis demo's do
    card_text      card_text() -> the model card of the result as ASCII JSON, "" where there is none
    """

    def __init__(self, rounds, max_examples, serve_unnamed, card_text):
        self.rounds = rounds
        self.max_examples = max_examples
        self.serve_unnamed = serve_unnamed
        self.card_text = card_text
        self.layout = weights.Layout(rounds.weights_path)
        self.max_bytes = int(1.1 * self.layout.size)
        self.max_messages = EXTRA_MESSAGES + self.max_bytes // SMALLEST_PIECE_BYTES
        self.changed = threading.Condition()  # with the lock of `transfers`: here, ended
        self.transfers = set()
        # What the thesis demo's clients last fetched: (connection, round), the newest last.
        self.fetched = collections.deque(maxlen=REMEMBERED_CONNECTIONS)
        # Who takes part, and who did: who has left may still ask for its last answer.
        self.known_clients = {*rounds.state.clients, *rounds.state.counted}
        # Peers that name nobody get few threads, and of their own: who takes all of them delays no
        # one who is enrolled.
        self.max_unnamed = len(rounds.state.clients) + 1 if serve_unnamed else 0
        self.unnamed = threading.Semaphore(self.max_unnamed)
        # Enough for all calls that can hold one, and four for those that are just ending. A client
        # holds four at most: an upload, a complete upload that waits, a download, a report.
        self.num_threads = 4 * len(self.known_clients) + self.max_unnamed + 4

    # --- how a call is refused -------------------------------------------------------------------

    @contextlib.contextmanager
    def refusals(self, context):
        """Tell the caller and the log what the body raises."""
        try:
            yield
            return
        except Refused as error:
            code, sentence = error.code, error.sentence
        except grpc.RpcError:
            raise  # the caller is gone: there is nobody to tell
        except Exception as error:  # of this machine, or a mistake of ours: gRPC would tell nobody
            code = "INTERNAL"
            sentence = f"a fault of the server: {type(error).__name__}: {error}; try again"
        if not self.rounds.stop_reason:  # a server that stops says the same to everyone
            name = dict(context.invocation_metadata()).get("fedml-client")
            known = name if name in self.rounds.client_table.rows else "unnamed"
            self.rounds.say_of((known, code), f"refused: {log.plain(sentence)} ({code})")
        # By it a client tells these words from those of gRPC, which may hide an answer.
        context.set_trailing_metadata([("fedml-round", str(self.rounds.state.round))])
        context.abort(grpc.StatusCode[code], sentence[:SENTENCE_CHARACTERS])

    # --- who calls -------------------------------------------------------------------------------

    def identify(self, context):
        """The Caller: one that this run knows, or where they are served a peer without a name.

        A client is named by its metadata or its certificate, by both only if they say the same.
        Raises Refused.
        """
        metadata = dict(context.invocation_metadata())
        name = metadata.get("fedml-client")
        certified = certified_names(context)
        if certified is not None:
            if name is None:  # of several in a certificate the one that this run knows
                known = [each for each in certified if each in self.known_clients]
                name = next(iter(known or certified), "")
            if name not in certified:
                raise Refused(
                    "PERMISSION_DENIED",
                    f"{name[:80]!r} came with the certificate of {', '.join(certified)[:200]}, "
                    "expected one in its own name",
                )
        if name is not None:
            self.check_known(name)
        elif not self.serve_unnamed:
            raise Refused(
                "UNAUTHENTICATED",
                "a peer that names nobody is served only on the server's own machine, with "
                "--insecure, or by its certificate (--tls-ca)",
            )
        return Caller(name, metadata, context.peer(), "fedml-client" in metadata)

    def check_known(self, client):
        """Raise Refused unless this run knows the client, which has then been seen just now."""
        if client not in self.known_clients:
            raise Refused(
                "PERMISSION_DENIED",
                f"client {client[:80]!r} is not one of this run's: expected "
                f"{', '.join(self.rounds.state.clients)} (--clients)",
            )
        self.rounds.client_table.note(client)

    # --- what is moving --------------------------------------------------------------------------

    @contextlib.contextmanager
    def moving(self, client, what, context, stall_s=STALL_S):
        """The body is a Transfer, which it gets. A client's newer one of a kind ends its older.

        The older is usually one of a connection that the client lost. It has left before the body
        runs: whoever opens hundreds holds the memory and the file of one. Raises Refused.
        """
        total_s = NEVER if client else EXTRA_S + self.max_bytes / SLOWEST_BYTES_PER_S
        transfer = Transfer(client, what, context, stall_s, total_s)
        if client is None and not self.unnamed.acquire(blocking=False):
            raise Refused(
                "RESOURCE_EXHAUSTED",
                f"{self.max_unnamed} peers that name nobody are here already: try again later",
            )
        with self.changed:
            same = [each for each in self.transfers if (each.client, each.what) == (client, what)]
            older = same if client else []
            self.transfers.add(transfer)
        for each in older:
            self.end(each, f"{client} began a new {what}: its unfinished one is ended")
        try:
            with self.changed:
                self.changed.wait_for(lambda: transfer.is_ended or self.transfers.isdisjoint(older))
            if transfer.is_ended:
                raise Refused("CANCELLED", f"{client} began another {what}")
            transfer.note_progress()
            yield transfer
        finally:
            with self.changed:
                self.transfers.discard(transfer)
                self.changed.notify_all()
            if client is None:
                self.unnamed.release()

    def end(self, transfer, why):
        self.rounds.say_of((transfer.client, transfer.what, "ended"), why)
        with self.changed:
            transfer.is_ended = True
            self.changed.notify_all()
        transfer.context.cancel()

    def run_watchdog(self):
        """End what moves no bytes, for ever."""
        while True:
            time.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            with self.changed:
                here = list(self.transfers)
            for transfer in here:
                if now < min(transfer.last_progress_at + transfer.stall_s, transfer.ends_at):
                    continue
                who = transfer.client or "a peer without a name"
                self.end(
                    transfer, f"{who}: its {transfer.what} stands still or takes too long: ended"
                )

    def first_message(self, caller, what, requests, context):
        """Wait for the first message of a stream. Raises Refused."""
        stall_s = STALL_S
        if what == "report" or (caller.client is None and self.last_fetched(caller) is None):
            stall_s = FIRST_MESSAGE_S
        who = caller.client or caller.connection
        with self.moving(caller.client, what, context, stall_s):
            try:
                first = next(requests, None)
            except grpc.RpcError:
                raise Refused("CANCELLED", f"{who} went away before it sent anything") from None
        if first is None:
            raise Refused("INVALID_ARGUMENT", f"{who} sent an empty stream")
        return first

    # --- getWeight -------------------------------------------------------------------------------

    def send_weights(self, caller, context):
        """The messages of a download: the weights of the open round, once one is open."""
        # A client that goes away wakes its call, where that waits for a merge.
        context.add_callback(self.rounds.wake)
        with self.moving(caller.client, "download", context, NEVER) as transfer:
            round_number, sha256, file = self.rounds.fetch(caller.client, context.is_active)
            with file:
                self.log_fetch(caller, round_number)
                if caller.is_new:
                    self.announce(round_number, sha256, context)
                else:  # it will name no round: its upload is for this one
                    self.fetched.append((caller.connection, round_number))
                messages = weights.base64_messages(file)
                if caller.metadata.get("fedml-accept") == "blob":
                    messages = weights.blob_messages(file)
                transfer.stall_s = STALL_S
                transfer.note_progress()
                for message in messages:
                    yield message
                    transfer.note_progress()
                    self.rounds.note_progress()

    def log_fetch(self, caller, round_number):
        who = caller.client or "a peer without a name"
        what = "result" if self.rounds.state.is_over else f"weights of round {round_number}"
        self.rounds.say_of((who, what), f"{who} fetches the {what}")
        arch = self.rounds.state.arch
        if not caller.is_new and arch != OLD_PEERS_ARCH:
            self.rounds.say_of(
                (who, "old"),
                f"warning: {who} names no round, as a peer of 2020 does; such a peer can load the "
                f"weights of --arch {OLD_PEERS_ARCH} only, and this run's are {arch}",
            )

    def announce(self, round_number, sha256, context):
        """Tell a new peer, before the weights, what they are and what to train with them."""
        state = self.rounds.state
        initial_metadata = {
            "fedml-run": state.run,
            "fedml-round": str(round_number),
            "fedml-rounds": str(state.rounds),
            "fedml-sha256": sha256,
            "fedml-arch": state.arch,
            "fedml-image-size": str(state.image_size),
            "fedml-preprocessing": state.preprocessing,
            "fedml-freeze-base": "1" if state.freeze_base else "",
            "fedml-card": self.card_text() if state.is_over else "",
        }
        context.send_initial_metadata([each for each in initial_metadata.items() if each[1]])

    def last_fetched(self, caller):
        """The round of the weights that this connection last fetched; None: of none."""
        return dict(self.fetched.copy()).get(caller.connection)

    # --- sendWeight ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def received(self, caller, requests, context):
        """Receive an upload into a temporary file and check it: the body gets the rounds.Upload.

        The file is gone after the body, unless that has put it somewhere. Raises Refused.
        """
        run, round_number = named_round(caller.metadata)
        if run is None:
            round_number = self.last_fetched(caller)
        announced = caller.metadata.get("fedml-sha256")
        first = self.first_message(caller, "upload", requests, context)
        client = self.sender_of(first, caller)
        if run is not None and announced is not None:
            self.rounds.verdict(client, run, round_number, announced)  # refuses what cannot count
        path = files.temporary(self.rounds.upload_path(client))
        # A client that goes away wakes its call, where that waits for its round.
        context.add_callback(self.rounds.wake)
        try:
            with self.moving(client, "upload", context) as transfer:
                messages = self.limited(itertools.chain([first], requests), transfer)
                sha256, file_sha256 = self.store(client, messages, path, announced, context)
            yield Upload(client, first.clientsize, run, round_number, sha256, path, file_sha256)
        finally:
            path.unlink(missing_ok=True)

    def sender_of(self, first, caller):
        """The client that the first message of an upload names. Raises Refused."""
        try:
            client = weights.client_of(first.clientname)
        except ValueError as error:
            raise Refused("INVALID_ARGUMENT", str(error)) from None
        self.check_known(client)
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
        return client

    def limited(self, messages, transfer):
        """The same messages; those with content are progress. Raises ValueError for too many."""
        for number, message in enumerate(messages):
            if number >= self.max_messages:
                raise ValueError(
                    f"the upload comes in more than {self.max_messages} messages: expected pieces "
                    "of 100,000 characters, or of 1 MiB"
                )
            if message.model or message.blob:
                transfer.note_progress()
            yield message
        transfer.stall_s = NEVER  # it is complete, and now checked

    def store(self, client, messages, path, announced, context):
        """Write an upload to `path`, check it, and bring it into the server's layout.

        Returns the SHA-256 of what was sent, and that of the file. Raises Refused.
        """
        try:
            sha256 = weights.spool(messages, path, self.max_bytes)
            if announced not in (None, sha256):
                raise ValueError(
                    f"what arrived has SHA-256 {sha256[:16]}..., announced was {announced[:16]}..."
                )
            if weights.fits(path, self.layout):
                return sha256, sha256
            self.rounds.say_of(
                (client, "converts"),
                f"{client} sent a file of another layout than the server's: converting it",
            )
            # A newer upload of this client ends this one also while it is converted.
            return sha256, convert.convert(path, self.layout, context.is_active)
        except Exception as error:
            # Whatever a broken connection led to, it is not a fault of the file.
            if isinstance(error, grpc.RpcError) or not context.is_active():
                sentence = f"{client} went away in the middle of its upload"
                # gRPC keeps its error with the call, and the error's traceback keeps the call and
                # the piece that came last: both would stay until Python looks for such cycles.
                error.with_traceback(None)
                raise Refused("CANCELLED", sentence) from None
            if isinstance(error, ValueError):
                raise Refused("INVALID_ARGUMENT", f"{client}: {error}") from None
            raise

    def answer(self, context):
        """The answer to a counted upload whose round is merged, evaluated and on disk."""
        state = self.rounds.state
        is_over = [("fedml-done", "1")] if state.is_over else []
        context.set_trailing_metadata([("fedml-round", str(state.round)), *is_over])
        return todo_pb2.myResponse(value=1)

    # --- tell ------------------------------------------------------------------------------------

    def hear(self, caller, requests, context):
        """Note where a client is and what it measured; the answer is the open round."""
        if caller.client is None:
            raise Refused("INVALID_ARGUMENT", "a peer without a name has nothing to tell")
        report = self.first_message(caller, "report", requests, context)
        where, problems = status.within(
            {name: getattr(report, name) for name in status.WHERE if getattr(report, name)},
            status.WHERE,
        )
        where["phase"] = report.phase
        if report.phase not in status.PHASES:
            where["phase"] = "working"
            problems.append(f"phase is {report.phase[:30]!r}, expected {', '.join(status.PHASES)}")
        scores, more_problems = status.within(report.scores, status.SCORES)
        problems += more_problems
        if problems:
            self.rounds.say_of(
                (caller.client, "said"),
                f"{caller.client} says what is left out here: {'; '.join(problems[:3])}",
            )
        round_number = self.rounds.hear(caller.client, report.run, report.round, where, scores)
        return todo_pb2.openRound(run=self.rounds.state.run, round=round_number)


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

"""The federated server: hands out the weights, waits for all clients, averages, evaluates.

    python3 todoServer.py                                     # three clients, ten rounds, here
    python3 todoServer.py --clients uppsala,lund --rounds 40

Killed at any instant, run the same command again to resume. Exit codes: 0 finished, 1 an error,
2 wrong usage, 3 too few clients within --round-timeout, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import functools
import queue
import secrets
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

from common import log
from common.log import fail
from common.script import (
    at_least,
    client_name,
    end_script,
    exit_on_signals,
    keep_heap_small,
    pixels,
    seconds,
    start_script,
    trim_heap,
    watch_signals,
)

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence
    keep_heap_small()

import data
import model
from common import files
from federation import service, tls, weights
from federation.rounds import Refused, Rounds, TooFewClients
from federation.state import RunState
from generated import todo_pb2_grpc

# How long a finished server stays for clients that have not heard its last answer.
LAST_ANSWER_S = 30
# What a new run is, where no flag says otherwise.
NEW_RUN = {
    "clients": ["client001", "client002", "client003"],
    "rounds": 10,
    "arch": "drcnn",
    "image_size": None,  # each network's own
    "seed": 0,
    "weights": "none",
}
# Flags that belong to the run: at a restart they may be left out, but not be changed.
FIXED_FLAGS = ("clients", "arch", "image_size", "seed", "weights")


def main(argv=None):
    arguments = parse(argv)
    exit_on_signals("server", "stopped before it began to listen; start it again")
    try:
        with ExitStack() as locks:
            locks.enter_context(files.alone_in(arguments.server_dir))
            validation = data.read_index(arguments.index_dir / "val_set.pkl")
            state = resume(arguments)
            if state is None:
                state = begin(arguments)
            check_min_clients(arguments, state)
            for client in state.clients:
                locks.enter_context(files.alone_in(arguments.server_dir / client))
            rounds = open_rounds(arguments, state, validation)
            code = serve(arguments, rounds)
            # Without joining threads: one may be in the middle of an evaluation.
            end_script(code)
    except (ValueError, OSError) as error:
        return fail("server", error)


class FedMLServicer(todo_pb2_grpc.FedMLServicer):
    """The two calls of todo.proto, as the thesis numbers the server's steps.

    Step 1, the first weights, is `begin`. A step that refuses a call raises Refused, and the caller
    gets its status code and sentence.

    max_examples   a client that says it has more is refused
    serve_unnamed  whether peers are served that name nobody, neither in metadata nor by a
                   certificate, as the thesis demo's do
    """

    def __init__(self, rounds, max_examples=10_000_000, serve_unnamed=True):
        self.rounds = rounds
        self.calls = service.Calls(rounds, max_examples, serve_unnamed)

    def getWeight(self, request, context):
        # 2. Receive the void request, return the weights in pieces.
        caller = self.calls.identify(context)
        yield from self.calls.send_weights(caller, context)

    def sendWeight(self, request_iterator, context):
        # 3. Record who sends, and with how many examples.
        caller = self.calls.identify(context)
        upload = self.calls.begin_upload(caller, request_iterator, context)
        # 4. Receive the weights, and check them.
        with self.calls.received(upload, context) as (path, sha256):
            # 5. Save them in the client's folder, and wait for all clients. Step 6, merge and
            #    evaluate, is the coordinator's: `Rounds.run`, in a thread of its own.
            is_last = self.rounds.deliver(
                upload.client,
                upload.num_examples,
                sha256,
                path,
                upload.run,
                upload.round_number,
                context.is_active,
            )
        # 7. Answer myResponse(value=1).
        return self.calls.answer(context, is_last)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--listen",
        default="localhost:50051",
        metavar="HOST:PORT",
        help="port 0 takes a free one (default: %(default)s)",
    )
    add(
        "--clients",
        type=client_names,
        metavar="NAME,...",
        help=f"all that take part (default: {','.join(NEW_RUN['clients'])})",
    )
    add(
        "--rounds",
        type=at_least(1),
        help="of the whole run; more than a finished run's extends it (default: 10)",
    )
    add("--arch", choices=["drcnn", "vgg16"], help="the network (default: drcnn)")
    add(
        "--image-size",
        type=pixels,
        metavar="PIXELS",
        help="a side (default: 128 for drcnn, 224 for vgg16)",
    )
    add("--seed", type=at_least(0), help="of the initial weights (default: 0)")
    add("--weights", metavar="none|imagenet|FILE", help="to start from (default: none, random)")
    add(
        "--server-dir",
        type=Path,
        default=Path("server"),
        metavar="DIR",
        help="weights, state, history (default: server)",
    )
    add(
        "--index-dir",
        type=Path,
        default=Path("index"),
        metavar="DIR",
        help="where val_set.pkl lies (default: index)",
    )
    add("--fresh", action="store_true", help="begin a new run; the old one's files are moved aside")
    add(
        "--round-timeout",
        type=seconds,
        default=0,
        metavar="S",
        help="merge a round after S seconds with the uploads that are there "
        "(default: 0, wait for all without a limit)",
    )
    add(
        "--min-clients",
        type=at_least(1),
        metavar="N",
        help="after --round-timeout, merge with N or more, else stop (default: all)",
    )
    add(
        "--max-examples",
        type=at_least(1),
        default=10_000_000,
        metavar="N",
        help="refuse a client that says it has more (default: %(default)s)",
    )
    tls.add_arguments(
        add,
        "that signed the clients' certificates: each client must show its own, in its name "
        "(mutual TLS)",
        "the server's certificate, for TLS",
    )
    arguments = parser.parse_args(argv)
    tls.check_arguments(parser, arguments, arguments.listen, bool(arguments.tls_cert))
    if arguments.min_clients and not arguments.round_timeout:
        parser.error(
            "--min-clients needs --round-timeout: without a limit the server waits for all clients"
        )
    return arguments


def client_names(text):
    """An argparse type: NAME,... as a sorted list."""
    names = [client_name(name) for name in text.split(",")]
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different names")
    return sorted(names)


def say(line):
    log.say("server", line)


# --- the run: resumed, or begun ------------------------------------------------------------------


def resume(arguments):
    """The state of the run in --server-dir as it was left; None where a new one is to begin.

    Raises ValueError where the flags contradict it.
    """
    path = arguments.server_dir / "state.json"
    if arguments.fresh:
        return None
    state = RunState.load(path, remedy="move it away, or begin with --fresh")
    if state is None:
        return None
    for name in FIXED_FLAGS:
        given = getattr(arguments, name)
        kept = getattr(state, name)
        if given is not None and given != kept:
            raise ValueError(
                f"--{name.replace('_', '-')} is {given}, but the run in {arguments.server_dir} has "
                f"{kept}: leave the flag out to go on with that run, or begin a new one with "
                "--fresh"
            )
    if arguments.rounds:
        state = state.changed(rounds=arguments.rounds)
    if state.evaluated >= state.rounds:
        say(
            f"run {state.run} is finished ({state.evaluated} rounds); --rounds N goes on, "
            "--fresh begins a new one"
        )
    else:
        # This may be a round less than are merged: the last evaluation is then repeated.
        next_round = state.evaluated + 1
        say(f"resuming run {state.run} at round {next_round}/{state.rounds} from {path}")
    return state


def begin(arguments):
    """Step 1 of the thesis: initialize the model. Publishes its weights, then a new run's state."""
    choices = dict(NEW_RUN)
    for name in NEW_RUN:
        given = getattr(arguments, name)
        if given is not None:
            choices[name] = given
    if choices["image_size"] is None:
        choices["image_size"] = model.ARCHS[choices["arch"]]
    size = choices["image_size"]
    say(
        f"a new run of {choices['rounds']} rounds: {choices['arch']} at {size} x {size} pixels, "
        f"seed {choices['seed']}, clients {', '.join(choices['clients'])}"
    )
    model.configure(choices["seed"])
    network = model.build(choices["arch"], size, choices["seed"])
    model.initialize(network, choices["weights"])
    moved = files.move_aside(arguments.server_dir)  # not before this run has all that it needs
    if moved:
        say(f"the old run's files are in {moved}")
    path = arguments.server_dir / "server_weight.h5"
    model.save(network, path)
    state = RunState(run=secrets.token_hex(8), weights_sha256=files.sha256_of(path), **choices)
    state.save(arguments.server_dir / "state.json")
    return state


def check_min_clients(arguments, state):
    if arguments.min_clients and arguments.min_clients > len(state.clients):
        raise ValueError(
            f"--min-clients {arguments.min_clients} is more than the run's {len(state.clients)} "
            "clients"
        )


def open_rounds(arguments, state, validation):
    """The Rounds of this run, with whatever a crash interrupted finished."""
    folder = arguments.server_dir
    path = folder / "server_weight.h5"
    check_weights(path, state)
    for each in [folder, *(folder / client for client in state.clients)]:
        files.clean(each)

    def merge(paths, num_examples):
        trim_heap()  # of what the uploads left
        return weights.fedavg(paths, num_examples, layout=path, target=path)

    rounds = Rounds(
        folder,
        state,
        merge,
        evaluator(folder, state, validation),
        arguments.min_clients,
        arguments.round_timeout,
        say,
    )
    rounds.open()
    return rounds


def check_weights(path, state):
    """Raises ValueError where server_weight.h5 is not the model that the state names."""
    if not path.exists():
        raise ValueError(
            f"{path} is missing, though {path.with_name('state.json')} knows a run: put it back, "
            "or begin with --fresh"
        )
    # Of a frozen round the merge may be done and not yet committed: the file is then newer.
    if not state.frozen and files.sha256_of(path) != state.weights_sha256:
        raise ValueError(
            f"{path} is not the model of round {state.round} of the run in "
            f"{path.with_name('state.json')}: put that back, or begin with --fresh"
        )


def evaluator(folder, state, validation):
    """evaluate() -> metrics (dict) of server_weight.h5 on the validation records."""
    images = data.load_images(validation, state.image_size, files.temporary(folder / "images.npy"))
    labels = data.healthy(validation)

    @functools.cache
    def network():
        # Built for the first evaluation: clients can fetch before TensorFlow is loaded.
        model.configure(state.seed)
        return model.build(state.arch, state.image_size)

    def evaluate():
        model.load(network(), folder / "server_weight.h5")
        return model.evaluate(network(), images, labels)

    return evaluate


# --- serving -------------------------------------------------------------------------------------


def listen(arguments, rounds):
    """A started gRPC server."""
    is_local = tls.is_this_machine(arguments.listen)
    servicer = FedMLServicer(
        rounds, arguments.max_examples, serve_unnamed=is_local or arguments.insecure
    )
    credentials = tls.server_credentials(arguments)
    server, address = service.create_server(servicer, arguments.listen, credentials)
    if not is_local and not arguments.tls_cert:
        say(
            "warning: plaintext: anyone on the network path can read and change everything, and a "
            "client is whoever says its name"
        )
    elif not is_local and not arguments.tls_ca:
        say("warning: without --tls-ca a client is whoever says its name")
    say(f"listening on {address}")
    return server


def serve(arguments, rounds):
    """Listen, and run the rounds until they are over or a signal comes. Returns the exit code."""
    codes = queue.SimpleQueue()  # the one thing that the main thread waits for
    watch_signals([signal.SIGTERM, signal.SIGINT], lambda number: codes.put(128 + number))
    server = listen(arguments, rounds)
    threading.Thread(target=lambda: codes.put(coordinate(rounds)), daemon=True).start()
    code = codes.get()
    if code == 0:
        # Let calls that are answered just now end, but still hear a signal.
        def see_off():
            server.stop(LAST_ANSWER_S).wait(LAST_ANSWER_S)
            codes.put(0)

        threading.Thread(target=see_off, daemon=True).start()
        code = codes.get()
    if code == 0:
        path = rounds.folder / "server_weight.h5"
        say(f"finished after {rounds.state.rounds} rounds; the model is {path}")
        return 0
    if code > 128:
        say("stopping; what has arrived is kept, start the server again to go on")
        rounds.stop("UNAVAILABLE", "the server is stopping; it goes on when it is started again")
    server.stop(1).wait(1.5)
    return code


def coordinate(rounds):
    """Close round after round, then stay for the last answers. Returns the exit code."""
    try:
        rounds.run()
        rounds.wait_until_all_left(LAST_ANSWER_S)
        return 0
    except TooFewClients as error:
        return fail("server", error, 3)
    except Refused:
        return 1  # a signal stopped the rounds: its own code came first
    except Exception as error:
        return fail(
            "server",
            f"round {rounds.answered + 1} failed: {type(error).__name__}: {error}; what was "
            "delivered is kept: start the server again when the cause is gone",
        )


if __name__ == "__main__":
    end_script(main())

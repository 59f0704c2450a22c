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
import shutil
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
    pixels,
    seconds,
    start_script,
    watch_signals,
)

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import data
import model
from common import files
from federation import convert, service, tls, weights
from federation.followers import Follower, RoundCommand
from federation.rounds import Refused, Rounds, TooFewClients
from federation.state import RunState, file_sha256_of, new_upload
from federation.status import StatusFile
from generated import todo_pb2_grpc
from reporting import card as cards
from reporting import metrics
from reporting.events import EventFiles

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
FIXED_FLAGS = ("arch", "image_size", "seed", "weights")


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
            clients = arguments.clients or state.clients
            check_min_clients(arguments, clients)
            for client in sorted({*clients, *state.clients, *state.left}):
                locks.enter_context(files.alone_in(arguments.server_dir / client))
                files.clean(arguments.server_dir / client)
            rounds = open_rounds(arguments, state, validation)
            rounds.change_clients(clients)
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
    card_text      card_text() -> the model card of the result as ASCII JSON, "" where there is none
    preprocessing  how the pictures were made that the server scores with, "" where that is unknown
    """

    def __init__(
        self,
        rounds,
        max_examples=10_000_000,
        serve_unnamed=True,
        card_text=lambda: "",
        preprocessing="",
    ):
        self.rounds = rounds
        self.calls = service.Calls(rounds, max_examples, serve_unnamed, card_text, preprocessing)

    def getWeight(self, request, context):
        # 2. Receive the void request, return the weights in pieces.
        caller = self.calls.identify(context)
        yield from self.calls.send_weights(caller, context)

    def sendWeight(self, request_iterator, context):
        # 3. Record who sends, and with how many examples.
        caller = self.calls.identify(context)
        upload = self.calls.begin_upload(caller, request_iterator, context)
        # 4. Receive the weights, and check them.
        with self.calls.received(upload, context) as (path, sha256, file_sha256):
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
                file_sha256,
                upload.metrics,
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
        help="all that take part; at a restart, others may: from the open round on "
        f"(default: {','.join(NEW_RUN['clients'])})",
    )
    add(
        "--rounds",
        type=at_least(1),
        help="of the whole run; more than a finished run's extends it (default: 10)",
    )
    add("--arch", choices=list(model.ARCHS), help="the network (default: drcnn)")
    add(
        "--image-size",
        type=pixels,
        metavar="PIXELS",
        help="a side (default: each network's own, "
        f"{', '.join(f'{name} {arch.image_size}' for name, arch in model.ARCHS.items())})",
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
    add(
        "--on-round",
        metavar="COMMAND",
        help="run it after each round, with the round's scores as JSON on its standard input",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write each round's scores, and each client's, for TensorBoard (DIR/tensorboard)",
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
        choices["image_size"] = model.ARCHS[choices["arch"]].image_size
    size = choices["image_size"]
    say(
        f"a new run of {choices['rounds']} rounds: {choices['arch']} at {size} x {size} pixels, "
        f"seed {choices['seed']}, clients {', '.join(choices['clients'])}"
    )
    dataset = cards.read_prepared(arguments.index_dir).get("dataset", "synthetic")
    from_random = choices["weights"] == "none"
    if choices["arch"] == "drcnn" and from_random and dataset != "synthetic":
        say(
            "warning: drcnn begins from random weights and learns little from few photographs; "
            "--arch lite0 begins with a network that has seen photographs before"
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


def check_min_clients(arguments, clients):
    if arguments.min_clients and arguments.min_clients > len(clients):
        raise ValueError(
            f"--min-clients {arguments.min_clients} is more than the run's {len(clients)} clients"
        )


def open_rounds(arguments, state, validation):
    """The Rounds of this run, with whatever a crash interrupted finished."""
    folder = arguments.server_dir
    path = folder / "server_weight.h5"
    check_weights(path, state)
    files.clean(folder)
    # Every file of this run has the layout of this one.
    layout = weights.Layout(path)
    state = check_uploads(folder, state, layout)

    def merge(paths, num_examples):
        return weights.fedavg(paths, num_examples, layout, target=path)

    judge = Judge(folder, state, validation, arguments.index_dir)
    rounds = Rounds(
        folder,
        state,
        merge,
        judge.evaluate,
        arguments.min_clients,
        arguments.round_timeout,
        say,
        judge.publish_result,
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


def check_uploads(folder, state, layout):
    """Check the uploads of the open round like those that arrive; returns the state that remains.

    They lay on the disk, and an earlier version of this program may have accepted them: it kept
    them in whatever layout they came.
    """
    converters = convert.Converters(layout)
    for client in state.uploads:
        path = folder / client / "client_weights.h5"
        sha256 = files.sha256_of(path)
        held = [each for each in state.uploads[client] if file_sha256_of(each) == sha256]
        if not held:
            continue  # a crash came before the file: Rounds knows what that means
        try:
            if not weights.inspect(path, layout)[1]:
                state = convert_upload(folder, state, client, held[0], converters)
        except ValueError as error:
            say(f"upload rejected: {client}: {error}")
            others = {name: each for name, each in state.uploads.items() if name != client}
            state = state.changed(uploads=others)
    return state


def convert_upload(folder, state, client, upload, converters):
    """Bring a stored upload into the server's layout; returns the state that names it.

    As with an upload that replaces another, the state comes first and names both; after a crash the
    file's SHA-256 says which holds.
    """
    path = folder / client / "client_weights.h5"
    with files.replacing(path) as converted:
        shutil.copyfile(path, converted)
        try:
            file_sha256 = converters.convert(client, converted)
        except OSError as error:
            raise OSError(
                f"{path} could not be converted: {error}; start the server again"
            ) from None
        stored = new_upload(upload["num_examples"], upload["sha256"], file_sha256)
        state = state.changed(uploads={**state.uploads, client: [upload, stored]})
        state.save(folder / "state.json")
    say(f"{path} had another layout than the server's file: converted")
    return state


class Judge:
    """Scores the merged model on the validation images, and publishes what came out.

    What came out is the model card, server_weight.json, and the best model so far, best_weight.h5
    with its card.
    """

    def __init__(self, folder, state, validation, index_dir):
        self.weights_path = folder / "server_weight.h5"
        self.best_path = folder / "best_weight.h5"
        self.seed = state.seed
        self.arch = state.arch
        self.image_size = state.image_size
        self.validation = validation
        self.images = data.load_images(
            validation, state.image_size, files.temporary(folder / "images.npy")
        )
        # Both as they are now: prepare.py may make another data set while this run goes on.
        self.validation_sha256 = files.sha256_of(index_dir / "val_set.pkl")
        self.prepared = cards.read_prepared(index_dir)
        self.assessed = None  # what `evaluate` found, for the card

    @functools.cached_property
    def network(self):
        # Built for the first evaluation: clients can fetch before TensorFlow is loaded.
        model.configure(self.seed)
        return model.build(self.arch, self.image_size)

    def evaluate(self):
        """The metrics (dict) of server_weight.h5 over all validation images."""
        model.load(self.network, self.weights_path)
        p_healthy = model.predict(self.network, self.images)
        self.assessed = metrics.assess(p_healthy, self.validation)
        return metrics.scores(p_healthy, data.healthy(self.validation))

    def publish_result(self, state, row):
        """Publish the card of the evaluated round, and its model if it is the best so far.

        Returns what RunState.best says then. Called again after a crash, it publishes the same.
        """
        card = cards.make(state, row, self.prepared, self.validation_sha256, self.assessed)
        cards.publish(self.weights_path, card)
        area = self.assessed["choosing_auc"]
        if not is_better(area, state.best):
            return state.best
        # The weights first: until its card is there too, the pair is refused by whoever reads it.
        with files.replacing(self.best_path) as written:
            shutil.copyfile(self.weights_path, written)
        cards.publish(self.best_path, card)
        return {"round": row["round"], "auc": area, "sha256": state.weights_sha256}


def is_better(area, best):
    """Whether an AUC is greater than that of the best round. Without one the newer round is."""
    if best is None or area is None or best["auc"] is None:
        return True
    return area > best["auc"]


def card_text(weights_path):
    """The card beside a weight file as fedml-card sends it; "" where there is none of it."""
    try:
        return cards.to_wire(cards.read(weights_path))
    except ValueError:  # a run that an older version finished has none
        return ""


def preprocessing_of(index_dir):
    """How the server's pictures were made, where that can be told to clients."""
    found = cards.read_prepared(index_dir).get("preprocessing")
    return found if found in cards.KINDS_OF_PICTURES else ""


# --- serving -------------------------------------------------------------------------------------


def listen(arguments, rounds):
    """A started gRPC server."""
    service.raise_descriptor_limit()
    service.keep_one_heap()
    is_local = tls.is_this_machine(arguments.listen)
    servicer = FedMLServicer(
        rounds,
        arguments.max_examples,
        serve_unnamed=is_local or arguments.insecure,
        card_text=lambda: card_text(rounds.weights_path),
        preprocessing=preprocessing_of(arguments.index_dir),
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
    status = StatusFile(rounds)
    status.start()
    followers = follow(arguments, rounds)
    threading.Thread(target=lambda: codes.put(coordinate(rounds)), daemon=True).start()
    code = codes.get()
    if code == 0:
        # Let calls that are answered just now end, and what the flags ask for after a round, but
        # still hear a signal.
        def see_off():
            server.stop(LAST_ANSWER_S).wait(LAST_ANSWER_S)
            for each in followers:
                each.finish()
            codes.put(0)

        threading.Thread(target=see_off, daemon=True).start()
        code = codes.get()
    if code == 0:
        say(f"finished after {rounds.state.rounds} rounds; the model is {rounds.weights_path}")
        best = rounds.state.best
        if best and best["round"] != rounds.state.evaluated:
            path = rounds.folder / "best_weight.h5"
            say(f"the best round by AUC was {best['round']}; its model is {path}")
        status.publish()
        return 0
    if code > 128:
        say("stopping; what has arrived is kept, start the server again to go on")
        rounds.stop("UNAVAILABLE", "the server is stopping; it goes on when it is started again")
    status.publish()
    server.stop(1).wait(1.5)
    return code


def follow(arguments, rounds):
    """The Followers that the flags ask for."""
    followers = []
    if arguments.on_round:
        command = RoundCommand(arguments.on_round, rounds.state, say)
        followers.append(Follower(rounds, command.tell, "--on-round"))
    if arguments.tensorboard:
        # Before an event file starts TensorFlow: how many threads it has cannot be set afterwards.
        model.configure(rounds.state.seed)
        files_of_run = EventFiles(arguments.server_dir / "tensorboard" / rounds.state.run)
        followers.append(Follower(rounds, files_of_run.write, "--tensorboard"))
    return followers


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

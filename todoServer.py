"""The federated server: hands out the weights, waits for all clients, averages, evaluates.

    python3 todoServer.py                                     # three clients, ten rounds, here
    python3 todoServer.py --clients uppsala,lund --rounds 40

Killed at any instant, run the same command again to resume. Exit codes: 0 finished, 1 an error,
2 wrong usage, 3 too few clients within --round-timeout, 130 Ctrl-C, 143 SIGTERM.
"""

# Flags, start, end, and what is made of a merged model. The rounds are `federation`'s: what clients
# send is checked there, and HDF5 opens no file of theirs in this process that has not the server's
# own bytes outside its tensors.

import argparse
import functools
import importlib.util
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
    end_when_a_thread_dies,
    exit_on_signals,
    initial_weights,
    new_parser,
    pixels,
    seconds,
    start_script,
    watch_signals,
)

if __name__ == "__main__":
    start_script(never_waits=True)  # before the packages, so that a missing one is a sentence

import data
import model
from common import files
from federation import service, status, tls, weights
from federation.rounds import Refused, Rounds, TooFewClients
from federation.state import RunState
from generated import todo_pb2_grpc
from reporting import card as cards
from reporting import metrics

# How long a finished server stays for clients that do not move.
LAST_ANSWER_S = 30
# How long answers that are on their way may take at the end.
GRACE_S = 1.5
# What a new run is, where no flag says otherwise.
NEW_RUN = {
    "clients": ["client001", "client002", "client003"],
    "rounds": 10,
    "arch": "drcnn",
    "image_size": None,  # each network's own
    "seed": 0,
    "weights": None,  # each network's own
}
# Flags that belong to the run: at a restart they may be left out, but not be changed.
FIXED_FLAGS = ("arch", "image_size", "seed", "weights")
# What a run writes into --server-dir, beside a folder for each client. The state comes first: once
# it is moved aside, the files that are left belong to no run.
RUN_FILES = (
    "state.json",
    "server_weight.h5",
    "server_weight.json",
    "clients.csv",
    "best_weight.h5",
    "best_weight.json",
    "history.csv",
    "status.json",
    "report.html",
)

say = functools.partial(log.say, "server")


def main(argv=None):
    arguments = parse(argv)
    exit_on_signals("server", "stopped before it began to listen; start it again")
    try:
        with ExitStack() as locks:
            locks.enter_context(files.alone_in(arguments.server_dir))
            tls.check_free(arguments.listen)  # before any work
            evaluator = Evaluator(arguments)
            state = resume(arguments, evaluator)
            clients = arguments.clients or (state.clients if state else NEW_RUN["clients"])
            if (arguments.min_clients or 1) > len(clients):
                raise ValueError(
                    f"--min-clients {arguments.min_clients} is more than the run's {len(clients)} "
                    "clients"
                )
            state = state or begin(arguments, evaluator)
            # Also those who leave: what they delivered for the open round is moved aside.
            for client in sorted({*clients, *state.clients}):
                locks.enter_context(files.alone_in(arguments.server_dir / client))
                files.clean(arguments.server_dir / client)
            rounds = open_rounds(arguments, state, evaluator)
            rounds.change_clients(clients)
            code = serve(arguments, rounds, evaluator)
            # Without joining threads: one may be in the middle of an evaluation.
            end_script(code)
    except (ValueError, OSError) as error:
        return fail("server", error)


class FedMLServicer(todo_pb2_grpc.FedMLServicer):
    """The calls of todo.proto, as the thesis numbers the server's steps.

    Step 1, the first weights, is `begin`. A step that refuses a call raises Refused, and the caller
    gets its status code and sentence. The arguments are those of `service.Service`.
    """

    def __init__(self, rounds, max_examples, serve_unnamed, card_text):
        self.rounds = rounds
        self.service = service.Service(rounds, max_examples, serve_unnamed, card_text)

    def getWeight(self, request, context):
        # 2. Receive the void request, return the weights in pieces.
        caller = self.service.identify(context)
        yield from self.service.send_weights(caller, context)

    def sendWeight(self, request_iterator, context):
        # 3. Record who sends, and with how many examples. 4. Receive the weights, and check them.
        caller = self.service.identify(context)
        with self.service.received(caller, request_iterator, context) as upload:
            # 5. Save them in the client's folder, and wait for all clients. Step 6, merge and
            #    evaluate, is the coordinator's: `Rounds.run`, in a thread of its own.
            self.rounds.deliver(upload, context.is_active)
        # 7. Answer myResponse(value=1).
        return self.service.answer(context)

    def tell(self, request_iterator, context):
        # Ours: a client says where it is, and hears which round is open.
        caller = self.service.identify(context)
        return self.service.hear(caller, request_iterator, context)


def parser():
    """The flags of this script, for itself and for the launcher."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add(
        "--listen",
        type=tls.address,
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
        help="of the whole run; more than a finished run's extends it "
        f"(default: {NEW_RUN['rounds']})",
    )
    add(
        "--arch",
        choices=list(model.ARCHS),
        help=f"the network (default: {NEW_RUN['arch']})",
    )
    add(
        "--image-size",
        type=pixels,
        metavar="PIXELS",
        help="a side (default: each network's own, "
        f"{', '.join(f'{name} {arch.image_size}' for name, arch in model.ARCHS.items())})",
    )
    add(
        "--seed",
        type=at_least(0),
        help=f"of the initial weights (default: {NEW_RUN['seed']})",
    )
    add(
        "--weights",
        metavar="none|imagenet|FILE",
        help="to start from (default: each network's own, "
        f"{', '.join(f'{name} {arch.weights}' for name, arch in model.ARCHS.items())})",
    )
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
        "--tensorboard",
        action="store_true",
        help="write each round's scores for TensorBoard (tensorboard/ in the server's folder)",
    )
    tls.add_arguments(
        add,
        "the CA that signed the clients' certificates: each client must show its own, in its name "
        "(mutual TLS)",
        "the server's certificate, for TLS",
    )
    return parser


def parse(argv):
    flags = parser()
    arguments = flags.parse_args(argv)
    tls.check_arguments(flags, arguments, arguments.listen, bool(arguments.tls_cert))
    if arguments.min_clients and not arguments.round_timeout:
        flags.error(
            "--min-clients needs --round-timeout: without a limit the server waits for all clients"
        )
    # A run that goes on does not need the file, which --fresh may have moved aside.
    begins = arguments.fresh or not (arguments.server_dir / "state.json").exists()
    if begins and arguments.weights:
        try:
            initial_weights(arguments.weights)
        except argparse.ArgumentTypeError as error:
            flags.error(f"argument --weights: {error}")
    if arguments.tensorboard and importlib.util.find_spec("tensorboard") is None:
        flags.error("--tensorboard needs its package: pip install tensorboard")
    return arguments


def client_names(text):
    """An argparse type: NAME,... as a sorted list."""
    names = [client_name(name) for name in text.split(",")]
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different names")
    taken = [name for name in names if name in (*RUN_FILES, "features.npz", "tensorboard")]
    if taken:
        raise argparse.ArgumentTypeError(
            f"a client cannot be called {taken[0]!r}: the server has a file of that name"
        )
    return sorted(names)


# --- the run: resumed, or begun ------------------------------------------------------------------


def resume(arguments, evaluator):
    """The state of the run in --server-dir as it was left; None where a new one is to begin.

    Raises ValueError where the flags or the validation images contradict it.
    """
    folder = arguments.server_dir
    if arguments.fresh:
        return None
    state = RunState.load(folder / "state.json", remedy="move it away, or begin with --fresh")
    if state is None:
        return None
    if state.arch not in model.ARCHS:
        raise ValueError(
            f"the run in {folder} has --arch {state.arch[:40]}, and this program knows "
            f"{', '.join(model.ARCHS)}: go on with the program that began it, or begin with --fresh"
        )
    for name in FIXED_FLAGS:
        given = getattr(arguments, name)
        kept = getattr(state, name)
        if given is not None and given != kept:
            raise ValueError(
                f"--{name.replace('_', '-')} is {given}, but the run in {folder} has {kept}: leave "
                "the flag out to go on with that run, or begin a new one with --fresh"
            )
    for name in ("validation_sha256", "preprocessing"):
        if getattr(state, name) != getattr(evaluator, name):
            raise ValueError(
                f"the run in {folder} is scored on other images than {arguments.index_dir} has now "
                f"({name} was {getattr(state, name)[:12]!r}, is "
                f"{getattr(evaluator, name)[:12]!r}): put val_set.pkl and prepared.json back, or "
                "begin with --fresh"
            )
    if arguments.rounds:
        # A run cannot end before what it has merged, or is about to.
        merged = state.round if state.frozen else state.round - 1
        state = state.changed(rounds=max(arguments.rounds, merged))
    if state.is_over:
        say(
            f"run {state.run} is over ({state.evaluated} rounds); --rounds N goes on, --fresh "
            "begins a new one"
        )
    else:
        # This may be a round less than are merged: the last evaluation is then repeated.
        next_round = state.evaluated + 1
        say(f"resuming run {state.run} at round {next_round}/{state.rounds} from {folder}")
    return state


def begin(arguments, evaluator):
    """Step 1 of the thesis: initialize the model. Publishes its weights, then a new run's state."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    choices = {name: given.get(name, default) for name, default in NEW_RUN.items()}
    arch = model.ARCHS[choices["arch"]]
    choices["image_size"] = choices["image_size"] or arch.image_size
    choices["weights"] = choices["weights"] or arch.weights
    size = choices["image_size"]
    say(
        f"a new run of {choices['rounds']} rounds: {choices['arch']} at {size} x {size} pixels, "
        f"weights {choices['weights']}, seed {choices['seed']}, clients "
        f"{', '.join(choices['clients'])}"
    )
    dataset = evaluator.prepared.get("dataset", "synthetic")
    from_random = choices["weights"] == "none"
    if choices["arch"] == "drcnn" and from_random and dataset != "synthetic":
        say(
            "warning: drcnn begins from random weights and learns little from few photographs; "
            "--arch lite0 begins with a network that has seen photographs before"
        )
    if warning := cards.too_small(evaluator.prepared, size):
        say(warning)
    model.configure(choices["seed"])
    network = model.build(choices["arch"], size, choices["seed"])
    model.initialize(network, choices["weights"])
    moved = move_aside(arguments.server_dir)  # not before this run has all that it needs
    if moved:
        say(f"the old run's files are in {moved}")
    model.save(network, evaluator.weights_path)
    state = RunState(
        run=secrets.token_hex(8),
        weights_sha256=files.sha256_of(evaluator.weights_path),
        validation_sha256=evaluator.validation_sha256,
        preprocessing=evaluator.preprocessing,
        freeze_base=arch.freezes_base(choices["weights"]),
        **choices,
    )
    state.save(arguments.server_dir / "state.json")
    return state


def move_aside(folder):
    """Move what a run wrote into `folder`, and nothing else, to a new folder there (or None)."""
    sites = sorted({upload.parent for upload in folder.glob("*/client_weights*.h5")})
    return files.move_aside(
        folder,
        [
            *(folder / name for name in RUN_FILES),
            # A state.json beside it means that a client works there, in its own folder.
            *(site for site in sites if not (site / "state.json").exists()),
        ],
    )


def open_rounds(arguments, state, evaluator):
    """The Rounds of this run, with whatever a crash interrupted finished."""
    folder = arguments.server_dir
    path = evaluator.weights_path
    check_weights(path, state)
    files.clean(folder)
    # Every file of this run has the layout of this one.
    layout = weights.Layout(path)

    def merge(paths, num_examples):
        # A frozen base counts as trained: who leaves it as it is adds nothing to its update.
        trainable = model.trainable(evaluator.network)
        sha256, products = weights.fedavg(paths, num_examples, layout, path, trainable)
        return sha256, weights.compare_updates(products, num_examples)

    evaluator.open(state)
    rounds = Rounds(
        folder,
        state,
        merge,
        evaluator.evaluate,
        evaluator.publish_result,
        say,
        arguments.min_clients,
        arguments.round_timeout,
    )
    rounds.open()
    return rounds


def check_weights(path, state):
    """Raises ValueError where server_weight.h5 is not the model that the state names."""
    found = files.sha256_of(path)
    if not found:
        raise ValueError(
            f"{path} is missing, though {path.with_name('state.json')} knows a run: put it back, "
            "or begin with --fresh"
        )
    # Of a frozen round the merge may be done and not yet committed: the file is then newer.
    if not state.frozen and found != state.weights_sha256:
        raise ValueError(
            f"{path} is not the model of round {state.round} of the run in "
            f"{path.with_name('state.json')}: put that back, or begin with --fresh"
        )


class Evaluator:
    """Scores the merged model on the validation images, and publishes what came out.

    What came out is the model card, server_weight.json, and the best model so far, best_weight.h5
    with its card. With --tensorboard, also its scores as events.
    """

    def __init__(self, arguments):
        self.folder = arguments.server_dir
        self.weights_path = self.folder / "server_weight.h5"
        self.best_path = self.folder / "best_weight.h5"
        self.events_path = self.folder / "tensorboard" if arguments.tensorboard else None
        index = arguments.index_dir / "val_set.pkl"
        self.validation = data.read_index(index)
        # Both as they are now: prepare.py may make another data set while this run goes on.
        self.validation_sha256 = files.sha256_of(index)
        self.prepared = cards.read_prepared(arguments.index_dir)
        found = self.prepared.get("preprocessing")
        # "" where that cannot be told to clients
        self.preprocessing = found if found in cards.KINDS_OF_PICTURES else ""

    def open(self, state):
        """Load the images of this run: once, before anyone is served."""
        self.state = state
        self.images = data.images_for(
            self.validation, state.image_size, self.folder, on_features=state.freeze_base
        )

    @functools.cached_property
    def network(self):
        # Built for the first merge: clients can fetch before TensorFlow is loaded.
        model.configure(self.state.seed)
        return model.build(self.state.arch, self.state.image_size)

    def evaluate(self):
        """The metrics (dict) of server_weight.h5 over all validation images."""
        model.load(self.network, self.weights_path)
        p_healthy = model.predict(self.network, self.images)
        self.assessed = metrics.assess(p_healthy, self.validation)  # for the card
        return metrics.scores(p_healthy, data.healthy(self.validation))

    def publish_result(self, state, row):
        """Publish the card of the evaluated round, and its model if it is the best so far.

        Returns what RunState.best says then, and the scores in words, as on the page: a model has
        one number wherever a person reads it. Called again after a crash, it publishes the same.
        """
        card = cards.make(state, row, self.prepared, self.validation_sha256, self.assessed)
        cards.publish(self.weights_path, card)
        if self.events_path:
            write_events(self.events_path / state.run, row)
        line = self.line_of(state, card)
        area = self.assessed["choosing_auc"]
        best_area = (state.best or {}).get("auc")
        is_better = area is None or best_area is None or area > best_area  # without one the newer
        if card["num_nan"] or not is_better:
            return state.best, line
        # The weights first: until its card is there too, the pair is refused by whoever reads it.
        with files.replacing(self.best_path) as written:
            shutil.copyfile(self.weights_path, written)
        cards.publish(self.best_path, card)
        return {"round": row["round"], "auc": area, "sha256": state.weights_sha256}, line

    def line_of(self, state, card):
        """The scores in words; of a model that answers NaN, with whose update may be why."""
        if not card["num_nan"]:
            return cards.summary(card)
        paths = {
            client: self.folder / client / "client_weights.h5"
            for client, upload in state.counted.items()
            if upload["round"] == card["round"]
        }
        suspects = [
            client
            for client, path in paths.items()
            # by its digest: a client may have delivered for the next round by now
            if files.sha256_of(path) == state.counted[client]["file_sha256"]
            and weights.has_negative_variance(path)
        ]
        line = f"the merged model {card['warning'].removeprefix('it ')}"
        if suspects:
            line += (
                f"; the update of {', '.join(suspects)} holds a negative moving variance, which no "
                "training makes"
            )
        return line

    def card_text(self):
        """The card of server_weight.h5 as fedml-card sends it; "" where its file is gone."""
        try:
            return cards.to_wire(cards.read(self.weights_path))
        except ValueError as error:
            say(f"warning: the result goes out without its model card: {error}")
            return ""


def write_events(folder, row):
    """The scores of a round as events that TensorBoard draws; what fails here is a warning."""
    try:
        import tensorflow as tf  # the evaluation has loaded it by now

        with tf.summary.create_file_writer(str(folder)).as_default(step=row["round"]):
            for name in ("loss", "accuracy", "auc", "sensitivity", "specificity"):
                if row[name] is not None:
                    tf.summary.scalar(name, row[name])
    except Exception as error:
        say(f"warning: --tensorboard: {type(error).__name__}: {error}; the run goes on")


# --- serving -------------------------------------------------------------------------------------


def listen(arguments, rounds, evaluator):
    """A started gRPC server."""
    service.raise_descriptor_limit()
    service.keep_one_heap()
    is_local = tls.is_this_machine(arguments.listen)
    servicer = FedMLServicer(
        rounds, arguments.max_examples, is_local or arguments.insecure, evaluator.card_text
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


def serve(arguments, rounds, evaluator):
    """Listen, and run the rounds until they are over or a signal comes. Returns the exit code."""
    codes = queue.SimpleQueue()  # the one thing that the main thread waits for
    watch_signals([signal.SIGTERM, signal.SIGINT], lambda number: codes.put(128 + number))
    end_when_a_thread_dies("server")
    server = listen(arguments, rounds, evaluator)
    threading.Thread(target=status.follow, args=[rounds], daemon=True).start()
    threading.Thread(target=lambda: codes.put(coordinate(rounds)), daemon=True).start()
    code = codes.get()
    if code == 0:
        say(f"finished after {rounds.state.rounds} rounds; the model is {rounds.weights_path}")
        best = rounds.state.best
        if best and best["round"] != rounds.state.evaluated:
            say(f"the best round by AUC was {best['round']}; its model is {evaluator.best_path}")
    elif code > 128:
        say("stopping; what has arrived is kept, start the server again to go on")
        rounds.stop("UNAVAILABLE", "the server is stopping; it goes on when it is started again")
    server.stop(GRACE_S).wait(GRACE_S)
    status.write(rounds.folder, status.status_of(rounds))
    return code


def coordinate(rounds):
    """Close round after round, then stay for the last answers. Returns the exit code."""
    try:
        rounds.run()
        rounds.wait_until_all_done(LAST_ANSWER_S)
        return 0
    except TooFewClients as error:
        return fail("server", error, 3)
    except Refused:
        return 1  # a signal stopped the rounds: its own code came first
    except Exception as error:
        return fail(
            "server",
            f"round {rounds.state.evaluated + 1} failed: {type(error).__name__}: {error}; what was "
            "delivered is kept: start the server again when the cause is gone",
        )


if __name__ == "__main__":
    end_script(main())

"""One hospital: fetches the weights, trains on its own images, sends the weights back; round after round.

    python3 todoClient.py --name client001                              # trains on index/worker1.pkl
    python3 todoClient.py --name client002 --server SERVER_IP:50051 --epochs 2

Killed at any instant and started again with the same command, it takes part again. Exit codes: 0 the run is over,
1 refused or an error, 2 wrong usage, 4 gave up on a server that is away, 5 the last round was delivered but never
answered, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import random
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from common.script import (
    at_least,
    client_name,
    exit_on_signals,
    fail,
    pixels,
    say,
    seconds,
    start_script,
)

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import grpc

import data
import model
from common import files
from federation import tls, weights
from generated import todo_pb2, todo_pb2_grpc

HISTORY_COLUMNS = "round,epoch,loss,accuracy,num_examples,seconds".split(",")
SETTINGS = (
    "name",
    "threads",
    "seed",
    "epochs",
    "batch_size",
    "freeze_base",
    "no_augmentation",
)  # what was trained follows
REPORT_EVERY_S = 30
CONNECT_S = (
    10  # an attempt that lasted longer than a connection may take had a server at its other end
)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10
MESSAGE_BYTES = 2 << 20
MAX_WEIGHTS_BYTES = 4 << 30
SEED_TASK = {
    "run": "",
    "arch": "vgg16",
    "image_size": 224,
}  # what a server trains that names nothing
REFUSALS = {
    grpc.StatusCode[name]
    for name in (
        "INVALID_ARGUMENT",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "ABORTED",
        "RESOURCE_EXHAUSTED",
        "UNIMPLEMENTED",
    )
}


class Finished(Exception):
    """The run is over."""


class GaveUp(Exception):
    """The server has been away for --give-up-after."""


def main(argv=None):
    arguments = parse(argv)
    exit_on_signals(f"{arguments.name}: stopped; start it again to take part again")
    try:
        with files.alone_in(arguments.client_dir):
            federate(Site(arguments))
    except Finished as end:
        say(arguments.name, end)
        return 0
    except GaveUp as error:
        return fail(arguments.name, *error.args)
    except (ValueError, OSError) as error:
        return fail(arguments.name, error)


def federate(site):
    """The seed's five steps, round after round, until Finished is raised."""
    while True:
        if not site.has_trained_weights():
            task = keep_trying(ClientgetWeight, site)  # 1, 2: connect, get the weights
            train(site, task)  # 3: create the model, load the weights, train, save
        keep_trying(ClientsendWeight, site)  # 4: upload, wait for the answer
        # 5: next round


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--name",
        required=True,
        type=client_name,
        help="who this is, as the server's --clients has it",
    )
    add("--server", default="localhost:50051", metavar="HOST:PORT", help="(default: %(default)s)")
    add(
        "--epochs",
        type=at_least(1),
        default=1,
        help="passes over the images in a round (default: %(default)s)",
    )
    add("--batch-size", type=at_least(1), default=16, metavar="N", help="(default: %(default)s)")
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="of shuffling and augmentation (default: %(default)s)",
    )
    add(
        "--index",
        type=Path,
        metavar="FILE",
        help="(default: index/workerK.pkl, K the number at the end of the name)",
    )
    add(
        "--client-dir", type=Path, metavar="DIR", help="weights, state, history (default: the name)"
    )
    add(
        "--rounds",
        type=at_least(1),
        default=100,
        help="only for a server that names none (default: %(default)s)",
    )
    add(
        "--threads",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of TensorFlow (default: 0, all cores)",
    )
    add("--freeze-base", action="store_true", help="train only the dense layers of a vgg16")
    add(
        "--no-augmentation",
        action="store_true",
        help="train on the images as they are, without rotation and flips",
    )
    add(
        "--give-up-after",
        type=seconds,
        default=600,
        metavar="S",
        help="of a server that is away (default: %(default)s)",
    )
    tls.add_arguments(
        add,
        "that signed the server's certificate: speak TLS",
        "this client's certificate, in its --name",
    )
    arguments = parser.parse_args(argv)
    tls.check_arguments(parser, arguments, arguments.server, bool(arguments.tls_ca))
    arguments.index = arguments.index or data.worker_index(arguments.name)
    if arguments.index is None:
        parser.error(
            f"--name {arguments.name} ends in no number: say which images are its own with --index FILE"
        )
    arguments.client_dir = arguments.client_dir or Path(arguments.name)
    return arguments


class Site:
    """What a client knows: its images, its network, and the state file.

    The state's `trained` says for which round client_weights.h5 was trained, as long as it is not delivered: whoever
    finds it at a start delivers instead of training again.
    """

    def __init__(self, arguments):
        self.arguments, self.name = arguments, arguments.name
        files.clean(arguments.client_dir)
        self.weights = arguments.client_dir / "client_weights.h5"
        self.records = data.read_index(arguments.index)
        nothing = {"run": None, "round": 0, "rounds": 0, "trained": None, "history": []}
        self.state = files.load_state(arguments.client_dir / "state.json", nothing) or nothing
        arguments.threads = arguments.threads or model.default_threads()
        self.settings = {name: getattr(arguments, name) for name in SETTINGS} | {
            "index": files.sha256_of(arguments.index)[:12],
            "num_examples": len(self.records),
        }
        self.network = self.batches = None
        self.sent = False  # whether the open round's weights went out whole at least once

    def say(self, line):
        say(self.name, line)

    def save(self, **changes):
        self.state.update(changes)
        files.save_state(self.arguments.client_dir / "state.json", self.state)

    def has_trained_weights(self):
        trained = self.state["trained"]
        if trained is None or trained["sha256"] != files.sha256_of(self.weights):
            return False
        changed = [
            f"{name} was {trained.get(name)}, is {now}"
            for name, now in self.settings.items()
            if trained.get(name) != now
        ]
        if changed:
            self.say(
                f"round {self.state['round']}: trained before with other settings ({'; '.join(changed)}): training again"
            )
        return not changed

    def prepare(self, task):
        """The network and the images, once for all rounds."""
        if self.network is None or (self.network.name, self.network.input_shape[1]) != (
            task["arch"],
            task["image_size"],
        ):
            model.configure(self.arguments.seed, self.arguments.threads)
            self.network = model.build(task["arch"], task["image_size"])
            if self.arguments.freeze_base:
                model.freeze_base(self.network)
            images = data.load_images(
                self.records,
                task["image_size"],
                files.temporary(self.weights.with_name("images.npy")),
            )
            self.batches = data.TrainingBatches(
                images,
                data.healthy(self.records),
                self.arguments.batch_size,
                self.arguments.seed,
                self.name,
                not self.arguments.no_augmentation,
            )


def ClientgetWeight(stub, site):
    """get weight from server: client_weights.h5 is then the server's. Returns the task (dict): run, round, rounds, arch,
    image_size. Raises Finished."""
    with waiting(site, "for the weights"), files.replacing(site.weights) as written:
        call = stub.getWeight(
            todo_pb2.void(), metadata=(("fedml-client", site.name), ("fedml-accept", "blob"))
        )
        told = dict(call.initial_metadata())
        digest = weights.spool(call, written, MAX_WEIGHTS_BYTES)
        if told.get("fedml-sha256", digest) != digest:
            raise ValueError(
                f"the weights arrived with SHA-256 {digest}, the server announced {told['fedml-sha256']}"
            )
    if "fedml-run" in told:
        try:
            task = {
                "run": told["fedml-run"],
                "arch": told["fedml-arch"],
                "image_size": pixels(told["fedml-image-size"]),
                "round": at_least(1)(told["fedml-round"]),
                "rounds": at_least(1)(told["fedml-rounds"]),
            }
            model.ARCHS[task["arch"]]  # known?
        except (KeyError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(
                f"the server names a run, but not its network and round as expected ({error}): is it this "
                "project's todoServer.py, of the same commit?"
            ) from None
    else:  # the thesis demo's server: the client counts
        counted = (
            site.state["round"] - bool(site.state["trained"])
            if site.state["run"] == SEED_TASK["run"]
            else 0
        )
        task = {**SEED_TASK, "round": counted + 1, "rounds": site.arguments.rounds}
    if task["round"] > task["rounds"]:
        raise Finished(
            f"the run is over after {task['rounds']} rounds; its result is in {site.weights}"
        )
    return task


def train(site, task):
    """Trains on the site's own images; publishes client_weights.h5, history.csv and state.json, in this order."""
    site.prepare(task)
    model.load(site.network, site.weights)
    title = f"round {task['round']}/{task['rounds']}"
    site.say(f"{title}: training on {len(site.records)} images")
    rows = model.train(
        site.network,
        site.batches,
        task["round"],
        site.arguments.epochs,
        lambda row: site.say(
            f"{title}: epoch {row['epoch']}/{site.arguments.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
            f"({row['seconds']:.1f} s)"
        ),
    )
    model.save(site.network, site.weights)
    before = site.state["history"] if site.state["run"] == task["run"] else []
    history = [row for row in before if row["round"] < task["round"]] + rows
    files.publish_rows(site.arguments.client_dir / "history.csv", HISTORY_COLUMNS, history)
    site.save(
        run=task["run"],
        round=task["round"],
        rounds=task["rounds"],
        history=history,
        trained={**site.settings, "sha256": files.sha256_of(site.weights)},
    )
    site.sent = False


def ClientsendWeight(stub, site):
    """send weight to server, and wait for its answer. Afterwards nothing is left to deliver. Raises Finished."""
    state, trained = site.state, site.state["trained"]
    title = f"round {state['round']}/{state['rounds']}"
    if state["run"]:
        metadata = (
            ("fedml-client", site.name),
            ("fedml-run", state["run"]),
            ("fedml-round", str(state["round"])),
            ("fedml-sha256", trained["sha256"]),
        )
        messages = weights.blob_messages(site.weights, site.name, trained["num_examples"])
    else:
        metadata = ()
        messages = weights.base64_messages(
            site.weights, f"{site.name}/{weights.SEED_FILE_NAME}", trained["num_examples"]
        )

    def noted():
        yield from messages
        site.sent = True

    try:
        with waiting(site, "for the server's answer", title):
            answer, call = stub.sendWeight.with_call(noted(), metadata=metadata)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
            raise
        site.say(f"{title}: these weights do not count ({error.details()}); dropped")
        return site.save(trained=None)
    told = dict(call.trailing_metadata())
    site.save(trained=None, round=state["round"] - (answer.value != 1))
    if answer.value != 1:
        return site.say(
            f"{title}: the server did not merge (answer {answer.value}): fetching again"
        )
    if "fedml-done" in told or (not state["run"] and state["round"] >= state["rounds"]):
        raise Finished(
            f"the run is over after {state['rounds']} rounds; {site.weights} is this site's last; "
            "the merged model is the server's server_weight.h5"
        )


def keep_trying(attempt, site):
    """attempt(stub, site), on a new connection each time, until it succeeds or is refused. Raises GaveUp, ValueError."""
    away_since, said, pause_s = None, 0, FIRST_PAUSE_S
    while True:
        started = time.monotonic()
        try:
            with connect(site) as channel:
                return attempt(todo_pb2_grpc.FedMLStub(channel), site)
        except grpc.RpcError as error:
            code, sentence = error.code(), error.details() or ""
        if code in REFUSALS:
            raise ValueError(f"the server refused: {sentence} ({code.name})")
        now = time.monotonic()
        if away_since is None or now - started > 2 * CONNECT_S:
            away_since, said, pause_s = now, 0, FIRST_PAUSE_S
        give_up_s = site.arguments.give_up_after
        if now - away_since >= give_up_s:
            raise gave_up(site)
        if not said or now - said >= REPORT_EVERY_S:
            said = now
            if code == grpc.StatusCode.UNAVAILABLE and (why := tls.explain(site.arguments)):
                raise ValueError(why)
            reason = (
                "no server answers there yet"
                if "connect" in sentence.lower()
                else sentence or code.name
            )
            site.say(
                f"waiting for the server at {site.arguments.server} ({reason}); "
                f"giving up in {give_up_s - (now - away_since):.0f} s"
            )
        time.sleep(
            min(pause_s * random.uniform(0.5, 1.5), max(0, away_since + give_up_s - now))
        )  # jitter: not all at once
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def gave_up(site):
    away = f"the server at {site.arguments.server} did not answer for {site.arguments.give_up_after:g} s"
    state = site.state
    if state["trained"] and site.sent and state["round"] == state["rounds"]:
        return GaveUp(
            f"{away}; the last round's weights were delivered and never answered: the run is probably over, "
            "look at the server; started again, this client asks again",
            5,
        )
    return GaveUp(
        f"{away}; what was trained is kept: start this client again when the server is back", 4
    )


def connect(site):
    """A channel of its own for each attempt: an old one would keep its back-off and its dead connection."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.min_reconnect_backoff_ms", CONNECT_S * 1000),
    ]
    if site.state[
        "run"
    ]:  # a server of ours: it lets us knock while everyone trains, the thesis demo's would hang up
        options += [
            ("grpc.keepalive_time_ms", 8000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    return tls.channel(site.arguments, options)


@contextmanager
def waiting(site, what, title=""):
    """Says every 30 s for what and for how long this client waits, while the body runs."""
    over, started = threading.Event(), time.monotonic()

    def report():
        while not over.wait(REPORT_EVERY_S):
            site.say(
                f"{title + ': ' if title else ''}waiting {what} for {time.monotonic() - started:.0f} s"
            )

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        over.set()


if __name__ == "__main__":
    sys.exit(main())

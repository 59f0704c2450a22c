"""One hospital: fetch the weights, train on its own images, send them back; round after round.

What leaves it is weights, numbers and its name: no image and no index goes into a message.

    python3 todoClient.py --name client001                      # trains on index/worker1.pkl
    python3 todoClient.py --name client002 --server SERVER_IP:50051 --epochs 2

Killed at any instant and started again with the same command, it takes part again. Exit codes:
0 the run is over, 1 refused or an error, 2 wrong usage, 4 try again later: the server was away for
--give-up-after, or this machine's disk is full or its open files are used up; 5 the last round was
delivered but never answered, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import math
import random
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from common.log import fail, plain, say
from common.script import (
    at_least,
    client_name,
    end_script,
    exit_on_signals,
    new_parser,
    pixels,
    positive,
    seconds,
    start_script,
)

if __name__ == "__main__":
    start_script(never_waits=True)  # before the packages, so that a missing one is a sentence

import grpc
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import data
import model
from common import files
from federation import convert, tls, weights
from generated import todo_pb2, todo_pb2_grpc
from reporting import card as cards
from reporting import metrics

# The last four are of the weights that the round began with, on the images of --val-index.
HISTORY_COLUMNS = ["round", "epoch", "loss", "accuracy", "num_examples", "seconds"]
HISTORY_COLUMNS += ["held_out_loss", "held_out_auc", "held_out_sensitivity", "held_out_specificity"]

# The flags that decide what a round's training gives; the state keeps what they were.
TRAINING_FLAGS = [
    "name",
    "threads",
    "seed",
    "epochs",
    "batch_size",
    "learning_rate",
    "freeze_base",
    "no_augmentation",
]
# What the state says of a run that was not begun, and the types of its entries.
NEW_STATE = {
    "run": None,
    "round": 0,
    "rounds": 0,
    "trained": None,
    "history": [],
}
STATE_KINDS = {
    "run": str | None,
    "round": int,
    "rounds": int,
    "trained": dict | None,
    "history": list,
}
# What a run writes into --client-dir; once the state is moved aside, the others belong to no run.
RUN_FILES = (
    "state.json",
    "client_weights.h5",
    "history.csv",
    "server_weight.h5",
    "server_weight.json",
)

REPORT_EVERY_S = 30  # how often the log says that this client waits
TELL_EVERY_S = 5  # how often the server is told where this client is
TELL_TIMEOUT_S = 10
UNANSWERED_S = 60  # a server that answers nothing for so long is away, be its port open
PING_S = 8  # while a call waits: to a server of ours, which allows it
RARE_PING_S = 330  # to any other: the thesis demo's hangs up on who pings within five minutes
FIRST_PAUSE_S = 0.2  # between two attempts, as in `keep_trying`
LONGEST_PAUSE_S = 10
CONNECT_S = 10  # what gRPC may take to connect
SERVED_S = 2 * CONNECT_S  # a call that lasted longer had a server at its other end

MAX_WEIGHTS_BYTES = 4 << 30  # that a server may send

# What a server trains that names nothing: the thesis demo's, of 2020. A run without an id is its.
TASK_OF_2020 = {
    "run": "",
    "arch": "vgg16",
    "image_size": 224,
    "freeze_base": False,
    "preprocessing": "",
}

# Status codes that trying again does not change.
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
# Those of an upload that never will count, so it is not kept: another run or another round is open
# by now, or the run is over (FAILED_PRECONDITION); or the server finds fault with the weights.
# Training is deterministic, so to train at once would give the same again: the client then ends,
# and its next start trains with what its user has changed.
REJECTIONS = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT}
# Those of a server that does not answer.
UNANSWERED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


class RoundClosed(Exception):
    """The round that this client trains for was closed without it."""


class GaveUp(Exception):
    """GaveUp(sentence, exit code): the server has been away for --give-up-after."""


def main(argv=None):
    arguments = parse(argv)
    exit_on_signals(arguments.name, "stopped; start it again to take part again")
    try:
        with files.alone_in(arguments.client_dir):
            say(arguments.name, federate(Site(arguments)))
            return 0
    except GaveUp as error:
        return fail(arguments.name, *error.args)
    except ValueError as error:
        return fail(arguments.name, error)
    except OSError as error:  # a full disk may have room again: its unit may start this again
        may_help = error.errno in (*files.NO_ROOM, *files.OUT_OF_FILES)
        return fail(arguments.name, error, 4 if may_help else 1)


def federate(site):
    """The thesis's five steps, round after round, until the run is over. Returns its last words."""
    while True:
        if not site.has_trained_weights():
            task = keep_trying(ClientgetWeight, site)  # 1, 2: connect, get the weights
            if task["round"] > task["rounds"]:
                return finish(site, task)
            if not train(site, task):  # 3: create the model, load the weights, train, save
                continue  # the round went on without this client
        keep_trying(ClientsendWeight, site)  # 4: send the weights, wait for the answer
        # 5: next round


# --- the steps ------------------------------------------------------------------------------------


def ClientgetWeight(stub, site):
    """get weight from server, save locally: client_weights.h5 is then the server's.

    Returns the task, a dict of run, round, rounds, arch, image_size, freeze_base and
    preprocessing. Where its round is behind the last, what was fetched is the result, and lies in
    server_weight.h5. Raises ValueError where the answer makes no sense, grpc.RpcError.
    """
    site.reporter.at(site.state, "waiting")
    request_metadata = (("fedml-client", site.name), ("fedml-accept", "blob"))
    call = stub.getWeight(todo_pb2.void(), metadata=request_metadata)
    with site.reporter.waiting("waiting for the weights", call):
        initial_metadata = dict(call.initial_metadata())
        if "fedml-run" in initial_metadata:
            task = task_from(initial_metadata)
        else:
            task = next_task_of_2020(site)
        is_result = task["round"] > task["rounds"]
        path = site.result_path if is_result else site.weights_path
        with files.replacing(path) as written:
            sha256 = weights.spool(site.reporter.moving(call), written, MAX_WEIGHTS_BYTES)
            announced = initial_metadata.get("fedml-sha256", sha256)
            if announced != sha256:
                raise ValueError(
                    f"the weights arrived with SHA-256 {sha256}, the server announced "
                    f"{plain(announced)}"
                )
            # Not before all is here: an answer that breaks off may have named no run, as that of a
            # server of 2020, which would then be taken for another run.
            if task["run"] != site.state["run"]:
                site.begin_run(task["run"])
            site.layout = layout_of(written, site.layout)
    if is_result:
        save_card(site, initial_metadata.get("fedml-card"), sha256)
    return task


def task_from(initial_metadata):
    """The task that a server of ours names. Raises ValueError where it is none."""
    try:
        task = {
            "run": initial_metadata["fedml-run"],
            "arch": initial_metadata["fedml-arch"],
            "image_size": pixels(initial_metadata["fedml-image-size"]),
            "round": at_least(1)(initial_metadata["fedml-round"]),
            "rounds": at_least(1)(initial_metadata["fedml-rounds"]),
            "freeze_base": initial_metadata.get("fedml-freeze-base") == "1",
            "preprocessing": initial_metadata.get("fedml-preprocessing", ""),
        }
        if task["arch"] not in model.ARCHS:
            raise ValueError(f"unknown network {task['arch']!r}")
    except (KeyError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(
            f"the server names a run, but not its network and round as expected ({plain(error)}): "
            "is it this project's todoServer.py, of the same commit?"
        ) from None
    return task


def next_task_of_2020(site):
    """The task of a server that names none, the thesis demo's: there the client counts rounds."""
    delivered = 0
    if site.state["run"] == TASK_OF_2020["run"]:
        delivered = site.state["round"]
        if site.state["trained"]:  # of this round, and not delivered
            delivered -= 1
    return {**TASK_OF_2020, "round": delivered + 1, "rounds": site.arguments.rounds}


def layout_of(path, earlier):
    """The Layout of a file that the server sent, which is trusted no more than a client's is there.

    earlier  the Layout of the one before, which most files have, or None
    Raises ValueError.
    """
    try:
        if earlier is not None and weights.fits(path, earlier):
            return earlier
        return weights.Layout(path, *convert.contents_of(path))
    except ValueError as error:
        raise ValueError(f"the server's weights cannot be used: {plain(error)}") from None


def save_card(site, text, sha256):
    """Publish the model card of the result beside it, where the server sent one that is good."""
    cards.path_of(site.result_path).unlink(missing_ok=True)  # of the result of fewer rounds
    if text is None:
        return
    try:
        card = cards.parse(text)
        if card["weights_sha256"] != sha256:
            raise ValueError("it describes other weights")
    except ValueError as error:
        site.say(f"the server's model card is left out: {plain(error)}")
        return
    cards.publish(site.result_path, card)


def train(site, task):
    """Create the model, load the weights, train on the site's own images, save.

    Publishes client_weights.h5, then history.csv, and state.json last: only the state says that the
    weights are trained, so a crash in between trains this round again.
    Returns False where the round was closed meanwhile: then nothing is kept.
    """
    title = f"round {task['round']}/{task['rounds']}"
    site.reporter.at(task, "loading")
    training = site.training_for(task)
    measured = training.scores(task, f"{title}: the fetched model")
    site.say(f"{title}: training on {len(site.records)} images")
    try:
        rows = train_network(training, task, title)
    except RoundClosed as reason:
        site.say(f"{title}: {reason}; what was trained is dropped")
        return False
    try:
        # The numbers go into the file that was fetched: outside its tensors an upload is then the
        # server's own file, which the server can check without opening HDF5 from outside.
        digest = weights.write_tensors(
            site.weights_path, site.layout, model.tensors(training.network)
        )
    except weights.NotFinite as error:
        raise ValueError(
            f"{title}: {error}. Training ended in numbers that are not finite, and nothing of it "
            "is kept: try a smaller --learning-rate, or look for damaged images in "
            f"{site.arguments.index}, then start this client again"
        ) from None
    held_out = {f"held_out_{name}": value for name, value in measured.items()}
    earlier = [row for row in site.state["history"] if row["round"] < task["round"]]
    history = earlier + [{**row, **held_out} for row in rows]
    if measured:  # who gave no --val-index tells nothing but where it is
        measured["training_loss"] = rows[-1]["loss"]
        measured["training_seconds"] = sum(row["seconds"] for row in rows)
    files.publish_rows(site.folder / "history.csv", HISTORY_COLUMNS, history)
    site.save(
        round=task["round"],
        rounds=task["rounds"],
        history=history,
        trained={**site.settings, "sha256": digest, "scores": measured},
    )
    site.sent = False
    return True


def train_network(training, task, title):
    """model.train, with a line an epoch. Returns the rows of the history; raises RoundClosed."""
    site = training.site
    epochs = site.arguments.epochs or model.default_epochs(training.network)

    def report(row):
        site.say(
            f"{title}: epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy']:.3f}  ({row['seconds']:.1f} s)"
        )

    def progress(epoch, step, steps, loss):
        if site.reporter.knows_closed(task):
            raise RoundClosed("the round was closed without this client")
        text = f"{title}: epoch {epoch}/{epochs}, step {step}/{steps}, loss {loss:.4f}"
        done = (epoch - 1) * steps + step
        show(done, epochs * steps, text, epoch=epoch, epochs=epochs)

    with progress_of(site, task, "training") as show:
        return model.train(
            training.network,
            training.batches,
            task["round"],
            epochs,
            report,
            progress=progress,
            first_rate=site.arguments.learning_rate,
        )


@contextmanager
def progress_of(site, task, phase):
    """show(done, total, text, **where) for the body: how far it is, to the user and to the server.

    On a terminal it is a bar, below the lines, and drawn by the way of the lines: one that stands
    still holds nobody. What takes minutes says a line now and then, too.
    """
    began = last_line = time.monotonic()

    def show(done, total, text="features of the images", **where):
        nonlocal last_line
        now = time.monotonic()
        left_s = (now - began) / done * (total - done)
        believed_s = min(round(left_s), 10_000_000)  # the server leaves a larger one out
        site.reporter.at(task, phase, seconds_left=believed_s, **where)
        bar.update(drawn, description=text, completed=done, total=total)
        if now - last_line >= 2 * REPORT_EVERY_S:
            last_line = now
            site.say(f"{text}, {left_s:.0f} s to go")

    text_column = TextColumn("{task.description}", markup=False)
    columns = [text_column, BarColumn(20), TimeRemainingColumn(compact=True)]
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        drawn = bar.add_task("")
        yield show


def ClientsendWeight(stub, site):
    """send weight to server, and wait for its answer. Afterwards nothing is left to deliver.

    Raises grpc.RpcError, ConnectionError where the server has answered nothing for too long.
    """
    state = site.state
    title = f"round {state['round']}/{state['rounds']}"
    scores = state["trained"].get("scores")
    site.reporter.at(state, "waiting", scores)
    if scores and (error := site.reporter.tell()):
        # A server that starts at this moment would count the upload without what was measured.
        # Not raised as it is: to `keep_trying` a call that took long had a server at its other end.
        is_call = isinstance(error, grpc.RpcError)
        raise ConnectionError(why_it_failed(error, site.arguments) if is_call else str(error))
    messages, request_metadata = upload_of(site)
    call = stub.sendWeight.future(messages, metadata=request_metadata)
    try:
        with site.reporter.waiting(f"{title}: waiting for the server's answer", call):
            answer = call.result()
    except grpc.RpcError as error:
        by_server = "fedml-round" in dict(error.trailing_metadata() or ())
        if by_server or (error.details() or "").startswith(tls.SAID_BY_A_PROXY):
            site.sent = False  # it was answered: the round is not over yet, or a proxy refused
        if error.code() in REJECTIONS:
            site.save(trained=None)
        if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
            raise
        site.say(f"{title}: upload rejected: {plain(error.details())}; these weights are dropped")
        return
    if answer.value == 1:
        site.save(trained=None)
    else:  # the thesis demo's server says 0 when the others did not come in time
        site.save(trained=None, round=state["round"] - 1)
        site.say(f"{title}: the server did not merge (answer {answer.value}): fetching again")


def upload_of(site):
    """(messages, request metadata) of what is trained, in the form that this server reads."""
    state = site.state
    num_examples = state["trained"]["num_examples"]
    if state["run"]:
        messages = weights.blob_messages(site.weights_path, site.name, num_examples)
        request_metadata = (
            ("fedml-client", site.name),
            ("fedml-run", state["run"]),
            ("fedml-round", str(state["round"])),
            ("fedml-sha256", state["trained"]["sha256"]),
        )
    else:  # the thesis demo's server knows base64 only, and takes the client's name from a path
        path_on_server = f"{site.name}/{weights.OLD_PEERS_FILE_NAME}"
        messages = weights.base64_messages(site.weights_path, path_on_server, num_examples)
        request_metadata = ()

    def noting_the_end():
        yield from site.reporter.moving(messages)
        site.sent = True

    return noting_the_end(), request_metadata


def finish(site, task):
    """Score the result on the held-out images, tell the server that it is here. Returns words."""
    card_path = cards.path_of(site.result_path)
    card = None
    with_card = "without a model card"
    if card_path.exists():
        card = cards.read(site.result_path)
        with_card = f"with its model card {card_path}: "
        if card["warning"]:
            with_card += f"it must not be used: {card['warning']}"
        else:
            with_card += f"predict.py --weights {site.result_path} scores images with it"
    measured = {}
    if site.held_out:
        measured = site.training_for(task).scores(task, "the result", card)
    site.reporter.at(task, "done", measured)
    site.reporter.tell()
    return (
        f"the run is over after {task['rounds']} rounds; its result is {site.result_path}, "
        f"{with_card}"
    )


# --- the site -------------------------------------------------------------------------------------


class Site:
    """What one hospital has: its images, its folder and its state file.

    weights_path  of client_weights.h5: fetched, then trained
    result_path   of server_weight.h5: the merged model of the last round, once the run is over
    layout        of the weight files of this run, once one was fetched
    training      the Training of this run, once it was needed
    sent          whether the open round's weights went out whole, and nothing came back

    state["trained"] says for which settings client_weights.h5 was trained, and its SHA-256, as long
    as it is not delivered; None otherwise. A client that finds it when it starts delivers that file
    instead of training again.
    """

    def __init__(self, arguments):
        self.arguments = arguments
        self.name = arguments.name
        self.folder = arguments.client_dir
        self.weights_path = self.folder / "client_weights.h5"
        self.result_path = self.folder / "server_weight.h5"
        files.clean(self.folder)
        self.records = data.read_index(arguments.index)
        self.held_out = data.read_index(arguments.val_index) if arguments.val_index else []
        self.state = self.load_state()
        arguments.threads = arguments.threads or model.default_threads()
        self.settings = {flag: getattr(arguments, flag) for flag in TRAINING_FLAGS}
        self.settings["index"] = files.sha256_of(arguments.index)[:12]
        self.settings["num_examples"] = len(self.records)
        self.layout = None
        self.training = None
        self.sent = False
        self.reporter = ProgressReporter(self)

    def say(self, line):
        say(self.name, line)

    def load_state(self):
        path = self.folder / "state.json"
        remedy = "move it away; this client then begins with the open round"
        state = files.load_state(path, STATE_KINDS, remedy) or dict(NEW_STATE)
        if not is_possible(state):
            raise ValueError(f"{path} says what no state of a client can: {remedy}")
        return state

    def save(self, **changes):
        self.state.update(changes)
        files.save_state(self.folder / "state.json", self.state)

    def begin_run(self, run):
        """What lies here is of another run, or nobody knows of which: it is moved aside."""
        moved = files.move_aside(self.folder, [self.folder / name for name in RUN_FILES])
        if moved:
            self.say(f"another run begins: what lay in {self.folder} is in {moved}")
        self.state = {**NEW_STATE, "run": run}
        self.save()
        self.layout = None
        self.training = None

    def has_trained_weights(self):
        """Whether client_weights.h5 is trained, not delivered, and by the settings of now."""
        trained = self.state["trained"]
        if trained is None or trained.get("sha256") != files.sha256_of(self.weights_path):
            return False
        changed = [
            f"{name} was {trained.get(name)}, is {value}"
            for name, value in self.settings.items()
            if trained.get(name) != value
        ]
        if changed:
            self.say(
                f"round {self.state['round']}: trained before with other settings "
                f"({'; '.join(changed)}): training again"
            )
        return not changed

    def training_for(self, task):
        """Its Training with the weights of this task; the first of a run takes long to make."""
        self.training = self.training or Training(self, task)
        path = self.result_path if task["round"] > task["rounds"] else self.weights_path
        model.load(self.training.network, path, self.layout.tensors)
        self.training.compute_features(task)
        return self.training


def is_possible(state):
    """Whether a state's values, whose types are right, are such as a client writes."""
    rows = [row if isinstance(row, dict) else {} for row in state["history"]]
    numbers = [state["round"], state["rounds"], *(row.get("round") for row in rows)]
    scores = (state["trained"] or {}).get("scores", {})
    run = state["run"] or ""
    return (
        all(type(number) is int and 0 <= number <= 999_999_999 for number in numbers)
        and isinstance(scores, dict)
        and all(type(value) in (int, float) for value in scores.values())
        and run.isascii()
        and run.isprintable()
    )


class Training:
    """The network of one run, and a site's images as that network takes them."""

    def __init__(self, site, task):
        check_pictures(site, task)
        arguments = site.arguments
        model.configure(arguments.seed, arguments.threads)
        self.site = site
        self.network = model.build(task["arch"], task["image_size"])
        check_layers(site, task, self.network)
        # Where the server announced a frozen base, and no flag says otherwise, the images are
        # trained on as they are: their features are computed once, and a round takes seconds. With
        # --freeze-base, as the thesis did it, they are rotated and flipped.
        on_features = arguments.freeze_base is None and task["freeze_base"]
        is_frozen = arguments.freeze_base or on_features
        if is_frozen:
            model.freeze_base(self.network)
        if on_features:
            site.say(
                "the base keeps its ImageNet weights and only the layers after it are trained: "
                f"the features of {len(site.records)} images are computed once, without rotation "
                "and flips (--no-freeze-base trains all layers)"
            )
        augment = not (arguments.no_augmentation or on_features)
        size = task["image_size"]
        self.batches = data.TrainingBatches(
            data.images_for(site.records, size, site.folder, is_frozen and not augment),
            data.healthy(site.records),
            arguments.batch_size,
            arguments.seed,
            site.name,
            augment,
        )
        self.held_out_images = None
        if site.held_out:
            self.held_out_images = data.images_for(
                site.held_out, size, site.folder, is_frozen, name="held_out_features"
            )

    def compute_features(self, task):
        """Those of a frozen base that are not there yet, with a bar. Else nothing."""
        for images in (self.batches.images, self.held_out_images):
            if isinstance(images, data.Features) and images.array is None:
                with progress_of(self.site, task, "loading") as show:
                    model.on_features(self.network, images, show)  # which keeps them in `images`

    def scores(self, task, what, card=None):
        """What the network scores on the held-out images; {} where there are none.

        what  whose scores that are, for the log
        card  of the result. While the run goes on there is none: the score is then the network's
              own, and sensitivity and specificity are at 0.5.
        The names are those of federation.status.SCORES. A metric that cannot be measured (the AUC
        of one class) is left out.
        """
        site = self.site
        if not site.held_out:
            return {}
        site.reporter.at(task, "scoring")
        p_healthy = model.predict(self.network, self.held_out_images)
        if answers_nan := metrics.answers_nan(p_healthy):
            site.say(f"warning: {what} must not be used: {answers_nan}")
        threshold = 0.5
        if card:
            p_healthy = 1 - cards.score(card, metrics.LEARNT, p_healthy)
            threshold = cards.used_threshold(card, metrics.LEARNT)
        measured = metrics.scores(p_healthy, data.healthy(site.held_out), threshold)
        measured["threshold"] = threshold
        names = ("loss", "auc", "threshold", "sensitivity", "specificity")
        scores = {name: measured[name] for name in names if measured[name] is not None}
        scores = {"examples": len(site.held_out), **scores}
        words = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        site.say(f"{what} on this site's own held-out images: {words}")
        return scores


def check_layers(site, task, network):
    """Raises ValueError where a server of ours sends the file of a network of other layers."""
    described = site.layout.layers if task["run"] else None
    if described and described != weights.digest_of_layers(network.to_json()):
        raise ValueError(
            f"this server runs another version: its weight file is of a {task['arch']} with "
            "other layers than this client's: the same commit everywhere"
        )


def check_pictures(site, task):
    """Raises ValueError where this site's pictures are of another kind than the server's."""
    index = site.arguments.index
    for each in (index, site.arguments.val_index or index):
        cards.check_kind(each, task["preprocessing"], "those that the server scores with")
    warning = cards.too_small(cards.read_prepared(index.parent), task["image_size"])
    if task["run"] and warning:
        site.say(warning)


# --- the connection -------------------------------------------------------------------------------


def keep_trying(attempt, site):
    """Call attempt(stub, site), each time on a new connection, until it returns.

    The pause between two attempts doubles up to LONGEST_PAUSE_S.
    Raises ValueError where the server refuses, GaveUp after --give-up-after.
    """
    away_since = None  # when the server was missed first; None as long as it was not
    while True:
        started = time.monotonic()
        try:
            with connect(site) as channel:
                return attempt(todo_pb2_grpc.FedMLStub(channel), site)
        except grpc.RpcError as error:
            reason = why_it_failed(error, site.arguments)
            was_served = time.monotonic() - started > SERVED_S
        except (tls.FilesNotReady, ChildProcessError, ConnectionError) as error:
            # Certificates that are being renewed; the process that reads the first file was killed;
            # a server that is deaf, but may have answered until a minute ago.
            reason = str(error)
            was_long = site.reporter.answered_at - started > SERVED_S
            was_served = was_long and isinstance(error, ConnectionError)

        now = time.monotonic()
        if away_since is None or was_served:
            # The server was there until now: the time to give up begins anew.
            away_since = now
            said_at = -math.inf
            pause_s = FIRST_PAUSE_S
        left_s = away_since + site.arguments.give_up_after - now
        if left_s <= 0:
            raise gave_up(site, reason)
        if now - said_at >= REPORT_EVERY_S:
            said_at = now
            site.say(
                f"waiting for the server at {site.arguments.server} ({reason}); giving up "
                f"in {left_s:.0f} s"
            )
        jitter = random.uniform(0.5, 1.5)  # or all clients would come back at the same moment
        time.sleep(min(pause_s * jitter, left_s))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def why_it_failed(error, arguments):
    """A failed call in words. Raises ValueError with them where trying again does not help."""
    said = error.details() or error.code().name
    reason, may_help = tls.explain(said, arguments)
    if reason == said:  # the server's own words
        reason = plain(said)
        if error.code() in REFUSALS:
            reason = f"the server refused: {reason} ({error.code().name})"
            may_help = False
    if not may_help:
        raise ValueError(reason) from None
    return reason


def gave_up(site, reason):
    """The GaveUp of this moment, and why: what is lost depends on what was delivered."""
    state = site.state
    is_last = state["run"] and 0 < state["round"] == state["rounds"]
    what, exit_code = "what was trained is kept: start this client again when the server is back", 4
    if is_last and state["trained"] and site.sent:
        exit_code = 5
        what = (
            "the last round's weights were delivered and never answered: the run is probably over, "
            "look at the server; started again, this client asks again"
        )
    elif is_last:
        what = (
            f"round {state['round']} was the last, so the run may be over, and its result is the "
            f"server's server_weight.h5; {what}"
        )
    return GaveUp(
        f"the server at {site.arguments.server} has not served this client for "
        f"{site.arguments.give_up_after:g} s ({reason}); {what}",
        exit_code,
    )


def connect(site):
    """A gRPC channel to the server, for one attempt.

    An old channel would keep its growing pauses and its dead connection.
    """
    options = [
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
        ("grpc.max_receive_message_length", weights.MOST_MESSAGE_BYTES),
        ("grpc.min_reconnect_backoff_ms", CONNECT_S * 1000),
        # Without pings, who waits on a line that is gone waits for ever.
        ("grpc.keepalive_time_ms", (PING_S if site.state["run"] else RARE_PING_S) * 1000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    return tls.channel(site.arguments, options)


class ProgressReporter:
    """Says where this client is, in a thread of its own: to the server, and to who looks on.

    The server is told only where it named a run. From the answer this client learns that its round
    was closed. A server that answers nothing for UNANSWERED_S is away, though its port may be open
    and pings be answered: then the call that waits is ended.
    """

    def __init__(self, site):
        self.site = site
        self.status = None  # what the server is told; None: nothing
        self.answer = todo_pb2.openRound()
        self.answered_at = time.monotonic()
        self.wait = None  # (what, the call, since when) while this client waits
        self.telling = threading.Lock()  # held while one report is on its way
        threading.Thread(target=self._run, daemon=True).start()

    def at(self, task, phase, scores=None, **where):
        """It is in this phase of this task.

        task   a dict with run and round: a task, or the site's state
        where  epoch, epochs, seconds_left
        """
        of_task = {"run": task["run"], "round": task["round"]}
        status = todo_pb2.clientStatus(**of_task, phase=phase, scores=scores, **where)
        self.status = status if task["run"] else None

    def knows_closed(self, task):
        """Whether the task's round is known to be closed."""
        return self.answer.run == task["run"] and self.answer.round > task["round"]

    @contextmanager
    def waiting(self, what, call):
        """While the body waits for this call, say so. Raises ConnectionError if it was ended."""
        self.wait = (what, call, time.monotonic())
        try:
            yield
        except (grpc.RpcError, grpc.FutureCancelledError):
            if call.cancelled():
                raise ConnectionError(f"it answered nothing for {UNANSWERED_S} s") from None
            raise
        finally:
            self.wait = None

    def moving(self, messages):
        """The same messages: a server that sends or takes one is there.

        On a slow line a report may wait behind them for longer than TELL_TIMEOUT_S.
        """
        for message in messages:
            self.answered_at = time.monotonic()
            yield message

    def tell(self):
        """Tell the server where this client is. Returns what went wrong, None where it answered.

        On a connection of its own each time: routers and proxies drop silent ones. One at a time:
        the server ends a client's older report for a newer one.
        """
        status = self.status  # once: it may change here
        if status is None:
            return None
        try:
            with self.telling, connect(self.site) as channel:
                stub = todo_pb2_grpc.FedMLStub(channel)
                metadata = (("fedml-client", self.site.name),)
                self.answer = stub.tell(status, metadata=metadata, timeout=TELL_TIMEOUT_S)
        except (tls.FilesNotReady, RuntimeError) as error:  # the second: no thread to be had
            return error
        except grpc.RpcError as error:
            # A server that refuses, or is of another commit and knows no `tell`, answers, too.
            if error.code() in UNANSWERED:
                return error
        self.answered_at = time.monotonic()
        return None

    def _run(self):
        said_at = 0
        while True:
            time.sleep(TELL_EVERY_S)
            self.tell()
            if not (wait := self.wait):  # once: it may end here
                continue
            what, call, since = wait
            now = time.monotonic()
            if now - max(said_at, since) >= REPORT_EVERY_S:
                said_at = now
                self.site.say(f"{what} for {now - since:.0f} s")
            if self.status and now - max(self.answered_at, since) > UNANSWERED_S:
                call.cancel()


# --- flags ----------------------------------------------------------------------------------------


def parser():
    """The flags of this script, for itself and for the launcher."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add(
        "--name",
        required=True,
        type=client_name,
        help="this client's name in the server's --clients",
    )
    add(
        "--server",
        type=tls.address,
        default="localhost:50051",
        metavar="HOST:PORT",
        help="(default: %(default)s)",
    )
    add(
        "--epochs",
        type=at_least(1),
        help="passes over the images in a round (default: 1; 5 of the last layer of a frozen "
        "lite0)",
    )
    add("--batch-size", type=at_least(1), default=16, metavar="N", help="(default: %(default)s)")
    add(
        "--learning-rate",
        type=positive,
        metavar="RATE",
        help="of round 1; each network has its own, and lowers it from round to round",
    )
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
        help="the images to train on "
        "(default: index/workerK.pkl, K the number at the end of the name)",
    )
    add(
        "--val-index",
        type=Path,
        metavar="FILE",
        help="held-out images of its own: score each fetched model on them, in the log and in "
        "history.csv, and tell the server the scores",
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
    add(
        "--freeze-base",
        action=argparse.BooleanOptionalAction,
        help="train only the layers after the base of a vgg16 or lite0; --no-freeze-base: train "
        "all (default: as the server says)",
    )
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
        help="end when the server has been away for S seconds (default: %(default)s)",
    )
    tls.add_arguments(
        add,
        "the CA that signed the server's certificate: speak TLS",
        "this client's certificate, in its --name",
    )
    return parser


def parse(argv):
    flags = parser()
    arguments = flags.parse_args(argv)
    tls.check_arguments(flags, arguments, arguments.server, bool(arguments.tls_ca), arguments.name)
    arguments.index = arguments.index or data.worker_index(arguments.name)
    if arguments.index is None:
        flags.error(
            f"--name {arguments.name} ends in no number: say which images are its own "
            "with --index FILE"
        )
    arguments.client_dir = arguments.client_dir or Path(arguments.name)
    return arguments


if __name__ == "__main__":
    end_script(main())

"""The federated server: hands out the weights, waits for all clients, averages, evaluates; round after round.

    python3 todoServer.py                                     # three clients, ten rounds, on this machine
    python3 todoServer.py --clients uppsala,lund --rounds 40

Killed at any instant and started again with the same command, it goes on where it was. Exit codes: 0 finished,
1 an error, 2 wrong usage, 3 too few clients within --round-timeout, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import os
import queue
import secrets
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from common import files
from common.script import (
    at_least,
    exit_on_signals,
    fail,
    keep_heap_small,
    pixels,
    seconds,
    start_script,
    trim_heap,
)
from common.script import say as say_as
from federation import tls
from federation.rounds import Refused, Rounds, TooFewClients, new_state

LAST_ANSWER_S = (
    30  # how long a finished server stays for clients that have not heard its last answer
)
NEW_RUN = {
    "clients": ["client001", "client002", "client003"],
    "rounds": 10,
    "arch": "drcnn",
    "image_size": None,
    "seed": 0,
    "weights": "none",
}


def main(argv=None):
    arguments = parse(argv)
    exit_on_signals("server: stopped before it began to listen; start it again")
    try:
        with ExitStack() as alone:
            alone.enter_context(files.alone_in(arguments.server_dir))
            state, examples = load(arguments)
            for client in state["clients"]:
                alone.enter_context(files.alone_in(arguments.server_dir / client))
            rounds = open_rounds(arguments, state, examples)
            return serve(listen(arguments, rounds), rounds)
    except (ValueError, OSError) as error:
        return fail("server", error)


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
        help="merge a round after S seconds with those who are there (default: 0, wait for all for ever)",
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
        "that signed the clients' certificates: each client must show its own, in its name (mutual TLS)",
        "the server's certificate, for TLS",
    )
    arguments = parser.parse_args(argv)
    tls.check_arguments(parser, arguments, arguments.listen, bool(arguments.tls_cert))
    if arguments.min_clients and not arguments.round_timeout:
        parser.error(
            "--min-clients needs --round-timeout: without a limit the server waits for all clients"
        )
    if arguments.clients is not None:
        arguments.clients = checked_names(parser, arguments.clients)
    return arguments


def checked_names(parser, text):
    from federation.weights import client_of

    names = text.split(",")
    try:
        if [client_of(name) for name in names] != names or len(set(names)) != len(names):
            raise ValueError("expected different names, without a path")
    except ValueError as error:
        parser.error(f"--clients {text!r}: {error}")
    return sorted(names)


def say(line):
    say_as("server", line)


# --- the run: begun, or resumed -----------------------------------------------------------------------------------


def load(arguments):
    """(state, validation records) of the run that this server serves: the one in --server-dir, or a new one."""
    import data

    keys = new_state("", (), 0, "", arch="", image_size=0, seed=0)
    state = (
        None
        if arguments.fresh
        else files.load_state(
            arguments.server_dir / "state.json", keys, "move it away, or begin with --fresh"
        )
    )
    examples = data.read_index(arguments.index_dir / "val_set.pkl")
    state = begin(arguments) if state is None else resume(arguments, state)
    if arguments.min_clients and arguments.min_clients > len(state["clients"]):
        raise ValueError(
            f"--min-clients {arguments.min_clients} is more than the run's {len(state['clients'])} clients"
        )
    return state, examples


def resume(arguments, state):
    """The state as it was left. Raises ValueError where the flags contradict it."""
    for flag in ("clients", "arch", "image_size", "seed", "weights"):
        asked = getattr(arguments, flag)
        if asked is not None and asked != state[flag]:
            raise ValueError(
                f"--{flag.replace('_', '-')} is {asked}, but the run in {arguments.server_dir} has {state[flag]}: "
                "leave the flag out to go on with that run, or begin a new one with --fresh"
            )
    state["rounds"] = arguments.rounds or state["rounds"]
    answered = len(
        state["history"]
    )  # a round less than are merged, where the last evaluation was interrupted
    if answered >= state["rounds"]:
        say(
            f"run {state['run']} is finished ({answered} rounds); --rounds N goes on, --fresh begins a new one"
        )
    else:
        where = arguments.server_dir / "state.json"
        say(f"resuming run {state['run']} at round {answered + 1}/{state['rounds']} from {where}")
    return state


def begin(arguments):
    """Publishes round 1's weights, then the state of a new run."""
    import model

    given = {name: getattr(arguments, name) for name in NEW_RUN}
    choices = {name: NEW_RUN[name] if value is None else value for name, value in given.items()}
    size = choices["image_size"] = choices["image_size"] or model.ARCHS[choices["arch"]].image_size
    say(
        f"a new run of {choices['rounds']} rounds: {choices['arch']} at {size} x {size} pixels, seed {choices['seed']}, "
        f"clients {', '.join(choices['clients'])}"
    )
    model.configure(choices["seed"])
    path = arguments.server_dir / "server_weight.h5"
    network = model.build(choices["arch"], size, choices["seed"])
    model.initialize(network, choices["weights"])
    if moved := files.move_aside(arguments.server_dir):  # not before this run has all that it needs
        say(f"the old run's files are in {moved}")
    model.save(network, path)
    state = new_state(secrets.token_hex(8), weights_sha256=files.sha256_of(path), **choices)
    files.save_state(arguments.server_dir / "state.json", state)
    return state


def open_rounds(arguments, state, examples):
    """The Rounds of this run, with whatever a crash interrupted finished."""
    import data
    from federation import weights

    folder = arguments.server_dir
    path = folder / "server_weight.h5"
    if not path.exists():
        raise ValueError(
            f"{path} is missing, though {folder / 'state.json'} knows a run: put it back, or begin with --fresh"
        )
    if not state["frozen"] and files.sha256_of(path) != state["weights_sha256"]:
        raise ValueError(
            f"{path} is not the model of round {state['round']} of the run in {folder / 'state.json'}: put that "
            "back, or begin with --fresh"
        )
    for place in [folder, *(folder / client for client in state["clients"])]:
        files.clean(place)
    images = data.load_images(examples, state["image_size"], files.temporary(folder / "images.npy"))
    labels = data.healthy(examples)
    network = None

    def evaluate():
        nonlocal network
        import model

        if network is None:  # TensorFlow loads when the first round is evaluated
            model.configure(state["seed"])
            network = model.build(state["arch"], state["image_size"])
        model.load(network, path)
        return model.evaluate(network, images, labels)

    def merge(paths, num_examples):
        trim_heap()  # of what the uploads left
        return weights.fedavg(paths, num_examples, layout=path, target=path)

    rounds = Rounds(
        folder, state, merge, evaluate, arguments.min_clients, arguments.round_timeout, say
    )
    rounds.open()
    return rounds


# --- serving ------------------------------------------------------------------------------------------------------


def listen(arguments, rounds):
    """A started gRPC server."""
    from federation.service import create_server

    local, credentials = (
        tls.is_this_machine(arguments.listen),
        tls.server_credentials(arguments),
    )
    server, address = create_server(
        rounds,
        arguments.listen,
        arguments.max_examples,
        credentials,
        serve_unnamed=local or arguments.insecure,
    )
    if not (local or arguments.tls_cert and arguments.tls_ca):
        say(
            "warning: "
            + (
                "without --tls-ca a client is whoever says its name"
                if arguments.tls_cert
                else "plaintext: who is on the way reads and changes the weights, and a client is whoever says its name"
            )
        )
    say(f"listening on {address}")
    return server


def serve(server, rounds):
    """Runs the rounds until they are over or a signal comes. Returns the exit code."""
    ends = (
        queue.SimpleQueue()
    )  # the one thing that the main thread waits for; signal handlers may put into it

    def coordinate():
        try:
            rounds.run()
            rounds.wait_until_all_left(LAST_ANSWER_S)
            ends.put(0)
        except TooFewClients as error:
            ends.put(fail("server", error, 3))
        except Refused:
            pass  # a signal stopped the rounds: its code is in the queue
        except Exception as error:
            ends.put(
                fail(
                    "server",
                    f"round {rounds.answered + 1} failed: {type(error).__name__}: {error}; what was "
                    "delivered is kept: start the server again when the cause is gone",
                )
            )

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: ends.put(128 + number))
    threading.Thread(target=coordinate, daemon=True).start()
    code = ends.get()
    if code > 128:
        say("stopping; what has arrived is kept, start the server again to go on")
        rounds.stop("UNAVAILABLE", "the server is stopping; it goes on when it is started again")

    def see_off():
        server.stop(LAST_ANSWER_S).wait(LAST_ANSWER_S)
        ends.put(0)

    if code == 0:
        threading.Thread(target=see_off, daemon=True).start()
        code = ends.get()  # a signal is still heard
    else:
        server.stop(1).wait(1.5)
    if code == 0:
        say(
            f"finished after {rounds.state['rounds']} rounds; the model is {rounds.folder / 'server_weight.h5'}"
        )
    os._exit(code)  # every file is whole: nothing is owed to a thread that may still evaluate


if __name__ == "__main__":
    start_script()
    keep_heap_small()
    sys.exit(main())

"""Killed at any publish and started again, server and clients end in the undisturbed run's bits.

Nothing but a publish changes what the next start goes by, so this is any instant: before and after
each, and with a cut-short temporary file left behind. Real processes, forked from one that has
imported the scripts; only the network is a stand-in, and client002 sends files of another layout.
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import standin
from conftest import free_port, make_data, read_weights, until, write_weights

import model
from common import files
from federation import convert, weights
from federation.state import RunState

CLIENTS = ["client001", "client002"]
CONVERTED = "client002"
ROUNDS = 2
DEADLINE_S = 600  # a run takes a few seconds where nothing else does
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["todoServer", "todoClient", "preparation.photos", "test_kill"])


# --- what runs in the processes ------------------------------------------------------------------


def train(network, batches, round_number, *arguments, **keywords):
    """What it adds follows from seed, client and round."""
    seed = [batches.seed, batches.client_number, round_number]
    network.change = np.float32(np.random.default_rng(seed).standard_normal())
    return standin.train(network, batches, round_number, *arguments, **keywords)


def tensors(network):
    return [tensor + network.change for tensor in read_weights(network.path)]


def write_another_layout(path, layout, arrays):
    with files.replacing(path) as written:
        write_weights(written, arrays, root="model_weights")
    return files.sha256_of(path)


def contents_of(path, is_awaited=None):
    """In this process: the bounded one is `test_convert.py`."""
    return weights.Layout(path).tensors, None


def stand_in(name):
    import todoClient
    import todoServer

    for function in ("configure", "build", "initialize", "load", "predict", "save", "trainable"):
        setattr(model, function, getattr(standin, function))
    model.train, model.tensors = train, tensors
    convert.contents_of = contents_of
    if name == CONVERTED:
        weights.write_tensors = write_another_layout
    todoClient.FIRST_PAUSE_S = todoClient.LONGEST_PAUSE_S = 0.05
    todoServer.Rounds.wait_until_all_done = wait_until_all_ended


def wait_until_all_ended(rounds, timeout_s):
    """A server that starts again has forgotten who said "done", and would wait for it in vain."""
    codes = [Path(f"{name}.code") for name in rounds.state.clients]
    until(lambda: all(code.exists() for code in codes), "every client ends", DEADLINE_S)


def life(script, arguments, folder, name, number, how):
    """One life of a process: main(), until the number-th publish.

    Everything it says goes into name.log, and into name.code the code with which it ends by itself.
    """
    os.chdir(folder)
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count, lock, publish, end = itertools.count(1), threading.Lock(), files.publish, os._exit

    def noted(code):
        Path(f"{name}.code").write_text(str(code))
        end(code)

    def counted(written, path):
        if path.name.startswith("."):  # what a conversion makes, which no start goes by
            return publish(written, path)
        with lock:
            this = next(count)
            os.write(2, f"PUBLISH {path}\n".encode())
            if this == number and how == "torn":
                os.truncate(written, os.path.getsize(written) // 2)
            if this != number or how == "after":
                publish(written, path)
            if this == number:
                os.write(2, f"KILLED {how} publish {this}: {path}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    os._exit = noted
    for module in list(sys.modules.values()):
        if getattr(module, "publish", None) is publish:
            module.publish = counted
    stand_in(name)
    code = 99
    try:
        code = sys.modules[script].main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the supervisor ------------------------------------------------------------------------------


class Supervised:
    """A run in `folder`, whose killed processes are started again; `victim` is killed once."""

    def __init__(self, folder, data, victim=None, number=0, how=None):
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)  # of another test of this session
        folder.mkdir()
        for name in ("preprocessed", "index"):
            (folder / name).symlink_to(data / name)
        address = f"localhost:{free_port()}"
        server = ["--clients", ",".join(CLIENTS), "--rounds", str(ROUNDS), "--image-size", "32"]
        client = ["--server", address, "--give-up-after", str(DEADLINE_S), "--threads", "1"]
        client += ["--val-index", "index/val_set.pkl"]
        self.commands = {
            "server": ("todoServer", ["--listen", address, *server]),
            **{name: ("todoClient", ["--name", name, *client]) for name in CLIENTS},
        }
        self.kills, self.codes, self.alive = 0, {}, {}
        try:
            for name in self.commands:
                self.begin(name, *((number, how) if name == victim else (0, None)))
            self.run(time.monotonic() + DEADLINE_S)
        finally:
            for process in self.alive.values():
                process.kill()

    def begin(self, name, number=0, how=None):
        script, arguments = self.commands[name]
        told = (script, arguments, self.folder, name, number, how)
        self.alive[name] = FORKS.Process(target=life, args=told, daemon=True)
        self.alive[name].start()

    def run(self, deadline):
        while self.alive:
            sentinels = [process.sentinel for process in self.alive.values()]
            multiprocessing.connection.wait(sentinels, deadline - time.monotonic())
            assert time.monotonic() < deadline, f"{list(self.alive)} still run:\n{self.log()}"
            for name, process in list(self.alive.items()):
                if process.exitcode is not None:
                    del self.alive[name]
                    ended = self.folder / f"{name}.code"
                    if ended.exists():
                        self.codes[name] = int(ended.read_text())
                    else:
                        self.kills += 1
                        self.begin(name)

    def log(self):
        return "".join((self.folder / f"{name}.log").read_text() for name in self.commands)

    def published(self, name):
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return [Path(line).name for line in lines if line.startswith("PUBLISH")]

    def result(self):
        """All that has to be the same, whoever was killed."""
        server = self.folder / "server"
        histories = [
            [line.rpartition(",")[0] for line in path.read_text().splitlines()]  # without seconds
            for path in sorted(self.folder.glob("*/history.csv"))
        ]
        # The server may be killed when a client tells its scores of the result: that is once.
        scores = (server / "clients.csv").read_text().splitlines()
        counted = sorted(line.split(",")[:2] for line in scores if not line.startswith(str(ROUNDS)))
        digests = [files.sha256_of(server / f"{kind}_weight.h5") for kind in ("server", "best")]
        return histories, counted, digests, RunState.load(server / "state.json").best


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    make_data(folder / "data", clients=2, images=3, validation=2)
    with pytest.MonkeyPatch.context() as patch:  # of this process, and of those that it starts
        patch.setenv("STANDIN_WEIGHTS", str(write_weights(folder / "first.h5", 0)))
        run = Supervised(folder / "undisturbed", folder / "data")
        assert set(run.codes.values()) == {0}, run.log()
        yield run


def kill_at_every_publish(undisturbed, victim, hows):
    points = undisturbed.published(victim)
    kills = [(number, point, how) for number, point in enumerate(points, 1) for how in hows(number)]

    def one(kill):
        number, _, how = kill
        folder = undisturbed.folder.parent / f"{victim}-{number}-{how}"
        run = Supervised(folder, undisturbed.folder.parent / "data", victim, number, how)
        assert run.kills == 1, f"{kill}: {run.codes}\n{run.log()}"
        assert run.result() == undisturbed.result(), f"{kill}:\n{run.log()}"
        assert set(run.codes.values()) == {0}, f"{kill}: {run.codes}\n{run.log()}"
        left_over = [path for path in run.folder.rglob(".*.tmp*") if ".status." not in path.name]
        assert not left_over, "a temporary file is left for ever"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, kills))


def test_the_undisturbed_run_publishes_what_it_should(undisturbed):
    """As the table of federation/state.py says it; of the client: fetched, trained, delivered."""
    accept = ["state.json", "client_weights.h5"] * len(CLIENTS)
    close = ["state.json", "server_weight.h5", "state.json", "server_weight.json"]
    best = ["best_weight.h5", "best_weight.json"]  # each round is scored alike
    end = ["history.csv", "state.json", "clients.csv"]
    begin = ["server_weight.h5", "state.json", "history.csv"]
    expected = begin + accept + close + best + end + accept + close + end
    server = undisturbed.published("server")
    assert server[: len(expected)] == expected and {*server[len(expected) :]} <= {"clients.csv"}
    a_round = ["client_weights.h5", "client_weights.h5", "history.csv", "state.json", "state.json"]
    client = undisturbed.published("client001")
    assert client == ["state.json", *a_round * ROUNDS, "server_weight.h5", "server_weight.json"]


@pytest.mark.parametrize("victim", ["server", "client001"])
def test_killed_at_every_publish(undisturbed, victim):
    """Each step in one of the two rounds (they differ by an odd number), in one way."""
    ways = ("after", "before", "torn")
    kill_at_every_publish(
        undisturbed, victim, lambda number: [] if number % 2 else [ways[number // 2 % 3]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["server", "client001"])
def test_killed_at_every_publish_in_every_way(undisturbed, victim):
    kill_at_every_publish(undisturbed, victim, lambda number: ["before", "torn", "after"])

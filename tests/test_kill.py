"""Killed at any instant and started again, server and clients end in the undisturbed run's bits.

Two ways: at every publish, before and after it and with a cut-short temporary file left behind
(real processes, forked from one that has imported the scripts; only the network is a stand-in);
and at random instants, a storm in which the converter is struck, too.
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import random
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
from conftest import (
    free_port,
    holding,
    make_data,
    new_run,
    processes_in,
    random_tensors,
    read_weights,
    server_script,
    until,
    write_weights,
)
from standin import shapes_of_size

import model
from common import files
from federation import weights
from federation.state import RunState

CLIENTS = ["client001", "client002"]
ROUNDS = 2
DEADLINE_S = 90
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["todoServer", "todoClient", "preparation.photos", "test_kill"])


# --- at every publish: what runs in the processes ------------------------------------------------


class Network:
    """Stands in for a keras.Model."""

    def __init__(self, arch, image_size, seed=0):
        self.name, self.input_shape = arch, (None, image_size, image_size, 3)
        self.tensors = random_tensors(seed)


def save(network, path):
    with files.replacing(path) as written:
        write_weights(written, network.tensors)


def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
    """What it adds follows from seed, client and round."""
    rng = np.random.default_rng([batches.seed, batches.client_number, round_number])
    network.tensors = [
        tensor + rng.standard_normal(tensor.shape).astype(np.float32) for tensor in network.tensors
    ]
    row = {"loss": 1.0, "accuracy": 1.0, "num_examples": len(batches.images), "seconds": 1.0}
    return [{"round": round_number, "epoch": 1, **row}]


STAND_INS = {
    "configure": lambda seed, threads=None: None,
    "build": Network,
    "save": save,
    "train": train,
    "initialize": lambda network, source: None,
    "load": lambda network, path, tensors=None: setattr(network, "tensors", read_weights(path)),
    "predict": lambda network, images: np.linspace(0.25, 0.75, len(images), dtype=np.float32),
    "tensors": lambda network: network.tensors,
    "trainable": lambda network: [True for _ in network.tensors],
}


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

    def die(point, path):
        os.write(2, f"KILLED {how} publish {point}: {path}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(written, path):
        with lock:
            this = next(count)
            os.write(2, f"PUBLISH {path}\n".encode())
            if this == number and how != "after":
                if how == "torn":
                    os.truncate(written, os.path.getsize(written) // 2)
                die(this, path)
            publish(written, path)
            if this == number:
                die(this, path)

    os._exit = noted
    for module in list(sys.modules.values()):
        if getattr(module, "publish", None) is publish:
            module.publish = counted
    for stand_in in STAND_INS.items():
        setattr(model, *stand_in)
    import todoClient
    import todoServer

    todoClient.FIRST_PAUSE_S = todoClient.LONGEST_PAUSE_S = 0.05
    todoServer.LAST_ANSWER_S = 3
    # no process is started for it
    todoClient.convert.contents_of = lambda path: (weights.tensors_of(path), None)
    code = 99
    try:
        code = sys.modules[script].main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- at every publish: the supervisor ------------------------------------------------------------


class Supervised:
    """A run in `folder`, whose killed processes are started again; `victim` is killed once."""

    def __init__(self, folder, data, victim=None, number=0, how=None):
        self.folder = folder
        folder.mkdir()
        for name in ("preprocessed", "index"):
            (folder / name).symlink_to(data / name)
        address = f"localhost:{free_port()}"
        server = ["--clients", ",".join(CLIENTS), "--rounds", str(ROUNDS), "--image-size", "32"]
        client = ["--server", address, "--give-up-after", "8", "--threads", "1"]
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
        return [line.partition(" ")[2] for line in lines if line.startswith("PUBLISH")]

    def result(self):
        """All that has to be the same, whoever was killed."""
        server = self.folder / "server"
        state = RunState.load(server / "state.json")
        rows = [(row["round"], row["clients"], row["num_examples"]) for row in state.history]
        columns = [
            [line.split(",")[:3] for line in (folder / name).read_text().splitlines()]
            for folder, name in [
                (server, "history.csv"),
                *((self.folder / client, "history.csv") for client in CLIENTS),
            ]
        ]
        # The server may be killed when a client tells its scores of the result: that is once.
        scores = (server / "clients.csv").read_text().splitlines()
        counted = sorted(line.split(",")[:2] for line in scores if not line.startswith(str(ROUNDS)))
        digests = [files.sha256_of(server / f"{kind}_weight.h5") for kind in ("server", "best")]
        return rows, columns, counted, digests, state.best


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    make_data(folder / "data", clients=2, images=3, validation=2)
    run = Supervised(folder / "undisturbed", folder / "data")
    assert set(run.codes.values()) == {0}, run.log()
    return run


def kill_at_every_publish(undisturbed, victim, hows):
    points = undisturbed.published(victim)
    kills = [(number, point, how) for number, point in enumerate(points, 1) for how in hows(number)]

    def one(kill):
        number, point, how = kill
        folder = undisturbed.folder.parent / f"{victim}-{number}-{how}"
        shutil.rmtree(folder, ignore_errors=True)  # of another test of this session
        run = Supervised(folder, undisturbed.folder.parent / "data", victim, number, how)
        assert run.kills == 1, f"{kill}: {run.codes}\n{run.log()}"
        assert run.result() == undisturbed.result(), f"{kill}:\n{run.log()}"
        # The last publishes of a client are the result and its card: the server has sent all of
        # that, and may be gone when a client that was killed there asks again.
        late = {4} if victim != "server" and number >= len(points) - 1 else set()
        assert set(run.codes.values()) <= {0} | late, f"{kill}: {run.codes}\n{run.log()}"
        left_over = [path for path in run.folder.rglob(".*.tmp*") if ".status." not in path.name]
        assert not left_over, "a temporary file is left for ever"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, kills))


def test_the_undisturbed_run_publishes_what_it_should(undisturbed):
    """As the table of federation/state.py says it; of the client: fetched, trained, delivered."""
    server = undisturbed.published("server")
    names = [Path(path).name for path in server]
    assert names[:3] == ["server_weight.h5", "state.json", "history.csv"]
    accept = ["state.json", "client_weights.h5"] * len(CLIENTS)
    close = ["state.json", "server_weight.h5", "state.json", "server_weight.json"]
    best = ["best_weight.h5", "best_weight.json"]  # each round is scored alike
    end = ["history.csv", "state.json", "clients.csv"]
    expected = accept + close + best + end + accept + close + end
    assert names[3:][: len(expected)] == expected
    assert set(names[3 + len(expected) :]) <= {"clients.csv"}
    a_round = ["client_weights.h5", "client_weights.h5", "history.csv", "state.json", "state.json"]
    client = [Path(path).name for path in undisturbed.published("client001")]
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


# --- a storm: at random instants ------------------------------------------------------------------

CONVERTED = "client003"  # in the storm, this one sends files of another layout

TRAINING = f"""
import os
import numpy as np
import standin
from common import files
from federation import weights
sys.modules["model"] = standin

def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
    while not os.path.exists(f"round-{{round_number}}-may-end"):
        time.sleep(0.01)
    rng = np.random.default_rng([batches.client_number, round_number])
    network.change = np.float32(rng.standard_normal())
    row = dict(loss=0.0, accuracy=0.0, num_examples=1, seconds=0.0)
    return [dict(round=round_number, epoch=1, **row)]

def tensors(network):
    return [tensor + network.change for tensor in standin.read_weights(network.path)]

def write_tensors(path, layout, arrays, inner=weights.write_tensors):
    if "{CONVERTED}" not in str(path):
        return inner(path, layout, arrays)
    with files.replacing(path) as written:
        standin.write_weights(written, arrays, layout.shapes, root="model_weights")
    return files.sha256_of(path)

standin.train, standin.tensors, weights.write_tensors = train, tensors, write_tensors
import todoClient
todoClient.FIRST_PAUSE_S = todoClient.LONGEST_PAUSE_S = 0.05
"""


class Storm:
    """A run without TensorFlow, whose round goes on when the test has made its faults.

    A process that was killed is started again.
    """

    rounds = 12

    def __init__(self, start, folder, data):
        self.start, self.folder, self.processes = start, folder, {}
        (folder / "server").mkdir(parents=True)
        for name in ("preprocessed", "index"):
            (folder / name).symlink_to(data / name)
        names = [*CLIENTS, CONVERTED]
        own = write_weights(folder / "server" / "server_weight.h5", 1, shapes_of_size(2))
        scored_on = files.sha256_of(data / "index" / "val_set.pkl")
        state = new_run(names, self.rounds, own).changed(validation_sha256=scored_on)
        state.save(folder / "server" / "state.json")
        address = f"localhost:{free_port()}"
        self.commands = {"server": [server_script(folder), "--listen", address]}
        script = holding(folder, "todoClient", TRAINING)
        for name in names:
            self.commands[name] = [script, "--name", name, "--server", address]
        self.begin(*self.commands)

    def begin(self, *names):
        for name in names:
            self.processes[name] = self.start(*self.commands[name], cwd=self.folder)

    def rounds_done(self):
        return RunState.load(self.folder / "server" / "state.json").evaluated

    def bits(self):
        """Wait for the end of all; the SHA-256 of the result."""
        for name, process in self.processes.items():
            assert process.wait(380) == 0, f"{name}:\n{process.output}"
        return files.sha256_of(self.folder / "server" / "server_weight.h5")

    def said(self):
        return "the next round opens\n" + "\n".join(each.output for each in self.processes.values())

    def let_end(self, round_number):
        (self.folder / f"round-{round_number}-may-end").touch()

    def converter(self):
        """The id of a process that reads a file just now, of the server or of a client; or None."""
        lines = processes_in(self.folder).items()
        return next((pid for pid, line in lines if "federation.convert" in line), None)

    def strike(self, victim, kind, chance):
        """Kill the victim and start it again, or stop it for a while. Whether it still ran."""
        if victim != "converter":
            time.sleep(chance.uniform(0, 0.3))  # at any instant
            pid = self.processes[victim].pid
        else:
            pid = until(self.converter, lambda: self.processes["server"].output)
        try:
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "stop":
                time.sleep(chance.uniform(0, 0.5))
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            assert victim == "converter"  # it was quicker, or the server has ended it
            return kind == "stop"
        if kind == "kill" and victim != "converter":
            self.processes[victim].process.wait()
            self.begin(victim)
        return True


@pytest.mark.slow
def test_a_storm_of_faults_ends_in_the_calm_runs_bits(start, shared_site, tmp_path):
    calm = Storm(start, tmp_path / "calm", shared_site)
    for number in range(1, Storm.rounds + 1):
        calm.let_end(number)
    expected = calm.bits()
    stormy = Storm(start, tmp_path / "stormy", shared_site)
    chance = random.Random(13)
    for number in range(1, Storm.rounds + 1):
        until(lambda: stormy.rounds_done() >= number - 1, stormy.said, 120)  # noqa: B023
        # a converter runs only while the round is closed: its turn comes last
        for victim in [*chance.choices([*stormy.commands], k=2), "converter"]:
            kind = chance.choice(["kill", "stop"])
            if victim == "converter":
                stormy.let_end(number)
            while not stormy.strike(victim, kind, chance):
                assert stormy.rounds_done() < number, "the round ended before the converter did"
        for name, process in stormy.processes.items():
            assert process.process.poll() is None or number == Storm.rounds, (name, process.output)
    assert stormy.bits() == expected

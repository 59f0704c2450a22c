"""Crash at every publish: the restarted run ends in the same bits.

Server and client are killed (SIGKILL to themselves) before and after each file that they publish in
a run of three rounds, and with a cut-short temporary file left behind.

The processes are real and run the real todoServer.main and todoClient.main, forked from one that
has imported them. Only
the network is a stand-in: training adds numbers that follow from (seed, client, round).
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
from conftest import (
    free_port,
    make_data,
    random_tensors,
    read_weights,
    write_weights,
)
from standin import SHAPES

import model
from common import files
from federation import rounds

CLIENTS = ["client001", "client002"]
ROUNDS = 3
# The stand-in scores every round alike, so the first stays the best one.
FIRST_IS_BEST = ["server/best_weight.h5", "server/best_weight.json"]
DEADLINE_S = 90
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "todoServer",
        "todoClient",
        "federation.service",
        "data",
        "preparation.photos",
        "pytest",
        "test_crash",
    ]
)


# --- what runs in the processes ------------------------------------------------------------------


class Network:
    """Stands in for a keras.Model."""

    def __init__(self, arch, image_size, seed=0):
        self.name, self.input_shape, self.tensors = (
            arch,
            (None, image_size, image_size, 3),
            random_tensors(seed),
        )


def save(network, path):
    with files.replacing(path) as written:
        write_weights(written, network.tensors)


def train(network, batches, round_number, epochs, report, progress=None):
    rng = np.random.default_rng([batches.seed, batches.client_number, round_number])
    network.tensors = [
        tensor + rng.standard_normal(tensor.shape).astype(np.float32) for tensor in network.tensors
    ]
    return [
        {
            "round": round_number,
            "epoch": 1,
            "loss": 1,
            "accuracy": 1,
            "num_examples": len(batches.images),
            "seconds": 1.0,
        }
    ]


STAND_INS = {
    "configure": lambda seed, threads=None: None,
    "build": Network,
    "save": save,
    "train": train,
    "initialize": lambda network, source: None,
    "load": lambda network, path: setattr(network, "tensors", read_weights(path)),
    "predict": lambda network, images: np.linspace(0.25, 0.75, len(images), dtype=np.float32),
    "shapes": lambda network: SHAPES,
    "tensors": lambda network: network.tensors,
}


def life(script, arguments, folder, code_file, number, how):
    """One life of a process: main(), until the number-th publish.

    Everything it says goes into a file, and into another the code with which it ends by itself
    (multiprocessing reports 255 for any code, once in 1000 times).
    """
    os.chdir(folder)
    log = os.open(
        f"{script}-{arguments[1].rpartition(':')[2]}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    count, lock, publish, end = itertools.count(1), threading.Lock(), files.publish, os._exit

    def noted(code):
        Path(code_file).write_text(str(code))
        end(code)

    os._exit = noted

    def die(point, path):
        os.write(2, f"KILLED {how} publish {point}: {path}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(written, path):
        # A thread of its own publishes the status whenever it likes, and nothing reads it back.
        if Path(path).name == "status.json":
            publish(written, path)
            return
        with lock:
            this = next(count)
            os.write(2, f"PUBLISH {this}: {path}\n".encode())
            if this == number and how != "after":
                if how == "torn":
                    os.truncate(written, os.path.getsize(written) // 2)
                die(this, path)
            publish(written, path)
            if this == number:
                die(this, path)

    for module in list(sys.modules.values()):
        if getattr(module, "publish", None) is publish:
            module.publish = counted
    for name, stand_in in STAND_INS.items():
        setattr(model, name, stand_in)
    import todoClient

    todoClient.FIRST_PAUSE_S = 0.05
    code = 99
    try:
        code = __import__(script).main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the supervisor ------------------------------------------------------------------------------


class Supervised:
    """A run in `folder`, whose killed processes are started again.

    victim: the script or client that is killed once.
    """

    def __init__(self, folder, data, victim=None, number=0, how=None):
        self.folder = folder
        folder.mkdir()
        for name in ("preprocessed", "index"):
            (folder / name).symlink_to(data / name)
        address = f"localhost:{free_port()}"
        server = [
            "--listen",
            address,
            "--clients",
            ",".join(CLIENTS),
            "--rounds",
            str(ROUNDS),
            "--image-size",
            "32",
        ]
        client = ["--server", address, "--give-up-after", "8", "--threads", "1"]
        self.commands = {
            "todoServer": ("todoServer", server),
            **{name: ("todoClient", ["--name", name, *client]) for name in CLIENTS},
        }
        self.kills, self.codes = 0, {}
        self.run(victim, number, how)

    def run(self, victim, number, how):
        alive, deadline = {}, time.monotonic() + DEADLINE_S

        def start(name, *arm):
            script, arguments = self.commands[name]
            alive[name] = FORKS.Process(
                target=life,
                args=(script, arguments, self.folder, f"{name}.code", *arm),
                daemon=True,
            )
            alive[name].start()

        try:
            for name in self.commands:
                start(name, *((number, how) if name == victim else (0, None)))
            while alive:
                multiprocessing.connection.wait(
                    [process.sentinel for process in alive.values()], deadline - time.monotonic()
                )
                assert time.monotonic() < deadline, (
                    f"{list(alive)} still run, {victim} killed {how} {number}:\n{self.log()}"
                )
                for name, process in list(alive.items()):
                    if process.exitcode is not None:
                        del alive[name]
                        ended = self.folder / f"{name}.code"
                        if ended.exists():
                            self.codes[name] = int(ended.read_text())
                        else:  # killed
                            self.kills += 1
                            start(name, 0, None)
        finally:
            for process in alive.values():
                process.kill()

    def log(self, only=""):
        return "".join(
            f"--- {path.name}\n{path.read_text()}"
            for path in sorted(self.folder.glob(f"{only}*.log"))
        )

    @property
    def weights(self):
        return files.sha256_of(self.folder / "server" / "server_weight.h5")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    make_data(folder / "data", clients=2, images=3, validation=2)
    run = Supervised(folder / "undisturbed", folder / "data")
    assert set(run.codes.values()) == {0}, run.log()
    return run


def points_of(run, log):
    return [
        line.split(": ", 1)[1] for line in run.log(log).splitlines() if line.startswith("PUBLISH")
    ]


def kill_at_every_publish(undisturbed, victim, hows):
    points = points_of(
        undisturbed, {"todoServer": "todoServer", "client001": "todoClient-client001"}[victim]
    )
    kills = [(number, point, how) for number, point in enumerate(points, 1) for how in hows(number)]
    data = undisturbed.folder.parent / "data"

    def one(kill):
        number, point, how = kill
        folder = undisturbed.folder.parent / f"{victim}-{number}-{how}"
        shutil.rmtree(folder, ignore_errors=True)  # of another test of this session
        run = Supervised(folder, data, victim, number, how)
        print(f"{victim} killed {how} publish {number} of {len(points)}, {point}")
        assert run.kills == 1 and f"KILLED {how} publish {number}: " in run.log(), (
            f"{run.kills}, {run.codes}\n{run.log()}"
        )
        assert run.weights == undisturbed.weights, f"other bits after {kill}:\n{run.log()}"
        # The last two publishes of a client are the result and its card: the server has sent all of
        # that, and may be gone when a client that was killed there asks again.
        late = {4} if victim == "client001" and number >= len(points) - 1 else set()
        assert set(run.codes.values()) <= {0} | late, f"{run.codes} after {kill}:\n{run.log()}"
        state = files.load_state(run.folder / "server" / "state.json")
        assert [row["round"] for row in state["history"]] == [1, 2, 3]
        assert {row["clients"] for row in state["history"]} == {2} and {
            row["num_examples"] for row in state["history"]
        } == {8}
        for name, columns in (
            ("server", rounds.HISTORY_COLUMNS),
            *((client, None) for client in CLIENTS),
        ):
            lines = (run.folder / name / "history.csv").read_text().splitlines()
            assert [line.split(",")[0] for line in lines] == ["round", "1", "2", "3"]
            assert columns is None or lines[0] == ",".join(columns)
        assert not list(run.folder.rglob(".*.tmp*")), "a temporary file is left for ever"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, kills))
    return points


def a_third(number):
    """For the fast run: every publish in one way, and the same step of the three rounds in each."""
    return [("after", "before", "torn")[(number + number // 10) % 3]]


def test_the_undisturbed_run_publishes_what_it_should(undisturbed):
    server = points_of(undisturbed, "todoServer")
    assert server[:3] == ["server/server_weight.h5", "server/state.json", "server/history.csv"]
    assert (
        len(server) == 3 + ROUNDS * (2 * len(CLIENTS) + 6) + len(FIRST_IS_BEST)
        and server.count("server/server_weight.h5") == 1 + ROUNDS
        and server.count("server/server_weight.json") == ROUNDS
        and [path for path in server if path in FIRST_IS_BEST] == FIRST_IS_BEST
    )
    client = points_of(undisturbed, "todoClient-client001")
    assert client[-2:] == ["client001/server_weight.h5", "client001/server_weight.json"]
    assert client[:-2] == ROUNDS * [
        f"client001/{name}"
        for name in (
            "client_weights.h5",
            "client_weights.h5",
            "history.csv",
            "state.json",
            "state.json",
        )
    ]


def test_a_server_killed_at_every_publish(undisturbed):
    kill_at_every_publish(undisturbed, "todoServer", a_third)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["todoServer", "client001"])
def test_killed_at_every_publish_in_every_way(undisturbed, victim):
    kill_at_every_publish(undisturbed, victim, lambda number: ["before", "torn", "after"])

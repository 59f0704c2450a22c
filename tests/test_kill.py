"""kill -9 for real: server and clients end in the undisturbed run's bits.

They are processes with real (tiny) training, killed at named points and at random instants, and
started again as a supervisor would.
"""

import random
import sys
import time

import pytest
from conftest import ROOT, Started, free_port, make_data, until

from common import files

CLIENTS = ["client001", "client002"]
HOLDING = f"""
# The script as it is, but that it stands still at a named point for which the test has made a file
# hold-POINT, and is killed there. It stands still once: the file is renamed to held-POINT.
import pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data
from common import files
import model
from federation import rounds
from federation import weights

def hold(point):
    request = pathlib.Path("hold-" + point)
    if request.exists():
        request.rename("held-" + point)
        while True:
            signal.pause()

def evaluate(*arguments, inner=model.predict):
    hold("evaluating")
    return inner(*arguments)

def epoch(self, inner=data.TrainingBatches._epoch):
    for batch in inner(self):
        yield batch
        hold("training-" + sys.argv[2])

def blob_messages(path, *who, inner=weights.blob_messages):
    for number, message in enumerate(inner(path, *who)):
        yield message
        if number == 2 and who:
            hold("half-an-upload-" + who[0])

def publish_rows(path, columns, rows, inner=rounds.publish_rows):
    inner(path, columns, rows)
    if rows:
        hold("before-the-answer")

def publish(written, path, inner=files.publish):
    if path.name == "server_weight.h5":
        hold("merging")
    inner(written, path)

data.TrainingBatches._epoch = epoch
weights.BLOB_BYTES = 50_000
weights.blob_messages = blob_messages
files.publish = publish
model.predict = evaluate
rounds.publish_rows = publish_rows
"""


class Supervised:
    """Server and clients in `folder`; who is killed with `kill` is started again with `again`."""

    def __init__(self, folder, data, rounds, clients):
        self.folder, self.rounds, self.processes = folder, rounds, {}
        folder.mkdir()
        for name in ("preprocessed", "index"):
            (folder / name).symlink_to(data / name)
        for script in ("todoServer", "todoClient"):
            (folder / f"{script}.py").write_text(
                f"{HOLDING}\nimport {script}\nsys.exit({script}.main())\n"
            )
        address = f"localhost:{free_port()}"
        self.commands = {
            "server": [
                "todoServer.py",
                "--listen",
                address,
                "--clients",
                ",".join(clients),
                "--rounds",
                str(rounds),
                "--image-size",
                "32",
            ],
            **{
                name: [
                    "todoClient.py",
                    "--name",
                    name,
                    "--server",
                    address,
                    "--threads",
                    "1",
                    "--batch-size",
                    "2",
                ]
                for name in clients
            },
        }

    def again(self, *names):
        """Starts these, or all."""
        for name in names or self.commands:
            script, *arguments = self.commands[name]
            self.processes[name] = Started(
                [sys.executable, str(self.folder / script), *arguments], self.folder
            )

    def kill(self, name):
        """kill -9, for real; whether it still ran."""
        running = self.processes[name].process.poll() is None
        if running:
            self.processes[name].kill()
        return running

    def kill_at(self, point, *names):
        """Kills these when the first of them has reached the point."""
        until(
            lambda: (self.folder / f"held-{point}").exists(),
            lambda: (
                f"{point} is reached\n"
                + "\n".join(process.output for process in self.processes.values())
            ),
            120,
        )
        for name in names:
            assert self.kill(name)
        print(f"killed {', '.join(names)}: {point}")

    def hold(self, point):
        (self.folder / f"hold-{point}").touch()

    def rounds_done(self):
        return len(
            (files.load_state(self.folder / "server" / "state.json") or {"history": []})["history"]
        )

    def finish(self):
        """Everyone comes to the end; the digest of the weights."""
        for name, process in self.processes.items():
            assert process.wait(180) == 0, f"{name}:\n{process.output}"
        state = files.load_state(self.folder / "server" / "state.json")
        assert [row["round"] for row in state["history"]] == list(range(1, self.rounds + 1))
        for name in self.commands:
            assert (self.folder / name / "history.csv").read_text().count("\n") == self.rounds + 1
        return files.sha256_of(self.folder / "server" / "server_weight.h5")

    def close(self):
        for process in self.processes.values():
            if process.process.poll() is None:
                process.process.kill()


@pytest.fixture
def supervise(tmp_path_factory):
    """supervise(name, rounds, clients) -> Supervised; none of its processes outlives the test."""
    made = []
    folder = tmp_path_factory.mktemp("kill")

    def make(name, rounds, clients=CLIENTS):
        if not (folder / "data").exists():
            make_data(folder / "data", clients=2, images=6, validation=4)
        made.append(Supervised(folder / name, folder / "data", rounds, clients))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def undisturbed(supervise):
    """undisturbed(rounds, clients) begins a run beside the other; its finish() gives the bits."""

    def begin(*arguments):
        run = supervise("undisturbed", *arguments)
        run.again()
        return run

    return begin


@pytest.mark.slow
def test_killed_while_training_and_while_evaluating(supervise, undisturbed):
    other = undisturbed(2, CLIENTS[:1])
    run = supervise("killed", 2, CLIENTS[:1])
    for point in ("training-client001", "evaluating"):
        run.hold(point)
    run.again()
    run.kill_at("training-client001", "client001")
    run.again("client001")
    run.kill_at("evaluating", "server")
    run.again("server")
    assert run.finish() == other.finish()


@pytest.mark.slow
def test_killed_at_every_named_point(supervise, undisturbed):
    other = undisturbed(4)
    run = supervise("killed", 4)
    run.hold("training-client001")
    run.again("server", "client001")
    # a client: while it trains, in the middle of its upload, at the barrier
    run.kill_at("training-client001", "client001")
    run.hold("half-an-upload-client001")
    run.again("client001")
    run.kill_at("half-an-upload-client001", "client001")
    assert not (run.folder / "server" / "client001" / "client_weights.h5").exists()
    run.again("client001")
    run.processes["server"].wait_for("client001 delivered")
    run.kill("client001")
    print("killed client001: at the barrier")
    # the server: at the barrier, in the middle of an upload, while it merges, while it evaluates,
    # and before the answer
    run.again("client001")
    run.processes["server"].wait_for("waiting for client002", 60)
    run.kill("server")
    print("killed server: at the barrier")
    run.hold("half-an-upload-client002")
    run.again("server", "client002")
    run.kill_at("half-an-upload-client002", "server", "client002")
    for point in ("merging", "evaluating", "before-the-answer"):
        run.hold(point)
    run.again("server", "client002")
    for point in ("merging", "evaluating", "before-the-answer"):
        run.kill_at(point, "server")
        if point == "before-the-answer":
            run.kill("client001")  # and one whose answer is lost, in the same moment
            run.again("client001")
        run.again("server")
    # and once more in the next round, in which the server is not just restarted
    run.processes["server"].wait_for("round 1.* delivered|fetches the weights of round 2", 120)
    for point in ("merging", "evaluating", "before-the-answer"):
        (run.folder / f"held-{point}").unlink()
        run.hold(point)
        run.kill_at(point, "server")
        run.again("server")
    assert run.finish() == other.finish()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_instants(supervise, undisturbed, seed):
    other = undisturbed(60)
    run, chance, kills = supervise("killed", 60), random.Random(seed), 0
    run.again()
    while kills < 10:
        victim, delay_s, before = (
            chance.choice(["server", *CLIENTS]),
            chance.uniform(0, 9),
            run.rounds_done(),
        )
        if kills % 2:  # in the middle of the rounds; else often while it starts
            until(lambda: run.rounds_done() > before, "a round is over", 120)  # noqa: B023
            delay_s /= 9
        end = (
            time.monotonic() + delay_s
        )  # the instant is what is tried; on a fast machine earlier, before the run is over
        until(lambda: time.monotonic() > end or run.rounds_done() > 5 * (kills + 1), "the instant")  # noqa: B023
        assert run.kill(victim), run.processes[victim].output
        kills += 1
        print(
            f"killed {victim} after at most {delay_s:.1f} s, {run.rounds_done()} rounds were over"
        )
        run.again(victim)
    assert run.finish() == other.finish()

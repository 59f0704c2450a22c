"""A storm: server, clients and converter are killed and stopped, three times in each of 20 rounds.

They are real processes without TensorFlow; "training" follows from the round and the client. One
client sends files of another layout, so each of its uploads starts a converter. The run ends in the
bits of a run that nobody disturbed.
"""

import os
import random
import signal
import time

import pytest
from conftest import free_port, holding, processes_in, server_script, until
from standin import shapes_of_size, write_weights

from common import files
from federation.state import RunState

CLIENTS = ["client001", "client002", "client003"]
CONVERTED = "client003"  # this one sends files of another layout
ROUNDS = 20
FAULTS_A_ROUND = 3
STOPPED_S = 0.5

TRAINING = f"""
import os, time
import numpy as np
import standin
from federation import weights
sys.modules["model"] = standin

def train(network, batches, round_number, epochs, report, progress=None):
    # a round goes on when the test has made its faults
    while not os.path.exists(f"round-{{round_number}}-may-end"):
        time.sleep(0.01)
    rng = np.random.default_rng([batches.client_number, round_number])
    network.change = np.float32(rng.standard_normal())
    row = dict(loss=0.0, accuracy=0.0, num_examples=1, seconds=0.0)
    return [dict(round=round_number, epoch=1, **row)]

def tensors(network):
    return [tensor + network.change for tensor in standin.read_weights(network.path)]

def write_tensors(path, tensors, inner=weights.write_tensors):
    if "{CONVERTED}" not in str(path):
        return inner(path, tensors)
    layout = weights.Layout(path)
    with files.replacing(path) as written:
        standin.write_weights(written, tensors, layout.shapes, root="model_weights")
    return files.sha256_of(path)

from common import files
standin.train, standin.tensors, weights.write_tensors = train, tensors, write_tensors
import todoClient
todoClient.FIRST_PAUSE_S = todoClient.LONGEST_PAUSE_S = 0.05
"""


class Site:
    """A run in a folder whose processes are started again when they were killed."""

    def __init__(self, start, folder, data):
        self.folder = folder
        self.start = start
        folder.mkdir()
        for name in ("preprocessed", "index"):
            (folder / name).symlink_to(data / name)
        (folder / "server").mkdir()
        own = write_weights(folder / "server" / "server_weight.h5", 1, shapes_of_size(2))
        RunState(
            run="run0",
            clients=CLIENTS,
            rounds=ROUNDS,
            weights_sha256=files.sha256_of(own),
            arch="drcnn",
            image_size=32,
            seed=0,
        ).save(folder / "server" / "state.json")
        address = f"localhost:{free_port()}"
        client = holding(folder, "todoClient", TRAINING)
        self.commands = {"server": [server_script(folder), "--listen", address]}
        for name in CLIENTS:
            self.commands[name] = [client, "--name", name, "--server", address]
        self.processes = {}

    def begin(self, name):
        self.processes[name] = self.start(*self.commands[name], cwd=self.folder)

    def let_end(self, round_number):
        (self.folder / f"round-{round_number}-may-end").touch()

    def check_that_all_run(self):
        for name, process in self.processes.items():
            assert process.process.poll() is None, f"{name} ended:\n{process.output}"

    def merged_rounds(self):
        return RunState.load(self.folder / "server" / "state.json").round - 1

    def converter(self):
        """The process id of a converter that runs just now, or None."""
        for pid, line in processes_in(self.folder).items():
            if "federation.convert" in line:
                return pid
        return None

    def bits(self):
        """Wait for the end of all; the SHA-256 of the result."""
        for name, process in self.processes.items():
            assert process.wait(380) == 0, f"{name}:\n{process.output}"
        return files.sha256_of(self.folder / "server" / "server_weight.h5")


def strike(site, victim, kind, rng):
    """Kill the victim, and start it again; or stop it for a while."""
    if victim == "converter":
        pid = until(site.converter, lambda: f"a converter runs; {site.processes['server'].output}")
    else:
        time.sleep(rng.uniform(0, 0.3))  # at any instant
        pid = site.processes[victim].pid
    try:
        os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    except ProcessLookupError:
        assert victim == "converter"  # it was quicker
        return False
    if kind == "stop":
        time.sleep(rng.uniform(0, STOPPED_S))
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            assert victim == "converter"  # the server has ended it, or it was ended with it
    elif victim != "converter":
        site.processes[victim].process.wait()
        site.begin(victim)
    return True


@pytest.mark.slow
def test_a_storm_of_60_faults_ends_in_the_calm_runs_bits(start, shared_site, tmp_path):
    calm = Site(start, tmp_path / "calm", shared_site)
    for name in calm.commands:
        calm.begin(name)
    for number in range(1, ROUNDS + 1):
        calm.let_end(number)
    expected = calm.bits()

    stormy = Site(start, tmp_path / "stormy", shared_site)
    for name in stormy.commands:
        stormy.begin(name)
    rng = random.Random(13)
    struck = []
    for number in range(1, ROUNDS + 1):
        until(lambda: stormy.merged_rounds() >= number - 1, f"round {number} opens", 120)  # noqa: B023
        # a converter runs only while the round is closed: its turn comes last
        victims = rng.choices(["server", *CLIENTS], k=FAULTS_A_ROUND - 1) + ["converter"]
        for victim in victims:
            kind = rng.choice(["kill", "stop"])
            if victim == "converter":
                stormy.let_end(number)
            while not strike(stormy, victim, kind, rng):
                assert stormy.merged_rounds() < number, "the round ended before the converter did"
            struck.append((victim, kind))
        stormy.check_that_all_run()
    assert stormy.bits() == expected
    assert len(struck) == 60 and len(set(struck)) == 10, struck

"""What several tests need: tiny data sets, real processes that never outlive their test, deadlines.

python3 -m pytest             # the quick tests
python3 -m pytest --slow      # the long ones
"""

import csv
import itertools
import os

# HDF5 locks the files that it opens, and a process that is started meanwhile holds the lock from
# fork to exec: scripts switch that off, and so do tests, before h5py is imported.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from standin import metrics, random_tensors, read_weights, write_weights

import data
import model
from common import files
from federation import weights
from federation.rounds import Rounds, Upload
from federation.state import RunState

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # photographs and cases, which are no part of the project
DEADLINE_S = 60  # for what takes a second on an idle machine
STARTS_S = 400  # for a script that loads TensorFlow
CLIENTS = ["client001", "client002", "client003"]
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a folder that no disk slows down

# Ignored, as in a background job, it would stay so in children.
signal.signal(signal.SIGINT, signal.default_int_handler)


# TensorFlow's pool is sized once a process, and all tests share this one.
model.default_threads = lambda: 1


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the tests marked slow, and no others")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--slow")
    others = [item for item in items if ("slow" in item.keywords) != wanted]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


# --- conditions with a deadline ------------------------------------------------------------------


def until(condition, what, timeout_s=DEADLINE_S):
    """Wait until condition() is true, and return its value.

    At the deadline it fails and names `what`: a text, or a function that gives one.
    """
    deadline = time.monotonic() + timeout_s
    value = condition()
    while not value:
        if time.monotonic() > deadline:
            raise AssertionError(f"{what() if callable(what) else what}: not within {timeout_s} s")
        time.sleep(0.001)
        value = condition()
    return value


# --- weight files --------------------------------------------------------------------------------


def averaged(uploads):
    """FedAvg, written here once more: uploads [(client, num_examples, tensors)] -> float32 tensors.

    The sum in float64, in the order of the clients' names, cast once.
    """
    uploads = sorted(uploads, key=lambda upload: upload[0])
    total = sum(num_examples for _, num_examples, _ in uploads)
    means = []
    for number in range(len(uploads[0][2])):
        products = [n * tensors[number].astype(np.float64) for _, n, tensors in uploads]
        means.append((sum(products) / total).astype(np.float32))
    return means


def same_bits(one, other):
    bits = [
        [(each.dtype, each.shape, each.tobytes()) for each in tensors] for tensors in (one, other)
    ]
    return bits[0] == bits[1]


# --- a run without a network ---------------------------------------------------------------------


class Call:
    """f(*arguments) in a thread of its own: `value` or `error` once it has ended."""

    def __init__(self, f, *arguments, **keywords):
        self.value = self.error = None

        def run():
            try:
                self.value = f(*arguments, **keywords)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    @property
    def ended(self):
        return not self.thread.is_alive()

    def result(self, timeout_s=DEADLINE_S):
        """What f returned; raises what f raised; fails when it still runs at the deadline."""
        self.thread.join(timeout_s)
        assert self.ended, f"a call still waits after {timeout_s} s"
        if self.error is not None:
            raise self.error
        return self.value


def new_run(clients, rounds, weights_path):
    """The state of a run that begins with these weights; its name is run0."""
    return RunState(
        run="run0",
        clients=list(clients),
        rounds=rounds,
        weights_sha256=files.sha256_of(weights_path),
        arch="drcnn",
        image_size=32,
        seed=0,
    )


class Run:
    """A run with real files, the real FedAvg on tiny weights and a coordinator thread.

    `said` has what it logs.
    """

    def __init__(self, folder, clients=CLIENTS, rounds=2, **options):
        self.folder = folder
        words = {"publish_result": lambda state, row: (None, f"AUC {row['auc']:.3f}")}
        self.options = words | options
        self.said = []
        self.weights = folder / "server_weight.h5"
        for client in clients:
            (folder / client).mkdir(parents=True, exist_ok=True)
        write_weights(self.weights, 1000)
        new_run(clients, rounds, self.weights).save(folder / "state.json")
        self.merge = self.average
        self.evaluate = metrics
        self.start()

    def average(self, paths, num_examples):
        layout = weights.Layout(self.weights)
        trainable = [True] * len(layout.tensors)
        sha256, products = weights.fedavg(paths, num_examples, layout, self.weights, trainable)
        return sha256, weights.compare_updates(products, num_examples)

    def start(self, rounds=None, clients=None):
        """Opens what is on disk, as a server does that is started."""
        state = RunState.load(self.folder / "state.json")
        state = state.changed(rounds=rounds or state.rounds)
        self.rounds = Rounds(
            self.folder,
            state,
            lambda paths, num_examples: self.merge(paths, num_examples),
            lambda: self.evaluate(),
            say=self.said.append,
            **self.options,
        )
        self.rounds.open()
        # From here on the coordinator may freeze again.
        assert RunState.load(self.folder / "state.json").frozen is None
        self.rounds.change_clients(clients or state.clients)
        self.rounds.opened_at = None
        self.coordinator = Call(self.rounds.run)
        until(
            lambda: self.rounds.opened_at is not None or self.coordinator.ended, "the round opens"
        )

    def stop(self):
        """As after a kill: what is not on disk is forgotten."""
        self.rounds.stop("UNAVAILABLE", "stopped by the test")
        self.coordinator.thread.join(DEADLINE_S)
        assert self.coordinator.ended

    def restart(self, **options):
        self.stop()
        self.start(**options)

    def deliver(
        self, client, seed, num_examples=1, run="run0", round_number=..., alive=lambda: True
    ):
        """A Call that delivers random_tensors(seed), for the open round unless another is named."""
        path = write_weights(files.temporary(self.rounds.upload_path(client)), seed)
        number = self.rounds.state.round if round_number is ... else round_number
        digest = files.sha256_of(path)
        upload = Upload(client, num_examples, run, number, digest, path, digest)
        return Call(self.rounds.deliver, upload, alive)

    def delivered(self, client, seed, **options):
        """The same, once it waits: its upload is counted."""
        before = self.rounds.waiting.get(client)
        call = self.deliver(client, seed, **options)

        def waits():
            return call.ended or self.rounds.waiting.get(client) is not before

        until(waits, f"{client} is counted")
        assert not call.ended, call.error
        return call

    def holds(self, *uploads):
        """Whether server_weight.h5 is FedAvg over these uploads (client, num_examples, seed)."""
        expected = averaged([(name, n, random_tensors(seed)) for name, n, seed in uploads])
        return same_bits(read_weights(self.weights), expected)


@pytest.fixture
def make_run(tmp_path):
    """make_run(clients=..., rounds=..., min_clients=..., round_timeout_s=...) -> Run.

    It is stopped after the test.
    """
    made = []

    def make(**options):
        made.append(Run(tmp_path / "server", **options))
        return made[-1]

    yield make
    for run in made:
        run.stop()


# --- data ----------------------------------------------------------------------------------------


def make_data(folder, clients=3, images=8, validation=8):
    """preprocessed/ and index/ in `folder`, which is returned.

    PNGs that follow from their number, grades 0 and 2 in turn.
    images: of the first client; every later one has 2 more, so that no two weigh the same.
    """
    for name in ("preprocessed", "index"):
        (folder / name).mkdir(parents=True)
    counts = {f"worker{number + 1}.pkl": images + 2 * number for number in range(clients)}
    numbers = itertools.count()
    for name, count in {**counts, "val_set.pkl": validation}.items():
        records = [make_picture(folder, next(numbers)) for _ in range(count)]
        data.write_index(folder / "index" / name, records)
    return folder


def make_picture(folder, number):
    """The record of a picture that is made."""
    grade, name = 2 * (number % 2), f"{number:04}.png"
    random = np.random.default_rng(number)
    pixels = random.integers(0, 120 + 40 * grade, (32, 32, 3), np.uint8)
    path = f"preprocessed/{name}"
    Image.fromarray(pixels).save(folder / path)
    return {"picture": name, "label": grade, "dir": path, "new_label": str(grade == 0)}


def rows_of(path):
    """The rows of a CSV file as dicts."""
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8-sig").splitlines()))


@pytest.fixture
def site(tmp_path):
    """A project folder with a tiny data set for three clients; real scripts are started in it."""
    return make_data(tmp_path / "site")


# --- faults --------------------------------------------------------------------------------------


def fail_with(error):
    def fail(*_):
        raise error

    return fail


def fails_once(monkeypatch, owner, name, error):
    inner, errors = getattr(owner, name), [error]

    def attempt(*arguments):
        if errors:
            raise errors.pop()
        return inner(*arguments)

    monkeypatch.setattr(owner, name, attempt)


# --- processes -----------------------------------------------------------------------------------


HELD = []  # the sockets that hold the ports of free_port(), as long as the tests run


def free_port():
    """A port of localhost where nobody listens, and that the system gives to nobody else.

    A socket stays bound to it without listening: until a killed server listens there again, no
    other test and no outgoing connection gets its port. SO_REUSEADDR lets that server in.
    """
    both = socket.has_dualstack_ipv6()  # one socket for IPv4 and IPv6
    held = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
    HELD.append(held)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if both:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.bind(("", 0))
    return held.getsockname()[1]


class Started:
    """A process whose output (stdout and stderr) is read all the time."""

    def __init__(self, command, cwd, env=None):
        self.command, self.lines = command, []
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "CUDA_VISIBLE_DEVICES": "-1",
                "PYTHONFAULTHANDLER": "1",
                **(env or {}),
            },
        )
        self.pid, self.signal = self.process.pid, self.process.send_signal
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, timeout_s=DEADLINE_S):
        """The match of the first line in which the pattern is found."""

        def found():
            ended = not self.reader.is_alive()  # then all of its lines are there
            matches = (re.search(pattern, line) for line in list(self.lines))
            match = next(filter(None, matches), None)
            assert match or not ended, f"{self.command} ended without {pattern!r}:\n{self.output}"
            return match

        return until(found, lambda: f"{pattern!r} of {self.command}:\n{self.output}", timeout_s)

    def wait(self, timeout_s=DEADLINE_S):
        """The exit code (-9 where it was killed), after all of its output has been read."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.command} still runs after {timeout_s} s; it said:\n{self.output}")
        self.reader.join(5)  # what it has started may hold its output open
        return code

    def kill(self):
        """kill -9, for real."""
        self.process.kill()
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def start():
    """start(script, *arguments, cwd=folder) -> Started; it does not outlive the test.

    `script` is a file of the project root.
    """
    started = []

    def begin(script, *arguments, cwd, env=None, python=(sys.executable,)):
        started.append(Started([*python, str(ROOT / script), *map(str, arguments)], cwd, env))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


@pytest.fixture
def on_a_terminal():
    """on_a_terminal(command, cwd=folder, NAME=value) -> (Popen, the end at which a person sits).

    It leads a session, and does not outlive the test. No fork in this process: it has many threads.
    """
    started = []

    def begin(command, cwd, **environment):
        terminal, its_own = pty.openpty()
        env = {**os.environ, "TERM": "xterm", **environment}
        ends = {"stdin": its_own, "stdout": its_own, "stderr": its_own}
        started.append(subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **ends))
        os.close(its_own)
        return started[-1], terminal

    yield begin
    for each in started:
        each.kill()
        each.wait()


def start_server(start, cwd, *arguments, port=0, script="todoServer.py", **options):
    """(Started, its HOST:PORT), once it listens."""
    server = start(script, "--listen", f"localhost:{port}", *arguments, cwd=cwd, **options)
    return server, server.wait_for(r"listening on (\S+)", STARTS_S)[1]


def processes_in(folder):
    """{process id: command line} of all processes that work in `folder` or below."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd").startswith(str(folder)):
                found[int(pid)] = open(f"/proc/{pid}/cmdline").read().replace("\0", " ")
        except OSError:
            pass  # it ended meanwhile
    return found


def project_files(*patterns):
    """Names of the project's files, as they are in git, or would be: a ZIP of it has no .git."""
    with tempfile.TemporaryDirectory() as empty:
        git = ["git", f"--git-dir={empty}/.git", "--work-tree=."]
        subprocess.run([*git, "init", "--quiet"], cwd=ROOT, check=True)
        command = [*git, "ls-files", "--others", "--exclude-standard", *patterns]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def copy_of(folder):
    """The project in a folder of its own. Returns the folder."""
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


# --- the real scripts without TensorFlow ---------------------------------------------------------


@pytest.fixture(scope="session")
def shared_site(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shared") / "site", clients=3, images=4, validation=4)


@pytest.fixture
def begun(shared_site, tmp_path):
    """A function: the folder of a run that is begun but not served.

    todoServer.py resumes it, without TensorFlow until it evaluates.
    """

    def begin(clients=("client001", "client002"), rounds=2):
        for name in ("preprocessed", "index"):
            (tmp_path / name).symlink_to(shared_site / name)
        (tmp_path / "server").mkdir()
        weights_path = write_weights(tmp_path / "server" / "server_weight.h5", 1)
        scored_on = files.sha256_of(tmp_path / "index" / "val_set.pkl")
        state = new_run(clients, rounds, weights_path).changed(validation_sha256=scored_on)
        state.save(tmp_path / "server" / "state.json")
        return tmp_path

    return begin


def holding(site, script, *patches):
    """A file: the script with the stand-in for `model`, after these patches (Python text)."""
    path = site / f"{script}_patched.py"
    lines = [
        "import sys, time",
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]",
        "from common.script import end_script, start_script",
        "start_script(never_waits=True)",
        "import standin",
        "sys.modules['model'] = standin",
        *patches,
        f"import {script}",
        f"end_script({script}.main())",
    ]
    # whole at every instant: an earlier process may just begin to read it
    files.publish_text(path, "\n".join(lines))
    return path


# --- the scripts' main() in this process ---------------------------------------------------------


@pytest.fixture
def server_main(begun, monkeypatch, capsys):
    """server_main(flags) -> (exit code, what it said): a start, up to where it would listen."""
    import standin

    import todoServer

    site = begun()
    monkeypatch.chdir(site)
    monkeypatch.setenv("STANDIN_WEIGHTS", str(write_weights(site / "first.h5", 5)))
    monkeypatch.setattr(todoServer, "model", standin)
    monkeypatch.setattr(todoServer, "exit_on_signals", lambda *_: None)
    monkeypatch.setattr(todoServer, "serve", lambda *_: 0)
    monkeypatch.setattr(todoServer, "end_script", lambda code: None)

    def main(*flags):
        code = todoServer.main([*flags])
        said = capsys.readouterr()
        return code or 0, said.out + said.err

    return main


@pytest.fixture
def client_main(shared_site, tmp_path, monkeypatch, capsys):
    """client_main(flags) -> (exit code, what it said): the whole client001, without TensorFlow."""
    import standin

    import todoClient

    monkeypatch.chdir(tmp_path)
    for name in ("preprocessed", "index"):
        (tmp_path / name).symlink_to(shared_site / name)
    monkeypatch.setattr(todoClient, "model", standin)
    monkeypatch.setattr(todoClient, "exit_on_signals", lambda *_: None)
    reporters, inner = [], todoClient.ProgressReporter

    def reporter(site):
        reporters.append(inner(site))
        return reporters[-1]

    monkeypatch.setattr(todoClient, "ProgressReporter", reporter)

    def main(*flags):
        code = todoClient.main(["--name", "client001", "--give-up-after", "0", *flags])
        for each in reporters:
            each.status = None  # it tells nobody any more
        said = capsys.readouterr()
        return code, said.out + said.err

    return main


@pytest.fixture
def served(make_run):
    """(Run, its address): one round of client001 alone, served by this process."""
    from serving import serve

    run = make_run(clients=["client001"], rounds=1)
    server, address = serve(run.rounds)
    yield run, address
    server.stop(0)

"""All of it on this machine: the data, a server, its clients, the result.

    python3 launch.py run --rounds 20       # what ./run_local.sh does: one federated run
    python3 launch.py compare --seed 1      # what ./compare.sh does: is federation worth it?

It needs only Python's standard library, so that a wrong flag is told before anything is installed.
It makes .venv (setup.sh) and starts the other scripts with the Python in there.
"""

import argparse
import csv
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from common import files
from common.log import fail, say, warn
from common.script import at_least, end_script, pixels, start_script

PROJECT = Path(__file__).resolve().parent
REQUIREMENTS = ["requirements.txt", "requirements-report.txt"]
LISTENING = re.compile(r"server: listening on (\S+)$")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SERVER_LOG = "run_local.log"
STOP_S = 10  # how long a process may take to end after SIGTERM, before it is killed

# These two repeat what scripts know that need packages; tests/test_launch.py compares them.
IMAGE_SIZES = {"drcnn": 128, "vgg16": 224}  # network: image size in pixels, where no flag names one
DATASETS = ["synthetic", "idrid", "ddr", "aptos", "eyepacs", "folder", "retinamnist"]
NEED_NO_SOURCE = ["synthetic", "retinamnist"]


def main(argv=None):
    command, flags = parse(argv)
    processes = Processes(command)
    processes.stop_on_signals()
    try:
        set_up(processes)
        os.chdir(PROJECT)
        {"run_local": run, "compare": compare}[command](processes, flags)
        return 0
    except Stop as stop:
        return stop.code
    except (ValueError, OSError) as error:
        return fail(command, error)
    finally:
        processes.stop()


# --- flags: which exist, and which script each goes to --------------------------------------------


def folder(text):
    """An argparse type: a folder that exists, as an absolute path; relative to where the user is."""
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path}")
    return path


def initial_weights(text):
    """An argparse type: none, imagenet, or a weight file as an absolute path."""
    if text in ("none", "imagenet"):
        return text
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected none, imagenet or a file; there is no {path}")
    return path


# Both commands know these: (flag, the scripts that it goes to, argparse's settings).
DATA_FLAGS = [
    ("--dataset", ["prepare"], {"choices": DATASETS, "help": "(default: synthetic, drawn images)"}),
    (
        "--source",
        ["prepare"],
        {"type": folder, "metavar": "DIR", "help": "the folder of the unpacked data set"},
    ),
    (
        "--image-size",
        ["prepare", "server", "central"],
        {"type": pixels, "metavar": "PIXELS", "help": "a side (default: 128; vgg16: 224)"},
    ),
    (
        "--num-train",
        ["prepare"],
        {"type": at_least(10), "metavar": "N", "help": "drawn images to train on (default: 900)"},
    ),
    (
        "--num-val",
        ["prepare"],
        {"type": at_least(10), "metavar": "N", "help": "drawn images to score with (default: 300)"},
    ),
    (
        "--share",
        ["prepare"],
        {"type": at_least(0), "metavar": "N", "help": "images that every client gets (default: 0)"},
    ),
    (
        "--balanced",
        ["prepare"],
        {"action": "store_true", "help": "ddr: draw 10,000 + 2,522 images as the thesis did"},
    ),
    (
        "--skip-broken",
        ["prepare"],
        {"action": "store_true", "help": "leave unreadable images out instead of stopping"},
    ),
]
TRAINING_FLAGS = [
    (
        "--rounds",
        ["server", "central"],
        {"type": at_least(1), "metavar": "N", "help": "(default: 10; compare.sh: 14)"},
    ),
    (
        "--epochs",
        ["client", "central"],
        {
            "type": at_least(1),
            "metavar": "N",
            "help": "passes over the images a round (default: 1)",
        },
    ),
    (
        "--batch-size",
        ["client", "central"],
        {"type": at_least(1), "metavar": "N", "help": "(default: 16)"},
    ),
    (
        "--seed",
        ["prepare", "server", "client", "central"],
        {"type": at_least(0), "metavar": "N", "help": "of everything that is random (default: 0)"},
    ),
    (
        "--arch",
        ["server", "central"],
        {"choices": list(IMAGE_SIZES), "help": "the network (default: drcnn)"},
    ),
    (
        "--weights",
        ["server", "central"],
        {
            "type": initial_weights,
            "metavar": "none|imagenet|FILE",
            "help": "to start from (default: none, random)",
        },
    ),
    (
        "--freeze-base",
        ["client", "central"],
        {"action": "store_true", "help": "train only the dense layers of a vgg16"},
    ),
    (
        "--no-augmentation",
        ["client", "central"],
        {"action": "store_true", "help": "train without rotated and mirrored images"},
    ),
]
# compare.sh has no use for these: it makes an IID and a non-IID split of three clients, afresh.
RUN_FLAGS = [
    (
        "--num-clients",
        ["prepare"],
        {"type": at_least(1), "metavar": "N", "help": "how many clients (default: 3)"},
    ),
    (
        "--split",
        ["prepare"],
        {
            "choices": ["iid", "noniid", "dirichlet"],
            "help": "who gets which images (default: iid)",
        },
    ),
    (
        "--alpha",
        ["prepare"],
        {
            "type": float,
            "help": "of --split dirichlet: the smaller, the more unequal (default: 0.5)",
        },
    ),
]
FLAGS = [*DATA_FLAGS, *TRAINING_FLAGS, *RUN_FLAGS]

RUN_HELP = """\
The whole demo on this machine: set-up, data, one server, its clients, the result.

  ./run_local.sh                                  ten rounds on drawn images
  ./run_local.sh --rounds 20 --seed 1
  ./run_local.sh --dataset folder --source DIR    your own photographs

Run the same command again to resume an unfinished run. After a finished one it begins a new run."""

COMPARE_HELP = """\
Is federation worth it? The same number of passes over the images: central, federated on an IID
and on a non-IID split, and the largest client of the non-IID split alone.
Writes compare.csv and, for both splits, a report with the four curves.

  ./compare.sh                                    14 rounds on drawn images
  ./compare.sh --dataset idrid --source DIR --rounds 20 --epochs 2

It works in compare-SEED/; server/ and index/ stay as they are. It always begins afresh."""

ENDING = """\
PYTHON=/path/to/python names an interpreter that has the packages, instead of .venv.
Exit codes: 0 finished, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM, else that of the process that failed."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers wrong usage with one line."""

    def error(self, message):
        who = Path(self.prog).stem
        sys.exit(fail(who, f"{message}; {self.prog} --help names the flags", 2))


def parse(argv):
    """("run_local" or "compare", {flag: value}) with only those flags that the user gave."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["run"]:
        parser = flag_parser("./run_local.sh", RUN_HELP)
        add_flags(parser, "this run", RUN_FLAGS)
        parser.add_argument(
            "--fresh",
            action="store_true",
            help="begin a new run; the old one's files are moved aside",
        )
    elif words[:1] == ["compare"]:
        parser = flag_parser("./compare.sh", COMPARE_HELP)
    else:
        sys.exit(fail("launch", "expected `launch.py run ...` or `launch.py compare ...`", 2))
    flags = {
        "--" + name.replace("_", "-"): value
        for name, value in vars(parser.parse_args(words[1:])).items()
    }
    check_combinations(parser, flags)
    image_size = IMAGE_SIZES[flags.get("--arch", "drcnn")]
    if image_size != IMAGE_SIZES["drcnn"]:
        flags.setdefault("--image-size", image_size)
    return Path(parser.prog).stem, flags


def flag_parser(command, description):
    parser = Parser(
        prog=command,
        usage=f"{command} [flags]",
        description=description,
        epilog=ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a flag that was not given is not passed on
        allow_abbrev=False,
    )
    add_flags(parser, "data", DATA_FLAGS)
    add_flags(parser, "training", TRAINING_FLAGS)
    return parser


def add_flags(parser, title, flags):
    group = parser.add_argument_group(title)
    for flag, _, settings in flags:
        group.add_argument(flag, **settings)


def check_combinations(parser, flags):
    """What prepare.py would refuse, before anything is installed for it."""
    dataset = flags.get("--dataset", "synthetic")
    if dataset not in NEED_NO_SOURCE and "--source" not in flags:
        parser.error(f"--dataset {dataset} needs --source, the folder of the unpacked data set")
    if "--source" in flags and dataset == "synthetic":
        parser.error("--source without --dataset: name the data set too, as in --dataset folder")
    if flags.get("--balanced") and dataset != "ddr":
        parser.error(f"--balanced is the thesis's draw from ddr, not from {dataset}")
    pretrained = flags.get("--weights") == "imagenet" or "--freeze-base" in flags
    if pretrained and flags.get("--arch") != "vgg16":
        parser.error("--freeze-base and --weights imagenet are for --arch vgg16")
    if flags.get("--split") == "noniid" and flags.get("--num-clients", 3) != 3:
        parser.error("--split noniid is for 3 clients: use --split dirichlet for another number")


def flags_for(script, flags):
    """The words of the command line for a script: those of the user's flags that it knows."""
    words = []
    for flag, scripts, settings in FLAGS:
        if script in scripts and flag in flags:
            words.append(flag)
            if settings.get("action") != "store_true":
                words.append(str(flags[flag]))
    return words


# --- processes ------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends the launcher, and all that it started, with an exit code."""

    def __init__(self, code):
        self.code = code


class Processes:
    """What the launcher has started. Their lines come out whole, and none outlives the launcher."""

    def __init__(self, command):
        self.command = command  # begins the launcher's own lines
        self.python = PROJECT / ".venv" / "bin" / "python"  # of the scripts
        self.running = {}  # name: Popen
        self.followers = []  # a thread for each, which passes its lines on
        # All that the main thread waits for: ("signal", number), ("listening", HOST:PORT) of the
        # server, ("ended", name).
        self.events = queue.SimpleQueue()
        self.printing = threading.Lock()  # one line at a time

    def stop_on_signals(self):
        """Puts SIGINT, SIGTERM and SIGHUP into `events`.

        By a pipe and a thread, because a handler's put() can be lost: it may interrupt the main
        thread in the middle of get(), and a second signal the handler.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # under nohup SIGHUP is ignored
                signal.signal(number, lambda number, frame: None)

        def pass_on_signals():
            while True:
                self.events.put(("signal", os.read(reading, 1)[0]))

        threading.Thread(target=pass_on_signals, daemon=True).start()

    def run(self, *command, cwd=PROJECT):
        """One process by itself: it has the terminal. Raises Stop when it fails."""
        process = subprocess.Popen([str(word) for word in command], cwd=cwd)
        self.follow(str(command[0]), process, [])
        self.wait_for_all()

    def run_script(self, script, *flags, cwd=PROJECT):
        self.run(self.python, PROJECT / script, *flags, cwd=cwd)

    def start(self, name, script, *flags, cwd, log=None, shown=True):
        """One of several processes: its lines go to the terminal and into the file `log`.

        shown: whether all of its lines go to the terminal, or only its errors.
        """
        kept = open(log or os.devnull, "w", encoding="utf-8", buffering=1)
        process = subprocess.Popen(
            [str(word) for word in (self.python, PROJECT / script, *flags)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
        )
        outputs = [kept, sys.stdout] if shown else [kept]
        streams = [(process.stdout, outputs), (process.stderr, [kept, sys.stderr])]
        self.follow(name, process, streams)

    def follow(self, name, process, streams):
        """Starts the thread that passes the lines on, and then tells that the process has ended."""
        self.running[name] = process

        def until_it_ends():
            readers = []
            for stream, outputs in streams:
                reader = threading.Thread(target=self.pass_on, args=(stream, outputs), daemon=True)
                reader.start()
                readers.append(reader)
            for reader in readers:
                reader.join()
            process.wait()
            self.events.put(("ended", name))

        self.followers.append(threading.Thread(target=until_it_ends, daemon=True))
        self.followers[-1].start()

    def pass_on(self, stream, outputs):
        """Writes every line of `stream` to all outputs."""
        for line in stream:
            with self.printing:
                for output in outputs:
                    write(output, line)
            if listening := LISTENING.search(line):
                self.events.put(("listening", listening[1]))

    def next_event(self):
        """(kind, value) of what happened next. Raises Stop on a signal, or when a process failed."""
        kind, value = self.events.get()
        if kind == "signal":
            raise Stop(128 + value)
        if kind == "ended":
            code = exit_code(self.running.pop(value))
            if code and self.running:
                sentence = f"{value} ended with {code} (its words are above): stopping the others"
                warn(self.command, sentence)
            if code:
                raise Stop(code)
        return kind, value

    def wait_for_address(self):
        """HOST:PORT of the server, once it listens."""
        while self.running:
            kind, value = self.next_event()
            if kind == "listening":
                return value
        raise Stop(1)  # it ended before; why is in its last line

    def wait_for_all(self):
        while self.running:
            self.next_event()

    def stop(self):
        """Ends what still runs, and waits until its last words are passed on."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for follower in self.followers:
            follower.join(STOP_S)


def exit_code(process):
    """As a shell gives it: 128 + the signal's number for a process that a signal ended."""
    code = process.returncode
    return code if code >= 0 else 128 - code


def write(output, line):
    """Writes and flushes a line. A terminal that went away, or a full disk, ends no run."""
    try:
        output.write(line)
        output.flush()
    except OSError:
        pass


# --- what both commands do ------------------------------------------------------------------------


def set_up(processes):
    """Makes .venv with all packages where that was not done yet, or takes the user's PYTHON."""
    chosen = os.environ.get("PYTHON")
    if not chosen:
        processes.run("bash", "setup.sh", *REQUIREMENTS)
        return
    found = shutil.which(chosen)
    if found is None:
        raise ValueError(f"PYTHON={chosen} is no program: give the path of an interpreter")
    processes.python = Path(found).absolute()


def federate(processes, clients, server_flags, client_flags, folder, server_log, client_logs=False):
    """One federated run in `folder`: a server and its clients, until all have ended.

    client_logs: whether the clients' lines go into files of their own in place of the terminal.
    """
    listen = ["--listen", "localhost:0", "--clients", ",".join(clients)]
    processes.start(
        "server", "todoServer.py", *listen, *server_flags, cwd=folder, log=folder / server_log
    )
    address = processes.wait_for_address()
    cores = len(os.sched_getaffinity(0))
    threads = math.ceil(cores / len(clients))  # the clients share this machine
    for name in clients:
        processes.start(
            name,
            "todoClient.py",
            *["--name", name, "--server", address, "--threads", threads],
            *client_flags,
            cwd=folder,
            log=folder / f"{name}.log" if client_logs else None,
            shown=not client_logs,
        )
    processes.wait_for_all()


def client_names(number):
    return [f"client{k:03}" for k in range(1, number + 1)]


# --- run: one federated run -----------------------------------------------------------------------


def run(processes, flags):
    """What ./run_local.sh does."""
    state = state_of_run(flags.get("--fresh", False))
    prepare_flags = flags_for("prepare", flags)
    server_flags = flags_for("server", flags)
    if state == "unfinished":
        check_data(processes, prepare_flags)
        say(processes.command, "resuming the unfinished run in server/")
    else:
        # Started again, prepare.py keeps the pictures that are there.
        processes.run_script("prepare.py", *prepare_flags)
        if state == "finished":
            say(processes.command, "a new run; the old one's files are moved aside")
            server_flags.append("--fresh")
        elif "--fresh" in flags:
            server_flags.append("--fresh")
    federate(
        processes,
        client_names(flags.get("--num-clients", 3)),
        server_flags,
        flags_for("client", flags),
        folder=PROJECT,
        server_log=SERVER_LOG,  # not in server/: --fresh moves away what is there
    )
    print_history()
    processes.run_script("report.py")


def state_of_run(fresh):
    """Of the run in server/: "none", "unfinished" or "finished".

    Raises ValueError where a server runs there, and where the state is damaged and not `fresh`.
    """
    with files.alone_in("server"):
        if fresh:
            return "none"
        state = files.load_state(
            "server/state.json", ("rounds", "history"), "move it away, or begin with --fresh"
        )
    if state is None:
        return "none"
    return "finished" if len(state["history"]) >= state["rounds"] else "unfinished"


def check_data(processes, prepare_flags):
    """Raises ValueError unless index/ was made from these choices: a run is resumed on its own data."""
    command = [processes.python, "prepare.py", "--check", *prepare_flags]
    checked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if checked.returncode:
        raise ValueError(
            f"server/ holds an unfinished run, but {checked.stdout.strip()}; "
            "resume it with the flags that it began with, or begin a new run with --fresh"
        )


def print_history():
    """The server's history as a table, at most 80 columns wide."""
    columns = {
        "round": 5,
        "loss": 7,
        "accuracy": 8,
        "auc": 6,
        "sensitivity": 11,
        "specificity": 11,
        "num_examples": 12,
        "seconds": 8,
    }
    with open("server/history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [" ".join(f"{name:>{width}}" for name, width in columns.items())]
    for row in rows:
        cells = []
        for name, width in columns.items():
            value = f"{float(row[name]):.3f}" if "." in row[name] else row[name]
            cells.append(f"{value:>{width}}")
        lines.append(" ".join(cells))
    files = f"model: server/server_weight.h5  history: server/history.csv  log: {SERVER_LOG}"
    write(sys.stdout, "\n" + "\n".join(lines) + f"\n\n{files}\n")


# --- compare: central, federated and alone --------------------------------------------------------


def compare(processes, flags):
    """What ./compare.sh does, in compare-SEED/iid and compare-SEED/noniid."""
    flags = {"--rounds": 14, **flags}  # after ten rounds federation has not caught up yet
    seed = flags.setdefault("--seed", 0)
    work = PROJECT / f"compare-{seed}"
    iid, noniid = work / "iid", work / "noniid"
    for split in (iid, noniid):
        shutil.rmtree(split, ignore_errors=True)
        split.mkdir(parents=True)
        (split / "preprocessed").symlink_to("../preprocessed")  # both use the same pictures
    (work / "preprocessed").mkdir(exist_ok=True)
    for split in (noniid, iid):
        step(processes, split, "prepare.py", *flags_for("prepare", flags), "--split", split.name)
    central_flags = flags_for("central", flags)
    step(processes, iid, "central.py", *central_flags)
    for split in (iid, noniid):
        say(processes.command, f"federated, in {split.relative_to(PROJECT)}")
        federate(
            processes,
            client_names(3),
            flags_for("server", flags),
            flags_for("client", flags),
            folder=split,
            server_log="server.log",
            client_logs=True,
        )
    largest = index_of_largest_client(noniid)
    step(processes, noniid, "central.py", "--index", largest, "--out", "alone", *central_flags)
    write_comparison(
        work / "compare.csv",
        {
            "central": iid / "central",
            "federated IID": iid / "server",
            "federated non-IID": noniid / "server",
            "largest client alone": noniid / "alone",
        },
    )
    shutil.copy(work / "compare.csv", PROJECT)
    for split in (iid, noniid):
        step(processes, split, "report.py", "--compare", "../compare.csv")


def step(processes, folder, script, *flags):
    """Says what it does, and runs one script in the folder."""
    command = " ".join([script, *flags])
    say(processes.command, f"{command}   (in {folder.relative_to(PROJECT)})")
    processes.run_script(script, *flags, cwd=folder)


def index_of_largest_client(folder):
    """Path of the index with the most images, as the clients' own histories count them."""
    num_examples = {}
    for number, name in enumerate(client_names(3), start=1):
        with open(folder / name / "history.csv", newline="", encoding="utf-8") as file:
            first_row = next(csv.DictReader(file))
        num_examples[f"index/worker{number}.pkl"] = int(first_row["num_examples"])
    return max(num_examples, key=num_examples.get)


def write_comparison(path, series):
    """compare.csv: the history of each series {name: folder}; says each one's last round."""
    columns = ["series", "round", "loss", "accuracy", "auc", "sensitivity", "specificity"]
    rows = []
    for name, folder in series.items():
        with open(folder / "history.csv", newline="", encoding="utf-8") as file:
            rows += [{"series": name, **row} for row in csv.DictReader(file)]
        write(sys.stdout, ",".join(rows[-1][column] for column in columns) + "\n")
    files.publish_rows(path, columns, rows)


if __name__ == "__main__":
    start_script()
    end_script(main())

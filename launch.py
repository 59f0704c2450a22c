"""The whole demo on this machine: packages, images, one server, its clients, each hospital alone,
and the page of the result.

  ./run_local.sh                                  ten rounds on synthetic images
  ./run_local.sh --rounds 20 --seed 1
  ./run_local.sh --dataset folder --source DIR --arch lite0     your own photographs
  ./compare.sh                                    the same, and --central

Run the same command again to resume an unfinished run. After a finished one it begins a new run.
PYTHON=/path/to/python names an interpreter that has the packages, instead of .venv.
Exit codes: 0 finished, 1 an error, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM; else that of the process
that failed.
"""

# A flag is declared in the script that it belongs to, and goes to every script that knows it.
# Nothing is trained, scored or written in here but the log.

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import files, log
from common.script import end_script, exit_on_signals, new_parser, start_script

if __name__ == "__main__":
    start_script(never_waits=True)  # before the packages, so that a missing one is a sentence

from rich.console import Console
from rich.live import Live

import central
import prepare
import todoClient
import todoServer
from federation import status
from federation.state import RunState
from reporting import card as cards
from reporting.metrics import TASK

WHO = "run_local"
PROJECT = Path(__file__).resolve().parent
SCRIPTS = {
    "prepare.py": prepare,
    "todoServer.py": todoServer,
    "todoClient.py": todoClient,
    "central.py": central,
}
# Flags of the scripts that are chosen in here: nobody else gives them.
CHOSEN_HERE = set(
    "listen clients server_dir name server client_dir index index_dir threads out like "
    "fine_tune score_every check insecure tls_ca tls_cert tls_key".split()
)
# On the synthetic images ten rounds of one pass are too few to learn them.
SYNTHETIC_EPOCHS = 2
SAID_HERE = {  # where a flag means something else here than in its script
    "epochs": "passes over the images in a round (2 of synthetic images; of photographs 1, or 5 of "
    "the last layer of a frozen lite0)",
    "rounds": "of the whole run (10)",
    "val_part": "part of the photographs to validate on (as the data set says, or 0.2)",
    "val_index": "held-out images, on which each client scores each model that it fetches",
}
SCORED = 4  # how often a model without federation is scored; that costs as much as a pass
MEASURED = ("AUC", "sensitivity", "specificity")

STATE = Path("server/state.json")
CARD = Path("server/server_weight.json")
PAGE = Path("server/report.html")
STATUS = Path("server/status.json")
ALONE = Path("alone")  # each client trained alone, for comparison
LOG = Path("run_local.log")
TRAINED_WITH = "a new run, trained with: "  # in the log, before its flags of training
LISTENS = r"server: listening on (\S+)\n"  # there too, once the server holds the run

LOOK_EVERY_S = 0.3
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHER = os.getpid()


class Failed(Exception):
    """Failed(name, exit code): a process ended with another exit code than 0."""


def main():
    """Runs the command. Returns the exit code."""
    # what was started is killed with this process: `belong_to_launcher`
    exit_on_signals(WHO, "stopped; the same command goes on with the run")
    # run_local.sh has blocked it: during the imports above Ctrl-C would be a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    argparse.ArgumentParser.error = refuse  # every script's, and in the name of this command
    try:
        given = parse(sys.argv[1:])
        os.chdir(PROJECT)
        with files.alone_in(PROJECT):
            return run(Processes(), given)
    except Failed as error:
        name, code = error.args
        print(*last_words(name), sep="\n")
        return log.fail(WHO, f"{name} ended with {code}; all that was said is in {LOG}", code)
    except (ValueError, OSError) as error:
        return log.fail(WHO, error)


# --- flags ----------------------------------------------------------------------------------------


def refuse(parser, message):
    """In place of an argparse parser's own, which shows a screen of usage first."""
    sys.exit(log.fail(WHO, f"{message}; ./run_local.sh --help names the flags", 2))


def all_flags():
    """A parser of the flags of all scripts, with the words of the first that has it."""
    parser = new_parser(__doc__, usage="./run_local.sh [flags]", argument_default=argparse.SUPPRESS)
    own = parser.add_argument_group("beside the federation")
    own.add_argument(
        "--no-alone", action="store_true", help="do not train each hospital alone, to compare with"
    )
    own.add_argument(
        "--central",
        action="store_true",
        help="also train on the images of all hospitals in one place",
    )
    known = {"help", *CHOSEN_HERE}
    for script, module in SCRIPTS.items():
        for group in module.parser()._action_groups:
            shown = parser.add_argument_group(script if group.title == "options" else group.title)
            for action in group._group_actions:
                if action.dest in known:
                    continue
                known.add(action.dest)
                action.help = SAID_HERE.get(action.dest, action.help) % vars(action)
                action.default = argparse.SUPPRESS  # it is the script's own
                if re.search("DIR|FILE", action.metavar or ""):
                    action.type = path_from_here
                shown._add_action(action)
    return parser


def path_from_here(text):
    """An argparse type: a path, from where the user is; none and imagenet are no paths."""
    return text if text in ("none", "imagenet") else Path(text).expanduser().absolute()


def parse(words):
    """{flag's name: value} of what the user says, and of what follows from it."""
    parser = all_flags()
    given = vars(parser.parse_args(words))
    if "index_from" not in given and given.get("dataset", "synthetic") == "synthetic":
        given.setdefault("epochs", SYNTHETIC_EPOCHS)
    for script in ("prepare.py", "todoServer.py"):  # refused before any work
        SCRIPTS[script].parse(words_for(script, given))
    if given.get("val_part") in (0, 1):
        parser.error(
            "--val-part 0 or 1 is of one hospital or of a server: here some train, some validate"
        )
    return given


def words_for(script, given):
    """The command line of a script: those of the given flags that it knows."""
    words = []
    for action in SCRIPTS[script].parser()._actions:
        if action.dest in given:
            value = given[action.dest]
            # of --freeze-base and --no-freeze-base the second is the one that says no
            words.append(action.option_strings[-1 if value is False else 0])
            if action.nargs != 0:
                words += map(str, value if isinstance(value, list) else [value])
    return words


# --- processes ------------------------------------------------------------------------------------


def belong_to_launcher():
    """In a new process: the kernel kills it when the launcher ends, however that ends. At any
    instant all that it has written is whole.

    A Ctrl-C in the terminal is for the launcher: in the imports of this one it would be a
    traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != LAUNCHER:  # it has ended before that
        os._exit(1)


def one_of_ours(script, *words):
    """What Popen needs to start a script."""
    command = [sys.executable, script, *map(str, words)]
    return {"args": command, "stdin": subprocess.DEVNULL, "preexec_fn": belong_to_launcher}


def run_in_terminal(script, *words):
    """Its exit code; why it fails it says itself."""
    return exit_code(subprocess.run(**one_of_ours(script, *words)).returncode)


class Processes:
    """What runs side by side, with its lines in the log."""

    def __init__(self):
        self.running = {}  # name: Popen

    def start(self, name, script, *words):
        with open(LOG, "ab") as output:
            self.running[name] = subprocess.Popen(
                **one_of_ours(script, *words), stdout=output, stderr=output
            )

    def until_ended(self):
        """Yields again and again until all have ended. Raises Failed."""
        while self.running:
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    if process.returncode:
                        raise Failed(name, exit_code(process.returncode))
            yield
            time.sleep(LOOK_EVERY_S)


def exit_code(returncode):
    """What a shell would say: 137 of a process that was killed."""
    return returncode if returncode >= 0 else 128 - returncode


def last_words(name):
    """The last eight lines in the log that no other process has said: a traceback names nobody."""
    others = re.compile(rf"\d{{4}}-\S+ \S+ (?!{re.escape(name)}: )")
    lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if not others.match(line)][-8:]


# --- the run --------------------------------------------------------------------------------------


def run(processes, given):
    """All steps, or those that an unfinished run still needs. Returns the exit code."""
    console = Console(highlight=False, markup=False)
    console.print(f"1/4 packages: those of {sys.prefix}")
    with files.alone_in(STATE.parent):  # no server runs: its clients would train with these images
        state = None if "fresh" in given else RunState.load(STATE, "begin a new one with --fresh")
    if state and state.is_over and PAGE.exists():
        console.print("the run in server/ is over: a new one begins, its files are moved aside")
        state, given["fresh"] = None, True
    if state:
        check_training(given)
    console.print("2/4 images")
    if code := prepare_images(given, is_new=state is None):
        return code
    if state is None:
        with open(LOG, "w", encoding="utf-8") as file:
            log.write_line(file, f"{WHO}: {TRAINED_WITH}{training_words(given)}")
    names = names_of_clients()
    done = len(state.history) if state else 0
    resumed = f", of which {done} rounds are done" if done else ""
    console.print(f"3/4 federation of {len(names)} hospitals{resumed} (log: {LOG})")
    if state is None or not state.is_over or given.get("rounds", 0) > state.rounds:
        federate(processes, console, given, names, done)
    alone = "each hospital alone, for comparison (--no-alone skips this)"
    console.print(f"4/4 {'the page' if 'no_alone' in given else alone}")
    train_beside(processes, console, given, names)
    return run_in_terminal("report.py")


def prepare_images(given, is_new):
    """Of a new run; a run that is resumed goes on with its own. Returns the exit code.

    prepare.py keeps the pictures that are there. Raises ValueError: the run has other images.
    """
    words = words_for("prepare.py", given)
    if is_new:
        return run_in_terminal("prepare.py", *words)
    if run_in_terminal("prepare.py", "--check", *words):
        raise ValueError(
            "server/ holds an unfinished run of other images: resume it with the flags that it "
            "began with, or begin a new run with --fresh"
        )
    return 0


def training_words(given):
    """The flags by which the clients train, and each hospital alone: "--epochs 2"."""
    training = {name: given[name] for name in todoClient.TRAINING_FLAGS if name in given}
    return shlex.join(words_for("central.py", training))


def check_training(given):
    """Of a run that is resumed. Raises ValueError: it was begun with other flags of training.

    The hospitals alone would be trained by others than the federation that they are compared with.
    """
    text = LOG.read_text(encoding="utf-8", errors="replace") if LOG.exists() else ""
    before = re.search(f"{WHO}: {TRAINED_WITH}(.*)\n", text)
    if before and not re.search(LISTENS, text):
        raise ValueError(
            "the run that was begun last ended before its server listened, and server/ may hold "
            "the run before it: begin with --fresh"
        )
    if before and before[1] != training_words(given):
        raise ValueError(
            f"server/ holds an unfinished run that trains with {before[1] or 'no flags'!r}, not "
            f"with {training_words(given) or 'no flags'!r}: resume it with the flags that it began "
            "with, or begin a new run with --fresh"
        )


def names_of_clients():
    """{"client001": "client001 (screening centre)", ...}, one for each index."""
    prepared = cards.read_prepared("index")
    clients = [f"client{k:03}" for k in range(1, prepared["num_clients"] + 1)]
    return {client: cards.name_of(client, prepared) for client in clients}


def federate(processes, console, given, names, num_shown):
    """A server and its clients until all have ended; a line for each round after `num_shown`."""
    STATUS.unlink(missing_ok=True)  # of an earlier run, maybe of another commit
    begin = LOG.stat().st_size if LOG.exists() else 0
    where = ["--listen", "localhost:0", "--clients", ",".join(names)]
    processes.start("server", "todoServer.py", *where, *words_for("todoServer.py", given))
    address = address_of_server(processes, console, begin)
    for client in names:
        who = ["--name", client, "--server", address, "--threads", threads_each(len(names))]
        processes.start(client, "todoClient.py", *who, *words_for("todoClient.py", given))
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for _ in processes.until_ended():
            card = read_json(CARD)
            for row in card.get("by_round", [])[num_shown:]:
                num_shown = row["round"]
                scores = "  ".join(
                    f"{each} {cards.number(row[TASK][each.lower()])}" for each in MEASURED
                )
                if card["num_nan"] and num_shown == card["round"]:
                    scores = f"no model: {card['warning']}"
                console.print(f"round {num_shown}/{card['rounds']}: {scores}")
            if STATUS.exists():
                live.update(status.draw(*status.read(STATUS), 0, names), refresh=True)


def address_of_server(processes, console, begin):
    """HOST:PORT, once the log says behind its byte `begin` that the server listens.

    What it warns of until then is of the user's flags, and is shown.
    """
    for _ in processes.until_ended():
        with open(LOG, "rb") as log_file:
            log_file.seek(begin)
            said = log_file.read().decode(errors="replace")
        if found := re.search(LISTENS, said):
            for warning in re.findall(r"server: (warning: .*)", said):
                console.print(warning)
            return found[1]
    raise ValueError(f"the server ended before it listened; all that it said is in {LOG}")


def train_beside(processes, console, given, names):
    """Each hospital alone, beside each other, with as many passes as in the run; --central, too."""
    for client in names:  # what else lies in there is the user's
        shutil.rmtree(ALONE / client, ignore_errors=True)
    models = {}  # name: (folder, index)
    if "no_alone" not in given:
        for k, (client, name) in enumerate(names.items(), start=1):
            models[f"{name} alone"] = (ALONE / client, f"index/worker{k}.pkl")
    if "central" in given:
        models["all images in one place"] = (Path("central"), "index/train_set.pkl")
    rounds = read_json(CARD)["rounds"]
    # As many rounds as the run has by --like: what --rounds says now may be another number.
    like_the_run = {name: value for name, value in given.items() if name != "rounds"}
    for folder, index in models.values():
        processes.start(
            str(folder),
            "central.py",
            *["--index", index, "--out", folder, "--like", CARD.with_suffix(".h5")],
            *["--score-every", -(-rounds // SCORED), "--threads", threads_each(len(models))],
            *words_for("central.py", like_the_run),
        )
    cards_of = {name: folder / "central_weight.json" for name, (folder, _) in models.items()}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for _ in processes.until_ended():
            done = {name: read_json(card).get("round", 0) for name, card in cards_of.items()}
            lines = [f"  {name}: round {number}/{rounds}" for name, number in done.items()]
            live.update("\n".join(lines), refresh=True)


def threads_each(num_processes):
    """Threads of TensorFlow for each of several processes that share this machine."""
    return -(-len(os.sched_getaffinity(0)) // num_processes)


def read_json(path):
    """What a JSON file holds, {} where there is none: of files that our own processes publish."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    end_script(main())

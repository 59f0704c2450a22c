"""The result of a run as one page: what federation brought, and the one model to use.

    python3 report.py                          # the server's: server/report.html
    python3 report.py --client-dir client002   # a hospital's, of its own held-out patients

Beside the federated model it shows what central.py trained --like this run: each hospital alone,
all images in one place, at home also the result that was fine-tuned there. Where a hospital's is
missing, the page names the command that makes it. The page is one file, and loads nothing.
No model is trained in here.
"""

import csv
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from common.log import fail, say
from common.script import end_script, exit_on_signals, new_file, new_parser, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence
    exit_on_signals("report", "stopped")

import numpy as np
from rich.console import Console
from rich.table import Table

import data
import model
from common import files
from reporting import card as cards
from reporting import metrics
from reporting.page import PYTHON, Page, interval

TRAINED_HERE = "central_weight.h5"  # what central.py writes
TEXT_COLUMNS = ("client", "missing")  # of history.csv and clients.csv; the others are numbers


def main(argv=None):
    args = parse(argv)
    try:
        page = Page(load_client(args) if args.client_dir else load_server(args))
        out = args.out or (args.client_dir or args.server_dir) / "report.html"
        files.publish_text(out, page.html())
    except (ValueError, OSError) as error:
        return fail("report", error)
    Console(highlight=False, markup=False).print("", table_of(page), "", sep="\n")
    say("report", page.verdict())
    say("report", f"the page: {out.resolve().as_uri()}")
    if not page.card["warning"]:
        say("report", f"to use the model: {page.command()}")
    return 0


def table_of(page):
    """The models of the page and how well they find it, for a terminal of 80 columns."""
    patients = page.card["num_reporting_patients"]
    title = f"{metrics.TASK}, of {patients} patients, with 95 % intervals"
    columns = ("AUC", "sensitivity", "specificity")
    table = Table("", *columns, title=title, title_justify="left", box=None, pad_edge=False)
    for each in page.models:
        measured = each.card["tasks"][metrics.TASK]["measured"]
        three = [measured[name.lower()] for name in columns]
        table.add_row(each.name, *[f"{cards.number(one[0])}\n{interval(one)}" for one in three])
    return table


def parse(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--server-dir", type=Path, default=Path("server"), metavar="DIR", help="(server)")
    add(
        "--client-dir",
        type=Path,
        metavar="DIR",
        help="a client's folder: make the page of its own held-out patients",
    )
    add(
        "--index-dir",
        type=Path,
        default=Path("index"),
        metavar="DIR",
        help="where val_set.pkl lies (index)",
    )
    add(
        "--out",
        type=new_file,
        metavar="FILE",
        help="(report.html in the server's or client's folder)",
    )
    return parser.parse_args(argv)


# --- what the page is made of ---------------------------------------------------------------------


@dataclass
class Model:
    """A weight file, its card, and what it says of each held-out image."""

    kind: str  # "federated", "alone", "fine-tuned" or "central"
    name: str  # as the page calls it
    path: Path
    card: dict  # its scores are those of the patients of this page
    p_healthy: np.ndarray  # (n,), in 0..1


@dataclass
class Run:
    """All that the page shows. The tables are lists of dicts, [] where there is no such file."""

    federated: Model
    val: list  # n records of the held-out images
    prepared: dict  # index/prepared.json
    home: str = ""  # the hospital whose page it is; "" for the server's
    candidates: list = field(default_factory=list)  # Models that may be better than `federated`
    others: list = field(default_factory=list)  # Models that it is compared with
    left_out: list = field(default_factory=list)  # sentences: why a model is not compared
    commands: list = field(default_factory=list)  # that make the models which are missing
    history: list = field(default_factory=list)  # server/history.csv
    client_rows: list = field(default_factory=list)  # server/clients.csv


def load_server(args):
    """The server's Run. Raises ValueError where its files do not belong together."""
    weights = args.server_dir / "server_weight.h5"
    card = cards.read(weights)
    answers = Answers(args.index_dir)
    if answers.val_sha256 != card["validation_sha256"]:
        raise ValueError(
            f"{answers.val_path} is not the validation set that this run was scored on (data set "
            f"{card['dataset']}): prepare that one again, or give its folder as --index-dir"
        )
    run = Run(
        federated=answers.of("federated", "federated", weights, card),
        val=answers.val,
        prepared=cards.read_prepared(args.index_dir),
        history=read_table(args.server_dir / "history.csv"),
        client_rows=read_table(args.server_dir / "clients.csv"),
    )
    best = args.server_dir / "best_weight.h5"
    if files.sha256_of(best) != card["weights_sha256"]:
        add_model(run, run.candidates, answers, "federated", "the model of the best round", best)
    for client in sorted(card["clients"]):
        title = f"{cards.name_of(client, run.prepared)} alone"
        index = data.worker_index(client, args.index_dir)
        folder = Path("alone") / client
        is_there = add_model(run, run.others, answers, "alone", title, folder / TRAINED_HERE)
        if not is_there and index and index.exists():
            run.commands.append(alone_command(weights, index, folder, Path(client)))
    if not run.commands and not run.others:  # the hospitals' images are elsewhere
        run.commands.append(f"{PYTHON} report.py --client-dir client001    # at the hospital")
    in_one_place = Path("central") / TRAINED_HERE
    add_model(run, run.others, answers, "central", "all images in one place", in_one_place)
    return run


def load_client(args):
    """A hospital's Run: the result that it fetched, measured on its own held-out patients."""
    client = args.client_dir.resolve().name
    weights = args.client_dir / "server_weight.h5"
    card = cards.read(weights)
    answers = Answers(args.index_dir)
    cards.check_kind(answers.val_path, card["preprocessing"], "those of the run")
    federated = answers.of("federated", "federated", weights, card)
    assessed = metrics.assess(federated.p_healthy, answers.val, card["tasks"])
    # Of a few patients at home nothing can be said against a model; the verdict says how few.
    num_with_it = assessed["tasks"][metrics.TASK]["num_positive"]
    fewest = min(num_with_it, assessed["num_reporting_images"] - num_with_it)
    own_warning = assessed["warning"] if fewest >= metrics.FEWEST_PATIENTS else ""
    federated.card = {**card, **assessed, "warning": card["warning"] or own_warning}
    federated.card["by_round"] = [cards.round_of(federated.card)]
    prepared = cards.read_prepared(args.index_dir)
    run = Run(federated, answers.val, prepared, home=cards.name_of(client, prepared))
    index = data.worker_index(client, args.index_dir)
    if index is None or not index.exists():  # a hospital prepares its images as those of one client
        index = args.index_dir / "worker1.pkl"
    alone, tuned = Path("alone") / client, Path("fine-tuned") / client
    name = "this hospital alone"
    if not add_model(run, run.others, answers, "alone", name, alone / TRAINED_HERE):
        run.commands.append(alone_command(weights, index, alone, args.client_dir))
    name = "federated, then fine-tuned here"
    if not add_model(run, run.others, answers, "fine-tuned", name, tuned / TRAINED_HERE):
        run.commands.append(central_command("--fine-tune", weights, index, tuned))
    run.candidates = run.others
    return run


def alone_command(weights, index, folder, client_dir):
    """The command that trains a hospital alone, with as many passes a round as its client made."""
    trained = read_table(client_dir / "history.csv")
    # a client of 2020 on this machine writes a table without that column
    epochs = max((int(row.get("epoch") or 1) for row in trained), default=1)
    return central_command("--like", weights, index, folder) + f" --epochs {epochs}"


def central_command(source_flag, weights, index, folder):
    words = [source_flag, weights, "--index", index, "--out", folder]
    if index.parent != Path("index"):
        words += ["--index-dir", index.parent]
    return shlex.join([PYTHON, "central.py", *map(str, words)])


def add_model(run, models, answers, kind, name, path):
    """Adds the Model of a weight file to a list of the run's; False where there is none to add.

    It has to be of this run, or trained like it or tuned from it by central.py, to the end. One
    that lies there but does not fit is left out, and the page says so.
    """
    if not path.exists():
        return False
    try:
        card = cards.read(path)
        if card["run"] != run.federated.card["run"]:
            raise ValueError(f"{path} is of another run")
        if card["validation_sha256"] != answers.val_sha256:
            raise ValueError(f"{path} was scored on other patients than those of this page")
        # a tuned one goes on behind the run; the best round's model is of any of its rounds
        last_round = run.federated.card["round"] + (kind == "fine-tuned")
        if kind != "federated" and card["round"] < last_round:
            raise ValueError(
                f"{path} ends at round {card['round']}, expected {last_round} beside this run: "
                "central.py was stopped, or the run went on since"
            )
        models.append(answers.of(kind, name, path, card))
    except ValueError as error:
        run.left_out.append(f"{name} is left out: {error}")
        return False
    return True


class Answers:
    """What models say of the held-out images of one index."""

    def __init__(self, index_dir):
        self.val_path = index_dir / "val_set.pkl"
        self.val = data.read_index(self.val_path)
        self.val_sha256 = files.sha256_of(self.val_path)
        self.loaded = {}  # (network's name, image size): (network, images); most models share one
        model.configure(seed=0)

    def of(self, kind, name, path, card):
        """The Model of a weight file. Raises ValueError where it answers NaN."""
        shape = (card["arch"], card["image_size"])
        if shape not in self.loaded:
            folder = self.val_path.parent  # for what memory cannot hold
            images = data.images_for(self.val, card["image_size"], folder, on_features=False)
            self.loaded[shape] = (model.build(*shape), images)
        network, images = self.loaded[shape]
        model.load(network, path)
        p_healthy = model.predict(network, images)
        if answers_nan := metrics.answers_nan(p_healthy):
            raise ValueError(f"{path} must not be used: {answers_nan}")
        return Model(kind, name, path, card, p_healthy)


def read_table(path):
    """The rows of a CSV file of a run as dicts: numbers, None where a cell is empty; [] without it.

    The columns client and missing are text. Raises ValueError where it is no such table.
    """
    if not path.exists():
        return []
    try:
        # -sig: a spreadsheet that saved it has put a byte order mark before the first name
        rows = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        return [{name: cell_of(name, text) for name, text in row.items()} for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no table of a run: {error}") from None


def cell_of(name, text):
    if name in TEXT_COLUMNS:
        return text or ""
    return float(text) if text else None


if __name__ == "__main__":
    end_script(main())

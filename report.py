"""The result of a run as one page, server/report.html, that needs nothing else: no network, no script, no other file.

    python3 report.py
    python3 report.py --compare compare.csv      # with the curves of ./compare.sh

Clients' images and training times are shown where they are on this machine. Needs requirements-report.txt.
"""

import argparse
import csv
import importlib.util
import json
import sys
from pathlib import Path

from common.script import exit_on_signals, fail, say, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import data
import model
from common import files
from reporting.metrics import METRICS, measure

CLIENT_IMAGES = 500  # of each client, or of more every n-th: vgg16 takes 0.3 s an image


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server-dir", type=Path, default=Path("server"), metavar="DIR", help="(server)")
    add("--index-dir", type=Path, default=Path("index"), metavar="DIR", help="(index)")
    add("--compare", type=Path, metavar="FILE", help="what ./compare.sh wrote of this data set")
    add("--out", type=Path, metavar="FILE", help="(SERVER_DIR/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.server_dir / "report.html"
    try:
        if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "sklearn")):
            raise ValueError(
                "the report needs matplotlib and scikit-learn: pip install -r requirements-report.txt"
            )
        from reporting.page import page

        run = load(args)
        files.publish_text(out, page(run))
    except (ValueError, OSError) as error:
        return fail("report", error)
    numbers = run["measured"].items()
    say(
        "report",
        f"{out}: round {len(run['history'])}/{run['rounds']}, {len(run['val'])} held-out images: "
        + ", ".join(
            f"{name} {value:.3f} ({low:.3f} to {high:.3f})" for name, (value, low, high) in numbers
        ).replace("auc", "AUC"),
    )
    return 0


def load(args):
    """The server's state (dict), and beside it what the page needs: val, p_healthy, measured, sites, prepared, compared."""
    run = files.load_state(
        args.server_dir / "state.json", "run clients arch image_size seed rounds history".split()
    )
    if run is None or not run["history"]:
        raise ValueError(
            f"{args.server_dir / 'state.json'} knows no finished round: start a run with ./run_local.sh"
        )
    val = data.read_index(args.index_dir / "val_set.pkl")
    model.configure(run["seed"])
    network = model.build(run["arch"], run["image_size"])
    model.load(network, args.server_dir / "server_weight.h5")
    p_healthy = model.predict(network, data.load_images(val, run["image_size"]))
    prepared = args.index_dir / "prepared.json"
    return {
        **run,
        "val": val,
        "p_healthy": p_healthy,
        "measured": measure(p_healthy, data.healthy(val)),
        "client_images": CLIENT_IMAGES,
        "sites": {name: load_site(name, args.index_dir, run, network) for name in run["clients"]},
        "prepared": json.loads(prepared.read_text(encoding="utf-8")) if prepared.exists() else {},
        "compared": read_compared(args.compare) if args.compare else {},
    }


def load_site(name, index_dir, run, network):
    """(training history of this run, records, measured) of a client; empty for one that trained on another machine."""
    left = files.load_state(Path(name) / "state.json")
    path = data.worker_index(name, index_dir) or index_dir / f"{name}.pkl"
    if not left or left["run"] != run["run"]:
        return [], [], {}
    records, measured = data.read_index(path) if path.exists() else [], {}
    if records and all(Path(record["dir"]).exists() for record in records):
        tried = records[:: -(-len(records) // CLIENT_IMAGES)]
        measured = measure(
            model.predict(network, data.load_images(tried, run["image_size"])), data.healthy(tried)
        )
    return left["history"], records, measured


def read_compared(path):
    """{series: [row (dict of numbers), ...]}."""
    rows, columns = (
        list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())),
        ("round", *METRICS),
    )
    if not rows or not {"series", *columns} <= set(rows[0]):
        raise ValueError(
            f"{path} is not what ./compare.sh writes: expected rows of series, {', '.join(columns)}"
        )
    return {
        series: [
            {name: float(row[name]) for name in columns} for row in rows if row["series"] == series
        ]
        for series in dict.fromkeys(row["series"] for row in rows)
    }


if __name__ == "__main__":
    exit_on_signals("report: stopped")
    sys.exit(main())

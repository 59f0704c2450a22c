"""The README's two figures of the demo: how long ./run_local.sh takes, and what comes out.

    python3 benchmarks/demo.py                # in a fresh clone: with set-up, then once more
    python3 benchmarks/demo.py --keep FOLDER  # and leave the clone there, to look at its page

The first run of a clone makes .venv and installs the packages; the second finds them there. Prints
the seconds of both, the size of .venv, and the table of the second run for referable DR.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to clone, and to leave")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        clone = arguments.keep or Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        first_s, second_s = run_demo(clone), run_demo(clone)
        size = sum(path.lstat().st_size for path in (clone / ".venv").rglob("*"))
        print(
            f"\nwith set-up {first_s:.0f} s, without {second_s:.0f} s; .venv {size / 1e9:.1f} GB\n"
        )
        print_table(clone)


def run_demo(clone):
    """Seconds of ./run_local.sh; ends this script where it fails."""
    started = time.monotonic()
    code = subprocess.run(["./run_local.sh"], cwd=clone).returncode
    if code:
        sys.exit(f"benchmark: error: ./run_local.sh ended with {code}")
    return time.monotonic() - started


def print_table(clone):
    """The README's table: AUC, sensitivity and specificity of each model, for referable DR."""
    cards = {"federated": clone / "server" / "server_weight.json"}
    for path in sorted((clone / "alone").glob("*/central_weight.json")):
        cards[f"{path.parent.name} alone"] = path
    print("| | AUC | sensitivity | specificity |\n|---|---|---|---|")
    for name, path in cards.items():
        measured = json.loads(path.read_text())["tasks"]["referable DR"]["measured"]
        cells = [measured[metric] for metric in ("auc", "sensitivity", "specificity")]
        # a model without a threshold has no sensitivity
        words = [
            "not measured" if value is None else f"{value:.3f} ({low:.2f} to {high:.2f})"
            for value, low, high in cells
        ]
        print(f"| {name} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()

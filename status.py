"""Where a run is: its round, its clients and its scores, from server/status.json.

python3 status.py                       # on a terminal it redraws until the run is over
python3 status.py copied/status.json    # a copy, on any machine
python3 status.py --once
"""

import time
from pathlib import Path

from common.log import fail
from common.script import end_script, exit_on_signals, new_parser, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

from rich.console import Console
from rich.live import Live

from federation import status

LOOK_EVERY_S = 1
OTHER_LINES = 8  # of the picture, beside a line for each client and each round


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=Path("server/status.json"),
        metavar="FILE",
        help="(default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    arguments = parser.parse_args(argv)
    try:
        return watch(arguments.file, arguments.once)
    except (ValueError, OSError) as error:
        return fail("status", error)
    except (LookupError, TypeError, AttributeError):
        return fail("status", f"{arguments.file} is not a server's status.json")


def watch(path, once):
    """Show the status; on a terminal, again and again until the run is over."""
    console = Console(markup=False, highlight=False)
    if once or not console.is_terminal:
        console.print(status.draw(*status.read(path)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found, written = status.read(path)
            rows = console.height - OTHER_LINES - len(found["clients"])
            live.update(status.draw(found, written, max(1, rows)), refresh=True)
            if found["phase"] in ("over", "stopped"):
                return
            time.sleep(LOOK_EVERY_S)


if __name__ == "__main__":
    exit_on_signals("status", "stopped; the run goes on")
    end_script(main())

"""How many photographs a second prepare.py prepares.

    python3 benchmarks/preparation.py                     # synthetic photographs, 4000 x 3000, JPEG
    python3 benchmarks/preparation.py --idrid DIR         # the photographs of IDRiD
    python3 benchmarks/preparation.py --against CHECKOUT  # in turn with another commit: their ratio

Of the time of a first run, which makes the pictures, that of a second one is taken off, which finds
all of them there: imports, table and contact sheet.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from common.script import new_parser
from preparation import synthetic

SIZE = (4000, 3000)  # pixels, of a usual fundus camera
NUM_PHOTOGRAPHS = 60


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--idrid", metavar="DIR", help="folder of the unpacked IDRiD")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another commit's folder")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(3)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.idrid:
            flags = ["--dataset", "idrid", "--source", str(Path(arguments.idrid).resolve())]
        else:
            draw_photographs(Path(folder))
            flags = ["--dataset", "folder", "--source", folder]
        checkouts = [ROOT, *filter(None, [arguments.against])]
        rates = [
            [rate(checkout, flags) for checkout in checkouts] for _ in range(arguments.repeats)
        ]
    for checkout, own in zip(checkouts, zip(*rates, strict=True), strict=True):
        print(f"{checkout}: {statistics.median(own):.1f} photographs a second")
    if arguments.against:
        print(f"ratio {statistics.median(ours / theirs for ours, theirs in rates):.2f}")


def draw_photographs(folder):
    """JPEGs of SIZE with a labels.csv: an eye on black, with the noise of a sensor."""
    rows = ["image,label"]
    for number in range(NUM_PHOTOGRAPHS):
        rng = np.random.default_rng(number)
        eye = synthetic.draw(number % 5, rng, 750)
        large = Image.fromarray(eye).resize((SIZE[1], SIZE[1]), Image.Resampling.BICUBIC)
        photograph = Image.new("RGB", SIZE)
        photograph.paste(large, ((SIZE[0] - SIZE[1]) // 2, 0))
        noise = rng.integers(-3, 4, (*SIZE[::-1], 1), np.int8)
        pixels = np.clip(np.asarray(photograph).astype(np.int16) + noise, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)
        rows.append(f"{number}.jpg,{number % 5}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def rate(checkout, flags):
    """Photographs a second that the prepare.py of a checkout prepares, in an empty folder."""
    with tempfile.TemporaryDirectory() as project:

        def seconds():
            started = time.monotonic()
            command = [sys.executable, str(Path(checkout).resolve() / "prepare.py"), *flags]
            done = subprocess.run(command, cwd=project, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            return time.monotonic() - started

        first = seconds()
        again = seconds()
        # not the sheets, contact_sheet.png and check_these.png, which lay there once
        num_pictures = len(list(Path(project).glob("preprocessed/*/[!c]*.png")))
        return num_pictures / (first - again)


if __name__ == "__main__":
    main()

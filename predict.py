"""DR scores (0 healthy ... 1 DR) of new photographs, prepared as the training images were.

python3 predict.py eye1.jpg eye2.png
"""

import argparse
import json
import sys
from pathlib import Path

from common.script import exit_on_signals, fail, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import numpy as np
from PIL import Image

import model
from common import files
from preparation import photos

DRAWN = "  (the model was trained on drawn images: its score of a photograph says nothing)"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a JPEG, PNG, TIFF or BMP; one in preprocessed/ is prepared",
    )
    parser.add_argument(
        "--weights", default="server/server_weight.h5", metavar="FILE", help="(%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        for needed in (args.weights, "server/state.json", "index/prepared.json"):
            if not Path(needed).exists():
                raise ValueError(f"{needed} is missing: train a model first, with ./run_local.sh")
        state = files.load_state("server/state.json", ("arch", "image_size", "seed", "history"))
        made = json.loads(Path("index/prepared.json").read_text(encoding="utf-8"))
        if args.weights == parser.get_default("weights") and not state["history"]:
            raise ValueError(f"{args.weights} is not trained yet: no round of its run is over")
        model.configure(state["seed"])
        network = model.build(state["arch"], state["image_size"])
        model.load(network, args.weights)
    except (ValueError, OSError) as error:
        return fail("predict", error)
    failed = sum(not predict(network, made, path) for path in args.images)
    print("This is no medical device: decide nothing about a patient by these scores.")
    return min(failed, 1)


def predict(network, made, path):
    """Prints the score of one photograph; returns whether it could be read. made: what prepared.json says."""
    drawn, prepared = (
        made["preprocessing"] == "drawn",
        Path("preprocessed").resolve() in Path(path).resolve().parents,
    )
    try:
        image = photos.open_image(path)
        if not prepared and not drawn:
            image = Image.fromarray(photos.preprocess(image, made["image_size"]))
    except ValueError as error:
        fail("predict", error if str(error).startswith(path) else f"{path}: {error}")
        return False
    pixels = np.asarray(image.resize(network.input_shape[1:3]))[None]  # (1, size, size, 3)
    print(
        f"{path}  DR score {1 - model.predict(network, pixels)[0]:.3f}{DRAWN * (drawn and not prepared)}",
        flush=True,
    )
    return True


if __name__ == "__main__":
    exit_on_signals("predict: stopped")
    sys.exit(main())

"""DR scores (0 healthy ... 1 DR) of new photographs, prepared as the training images were.

python3 predict.py eye1.jpg eye2.png
"""

import argparse
import json
from pathlib import Path

from common.log import fail
from common.script import end_script, exit_on_signals, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import numpy as np
from PIL import Image

import model
from common import files
from preparation import photos

DRAWN_WARNING = "  (the model was trained on drawn images: its score of a photograph says nothing)"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a JPEG, PNG, TIFF or BMP; one in preprocessed/ is prepared already",
    )
    parser.add_argument(
        "--weights", default="server/server_weight.h5", metavar="FILE", help="(%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        network, prepared = load(args.weights, parser.get_default("weights"))
    except (ValueError, OSError) as error:
        return fail("predict", error)
    unreadable = 0
    for path in args.images:
        try:
            print_score(network, prepared, path)
        except ValueError as error:
            sentence = str(error)
            fail("predict", sentence if sentence.startswith(path) else f"{path}: {sentence}")
            unreadable += 1
    print("This is no medical device: decide nothing about a patient by these scores.")
    return 1 if unreadable else 0


def load(weights, default_weights):
    """(the network with its weights, what prepared.json says of the training images).

    Raises ValueError where something is missing or does not belong together.
    """
    for needed in (weights, "server/state.json", "index/prepared.json"):
        if not Path(needed).exists():
            raise ValueError(f"{needed} is missing: train a model first, with ./run_local.sh")
    state = files.load_state("server/state.json", ("arch", "image_size", "seed", "history"))
    prepared = json.loads(Path("index/prepared.json").read_text(encoding="utf-8"))
    if weights == default_weights and not state["history"]:
        raise ValueError(f"{weights} is not trained yet: no round of its run is over")
    model.configure(state["seed"])
    network = model.build(state["arch"], state["image_size"])
    model.load(network, weights)
    return network, prepared


def print_score(network, prepared, path):
    """Prints the score of one photograph. Raises ValueError where it cannot be read."""
    drawn = prepared["preprocessing"] == "drawn"
    already_prepared = Path("preprocessed").resolve() in Path(path).resolve().parents
    image = photos.open_image(path)
    if not already_prepared and not drawn:
        image = Image.fromarray(photos.preprocess(image, prepared["image_size"]))
    pixels = np.asarray(image.resize(network.input_shape[1:3]))[None]  # (1, size, size, 3)
    score = 1 - model.predict(network, pixels)[0]
    warning = DRAWN_WARNING if drawn and not already_prepared else ""
    print(f"{path}  DR score {score:.3f}{warning}", flush=True)


if __name__ == "__main__":
    exit_on_signals("predict", "stopped")
    end_script(main())

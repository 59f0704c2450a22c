"""The central baseline: what the network learns when all images are in one place.

The same network as the server's, from the same initial weights, trained as a client trains it.

python3 central.py                                           # on all images, index/train_set.pkl
python3 central.py --index index/worker3.pkl --out alone     # one hospital that trains alone
"""

import argparse
import json
import time
from pathlib import Path

from common.log import fail, say
from common.script import at_least, end_script, exit_on_signals, pixels, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import data
import model
from common import files
from federation.rounds import HISTORY_COLUMNS
from reporting import metrics


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=at_least(1), default=10, help="(10)")
    add("--epochs", type=at_least(1), default=1, help="passes over the images in a round (1)")
    add("--batch-size", type=at_least(1), default=16, metavar="N", help="(16)")
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation (0)")
    add("--arch", choices=list(model.ARCHS), default="drcnn", help="the network (drcnn)")
    add("--image-size", type=pixels, metavar="PIXELS", help="a side (128 for drcnn, 224 for vgg16)")
    add(
        "--weights",
        default="none",
        metavar="none|imagenet|FILE",
        help="to start from (none: random)",
    )
    add(
        "--freeze-base",
        action="store_true",
        help="train only the layers after the base of a vgg16 or lite0",
    )
    add(
        "--no-augmentation",
        action="store_true",
        help="train on the images as they are, without rotation and flips",
    )
    add(
        "--index",
        type=Path,
        metavar="FILE",
        help="the images to train on (INDEX_DIR/train_set.pkl)",
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
        type=Path,
        default=Path("central"),
        metavar="DIR",
        help="weights and history (central)",
    )
    add("--threads", type=at_least(0), default=0, metavar="N", help="of TensorFlow (0: all cores)")
    args = parser.parse_args(argv)
    image_size = args.image_size or model.ARCHS[args.arch].image_size
    try:
        with files.alone_in(args.out):
            train_and_evaluate(args, image_size)
    except (ValueError, OSError) as error:
        return fail("central", error)
    return 0


def train_and_evaluate(args, image_size):
    """Publishes central_weight.h5, history.csv and assessed.json in OUT after every round.

    The columns are those of server/history.csv, so that the two can be compared row by row.
    assessed.json says of this model what the card server_weight.json says of the merged one.
    """
    files.clean(args.out)
    train = data.read_index(args.index or args.index_dir / "train_set.pkl")
    val = data.read_index(args.index_dir / "val_set.pkl")
    images = data.load_images(train, image_size, files.temporary(args.out / "images.npy"))
    val_images = data.load_images(val, image_size, files.temporary(args.out / "val_images.npy"))
    model.configure(args.seed, args.threads)
    network = model.build(args.arch, image_size, args.seed)
    model.initialize(network, args.weights)
    if args.freeze_base:
        model.freeze_base(network)
    batches = data.TrainingBatches(
        images,
        data.healthy(train),
        args.batch_size,
        args.seed,
        args.out.name,
        augment=not args.no_augmentation,
    )
    rows = []
    for round_number in range(1, args.rounds + 1):
        started = time.monotonic()
        # an epoch's own line is left out: a round here is what the log of the server shows
        model.train(
            network,
            batches,
            round_number,
            args.epochs,
            report=lambda row: None,
        )
        p_healthy = model.predict(network, val_images)
        scores = metrics.scores(p_healthy, data.healthy(val))
        row = {
            "round": round_number,
            **scores,
            "clients": 1,
            "num_examples": len(train),
            "seconds": time.monotonic() - started,
        }
        rows.append(row)
        model.save(network, args.out / "central_weight.h5")
        files.publish_rows(args.out / "history.csv", HISTORY_COLUMNS, rows)
        assessed = json.dumps(metrics.assess(p_healthy, val), indent=1)
        files.publish_text(args.out / "assessed.json", assessed + "\n")
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        say(str(args.out), f"round {round_number}/{args.rounds}: {numbers}")


if __name__ == "__main__":
    exit_on_signals("central", "stopped; its last whole round is kept")
    end_script(main())

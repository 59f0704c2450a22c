"""Training without a federation, to compare with one: all images in one place, or one hospital's.

The same network as the server's, from the same first weights, trained as a client trains it. What
comes out is a weight file with its model card, as the server's.

    python3 central.py                          # all images, index/train_set.pkl, in one place
    python3 central.py --index index/worker1.pkl --out alone/client001 \\
        --like client001/server_weight.h5       # a hospital alone, as in that run
    python3 central.py --index index/worker1.pkl --out fine-tuned/client001 \\
        --fine-tune client001/server_weight.h5  # the result of that run, tuned at home

report.py shows the last two beside the federation. No weights leave this machine in here.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

from common.log import fail, say
from common.script import (
    at_least,
    end_script,
    exit_on_signals,
    initial_weights,
    new_parser,
    pixels,
    positive,
    start_script,
)

if __name__ == "__main__":
    start_script(never_waits=True)  # before the packages, so that a missing one is a sentence
    exit_on_signals("central", "stopped; its last whole round is kept")

import data
import model
from common import files
from federation.state import HISTORY_COLUMNS
from reporting import card as cards
from reporting import metrics

FINE_TUNING_EPOCHS = 2


def main(argv=None):
    flags = parser()
    args = flags.parse_args(argv)
    if args.fine_tune and args.weights:
        flags.error("--fine-tune goes on from the weights of its own file: leave out --weights")
    try:
        if args.fine_tune or args.like:
            flags.set_defaults(**settings_of_run(args))  # for all that no flag says
            args = flags.parse_args(argv)
        complete(args)
        with files.alone_in(args.out):
            train_and_evaluate(args)
    except (ValueError, OSError) as error:
        return fail(str(args.out), error)  # as its rounds: several write into one log
    return 0


def complete(args):
    """What follows from the network, for all that no flag says; as in a federated run."""
    arch = model.ARCHS[args.arch]
    args.image_size = args.image_size or arch.image_size
    args.weights = args.weights or arch.weights
    if args.freeze_base is None and arch.freezes_base(args.begins_from or args.weights):
        args.freeze_base = args.no_augmentation = True


def parser():
    """The flags of this script, for itself and for the launcher."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="train as in the run of this weight file: network, image size, first weights, seed "
        "and rounds of its model card",
    )
    source.add_argument(
        "--fine-tune",
        type=Path,
        metavar="FILE",
        help=f"go on from these weights: one more round, of {FINE_TUNING_EPOCHS} passes",
    )
    add("--rounds", type=at_least(1), default=10, help="(10)")
    add(
        "--epochs",
        type=at_least(1),
        help="passes over the images in a round (1; 5 of the last layer of a frozen lite0)",
    )
    add("--batch-size", type=at_least(1), default=16, metavar="N", help="(16)")
    add(
        "--learning-rate",
        type=positive,
        metavar="RATE",
        help="of round 1; it falls from round to round (each network's own)",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation (0)")
    add("--arch", choices=list(model.ARCHS), default="drcnn", help="the network (drcnn)")
    add("--image-size", type=pixels, metavar="PIXELS", help="a side (that of the network)")
    add(
        "--weights",
        type=initial_weights,
        metavar="none|imagenet|FILE",
        help="to start from; none: random (each network's own)",
    )
    add(
        "--freeze-base",
        action=argparse.BooleanOptionalAction,
        help="train only the layers after the base of a vgg16 or lite0 (as a client would)",
    )
    add(
        "--no-augmentation",
        action="store_true",
        help="train on the images as they are, without rotation and flips",
    )
    add(
        "--score-every",
        type=at_least(1),
        default=1,
        metavar="N",
        help="score the model every N rounds and after the last (1)",
    )
    add("--index", type=Path, metavar="FILE", help="to train on (INDEX_DIR/train_set.pkl)")
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
        help="weights, card and history (central)",
    )
    add("--threads", type=at_least(0), default=0, metavar="N", help="of TensorFlow (0: all cores)")
    # of no flag, but of --like and --fine-tune
    parser.set_defaults(run="central", rounds_before=0, begins_from=None)
    return parser


def settings_of_run(args):
    """{flag: value} of the run that made the file of --like or --fine-tune, from its card.

    Raises ValueError where that run began from a file, which the card can only name, or where the
    pictures here are of another kind than that run's.
    """
    card = cards.read(args.fine_tune or args.like)
    val_path = args.index_dir / "val_set.pkl"
    for index in (args.index or val_path, val_path):
        cards.check_kind(index, card["preprocessing"], "those of that run")
    settings = {
        "run": card["run"],
        "arch": card["arch"],
        "image_size": card["image_size"],
        "seed": card["seed"],
        "rounds": card["round"],
        "weights": card["initial_weights"],
        "begins_from": card["initial_weights"],
    }
    if args.fine_tune:
        of_tuning = {"weights": args.fine_tune, "rounds": 1, "epochs": FINE_TUNING_EPOCHS}
        # the learning rate goes on where the run's schedule ended
        return {**settings, **of_tuning, "rounds_before": card["round"]}
    if args.weights is None and card["initial_weights"] not in ("none", "imagenet"):
        raise ValueError(
            f"the run of {args.like} began from a file {card['initial_weights']}: name it with "
            "--weights"
        )
    return settings


def train_and_evaluate(args):
    """Publishes central_weight.h5, its card and history.csv in OUT after every scored round.

    The columns are those of server/history.csv, so that the two can be compared row by row.
    """
    files.clean(args.out)
    weights_path = args.out / "central_weight.h5"
    # An earlier model's: the rounds on it are not this one's.
    cards.path_of(weights_path).unlink(missing_ok=True)
    val_path = args.index_dir / "val_set.pkl"
    train = data.read_index(args.index or args.index_dir / "train_set.pkl")
    val = data.read_index(val_path)
    images = data.images_for(
        train, args.image_size, args.out, args.freeze_base and args.no_augmentation
    )
    val_images = data.images_for(
        val, args.image_size, args.out, args.freeze_base, name="val_features"
    )
    model.configure(args.seed, args.threads)
    network = model.build(args.arch, args.image_size, args.seed)
    model.initialize(network, str(args.weights))
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
    last_round = args.rounds_before + args.rounds
    for round_number in range(args.rounds_before + 1, last_round + 1):
        started = time.monotonic()
        # an epoch's own line is left out: a round here is what the log of the server shows
        model.train(
            network,
            batches,
            round_number,
            args.epochs or model.default_epochs(network),
            report=lambda row: None,
            first_rate=args.learning_rate,
        )
        if round_number % args.score_every and round_number < last_round:
            continue
        p_healthy = model.predict(network, val_images)
        row = {
            "round": round_number,
            **metrics.scores(p_healthy, data.healthy(val)),
            "clients": 1,
            "num_examples": len(train),
            "seconds": time.monotonic() - started,
        }
        rows.append(row)
        model.save(network, weights_path)
        files.publish_rows(args.out / "history.csv", HISTORY_COLUMNS, rows)
        # what `cards.make` takes from a server's state
        state = SimpleNamespace(
            arch=args.arch,
            image_size=args.image_size,
            run=args.run,
            rounds=last_round,
            seed=args.seed,
            weights=args.weights,
            weights_sha256=files.sha256_of(weights_path),
            counted={args.out.name: {"round": round_number, "num_examples": len(train)}},
        )
        card = cards.make(
            state,
            row,
            cards.read_prepared(args.index_dir),
            files.sha256_of(val_path),
            metrics.assess(p_healthy, val),
        )
        cards.publish(weights_path, card)
        say(str(args.out), f"round {round_number}/{last_round}: {cards.summary(card)}")


if __name__ == "__main__":
    end_script(main())

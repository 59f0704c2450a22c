"""The DR CNN: build, train, evaluate, save and load. The only module with Keras layers; TensorFlow loads on first use.

The network's one output is P(healthy), as in the thesis (Keras sorts the class names 'False', 'True'; 'True' is
healthy). The DR score is 1 - P(healthy); AUC, sensitivity and specificity are those of finding DR.
"""

import hashlib
import os
import sys
import time
from contextlib import contextmanager

import h5py
import numpy as np

import data
from common.files import replacing
from federation import weights

ARCHS = {"drcnn": 128, "vgg16": 224}  # architecture: default image size, pixels a side


def default_threads():
    return len(os.sched_getaffinity(0))


@contextmanager
def quiet_stderr():
    """TensorFlow announces itself on the C level, whatever its log level: here into nothing."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def configure(seed, threads=None):
    """Loads TensorFlow, quietly and deterministically; call it before anything else here.

    threads: of TensorFlow's pool. The same seed and the same number of threads give the same bits.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # three clients may share one card
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with quiet_stderr():
        import absl.logging
        import keras
        import tensorflow as tf

        tf.config.list_physical_devices()
    absl.logging.set_verbosity(
        absl.logging.ERROR
    )  # it warns of "legacy HDF5": that is the contract
    threads = threads or default_threads()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def build(arch, image_size, seed=0):
    """A compiled keras.Model, (n, image_size, image_size, 3) in 0..1 -> (n, 1) P(healthy); initial weights from the seed."""
    import keras

    if arch not in ARCHS:
        raise ValueError(f"architecture {arch!r} is unknown, expected one of {', '.join(ARCHS)}")
    keras.utils.set_random_seed(seed)
    return compiled({"drcnn": drcnn, "vgg16": vgg16}[arch](image_size))


def compiled(network):
    import keras

    network.compile(
        optimizer=keras.optimizers.Adam(),
        loss="binary_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )  # compiling for each batch shape costs more than it gains on a small network
    return network


def drcnn(image_size):
    """Five convolutions and a global maximum: one lesion anywhere is enough to answer "DR". Layer names are fixed,
    so that equal weights are equal bytes. BatchNormalization's momentum is 0.9: at Keras's 0.99 the moving
    statistics lag hundreds of steps behind, and evaluation sits at chance while training is long right."""
    from keras import Input, Model, layers

    image = x = Input((image_size, image_size, 3), name="image")
    for number, filters in enumerate((16, 32, 64, 64, 128), start=1):
        if number > 1:
            x = layers.MaxPooling2D(name=f"pool{number}")(
                x
            )  # (b, size / 2**(number-1), size / 2**(number-1), ...)
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"norm{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
    x = layers.GlobalMaxPooling2D(name="anywhere")(x)
    return Model(image, layers.Dense(1, activation="sigmoid", name="healthy")(x), name="drcnn")


def vgg16(image_size):
    """The thesis's network: VGG16 (Simonyan and Zisserman 2014) without its top, Flatten, Dense 256, Dense 1."""
    from keras import Model, applications, layers

    base = applications.VGG16(
        include_top=False, weights=None, input_shape=(image_size, image_size, 3)
    )
    x = layers.Flatten(name="flatten")(base.output)
    x = layers.Dense(256, activation="relu", name="dense")(x)
    return Model(base.input, layers.Dense(1, activation="sigmoid", name="dense_1")(x), name="vgg16")


def base_of(network):
    """The convolutions of a vgg16, up to its features."""
    from keras import Model

    if network.name != "vgg16":
        raise ValueError(
            f"--freeze-base and ImageNet weights are for --arch vgg16, this network is {network.name}"
        )
    return Model(network.input, network.get_layer("block5_pool").output)


def initialize(network, source):
    """Initial weights from `source`: "none" (random), "imagenet", or a weight file of the network or of VGG16's base."""
    from keras import applications

    if source == "imagenet":
        base = base_of(network)
        try:
            known = applications.VGG16(
                include_top=False, weights="imagenet", input_shape=network.input_shape[1:]
            )
        except Exception as error:
            raise ValueError(
                f"ImageNet weights could not be fetched ({error}): put vgg16_weights_tf_dim_ordering_tf_kernels_"
                "notop.h5 into ~/.keras/models, or give that file as --weights FILE"
            ) from None
        base.set_weights(known.get_weights())
    elif source != "none":
        whole = network.name != "vgg16" or len(weights.shapes_of(source)) == len(shapes(network))
        load(network if whole else base_of(network), source)


def freeze_base(network):
    """Leaves only the two dense layers of a vgg16 to be trained (thesis: "most layers are set as non-trainable")."""
    base_of(network).trainable = False
    compiled(network)


def on_features(network, batches):
    """(the dense layers as a network of their own, batches of the base's features): for a frozen base without augmentation
    the features of an image never change, so they are computed once. The layers are shared with `network`."""
    from keras import Input, Model

    base = base_of(network)
    digest = hashlib.sha256(
        b"".join(np.asarray(weight).tobytes() for weight in base.weights)
    ).digest()
    if (
        getattr(batches, "features_of", None) != digest
    ):  # the base is another than in the last round, or this is the first
        features = x = Input(base.output.shape[1:])
        for layer in network.layers[-3:]:
            x = layer(x)
        batches.head = compiled(Model(features, x, name=network.name))
        pixels = data.evaluation_batches(batches.images)
        batches.features = batches.of(
            np.concatenate([base.predict_on_batch(batch) for batch in pixels])
        )
        batches.features_of = digest
    return batches.head, batches.features


def learning_rate(arch, round_number):
    """Adam's rate in a round (counted from 1). vgg16's is the thesis's schedule; drcnn starts higher and falls faster, or
    its threshold, and with it the accuracy, jumps from round to round while the AUC no longer does."""
    first, decay = {"vgg16": (1e-4, 0.05), "drcnn": (2e-3, 0.3)}[arch]
    return first / (1 + decay * (round_number - 1))


def shapes(network):
    """[(layer name, shape)] of every tensor, in the order of the weight file: what weights.check compares with."""
    return [
        (layer.name, tuple(weight.shape))
        for layer in network.layers
        for weight in layer.trainable_weights + layer.non_trainable_weights
    ]


class InMemory(h5py.File):
    def __str__(self):
        return "weights.h5"  # by its name Keras knows the layout


def save(network, path):
    """Publishes the weights as `path` (.h5) in a layout that plain load_weights of any Keras reads. They are laid out in
    memory: HDF5 cannot close a file whose disk is full, and crashes the process."""
    with InMemory("weights.h5", "w", driver="core", backing_store=False) as file:
        network.save(file, include_optimizer=False)
        file.flush()
        content = file.id.get_file_image()
    with replacing(path) as written:
        written.write_bytes(content)


def load(network, path):
    """Loads checked weights. Raises ValueError, with the path, where they are not this network's."""
    try:
        if not str(path).endswith(".h5") or str(path).endswith(".weights.h5"):
            raise ValueError(
                "Keras goes by the name, expected one that ends in .h5, but not in .weights.h5"
            )
        weights.check(path, shapes(network))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    network.load_weights(str(path))


def train(network, batches, round_number, epochs, report=print):
    """client_update of FedAvg: `epochs` passes with a fresh Adam. Returns a history row (dict) an epoch.

    The compiled step and the pipeline survive from round to round; Adam's slots are set to zero instead of rebuilt.
    """
    if network.name == "vgg16" and not network.layers[1].trainable and not batches.augment:
        network, batches = on_features(network, batches)
    for slot in network.optimizer.variables:
        slot.assign(np.zeros(slot.shape, slot.dtype))
    network.optimizer.learning_rate = learning_rate(network.name, round_number)
    rows = []
    for epoch in range(1, epochs + 1):
        started = time.monotonic()
        history = network.fit(
            batches.start(round_number, epoch).dataset,
            epochs=1,
            steps_per_epoch=batches.steps,
            shuffle=False,
            verbose=1 if sys.stdout.isatty() else 0,
        ).history  # it is shuffled
        rows.append(
            {
                "round": round_number,
                "epoch": epoch,
                "loss": history["loss"][0],
                "accuracy": history["accuracy"][0],
                "num_examples": len(batches.images),
                "seconds": time.monotonic() - started,
            }
        )
        report(rows[-1])
    return rows


def predict(network, images):
    """P(healthy) of uint8 images (n, size, size, 3), as float64 (n,)."""
    answers = [network.predict_on_batch(batch)[:, 0] for batch in data.evaluation_batches(images)]
    return np.concatenate(answers).astype(np.float64)


def evaluate(network, images, labels):
    """loss, accuracy, and for finding DR: auc, sensitivity, specificity at 0.5. labels: (n,), 1 = healthy."""
    return scores(predict(network, images), labels)


def scores(p_healthy, labels):
    """The metrics of `evaluate` from P(healthy) (n,) and labels (n,), 1 = healthy; nan where a class is absent."""
    dr, found = labels < 0.5, p_healthy < 0.5
    p = np.clip(p_healthy, 1e-7, 1 - 1e-7)  # as Keras clips
    return {
        "loss": float(-np.mean(np.where(dr, np.log(1 - p), np.log(p)))),
        "accuracy": float(np.mean(found == dr)),
        "auc": auc(1 - p_healthy, dr),
        "sensitivity": float(np.mean(found[dr])) if dr.any() else float("nan"),
        "specificity": float(np.mean(~found[~dr])) if (~dr).any() else float("nan"),
    }


def auc(score, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half (Hanley, McNeil 1982)."""
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n1, n0 = int(positive.sum()), int((~positive).sum())
    return (
        float((rank[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)) if n1 and n0 else float("nan")
    )

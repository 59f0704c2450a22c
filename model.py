"""The DR CNN: build, train, evaluate, save and load.

The only module with Keras layers. TensorFlow takes seconds to import, so it loads on first use.

The network's one output is P(healthy), as in the thesis: Keras sorts the class names 'False' and
'True', and 'True' is healthy. The DR score is 1 - P(healthy); AUC, sensitivity and specificity are
those of finding DR.
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
from reporting import metrics

ARCHS = {"drcnn": 128, "vgg16": 224}  # architecture: default image size, pixels a side


# --- TensorFlow -----------------------------------------------------------------------------------


def default_threads():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def quiet_stderr():
    """Silences file descriptor 2: TensorFlow's C++ announces itself there at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def configure(seed, threads=None):
    """Loads TensorFlow, quiet and deterministic. Call it before anything else here.

    threads: size of TensorFlow's thread pools (default: all cores). The same seed and the same
    number of threads give the same bits.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # three clients may share one card
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with quiet_stderr():
        import absl.logging
        import keras
        import tensorflow as tf

        tf.config.list_physical_devices()
    # Keras warns of the "legacy" HDF5 format at every save; that format is our contract.
    absl.logging.set_verbosity(absl.logging.ERROR)
    threads = threads or default_threads()
    # ~/.keras/keras.json may hold another project's choices, which would change every number.
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


# --- the networks ---------------------------------------------------------------------------------


def build(arch, image_size, seed=0):
    """A compiled keras.Model whose initial weights follow from the seed.

    Input (n, image_size, image_size, 3) in 0..1, output (n, 1), P(healthy).
    """
    import keras

    builders = {"drcnn": drcnn, "vgg16": vgg16}
    if arch not in builders:
        raise ValueError(f"architecture {arch!r} is unknown, expected one of {', '.join(builders)}")
    keras.utils.set_random_seed(seed)
    return compiled(builders[arch](image_size))


def compiled(network):
    """The same network, ready to be trained."""
    import keras

    network.compile(
        optimizer=keras.optimizers.Adam(),
        loss="binary_crossentropy",
        metrics=["accuracy"],
        # XLA compiles once for each shape of a batch: more than a small network gains by it
        jit_compile=False,
    )
    return network


def drcnn(image_size):
    """Five convolutions and a global maximum: one lesion anywhere is enough to answer "DR".

    Layer names are fixed, so that equal weights are equal bytes. The momentum of
    BatchNormalization is 0.9: at Keras's default of 0.99 the moving statistics lag hundreds of
    steps behind, and evaluation stays at chance long after training has become right.
    """
    from keras import Input, Model, layers

    image = Input((image_size, image_size, 3), name="image")
    x = image
    for number, filters in enumerate((16, 32, 64, 64, 128), start=1):
        if number > 1:
            # (b, image_size / 2**(number - 1), image_size / 2**(number - 1), channels)
            x = layers.MaxPooling2D(name=f"pool{number}")(x)
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"norm{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
    x = layers.GlobalMaxPooling2D(name="anywhere")(x)  # (b, 128)
    healthy = layers.Dense(1, activation="sigmoid", name="healthy")(x)  # (b, 1)
    return Model(image, healthy, name="drcnn")


def vgg16(image_size):
    """The thesis's network: VGG16 (Simonyan and Zisserman 2014) with two dense layers on top."""
    from keras import Model, applications, layers

    base = applications.VGG16(
        include_top=False, weights=None, input_shape=(image_size, image_size, 3)
    )
    x = layers.Flatten(name="flatten")(base.output)
    x = layers.Dense(256, activation="relu", name="dense")(x)
    healthy = layers.Dense(1, activation="sigmoid", name="dense_1")(x)
    return Model(base.input, healthy, name="vgg16")


def base_of(network):
    """The convolutions of a vgg16, up to its features, as a model that shares their weights."""
    from keras import Model

    if network.name != "vgg16":
        raise ValueError(
            "--freeze-base and ImageNet weights are for --arch vgg16, "
            f"this network is {network.name}"
        )
    return Model(network.input, network.get_layer("block5_pool").output)


def initialize(network, source):
    """Sets the initial weights.

    source: "none" (random, as they are), "imagenet", or the path of a weight file of the whole
    network or of the base of a vgg16. Raises ValueError where they cannot be had.
    """
    if source == "none":
        return
    if source == "imagenet":
        base_of(network).set_weights(imagenet_weights(network.input_shape[1:]))
        return
    # A file with fewer tensors than the vgg16 has is taken for one of its base.
    of_base = network.name == "vgg16" and len(weights.shapes_of(source)) < len(shapes(network))
    load(base_of(network) if of_base else network, source)


def imagenet_weights(input_shape):
    """The weights of VGG16's convolutions as trained on ImageNet, which Keras downloads once."""
    from keras import applications

    try:
        base = applications.VGG16(include_top=False, weights="imagenet", input_shape=input_shape)
    except Exception as error:  # Keras's download raises many kinds
        raise ValueError(
            f"ImageNet weights could not be fetched ({error}): "
            "put vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5 into ~/.keras/models, "
            "or give that file as --weights FILE"
        ) from None
    return base.get_weights()


def freeze_base(network):
    """Leaves only the two dense layers of a vgg16 to be trained.

    The thesis: "most layers are set as non-trainable".
    """
    base_of(network).trainable = False
    compiled(network)


def has_frozen_base(network):
    return network.name == "vgg16" and not network.layers[1].trainable


def on_features(network, batches):
    """For a frozen base without augmentation: (head, batches of the base's features).

    The features of an image never change then, so they are computed once and kept in `batches`.
    The head is the dense layers as a model of their own; it shares its weights with `network`.
    """
    base = base_of(network)
    digest = hashlib.sha256()
    for weight in base.weights:
        digest.update(np.asarray(weight).tobytes())
    if batches.features_of != digest.digest():  # the first round, or the server changed the base
        batches.head = head_of(network, base.output.shape[1:])
        batches.features = batches.with_features(features(base, batches.images))
        batches.features_of = digest.digest()
    return batches.head, batches.features


def head_of(network, features_shape):
    """The layers after the base, as a compiled model: features (n, ...) -> (n, 1), P(healthy)."""
    from keras import Input, Model

    inputs = Input(features_shape)
    x = inputs
    for layer in network.layers[-3:]:  # Flatten and the two dense layers
        x = layer(x)
    return compiled(Model(inputs, x, name=network.name))


def features(base, images):
    """What the base makes of uint8 images (n, size, size, 3): float32 (n, ...)."""
    return np.concatenate(
        [base.predict_on_batch(batch) for batch in data.evaluation_batches(images)]
    )


# --- weight files ---------------------------------------------------------------------------------


def shapes(network):
    """[(layer name, shape)] of every tensor, in the order of the weight file."""
    return [
        (layer.name, tuple(weight.shape))
        for layer in network.layers
        for weight in layer.trainable_weights + layer.non_trainable_weights
    ]


class InMemory(h5py.File):
    """An HDF5 file in memory that Keras takes for a file on disk.

    Keras chooses the layout by the extension of the path, and asks an h5py.File for it by str().
    h5py answers "<HDF5 file ...>", for which Keras knows no layout. So this one answers with a
    name that ends in .h5.
    """

    def __str__(self):
        return "weights.h5"


def save(network, path):
    """Publishes the weights as `path` (.h5), in a layout that any Keras loads with load_weights.

    They are laid out in memory first: HDF5 cannot close a file whose disk is full, and crashes the
    process. Writing plain bytes raises an OSError instead.
    """
    with InMemory("weights.h5", "w", driver="core", backing_store=False) as file:
        network.save(file, include_optimizer=False)
        file.flush()
        content = file.id.get_file_image()
    with replacing(path) as written:
        written.write_bytes(content)


def load(network, path):
    """Loads weights after checking them.

    Raises ValueError, with the path, where they are not this network's.
    """
    try:
        if not str(path).endswith(".h5") or str(path).endswith(".weights.h5"):
            raise ValueError(
                "Keras chooses the format by the name, expected one that ends in .h5, "
                "but not in .weights.h5"
            )
        weights.check(path, shapes(network))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    network.load_weights(str(path))


# --- training and evaluation ----------------------------------------------------------------------


def learning_rate(arch, round_number):
    """Adam's learning rate in a round (counted from 1): first / (1 + decay * (round - 1)).

    vgg16's schedule is the thesis's. drcnn's starts higher and falls faster: else its accuracy
    jumps from round to round when its AUC no longer does.
    """
    first, decay = {"vgg16": (1e-4, 0.05), "drcnn": (2e-3, 0.3)}[arch]
    return first / (1 + decay * (round_number - 1))


def train(network, batches, round_number, epochs, report=print, progress=None):
    """client_update of FedAvg: `epochs` passes over `batches` with a fresh Adam.

    report    called with a row (dict) after each epoch
    progress  called as progress(epoch, step, steps, loss) after each batch; step counts from 1
    Returns the list of the rows.
    The compiled step and the input pipeline are kept from round to round, because building them
    takes seconds; Adam begins afresh all the same, by setting its variables to zero.
    """
    if has_frozen_base(network) and not batches.augment:
        network, batches = on_features(network, batches)
    for variable in network.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    network.optimizer.learning_rate = learning_rate(network.name, round_number)
    rows = []
    for epoch in range(1, epochs + 1):
        started = time.monotonic()
        history = network.fit(
            batches.start(round_number, epoch).dataset,
            epochs=1,
            steps_per_epoch=batches.steps,
            shuffle=False,  # `batches` shuffles, so that the order follows from the seed
            # Keras's own bar writes to the terminal at once: one that stands still (Ctrl-S) would
            # stop the training, one that is gone would end it.
            verbose=0,
            callbacks=[each_batch(progress, epoch, batches.steps)] if progress else [],
        ).history
        row = {
            "round": round_number,
            "epoch": epoch,
            "loss": history["loss"][0],
            "accuracy": history["accuracy"][0],
            "num_examples": len(batches.images),
            "seconds": time.monotonic() - started,
        }
        rows.append(row)
        report(row)
    return rows


def each_batch(progress, epoch, steps):
    """A Keras callback that calls progress(epoch, step, steps, loss) after each batch."""
    import keras

    def on_batch_end(batch, logs):
        progress(epoch, batch + 1, steps, float(logs["loss"]))

    return keras.callbacks.LambdaCallback(on_train_batch_end=on_batch_end)


def predict(network, images):
    """P(healthy) of uint8 images (n, size, size, 3), as float64 (n,)."""
    answers = [network.predict_on_batch(batch)[:, 0] for batch in data.evaluation_batches(images)]
    return np.concatenate(answers).astype(np.float64)


def evaluate(network, images, labels):
    """loss, accuracy, and for finding DR: auc, sensitivity and specificity at a score of 0.5.

    images: uint8 (n, size, size, 3). labels: (n,), 1 = healthy.
    """
    return metrics.scores(predict(network, images), labels)

"""The networks: build, train, predict, save and load.

The only module with Keras layers. TensorFlow takes seconds to import, so it loads on first use, by
an import within each function. No file but weights is read or written in here; who trains on what,
and when, is the scripts'.

The network's one output is P(healthy), as in the thesis: Keras sorts the class names 'False' and
'True', and 'True' is healthy. The DR score is 1 - P(healthy); AUC, sensitivity and specificity are
those of finding DR.
"""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import h5py
import numpy as np

import data
import pretrained
from common.files import replacing
from federation import weights

# --- TensorFlow -----------------------------------------------------------------------------------


def default_threads():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
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
    # Intel's kernels for convolutions and pooling. TensorFlow takes them by itself on the newest
    # processors only; without them a step takes over twice as long (benchmarks/training_input.py).
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with quiet_stderr():
        import absl.logging
        import keras
        import tensorflow as tf

        tf.config.list_physical_devices()
    # Keras warns of the "legacy" HDF5 format at every save; that format is our contract.
    absl.logging.set_verbosity(absl.logging.ERROR)
    # It warns of base and head, each with a last batch that is smaller: of what we mean.
    tf.get_logger().setLevel("ERROR")
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

    Input (n, image_size, image_size, 3), pixels as they are: RGB, 0 to 255, uint8 or float.
    Output (n, 1), P(healthy).
    """
    import keras

    if arch not in ARCHS:
        raise ValueError(f"architecture {arch!r} is unknown, expected one of {', '.join(ARCHS)}")
    keras.utils.set_random_seed(seed)
    network = ARCHS[arch].build(image_size)
    check_contract(network, arch, image_size)
    return compiled(network)


def check_contract(network, arch, image_size):
    """Raises ValueError where a network is not as the comment above ARCHS says."""
    from keras import activations, layers

    def expect(holds, found, expected):
        if not holds:
            raise ValueError(f"the network {arch!r} of model.py {found}, expected {expected}")

    takes = (None, image_size, image_size, 3)
    without_input = [each for each in network.layers if not isinstance(each, layers.InputLayer)]
    first, last = without_input[0], without_input[-1]
    activation = getattr(last, "activation", None)
    expect(network.name == arch, f"has the name {network.name!r}", f"its key in ARCHS, {arch!r}")
    expect(network.input_shape == takes, f"takes {network.input_shape}", takes)
    expect(
        isinstance(first, layers.Rescaling),
        f"begins with the layer {first.name!r}",
        "a Rescaling, of pixels 0 to 255",
    )
    expect(
        network.output_shape == (None, 1) and activation is activations.sigmoid,
        f"ends with the layer {last.name!r} of shape {network.output_shape}",
        "one number, P(healthy), of a sigmoid: (None, 1)",
    )
    for layer in without_input:
        is_keras = type(layer).__module__.startswith("keras.src.layers.")
        expect(
            is_keras and not isinstance(layer, layers.Lambda),
            f"has the layer {layer.name!r}, a {type(layer).__name__}",
            "layers of keras.layers, flat in one model, and no Lambda: the file has no code, and "
            "other machines could not load it",
        )


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

    Each channel of each image is standardised first. That takes the camera out, its light and its
    colours, which is what differs between hospitals: their updates then agree, and averaging them
    does not make the merged network jump.
    Layer names are fixed, so that equal weights are equal bytes. The momentum of
    BatchNormalization is 0.9: at Keras's default of 0.99 the moving statistics lag hundreds of
    steps behind, and evaluation stays at chance long after training has become right.
    """
    from keras import Input, Model, layers

    image = Input((image_size, image_size, 3), name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    # a group for each channel, and no weights: nothing is learnt of it
    x = layers.GroupNormalization(3, center=False, scale=False, name="standardise")(x)
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
    from keras import Input, Model, applications, layers

    image = Input((image_size, image_size, 3), name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    base = applications.VGG16(include_top=False, weights=None, input_tensor=x)
    x = layers.Flatten(name="flatten")(base.output)
    x = layers.Dense(256, activation="relu", name="dense")(x)
    healthy = layers.Dense(1, activation="sigmoid", name="dense_1")(x)
    return Model(image, healthy, name="vgg16")


def lite0(image_size):
    """EfficientNet-Lite0 (Tan and Le 2019) and one dense layer, without squeeze-and-excitation.

    All layers lie flat in one model: a model within a model orders its tensors anew when it is
    frozen, and weights are matched by order.
    """
    from keras import Input, Model, layers

    image = Input((image_size, image_size, 3), name="image")
    # (pixel - 127) / 128: what the ImageNet weights were trained with
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="scale")(image)
    x = layers.Conv2D(32, 3, 2, padding="same", use_bias=False, name="stem_conv")(x)
    x = norm_relu6(x, "stem")
    channels = 32
    number = 0
    for repeats, kernel_size, first_stride, expansion, filters in LITE0_BLOCKS:
        for repeat in range(repeats):
            number += 1
            stride = first_stride if repeat == 0 else 1
            y = inverted_residual(
                x, f"block{number}", channels * expansion, kernel_size, stride, filters
            )
            # the same shape: only what the block changes has to be learned (He et al. 2015)
            if stride == 1 and channels == filters:
                y = layers.Add(name=f"block{number}_add")([x, y])
            x = y
            channels = filters
    x = layers.Conv2D(1280, 1, use_bias=False, name="top_conv")(x)
    x = norm_relu6(x, "top")
    x = layers.GlobalAveragePooling2D(name="average")(x)  # (b, 1280)
    healthy = layers.Dense(1, activation="sigmoid", name="healthy")(x)  # (b, 1)
    return Model(image, healthy, name="lite0")


# EfficientNet-Lite0's groups of blocks (Tan and Le 2019, table 1):
# blocks, kernel size, stride of the first block, expansion of its channels inside, filters
LITE0_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def inverted_residual(x, name, inner_channels, kernel_size, stride, filters):
    """A block of MobileNetV2 (Sandler et al. 2018): expand, convolve each channel, project."""
    from keras import layers

    if inner_channels != x.shape[-1]:
        x = layers.Conv2D(inner_channels, 1, use_bias=False, name=f"{name}_expand")(x)
        x = norm_relu6(x, f"{name}_expand")
    x = layers.DepthwiseConv2D(
        kernel_size, stride, padding="same", use_bias=False, name=f"{name}_depthwise"
    )(x)
    x = norm_relu6(x, f"{name}_depthwise")
    x = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_project")(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-3, name=f"{name}_project_norm")(x)


def norm_relu6(x, name):
    from keras import layers

    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-3, name=f"{name}_norm")(x)
    return layers.ReLU(max_value=6, name=f"{name}_relu")(x)


@dataclass(frozen=True)
class Arch:
    """A network that --arch names.

    Adam's learning rate in round r, counted from 1, is first_rate / (1 + rate_decay * (r - 1)).
    """

    build: Callable  # build(image_size) -> keras.Model, whose name is the key in ARCHS
    image_size: int  # the default, pixels a side
    first_rate: float
    rate_decay: float
    preprocessing: str = "graham"  # of photographs, what prepare.py makes of them for it
    features: str | None = None  # the last layer of the base, where the base can be pretrained
    frozen_first_rate: float | None = None  # first_rate while the base is frozen; None: the same
    frozen_epochs: int = 1  # passes in a round while the base is frozen, where no flag says it
    weights: str = "none"  # what a run begins from where no flag says it: none (random), imagenet

    def freezes_base(self, weights):
        """Whether a run that begins from `weights` trains only the layers after the base.

        Not of the thesis's vgg16: there each client chooses, with --freeze-base.
        """
        return self.weights == weights == "imagenet"


# To add a network of your own: a function like the three above, and an entry here. `build` checks:
# - its name is its key here
# - pixels as they are in, RGB, 0 to 255: it begins with a Rescaling layer
# - one number out, P(healthy), by a sigmoid
# - layers of keras.layers only, flat in one model, and no Lambda: the file is the whole model
# Give each layer a name: equal weights are then equal bytes.
ARCHS = {
    # High at first, and falling faster than the thesis's: the AUC of the merged network then hardly
    # falls from one round to the next (benchmarks/story.py measures it).
    "drcnn": Arch(drcnn, 128, first_rate=3e-3, rate_decay=0.5),
    "vgg16": Arch(vgg16, 224, first_rate=1e-4, rate_decay=0.05, features="block5_pool"),
    # One dense layer on frozen features is a convex problem: it takes a high rate, and at 1e-3 ten
    # rounds are too few for it. A network that knows photographs knows colours. Microaneurysms need
    # pixels: at 224 it finds less.
    "lite0": Arch(
        lite0,
        448,
        first_rate=1e-3,
        rate_decay=0.3,
        preprocessing="colour",
        features="average",
        frozen_first_rate=2e-2,
        frozen_epochs=5,  # on features a pass takes milliseconds
        weights="imagenet",
    ),
}


# --- a pretrained base ----------------------------------------------------------------------------


def base_of(network):
    """The layers up to the features of a network that can be pretrained, sharing their weights."""
    from keras import Model

    features = ARCHS[network.name].features
    if features is None:
        able = " and ".join(name for name, arch in ARCHS.items() if arch.features)
        raise ValueError(
            f"--freeze-base and ImageNet weights are for --arch {able}, "
            f"this network is {network.name}"
        )
    return Model(network.input, network.get_layer(features).output, name=network.name)


def initialize(network, source):
    """Sets the initial weights.

    source: "none" (random, as they are), "imagenet", or the path of a weight file of the whole
    network or of its base. Raises ValueError where they cannot be had.
    """
    if source == "none":
        return
    if source == "imagenet":
        set_imagenet_weights(base_of(network))
        return
    # A file with fewer tensors than the network has is taken for one of its base.
    can_be_base = ARCHS[network.name].features is not None
    if can_be_base and len(weights.Layout(source).tensors) < len(shapes(network)):
        load(base_of(network), source)
    else:
        load(network, source)


def set_imagenet_weights(base):
    """Weights trained on ImageNet into the base of a vgg16 or a lite0. Raises ValueError."""
    if base.name == "vgg16":
        arrays = pretrained.vgg16_weights(base.input_shape[1:])
    else:
        arrays = pretrained.lite0_weights()
    arrays = iter(arrays)
    for layer in base.layers:
        layer.set_weights([next(arrays) for _ in layer.weights])


def freeze_base(network):
    """Leaves only the layers after the base to be trained.

    The thesis: "most layers are set as non-trainable". BatchNormalization in a frozen base keeps
    its statistics, and works with them while training too.
    """
    base_of(network).trainable = False
    compiled(network)


def has_frozen_base(network):
    last_of_base = ARCHS[network.name].features
    if last_of_base is None:
        return False
    return not network.get_layer(last_of_base).trainable


def on_features(network, images, progress=None):
    """The network that takes these images: of data.Features, only the layers after its base.

    Features that are of another base, or not there yet, are computed; progress is called as
    progress(done, total) then. The layers after the base are a model of their own, which shares its
    weights with `network`.
    """
    if not isinstance(images, data.Features):
        return network
    base = base_of(network)
    digest = hashlib.sha256(base.to_json().encode())
    for weight in base.weights:
        digest.update(np.asarray(weight).tobytes())
    images.update(
        digest.hexdigest(),
        base.output.shape[1:],
        lambda pictures: features(base, pictures, progress),
    )
    if images.head is None:
        images.head = head_of(network, base)
    return images.head


def head_of(network, base):
    """The layers after the base, as a compiled model: features (n, ...) -> (n, 1), P(healthy)."""
    from keras import Input, Model

    inputs = Input(base.output.shape[1:])
    x = inputs
    for layer in network.layers[len(base.layers) :]:
        x = layer(x)
    return compiled(Model(inputs, x, name=network.name))


def features(base, images, progress=None):
    """What the base makes of uint8 images (n, size, size, 3): float32 (n, ...)."""
    made = []
    done = 0
    for batch in data.evaluation_batches(images):
        made.append(base.predict_on_batch(batch))
        done += len(batch)
        if progress:
            progress(done, len(images))
    return np.concatenate(made)


# --- weight files ---------------------------------------------------------------------------------


def tensors(network):
    """The network's variables in the order of the weight file, frozen or not."""
    return [variable for _, variable in _named_tensors(network)]


def trainable(network):
    """Of each tensor whether it is trained (bool), as no moving statistic is."""
    return [variable.trainable for variable in tensors(network)]


def shapes(network):
    """[(layer name, shape)] of every tensor, in the order of the weight file."""
    return [(layer, tuple(variable.shape)) for layer, variable in _named_tensors(network)]


def _named_tensors(network):
    return [
        (layer.name, variable)
        for layer in network.layers
        for variable in layer.trainable_weights + layer.non_trainable_weights
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


def load(network, path, tensors=None):
    """Sets the network's weights from a file, after checking them.

    tensors  where they lie in it (weights.Tensor); None: the file is trusted, and HDF5 reads it
    Raises ValueError, with the path, where they are not this network's.
    """
    try:
        if tensors is None:
            tensors, _ = weights.contents_of(path)
        weights.check_shapes(tensors, shapes(network))
        numbers = weights.numbers(path, tensors)
        for (_, variable), values in zip(_named_tensors(network), numbers, strict=True):
            variable.assign(values)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


# --- training and evaluation ----------------------------------------------------------------------


def learning_rate(arch, round_number, frozen_base=False, first_rate=None):
    """Adam's learning rate in a round (counted from 1). The schedule's form is the thesis's.

    first_rate: of round 1; None: the network's own
    """
    schedule = ARCHS[arch]
    if first_rate is None and frozen_base:
        first_rate = schedule.frozen_first_rate
    if first_rate is None:
        first_rate = schedule.first_rate
    return first_rate / (1 + schedule.rate_decay * (round_number - 1))


def default_epochs(network):
    """Passes over the images in a round, where nobody says how many."""
    return ARCHS[network.name].frozen_epochs if has_frozen_base(network) else 1


def train(network, batches, round_number, epochs, report=print, progress=None, first_rate=None):
    """client_update of FedAvg: `epochs` passes over `batches` with a fresh Adam.

    report    called with a row (dict) after each epoch
    progress  called as progress(epoch, step, steps, loss) after each batch; step counts from 1
    first_rate  the learning rate of round 1; None: the network's own
    Returns the list of the rows.
    The compiled step and the input pipeline are kept from round to round, because building them
    takes seconds; Adam begins afresh all the same, by setting its variables to zero.
    """
    frozen_base = has_frozen_base(network)
    network = on_features(network, batches.images)
    for variable in network.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    rate = learning_rate(network.name, round_number, frozen_base, first_rate)
    network.optimizer.learning_rate = rate
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
    """P(healthy) of uint8 images (n, size, size, 3), or of data.Features: float64 (n,)."""
    network = on_features(network, images)
    answers = [network.predict_on_batch(batch)[:, 0] for batch in data.evaluation_batches(images)]
    return np.concatenate(answers).astype(np.float64)

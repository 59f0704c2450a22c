"""data.py: the index and its refusals, images, batches that follow from the seed."""

import errno
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_data
from PIL import Image

import data
import model

RECORD = {"picture": "1.png", "label": 2, "dir": "preprocessed/1.png", "new_label": "False"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_index_comes_back():
    records = [RECORD, {**RECORD, "label": 0, "new_label": "True"}]
    data.write_index("worker1.pkl", records)
    assert data.read_index("worker1.pkl") == records
    assert data.healthy(records).tolist() == [0, 1]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("value, name", [
    (Evil(), "posix.mkdir"), (np.arange(3), "numpy"), ({"dir": [print]}, "builtin.*print"),
])  # fmt: skip
def test_a_pickle_with_a_class_is_refused_by_its_name(value, name):
    for protocol in (2, 5):
        Path("worker1.pkl").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(ValueError, match=rf"worker1.pkl.*{name}.*only plain"):
            data.read_index("worker1.pkl")
    assert os.listdir() == ["worker1.pkl"]


def columns(**changes):
    return pickle.dumps({name: changes.get(name, [value]) for name, value in RECORD.items()})


@pytest.mark.parametrize("content, reason", [
    (pickle.dumps([1, 2]), "holds a list, expected a dict"),
    (b"\x80\x04junk", "not a readable pickle"),
    (b"Pelsewhere\n.", "not a readable pickle"),  # of an object outside of it
    (b"\x80\x04K\x01r\x40\x42\x0f\x00.", "made to cost memory .*LONG_BINPUT"),  # place 1,000,000
    (pickle.dumps({"dir": ["a"]}), "has no column 'picture'"),
    (columns(dir=[]), "different lengths"),
    (pickle.dumps({name: [] for name in RECORD}), "is empty"),
    (columns(label=["2"]), "'label' must be a list of int"),
    (columns(label=[7]), "label 7 .* is no grade"),
    (columns(new_label=["True"]), "contradicts"),
    (pickle.dumps({**{name: [value] for name, value in RECORD.items()}, "patient": [""]}),
     "an empty patient"),
    (columns(dir=["../secret.png"]), "leaves the project folder"),
    (columns(dir=["/etc/passwd"]), "leaves the project folder"),
])  # fmt: skip
def test_a_bad_index_gets_one_sentence_with_the_path(content, reason):
    Path("worker1.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"worker1.pkl.*{reason}") as refused:
        data.read_index("worker1.pkl")
    assert "\n" not in str(refused.value)


def test_what_is_missing_or_no_file_is_named():
    with pytest.raises(ValueError, match="index/worker1.pkl is missing: make it with"):
        data.read_index("index/worker1.pkl")
    os.mkfifo("worker1.pkl")  # who reads a pipe that nobody writes waits for ever
    with pytest.raises(ValueError, match="worker1.pkl is refused: it is no file"):
        data.read_index("worker1.pkl")
    with pytest.raises(ValueError, match="preprocessed/1.png"):
        data.load_images([RECORD], 32)


# --- images --------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.chdir(make_data(tmp_path / "site"))
    return data.read_index("index/worker1.pkl")


def test_images_too_large_for_memory_lie_in_a_file(records, monkeypatch):
    in_memory = data.load_images(records, 32)
    monkeypatch.setattr(data, "available_memory", lambda: 1000)
    on_disk = data.load_images(records, 32, Path("spilled.npy"))
    assert isinstance(on_disk, np.memmap) and np.array_equal(in_memory, on_disk)
    assert not Path("spilled.npy").exists()  # nothing stays behind


def test_a_disk_without_room_is_told_before_anything_is_mapped(tmp_path, monkeypatch):
    """A mapped page that finds no room later is SIGBUS, and an empty log."""
    asked = []

    def full(descriptor, first, count):
        asked.append((first, count))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "available_memory", lambda: 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=f"100 images of 64 x 64 .*{tmp_path}.*No space left"):
        data.room_for((100, 64, 64, 3), tmp_path / "spilled.npy")
    assert asked == [(0, 100 * 64 * 64 * 3)] and not list(tmp_path.iterdir())


# --- features ------------------------------------------------------------------------------------


def features(records, base="a base"):
    """(their features as a list, whether these had to be computed)"""
    made = data.Features(records, 32, Path("features.npz"))
    computed = []

    def compute(pictures):
        computed.append(True)
        whole = pictures[: len(pictures)]
        numbers = [whole.mean((1, 2, 3)), np.full(len(records), len(base))]
        return np.stack(numbers, axis=1).astype(np.float32)

    made.update(base, (2,), compute)
    assert made.dtype == np.float32 and made.shape == (len(made), 2) == (len(records), 2)
    return made[:].tolist(), bool(computed)


def test_features_are_kept_as_long_as_base_and_pictures_are_the_same(records):
    first = features(records)[0]
    assert features(records) == (first, False)
    assert features(records, "another base") == ([[mean, 12] for mean, _ in first], True)
    assert features(records[::-1], "another base")[1]
    assert features(records) == (first, True)
    Image.new("RGB", (32, 32), "white").save(records[0]["dir"])
    assert features(records) == ([[255, 6], *first[1:]], True)
    assert not list(Path().glob("old-*"))  # a file of before is ours
    Path(records[3]["dir"]).unlink()
    with pytest.raises(ValueError, match=f"{records[3]['dir']} is missing"):
        features(records)


def zip_bomb(path, good):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in good.items():
            with file.open(f"{name}.npy", "w") as member:
                np.save(member, array)
                member.write(bytes(10_000_000 if name == "features" else 0))


def other(**changes):
    return lambda path, good: np.savez(path, **good | changes)


SPOILT = {
    "text": lambda path, good: path.write_text("mine"),
    "a pipe": lambda path, good: os.mkfifo(path),
    "a pickle": other(features=np.array([Evil()])),
    "another's": lambda path, good: np.savez(path, features=good["features"]),
    "another shape": other(features=np.ones((8, 3), np.float32)),
    "other numbers": other(features=np.ones((8, 2))),
    "nan": other(features=np.full((8, 2), np.nan, np.float32)),
    "a long name": other(made_from=np.array("x" * 5000)),
    "zeros without end": zip_bomb,
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_no_file_of_features_is_moved_aside(records, spoil, capsys):
    first = features(records)[0]
    path = Path("features.npz")
    with np.load(path) as file:
        good = dict(file)
    path.unlink()
    SPOILT[spoil](path, good)
    assert features(records) == (first, True)
    assert "features.npz is no file of features" in capsys.readouterr().out
    assert os.listdir("old-1") == ["features.npz"] and not Path("pwned").exists()


# --- batches -------------------------------------------------------------------------------------


def test_a_transform_is_a_rotation_with_flips_about_the_centre():
    transforms = data.random_transforms(np.random.default_rng(0), 1000, 33)
    linear, moved = transforms[:, :, :2].astype(np.float64), transforms[:, :, 2]
    assert np.allclose(linear @ linear.transpose(0, 2, 1), np.eye(2), atol=1e-6)
    centre = np.full(2, 16.0)
    assert np.allclose(linear @ centre + moved, centre, atol=1e-4)
    determinants = np.linalg.det(linear)
    assert 0.4 < np.mean(determinants > 0) < 0.6  # one flip of two mirrors the image
    angles = np.arctan2(linear[:, 1, 0], linear[:, 0, 0])
    assert np.histogram(angles, 8, (-np.pi, np.pi))[0].min() > 80  # over 360 degrees


@pytest.fixture(scope="module")
def images():
    model.configure(0)
    return np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)


LABELS = np.arange(10, dtype=np.float32)


def epoch(batches, round_number, number):
    started = batches.start(round_number, number)
    return [(images.numpy(), labels.numpy()) for images, labels in started.dataset]


def test_an_epoch_follows_from_seed_client_round_and_epoch(images):
    made = set()
    choices = [(0, "a", 1, 1), (1, "a", 1, 1), (0, "b", 1, 1), (0, "a", 2, 1), (0, "a", 1, 2)]
    for seed, client, round_number, number in choices:
        batches = data.TrainingBatches(images, LABELS, 4, seed, client)
        once, again = epoch(batches, round_number, number), epoch(batches, round_number, number)
        fresh = epoch(data.TrainingBatches(images, LABELS, 4, seed, client), round_number, number)
        for other in (again, fresh):
            for (pixels, labels), (same, same_labels) in zip(once, other, strict=True):
                assert np.array_equal(pixels, same) and np.array_equal(labels, same_labels)
        assert [len(labels) for _, labels in once] == [4, 4, 2]  # the last, partial batch counts
        assert sorted(np.concatenate([labels for _, labels in once])) == list(range(10))
        first = once[0][0]  # augmented: float, and still 0 to 255
        assert first.dtype == np.float32 and first.min() >= 0 and 200 < first.max() <= 255
        made.add(first.tobytes())
    assert len(made) == len(choices)


@pytest.mark.parametrize("shape, expected", [
    ((70, 16, 16, 3), [32, 32, 6]), ((20, 448, 448, 3), [8, 8, 4]), ((2, 4000, 4000, 3), [1, 1]),
    ((40, 1280), [32, 8]),  # features
])  # fmt: skip
def test_so_many_images_at_once_as_memory_holds(shape, expected):
    images = np.broadcast_to(np.uint8(0), shape)
    assert [len(batch) for batch in data.evaluation_batches(images)] == expected


def test_resampling_is_what_tensorflow_s_own_projective_transform_gives(images):
    import tensorflow as tf

    transforms = data.random_transforms(np.random.default_rng(0), 10, 16)
    expected = tf.raw_ops.ImageProjectiveTransformV3(
        images=images.astype(np.float32),
        transforms=np.concatenate([transforms.reshape(10, 6), np.zeros((10, 2))], 1),
        output_shape=(16, 16),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )
    resampled = data.resample(tf.constant(images), tf.constant(transforms))
    assert np.allclose(resampled, expected, atol=0.01)  # of 255

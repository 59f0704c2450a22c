"""weights.py: the two forms on the wire, one layout for all files of a run, the average.

What a file from outside may do to us is pinned here without a process or a server: the bytes of an
upload (`fits`), and a list of tensors that lies about the file (`Layout`, `rewrite`, `numbers`).
"""

import base64
import errno

import h5py
import numpy as np
import pytest
from conftest import averaged, read_weights, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import SHAPES, random_tensors, write_weights

from common.files import sha256_of
from federation import weights
from federation.weights import Tensor
from generated import todo_pb2

NORM1 = "norm1/norm1/weight0"  # a tensor in the middle of a file of SHAPES


# --- the two forms on the wire -------------------------------------------------------------------


@pytest.fixture
def content(tmp_path):
    """Two and a half megabytes, which lie in file.h5."""
    content = np.random.default_rng(1).bytes(2_500_001)
    (tmp_path / "file.h5").write_bytes(content)
    return content


@pytest.mark.parametrize("size", [1, 2, 3, 74_999, 75_000, 75_001, 225_000, 300_001])
def test_base64_is_the_seeds_form_byte_for_byte(tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file.h5").write_bytes(content)
    name = "client001/client_weights.h5"
    text = base64.b64encode(content).decode()
    pieces = [text[first : first + 100_000] for first in range(0, len(text), 100_000)]
    expected = [
        todo_pb2.modelWeight(model=piece, clientname=name, clientsize=300) for piece in pieces
    ]
    assert list(weights.base64_messages(tmp_path / "file.h5", name, 300)) == expected


@pytest.mark.parametrize("name", ["client001", "c" * 30, "c" * 64])
def test_no_message_is_larger_than_the_seed_accepts(tmp_path, content, name):
    name = f"{name}/client_weights.h5"
    messages = list(weights.base64_messages(tmp_path / "file.h5", name, 2**31 - 1))
    assert max(message.ByteSize() for message in messages) <= 100_050
    weights.spool(messages, tmp_path / "back.h5", len(content))
    assert (tmp_path / "back.h5").read_bytes() == content


def test_blob_goes_in_pieces_of_a_mebibyte_behind_a_message_that_names_the_client(
    tmp_path, content
):
    messages = list(weights.blob_messages(tmp_path / "file.h5", "client001", 300))
    sizes = [len(message.blob) for message in messages]
    assert sizes == [0, 1 << 20, 1 << 20, len(content) - (2 << 20)]
    named = [(message.clientname, message.clientsize) for message in messages]
    assert named == [("client001", 300), *[("", 0)] * 3]
    digest = weights.spool(messages, tmp_path / "back.h5", len(content))
    assert (tmp_path / "back.h5").read_bytes() == content
    assert digest == sha256_of(tmp_path / "back.h5")


@settings(deadline=None)  # disks differ
@given(st.binary(min_size=1, max_size=200), st.lists(st.integers(1, 9), max_size=80))
def test_base64_cut_anywhere_is_joined(tmp_path_factory, content, cuts):
    back = tmp_path_factory.mktemp("cut") / "back.h5"
    text = base64.b64encode(content).decode()
    pieces = []
    for cut in cuts:
        pieces.append(text[:cut])
        text = text[cut:]
    messages = [todo_pb2.modelWeight(model=piece) for piece in [*pieces, text]]
    weights.spool(messages, back, 1000)
    assert back.read_bytes() == content


FIRST = {"blob": b"x", "clientname": "client001", "clientsize": 3}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"model": "QUJD"}, {"model": "Q!=="}], "not base64"),
        ([{"model": "QUI="}, {"model": "QUJD"}], "behind its end"),
        ([{"model": "QUJ"}], "left over"),
        ([{"model": "QU JD"}], "base64|left over"),
        ([{"model": ""}], "0 bytes"),
        ([], "0 bytes"),
        ([{"model": "QUJD" * 300}], "larger than"),
        ([{"blob": b"x" * 801}], "larger than"),
        ([FIRST, {"blob": b"x", "clientname": "client002"}], "goes on as 'client002'"),
        ([FIRST, {"blob": b"x", "clientsize": 4}], "with 4"),
        ([FIRST, {"model": "QUJD"}], "mixed"),
        ([{"model": "QUJD"}, {"blob": b"x"}], "mixed"),
    ],
)
def test_a_bad_stream_is_refused(tmp_path, messages, reason):
    messages = [todo_pb2.modelWeight(**message) for message in messages]
    with pytest.raises(ValueError, match=reason):
        weights.spool(messages, tmp_path / "back.h5", 800)


def test_later_messages_may_name_the_client_again_or_not(tmp_path):
    messages = [todo_pb2.modelWeight(**message) for message in (FIRST, {"blob": b"y"}, FIRST)]
    weights.spool(messages, tmp_path / "back.h5", 800)
    assert (tmp_path / "back.h5").read_bytes() == b"xyx"


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("file_name", ["/client_weights.h5", "/client_weights"])
def test_a_peer_of_2020_names_itself_by_a_path(prefix, file_name):
    assert weights.client_of(prefix + "client001" + file_name) == "client001"
    assert weights.client_of("client001") == "client001"


@pytest.mark.parametrize(
    "name",
    [
        *["", "../x", "/etc/passwd", "a b", "ä", ".hidden", "c" * 65, "c" * 10_000],
        *["client001\n", "client001\0", "client001/", "./client001", "client001/other.h5"],
        *["../client_weights", "./../client_weights", "././client001/client_weights"],
        *["a/b/client_weights.h5", "client001/client_weights/client_weights.h5"],
    ],
)
def test_no_other_name_is_taken_for_a_folder(name):
    with pytest.raises(ValueError, match="refused: expected"):
        weights.client_of(name)


# --- one layout ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(the server's own file, its layout)."""
    path = write_weights(tmp_path_factory.mktemp("own") / "server_weight.h5", 0)
    return path, weights.Layout(path)


def with_number(path, value, name=NORM1, position=1):
    """The file, with another number in one of its tensors."""
    with h5py.File(path, "r+") as file:
        file[name][position] = value
    return path


def test_a_layout_says_where_the_numbers_lie(own):
    path, layout = own
    content = path.read_bytes()
    assert layout.size == len(content) and layout.shapes == SHAPES
    for tensor, array in zip(layout.tensors, random_tensors(0), strict=True):
        assert content[tensor.begin : tensor.end] == array.tobytes()
    for begin, outside in layout.outside:
        assert content[begin : begin + len(outside)] == outside
    numbers = sum(tensor.end - tensor.begin for tensor in layout.tensors)
    assert numbers + sum(len(outside) for _, outside in layout.outside) == len(content)


def test_other_numbers_fit_and_every_byte_outside_them_counts(own, tmp_path):
    path, layout = own
    assert weights.fits(write_weights(tmp_path / "upload.h5", 9), layout)
    content = bytearray(path.read_bytes())
    for begin, outside in filter(lambda piece: piece[1], layout.outside):
        for position in {begin, begin + len(outside) // 2, begin + len(outside) - 1}:
            content[position] ^= 1
            (tmp_path / "upload.h5").write_bytes(content)
            assert not weights.fits(tmp_path / "upload.h5", layout), position
            content[position] ^= 1
    (tmp_path / "upload.h5").write_bytes(content)
    assert weights.fits(tmp_path / "upload.h5", layout)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slab", [1, 2, 5, weights.SLAB_ELEMENTS])
def test_a_number_that_is_not_finite_is_refused_by_its_layer(
    own, tmp_path, monkeypatch, value, slab
):
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", slab)
    for position in (0, 1):
        upload = with_number(write_weights(tmp_path / "bad.h5", 3), value, position=position)
        with pytest.raises(weights.NotFinite, match=f"layer 'norm1' holds {value}"):
            weights.fits(upload, own[1])


def test_a_short_file_is_cut_short_and_a_long_one_is_of_another_layout(own, tmp_path):
    path, layout = own
    content = path.read_bytes()
    for size in [*range(1, len(content), 997), len(content) - 1]:
        (tmp_path / "short.h5").write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"cut short: it has {size:,} of {len(content):,}"):
            weights.fits(tmp_path / "short.h5", layout)
    (tmp_path / "long.h5").write_bytes(content + b"\0")
    assert not weights.fits(tmp_path / "long.h5", layout)


def test_another_layout_is_told_from_a_bad_number(own, tmp_path):
    other = write_weights(tmp_path / "other.h5", 3, root="model_weights")
    with_number(other, np.nan, f"model_weights/{NORM1}")
    assert not weights.fits(other, own[1])


def test_an_upload_is_checked_without_hdf5(own, tmp_path, monkeypatch):
    upload = write_weights(tmp_path / "upload.h5", 3)
    monkeypatch.setattr(h5py, "File", None)
    assert weights.fits(upload, own[1])


@pytest.mark.parametrize("root", ["", "model_weights"])
def test_numbers_written_into_a_layout_are_the_file_that_keras_would_write(tmp_path, root):
    fetched = write_weights(tmp_path / "client_weights.h5", 0, root=root)
    digest = weights.write_tensors(fetched, weights.Layout(fetched), random_tensors(4))
    expected = write_weights(tmp_path / "expected.h5", 4, root=root)
    assert fetched.read_bytes() == expected.read_bytes()
    assert digest == sha256_of(fetched)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            [np.zeros(3, "f4"), *random_tensors(4)[1:]],
            r"'conv1' has shape \(3,\), .*\(3, 3, 3, 2\)",
        ),
        (random_tensors(4)[1:], "shorter"),
        ([*random_tensors(4)[:3], np.float32([np.nan])], "layer 'healthy' holds nan"),
    ],
)
def test_what_cannot_be_written_leaves_the_file(own, tmp_path, arrays, reason):
    fetched = write_weights(tmp_path / "client_weights.h5", 0)
    before = fetched.read_bytes()
    with pytest.raises(ValueError, match=reason):
        weights.write_tensors(fetched, own[1], arrays)
    assert fetched.read_bytes() == before and list(tmp_path.iterdir()) == [fetched]


def chunked(file):
    del file[NORM1]
    file.create_dataset(NORM1, data=np.zeros(2, "f4"), chunks=(1,))


def with_two_names_for_one_tensor(file):
    del file["healthy/healthy/weight0"], file[NORM1]
    file[NORM1] = file.create_dataset("healthy/healthy/weight0", data=np.zeros((2, 1), "f4"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(chunked, "'norm1' .*stored chunked"), (with_two_names_for_one_tensor, "shares its bytes")],
)
def test_a_file_without_plain_tensors_has_no_layout(tmp_path, change, reason):
    path = write_weights(tmp_path / "own.h5", 0)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=f"own.h5 cannot be used: layer {reason}|{reason}"):
        weights.Layout(path)


def test_tensors_are_compared_with_the_model_by_number_and_shape(own):
    tensors, shapes = own[1].tensors, own[1].shapes
    weights.check_shapes(tensors, [(f"model_2_{layer}", shape) for layer, shape in shapes])
    with pytest.raises(ValueError, match=r"'conv1' \(here 'mine'\) .*expected \(9,\)"):
        weights.check_shapes(tensors, [("mine", (9,)), *shapes[1:]])
    with pytest.raises(ValueError, match="4 tensors, the model 3"):
        weights.check_shapes(tensors, shapes[1:])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM])
def test_a_fault_of_the_machine_is_never_one_of_the_file(own, monkeypatch, number):
    def fail(*arguments, **options):
        raise OSError(number, "a fault of the test")

    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(OSError, match="a fault of the test"):
        weights.Layout(own[0])


# --- lists of tensors that lie -------------------------------------------------------------------


def lying(**changes):
    """A list of tensors like that of a good file, the third of which is said to be otherwise."""

    def lie(tensors):
        return [*tensors[:2], tensors[2]._replace(**changes), tensors[3]]

    return lie


HUGE = 1 << 62
LIES = {
    "beyond the end of the file": lying(begin=1 << 40, end=(1 << 40) + 8),
    "over the end of the file": lambda tensors: [
        tensor._replace(begin=tensor.begin + 100_000, end=tensor.end + 100_000)
        for tensor in tensors
    ],
    "an offset that is no file offset": lying(begin=(1 << 64) - 16, end=(1 << 64) - 8),
    "a negative offset": lying(begin=-8, end=0),
    "an end before the beginning": lying(begin=100, end=50),
    "a negative shape": lying(shape=(-2, 1)),
    "a shape of more numbers than there are": lying(shape=(HUGE, HUGE)),
    "a shape of other numbers": lying(shape=(2, 1, 3)),
    "no shape": lying(shape=()),
    "a size of nothing": lying(shape=(0, 1), end=0, begin=0),
    "fewer": lambda tensors: tensors[1:],
    "each twice": lambda tensors: [*tensors, *tensors],
    "none": lambda tensors: [],
}
CONSISTENT = ("a size of nothing", "fewer", "none")  # nothing in these is impossible


@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_lies_puts_nothing_into_our_layout(own, tmp_path, lie):
    """ValueError, and the file is as it was: never another exception, nor a file of ours."""
    upload = write_weights(tmp_path / "upload.h5", 7, root="model_weights")
    before = upload.read_bytes()
    tensors = LIES[lie](weights.tensors_of(upload))
    with pytest.raises(ValueError):
        weights.rewrite(upload, tensors, own[1])
    assert upload.read_bytes() == before and list(tmp_path.iterdir()) == [upload]


# What is left is a list of other tensors, which a model of other shapes refuses.
@pytest.mark.parametrize("lie", [lie for lie in LIES if lie not in CONSISTENT])
def test_a_list_that_lies_is_no_layout(tmp_path, lie):
    fetched = write_weights(tmp_path / "fetched.h5", 7)
    with pytest.raises(ValueError, match="fetched.h5 cannot be used"):
        weights.Layout(fetched, LIES[lie](weights.tensors_of(fetched)))


def test_numbers_stop_at_the_end_of_the_file(own):
    path, layout = own
    beyond = Tensor("layer", (2,), layout.size - 4, layout.size + 4)
    with pytest.raises(ValueError, match="cut short"):
        list(weights.numbers(path, [beyond]))


# --- FedAvg --------------------------------------------------------------------------------------


def fedavg(paths, num_examples, target, layout=None, trainable=None):
    """weights.fedavg of files as long as the first, onto what `target` is, or zeros."""
    layout = layout or weights.Layout(paths[0])
    if not target.exists():
        weights.write_tensors(target, layout, [np.zeros(shape, "f4") for _, shape in layout.shapes])
    trainable = trainable or [True] * len(layout.tensors)
    return weights.fedavg(paths, num_examples, layout, target, trainable)


def test_fedavg_by_hand(tmp_path):
    shapes = [("dense", (2,)), ("dense", ())]
    a = write_weights(tmp_path / "a.h5", [np.float32([1, 2]), np.float32(0)], shapes)
    b = write_weights(tmp_path / "b.h5", [np.float32([5, 10]), np.float32(4)], shapes)
    digest, products = fedavg([a, b], [1, 3], tmp_path / "merged.h5")
    merged = read_weights(tmp_path / "merged.h5")
    assert merged[0].tolist() == [4, 8] and merged[1] == 3
    assert digest == sha256_of(tmp_path / "merged.h5")
    assert products.tolist() == [[1 + 4, 5 + 20], [5 + 20, 25 + 100 + 16]]


@settings(deadline=None)  # disks differ
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=5))
def test_fedavg_is_the_formula_in_float64_cast_once(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("fedavg")
    uploads = [(f"client{k}", n, random_tensors(k)) for k, n in enumerate(sizes)]
    for _, _, tensors in uploads:
        tensors[0].reshape(-1)[:2] = [-0.0, 0.0]  # the sign of zero, too, is the formula's
    paths = [write_weights(folder / f"{name}.h5", tensors) for name, _, tensors in uploads]
    fedavg(paths, sizes, folder / "merged.h5")
    assert same_bits(read_weights(folder / "merged.h5"), averaged(uploads))


def test_fedavg_in_slabs_is_fedavg_at_once_and_opens_no_hdf5(tmp_path, monkeypatch):
    paths = [write_weights(tmp_path / f"{k}.h5", k) for k in range(3)]
    layout = weights.Layout(paths[0])
    monkeypatch.setattr(h5py, "File", None)
    _, at_once = fedavg(paths, [1, 2, 3], tmp_path / "once.h5", layout)
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", 5)
    _, in_slabs = fedavg(paths, [1, 2, 3], tmp_path / "slabs.h5", layout)
    assert (tmp_path / "once.h5").read_bytes() == (tmp_path / "slabs.h5").read_bytes()
    assert np.allclose(at_once, in_slabs)


@pytest.mark.parametrize(("size", "failure"), [(None, OSError), (-1, ValueError)])
def test_a_merge_that_fails_leaves_the_old_file(tmp_path, size, failure):
    """An upload is gone, or shorter than it was when it was checked."""
    paths = [write_weights(tmp_path / "a.h5", 1), tmp_path / "b.h5"]
    target = write_weights(tmp_path / "target.h5", 2)
    before, layout = target.read_bytes(), weights.Layout(target)
    if size is not None:
        end = max(tensor.end for tensor in layout.tensors)
        paths[1].write_bytes(paths[0].read_bytes()[: end + size])
    with pytest.raises(failure):
        fedavg(paths, [1, 1], target, layout)
    assert target.read_bytes() == before


# --- whose update pulls where --------------------------------------------------------------------


def compared(folder, updates, sizes, trainable=None):
    """[(length, cosine)] of clients whose files differ from what they fetched by these numbers."""
    fetched = write_weights(folder / "server_weight.h5", 9)
    layout, start = weights.Layout(fetched), read_weights(fetched)
    paths = [folder / f"{number}.h5" for number in range(len(updates))]
    for path, update in zip(paths, updates, strict=True):
        weights.write_tensors(path, layout, [a + b for a, b in zip(start, update, strict=True)])
    _, products = fedavg(paths, sizes, fetched, layout, trainable)
    found = weights.compare_updates(products, sizes)
    return [(each["update_length"], each["update_cosine"]) for each in found]


def scaled(factor, tensors):
    return [np.float32(factor) * tensor for tensor in tensors]


def test_updates_are_compared_by_length_and_with_the_others_as_the_formula_says(tmp_path):
    updates, sizes = [random_tensors(seed) for seed in range(4)], [10, 40, 90, 160]
    trainable = [True, False, True, True]
    found = compared(tmp_path, updates, sizes, trainable)
    rows = [
        np.concatenate(
            [tensor.ravel() for tensor, is_one in zip(each, trainable, strict=True) if is_one]
        )
        for each in updates
    ]
    units = [row / np.linalg.norm(row) for row in rows]
    lengths = [np.linalg.norm(row) / np.sqrt(n) for row, n in zip(rows, sizes, strict=True)]
    for number, (length, cosine) in enumerate(found):
        others = np.mean([unit for each, unit in enumerate(units) if each != number], axis=0)
        expected = units[number] @ others / np.linalg.norm(others)
        assert cosine == pytest.approx(expected, abs=1e-5)
        assert length == pytest.approx(lengths[number] / sorted(lengths)[1], rel=1e-5)


SAME = random_tensors(1)
LONGEST = weights.LONGEST / np.sqrt(sum(np.sum(tensor**2) for tensor in SAME))


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([SAME], [(1, None)]),  # nobody to compare it with
        ([SAME, scaled(1000, SAME)], [(1, 1), (1000, 1)]),
        ([SAME, SAME, scaled(-1, SAME)], [(1, None), (1, None), (1, -1)]),  # 0 has no direction
        ([SAME, SAME, scaled(0, SAME)], [(1, 1), (1, 1), (0, None)]),
        ([scaled(0, SAME)] * 2, [(0, None)] * 2),
        ([SAME, SAME, scaled(1e30, SAME)], [(1, 1), (1, 1), (LONGEST, None)]),
    ],
)
def test_one_without_a_direction_or_a_bound_leaves_the_others_compared(tmp_path, updates, expected):
    found = compared(tmp_path, updates, [1] * len(updates))
    for (length, cosine), (expected_length, expected_cosine) in zip(found, expected, strict=True):
        assert length == pytest.approx(expected_length, rel=1e-4)
        assert cosine == (expected_cosine and pytest.approx(expected_cosine, abs=1e-4))

"""weights.py: the two forms on the wire, one layout for all files of a run, the average.

What a file from outside may do to us is pinned here without a process or a server: the bytes of an
upload (`fits`), and a list of tensors that lies about the file (`Layout`, `rewrite`).
"""

import base64
import errno
import tracemalloc

import h5py
import numpy as np
import pytest
from conftest import averaged, fail_with, read_weights, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import random_tensors, write_weights

from common.files import sha256_of
from federation import weights
from generated import todo_pb2

# --- the two forms on the wire -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 75_000, 225_001])
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


def test_a_long_name_makes_no_message_larger_than_the_seed_accepts(tmp_path):
    (tmp_path / "file.h5").write_bytes(bytes(250_000))
    name = "c" * 64 + "/client_weights.h5"
    messages = list(weights.base64_messages(tmp_path / "file.h5", name, 2**31 - 1))
    assert max(message.ByteSize() for message in messages) <= 100_050
    weights.spool(messages, tmp_path / "back.h5", 250_000)
    assert (tmp_path / "back.h5").read_bytes() == bytes(250_000)


def test_blob_goes_in_pieces_of_a_mebibyte_behind_a_message_that_names_the_client(tmp_path):
    content = np.random.default_rng(1).bytes(2_500_001)
    (tmp_path / "file.h5").write_bytes(content)
    messages = list(weights.blob_messages(tmp_path / "file.h5", "client001", 300))
    sizes = [len(message.blob) for message in messages]
    assert sizes == [0, 1 << 20, 1 << 20, len(content) - (2 << 20)]
    assert (messages[0].clientname, messages[0].clientsize) == ("client001", 300)
    digest = weights.spool(messages, tmp_path / "back.h5", len(content))
    assert (tmp_path / "back.h5").read_bytes() == content
    assert digest == sha256_of(tmp_path / "back.h5")


FIRST = {"blob": b"x", "clientname": "client001", "clientsize": 3}


@settings(deadline=None)  # disks differ
@given(st.binary(min_size=1, max_size=200), st.lists(st.integers(1, 9), max_size=80))
def test_base64_cut_anywhere_is_joined(tmp_path_factory, content, cuts):
    """A later message may name the client again or not."""
    back = tmp_path_factory.mktemp("cut") / "back.h5"
    text = base64.b64encode(content).decode()
    messages = [todo_pb2.modelWeight(clientname="client001", clientsize=3)]
    for cut in [*cuts, len(text)]:
        messages.append(todo_pb2.modelWeight(model=text[:cut]))
        text = text[cut:]
    messages.append(messages[0])
    weights.spool(messages, back, 1000)
    assert back.read_bytes() == content


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"model": "QU!JD==="}], "not base64"),
        ([{"model": "QUI="}, {"model": "QUJD"}], "behind its end"),
        ([{"model": "QUJ"}], "left over"),
        ([{"model": ""}], "0 bytes"),
        ([{"blob": b"x" * 400}, {"blob": b"x" * 401}], "larger than"),
        ([FIRST, {"blob": b"x", "clientname": "client002"}], "goes on as 'client002'"),
        ([FIRST, {"blob": b"x", "clientsize": 4}], "with 4"),
        ([FIRST, {"model": "QUJD"}], "mixed"),
    ],
)
def test_a_bad_stream_is_refused(tmp_path, messages, reason):
    messages = [todo_pb2.modelWeight(**message) for message in messages]
    with pytest.raises(ValueError, match=reason):
        weights.spool(messages, tmp_path / "back.h5", 800)


@pytest.mark.parametrize(
    "name", ["client001", "client001/client_weights", "./client001/client_weights.h5"]
)
def test_a_peer_of_2020_names_itself_by_a_path(name):
    assert weights.client_of(name) == "client001"


@pytest.mark.parametrize(
    "name",
    [
        *["", "../x", "/etc/passwd", "a b", "ä", ".hidden", "c" * 65, "client001\n", "client001/"],
        *["./client001", "client001/other.h5", "../client_weights", "a/b/client_weights.h5"],
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


def test_other_numbers_fit_and_every_byte_outside_them_counts(own, tmp_path):
    layout, upload = own[1], write_weights(tmp_path / "upload.h5", 9)
    assert weights.fits(upload, layout)
    content = bytearray(upload.read_bytes())
    for begin, outside in filter(lambda piece: piece[1], layout.outside):
        for position in {begin, begin + len(outside) // 2, begin + len(outside) - 1}:
            content[position] ^= 1
            upload.write_bytes(content)
            assert not weights.fits(upload, layout), position
            content[position] ^= 1
    upload.write_bytes(content + b"\0")
    assert not weights.fits(upload, layout)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slab", [1, weights.SLAB_ELEMENTS])
def test_a_number_that_is_not_finite_is_refused_by_its_layer(
    own, tmp_path, monkeypatch, value, slab
):
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", slab)
    tensors = random_tensors(3)
    tensors[1][1] = value
    with pytest.raises(weights.NotFinite, match=f"layer 'norm1' holds {value}"):
        weights.fits(write_weights(tmp_path / "bad.h5", tensors), own[1])


def test_a_file_that_ends_early_is_cut_short(own, tmp_path):
    content = own[0].read_bytes()
    for size in (1, len(content) // 2, len(content) - 1):
        (tmp_path / "short.h5").write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"cut short: it has {size:,} of {len(content):,}"):
            weights.fits(tmp_path / "short.h5", own[1])


@pytest.mark.parametrize("root", ["", "model_weights"])
def test_numbers_written_into_a_layout_are_the_file_that_keras_would_write(tmp_path, root):
    fetched = write_weights(tmp_path / "client_weights.h5", 0, root=root)
    digest = weights.write_tensors(fetched, weights.Layout(fetched), random_tensors(4))
    expected = write_weights(tmp_path / "expected.h5", 4, root=root)
    assert fetched.read_bytes() == expected.read_bytes()
    assert digest == sha256_of(fetched)


def test_what_cannot_be_written_leaves_the_file(own, tmp_path):
    fetched = write_weights(tmp_path / "client_weights.h5", 0)
    before = fetched.read_bytes()
    with pytest.raises(ValueError, match="layer 'healthy' holds nan"):
        weights.write_tensors(fetched, own[1], [*random_tensors(4)[:3], np.float32([np.nan])])
    assert fetched.read_bytes() == before and list(tmp_path.iterdir()) == [fetched]


def test_a_fault_of_the_machine_is_never_one_of_the_file(own, monkeypatch):
    error = OSError(errno.EMFILE, "a fault of the test")
    monkeypatch.setattr(h5py, "File", fail_with(error))
    with pytest.raises(OSError, match="a fault of the test"):
        weights.Layout(own[0])


# --- lists of tensors that lie -------------------------------------------------------------------


def test_a_list_that_lies_is_no_layout_and_puts_nothing_into_ours(own, tmp_path):
    """ValueError, and the file is as it was: never another exception, nor a file of ours."""
    upload = write_weights(tmp_path / "upload.h5", 7, root="model_weights")
    before, tensors = upload.read_bytes(), weights.Layout(upload).tensors
    lies = [
        {"begin": 1 << 40, "end": (1 << 40) + 8},
        {"begin": len(before) - 4, "end": len(before) + 4},
        {"begin": -8, "end": 0},
        {"shape": (-2, -1)},
        {"shape": (1 << 62, 1 << 62)},
        {"shape": (2, 0.5, 2)},
    ]
    for lie in lies:
        lying = [*tensors[:2], tensors[2]._replace(**lie), tensors[3]]
        for use in (weights.Layout, lambda *it: weights.rewrite(*it, own[1])):
            with pytest.raises(ValueError):
                use(upload, lying)
    assert upload.read_bytes() == before and list(tmp_path.iterdir()) == [upload]


def test_tensors_that_share_bytes_or_lie_in_much_else_are_no_layout(own, monkeypatch):
    path, layout = own
    with pytest.raises(ValueError, match="own.*'conv1' shares its bytes"):
        weights.Layout(path, [layout.tensors[0], *layout.tensors])
    monkeypatch.setattr(weights, "MOST_OUTSIDE_BYTES", 100)
    with pytest.raises(ValueError, match="of its bytes are no weights, expected at most 100"):
        weights.Layout(path)


# --- FedAvg --------------------------------------------------------------------------------------


def fedavg(paths, num_examples, target, layout, trainable=None):
    """weights.fedavg onto what `target` is, or zeros."""
    if not target.exists():
        weights.write_tensors(target, layout, [np.zeros(shape, "f4") for _, shape in layout.shapes])
    trainable = trainable or [True] * len(layout.tensors)
    return weights.fedavg(paths, num_examples, layout, target, trainable)


@settings(deadline=None, max_examples=30)  # disks differ
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=5), st.sampled_from([5, 1 << 16]))
def test_fedavg_is_the_formula_in_float64_cast_once(tmp_path_factory, sizes, slab):
    folder = tmp_path_factory.mktemp("fedavg")
    uploads = [(f"client{k}", n, random_tensors(k)) for k, n in enumerate(sizes)]
    for _, _, tensors in uploads:
        tensors[0].reshape(-1)[:2] = [-0.0, 0.0]  # the sign of zero, too, is the formula's
    paths = [write_weights(folder / f"{name}.h5", tensors) for name, _, tensors in uploads]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SLAB_ELEMENTS", slab)
        digest, _ = fedavg(paths, sizes, folder / "merged.h5", weights.Layout(paths[0]))
    assert digest == sha256_of(folder / "merged.h5")
    assert same_bits(read_weights(folder / "merged.h5"), averaged(uploads))


def test_a_merge_that_fails_leaves_the_old_file(tmp_path):
    """An upload is shorter than it was when it was checked."""
    path, target = (write_weights(tmp_path / name, 1) for name in ("a.h5", "target.h5"))
    before, layout = target.read_bytes(), weights.Layout(target)
    end = max(tensor.end for tensor in layout.tensors)
    path.write_bytes(before[: end - 1])
    with pytest.raises(ValueError, match="ends in the middle"):
        fedavg([path], [1], target, layout)
    assert target.read_bytes() == before


def test_memory_does_not_follow_the_size_of_the_model(tmp_path):
    shapes = [("dense", (5_000_000,))]  # 20 MB
    own, upload, other = (tmp_path / name for name in ("own.h5", "upload.h5", "other.h5"))
    for path, root in ((own, ""), (upload, ""), (other, "model_weights")):
        write_weights(path, [np.ones(5_000_000, "f4")], shapes, root)
    layout, tensors = weights.Layout(own), weights.Layout(other).tensors
    tracemalloc.start()
    weights.spool(weights.blob_messages(upload, "client001", 3), tmp_path / "sent.h5", 30_000_000)
    assert weights.fits(upload, layout)
    weights.rewrite(other, tensors, layout)
    fedavg([upload, other], [1, 2], own, layout)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4_000_000


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


def test_updates_are_compared_by_length_and_with_the_others_as_the_formula_says(
    tmp_path, monkeypatch
):
    """Of the trainable tensors, in slabs."""
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", 5)
    updates, sizes = [random_tensors(seed) for seed in range(4)], [10, 40, 90, 160]
    found = compared(tmp_path, updates, sizes, [True, False, True, True])
    rows = [np.concatenate([each[number].ravel() for number in (0, 2, 3)]) for each in updates]
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
        ([SAME, scaled(1000, SAME)], [(1, 1), (1000, 1)]),
        ([SAME, SAME, scaled(-1, SAME)], [(1, None), (1, None), (1, -1)]),  # 0 has no direction
        ([SAME, SAME, scaled(0, SAME)], [(1, 1), (1, 1), (0, None)]),
        ([scaled(0, SAME)], [(0, None)]),
        ([SAME, SAME, scaled(1e30, SAME)], [(1, 1), (1, 1), (LONGEST, None)]),
    ],
)
def test_one_without_a_direction_or_a_bound_leaves_the_others_compared(tmp_path, updates, expected):
    found = compared(tmp_path, updates, [1] * len(updates))
    for (length, cosine), (expected_length, expected_cosine) in zip(found, expected, strict=True):
        assert length == pytest.approx(expected_length, rel=1e-4)
        assert cosine == (expected_cosine and pytest.approx(expected_cosine, abs=1e-4))

"""weights.py: the codec in both forms, the checks, FedAvg by hand."""

import base64
import math

import h5py
import numpy as np
import pytest
from conftest import averaged, random_tensors, read_weights, same_bits, write_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import SHAPES

from common.files import sha256_of
from federation import weights
from generated import todo_pb2


def seed_messages(content, name, size):
    """As the thesis demo cuts: one base64 text in pieces of 100,000 characters."""
    text = base64.b64encode(content).decode()
    return [
        todo_pb2.modelWeight(
            model=text[i * 100_000 : (i + 1) * 100_000], clientname=name, clientsize=size
        )
        for i in range(math.ceil(len(text) / 100_000))
    ]


@pytest.fixture
def content(tmp_path):
    data = np.random.default_rng(1).bytes(2_500_001)
    (tmp_path / "file.h5").write_bytes(data)
    return data


@pytest.mark.parametrize("size", [1, 2, 3, 74_999, 75_000, 75_001, 225_000, 300_001])
def test_base64_is_the_seeds_form_byte_for_byte(tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    ours = list(weights.base64_messages(tmp_path / "file", "client001/client_weights.h5", 300))
    assert ours == seed_messages(data, "client001/client_weights.h5", 300)


def test_no_message_is_larger_than_the_seed_accepts(tmp_path, content):
    for name in ("client001", "c" * 30, "c" * 64):
        messages = list(
            weights.base64_messages(tmp_path / "file.h5", f"{name}/client_weights.h5", 2**31 - 1)
        )
        assert max(message.ByteSize() for message in messages) <= 100_050
        assert (
            max(message.ByteSize() - len(message.model) for message in messages) - 4 < 46
            or name != "client001"
        )
        weights.spool(messages, tmp_path / "back.h5", 3_000_000)
        assert (tmp_path / "back.h5").read_bytes() == content


def test_blob_goes_in_pieces_of_a_mebibyte_and_names_the_client_once(tmp_path, content):
    messages = list(weights.blob_messages(tmp_path / "file.h5", "client001", 300))
    assert [len(message.blob) for message in messages] == [
        0,
        1 << 20,
        1 << 20,
        len(content) - (2 << 20),
    ]
    assert [(message.clientname, message.clientsize) for message in messages] == [
        ("client001", 300),
        *[("", 0)] * 3,
    ]
    weights.spool(messages, tmp_path / "back.h5", len(content))
    assert (tmp_path / "back.h5").read_bytes() == content


@settings(deadline=None)  # disks differ
@given(st.binary(min_size=1, max_size=200), st.lists(st.integers(1, 9), max_size=80))
def test_base64_cut_anywhere_is_joined(tmp_path_factory, data, cuts):
    folder = tmp_path_factory.mktemp("cut")
    text, pieces = base64.b64encode(data).decode(), []
    for cut in cuts:
        pieces.append(text[:cut])
        text = text[cut:]
    weights.spool(
        [todo_pb2.modelWeight(model=piece) for piece in [*pieces, text]], folder / "back", 1000
    )
    assert (folder / "back").read_bytes() == data


@pytest.mark.parametrize(
    "pieces, reason",
    [
        (["QUJD", "Q!=="], "not base64"),
        (["QUI=", "QUJD"], "goes on behind its end"),
        (["QUJ"], "left over"),
        (["QU JD"], "base64|left over"),
        ([""], "0 bytes"),
        ([], "0 bytes"),
        (["QUJD" * 300], "larger than"),
    ],
)
def test_bad_text_is_refused(tmp_path, pieces, reason):
    with pytest.raises(ValueError, match=reason):
        weights.spool(
            [todo_pb2.modelWeight(model=piece) for piece in pieces], tmp_path / "back", 800
        )


def test_a_stream_is_of_one_client_and_one_form(tmp_path):
    def spool(*messages):
        weights.spool(
            [todo_pb2.modelWeight(**message) for message in messages], tmp_path / "back", 800
        )

    first = {"blob": b"x", "clientname": "client001", "clientsize": 3}
    with pytest.raises(ValueError, match="goes on as 'client002'"):
        spool(first, {"blob": b"x", "clientname": "client002"})
    with pytest.raises(ValueError, match="with 4"):
        spool(first, {"blob": b"x", "clientsize": 4})
    with pytest.raises(ValueError, match="mixed"):
        spool(first, {"model": "QUJD"})
    with pytest.raises(ValueError, match="mixed"):
        spool({"model": "QUJD"}, {"blob": b"x"})
    spool(first, {"blob": b"y"}, first)
    assert (tmp_path / "back").read_bytes() == b"xyx"


def test_names():
    for good in (
        "client001",
        "client001/client_weights.h5",  # as the thesis's code has it, and its text:
        "client001/client_weights",
        "./client001/client_weights.h5",
        "./client001/client_weights",
    ):
        assert weights.client_of(good) == "client001"
    for bad in (
        "./client001",
        "././client001/client_weights",
        "../client_weights",
        "./../client_weights",
        "client001/client_weights/client_weights.h5",
        "",
        "../x",
        "/etc/passwd",
        "client001/other.h5",
        "a/b/client_weights.h5",
        "client001/",
        "a b",
        "ä",
        ".hidden",
        "client001\n",
        "c" * 65,
        "c" * 10_000,
        "client001\0",
    ):
        with pytest.raises(ValueError, match="refused: expected"):
            weights.client_of(bad)


# --- one layout -----------------------------------------------------------------------------------


def inspected(layout, content, cuts=()):
    """An Inspection that has seen these bytes, cut at these positions."""
    inspection = weights.Inspection(layout)
    for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        inspection.look(content[begin:end])
    return inspection


def with_number(path, value, name="norm1/norm1/weight0", position=1):
    """The file's bytes, with another number in one of its tensors."""
    with h5py.File(path, "r+") as file:
        file[name][position] = value
    return path.read_bytes()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The server's own file and its layout."""
    path = write_weights(tmp_path_factory.mktemp("own") / "server_weight.h5", 0)
    return path, weights.Layout(path)


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


@settings(deadline=None)  # disks differ
@given(st.integers(0, 9), st.lists(st.integers(0, 15_000), max_size=40))
def test_a_file_of_this_layout_fits_wherever_its_pieces_end(own, tmp_path_factory, seed, cuts):
    upload = write_weights(tmp_path_factory.mktemp("fits") / "upload.h5", seed)
    content = upload.read_bytes()
    cuts = sorted(cut for cut in cuts if cut < len(content))
    assert inspected(own[1], content, cuts).fits() is True
    assert weights.inspect(upload, own[1]) == (sha256_of(upload), True)


def test_every_byte_outside_the_tensors_counts(own):
    path, layout = own
    inside = set()
    for tensor in layout.tensors:
        inside.update(range(tensor.begin, tensor.end))
    for position in range(layout.size):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        assert inspected(layout, bytes(content)).fits() is (position in inside)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 8192, 1 << 20])
def test_a_number_that_is_not_finite_is_found_though_a_piece_ends_in_it(own, tmp_path, value, step):
    content = with_number(write_weights(tmp_path / "bad.h5", 3), value)
    inspection = inspected(own[1], content, range(step, len(content), step))
    with pytest.raises(ValueError, match=f"layer 'norm1' holds {value}: only finite numbers"):
        inspection.fits()


def test_the_first_layer_with_such_a_number_is_named(own, tmp_path):
    path = write_weights(tmp_path / "bad.h5", 3)
    with_number(path, np.nan, "healthy/healthy/weight1", 0)
    content = with_number(path, np.inf)
    with pytest.raises(ValueError, match="layer 'norm1' holds inf"):
        inspected(own[1], content, range(1, len(content), 999)).fits()


def test_a_short_file_is_cut_short_and_a_long_one_is_of_another_layout(own):
    path, layout = own
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        with pytest.raises(ValueError, match=f"cut short: it has {size:,} of {len(content):,}"):
            inspected(layout, content[:size]).fits()
    assert inspected(layout, content + b"\0").fits() is False


def test_another_layout_is_told_from_a_bad_number(own, tmp_path):
    other = write_weights(tmp_path / "other.h5", 3, root="model_weights")
    content = with_number(other, np.nan, "model_weights/norm1/norm1/weight0")
    assert inspected(own[1], content).fits() is False


def test_tensors_are_written_into_the_file_that_was_fetched(own, tmp_path):
    for root in ("", "model_weights"):
        fetched = write_weights(tmp_path / "client_weights.h5", 0, root=root)
        digest = weights.write_tensors(fetched, random_tensors(4))
        assert digest == sha256_of(fetched)
        expected = write_weights(tmp_path / "expected.h5", 4, root=root)
        assert fetched.read_bytes() == expected.read_bytes()


def test_tensors_of_other_shapes_are_not_written(own, tmp_path):
    fetched = write_weights(tmp_path / "client_weights.h5", 0)
    before = fetched.read_bytes()
    with pytest.raises(ValueError, match=r"'conv1' has shape \(3,\), .* has \(3, 3, 3, 2\)"):
        weights.write_tensors(fetched, [np.zeros(3, "f4"), *random_tensors(4)[1:]])
    with pytest.raises(ValueError):
        weights.write_tensors(fetched, random_tensors(4)[1:])
    assert fetched.read_bytes() == before and list(tmp_path.iterdir()) == [fetched]


def test_numbers_that_are_not_finite_are_not_written(own, tmp_path):
    fetched = write_weights(tmp_path / "client_weights.h5", 0)
    before, tensors = fetched.read_bytes(), random_tensors(4)
    tensors[1][1] = np.nan
    with pytest.raises(ValueError, match="layer 'norm1' holds nan"):
        weights.write_tensors(fetched, tensors)
    assert fetched.read_bytes() == before and list(tmp_path.iterdir()) == [fetched]


def test_a_layout_without_plain_tensors_is_refused(tmp_path):
    path = write_weights(tmp_path / "own.h5", 0)
    with h5py.File(path, "r+") as file:
        del file["norm1/norm1/weight0"]
        file["norm1"].create_dataset("norm1/weight0", data=np.zeros(2, "f4"), chunks=(1,))
    with pytest.raises(ValueError, match="own.h5 cannot be used: layer 'norm1' .*stored chunked"):
        weights.Layout(path)
    with h5py.File(path, "r+") as file:
        del file["norm1/norm1/weight0"]
        file["norm1"].create_dataset("norm1/weight0", data=np.zeros((2, 1), "f4"))
        del file["healthy/healthy/weight0"]
        file["healthy/healthy/weight0"] = file["norm1/norm1/weight0"]  # a second name for it
    with pytest.raises(ValueError, match="two tensors share the same bytes"):
        weights.Layout(path)
    with pytest.raises(ValueError, match="there is no such file"):
        weights.Layout(tmp_path / "none.h5")


# --- FedAvg ---------------------------------------------------------------------------------------


def test_fedavg_by_hand(tmp_path):
    shapes = [("dense", (2,)), ("dense", ())]
    a = write_weights(tmp_path / "a.h5", [np.float32([1, 2]), np.float32(0)], shapes)
    b = write_weights(tmp_path / "b.h5", [np.float32([5, 10]), np.float32(4)], shapes)
    digest = weights.fedavg([a, b], [1, 3], weights.Layout(a), tmp_path / "merged.h5")
    merged = read_weights(tmp_path / "merged.h5")
    assert merged[0].tolist() == [4, 8] and merged[1] == 3
    assert digest == sha256_of(tmp_path / "merged.h5")


@settings(deadline=None)  # disks differ
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=5))
def test_fedavg_is_the_formula_in_float64_cast_once(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("fedavg")
    uploads = [(f"client{k}", n, random_tensors(k)) for k, n in enumerate(sizes)]
    paths = [write_weights(folder / f"{name}.h5", tensors) for name, _, tensors in uploads]
    before = [path.read_bytes() for path in paths]
    weights.fedavg(paths, sizes, weights.Layout(paths[0]), folder / "merged.h5")
    assert same_bits(read_weights(folder / "merged.h5"), averaged(uploads))
    assert [path.read_bytes() for path in paths] == before


def test_the_average_of_minus_zero_has_the_sign_of_the_formula(tmp_path):
    shapes = [("dense", (2,))]
    tensors = [np.float32([-0.0, 0.0])]
    path = write_weights(tmp_path / "a.h5", tensors, shapes)
    weights.fedavg([path], [3], weights.Layout(path), tmp_path / "merged.h5")
    merged = read_weights(tmp_path / "merged.h5")
    assert same_bits(merged, averaged([("client001", 3, tensors)]))


def test_fedavg_in_slabs_is_fedavg_at_once(tmp_path, monkeypatch):
    paths = [write_weights(tmp_path / f"{k}.h5", k) for k in range(3)]
    layout = weights.Layout(paths[0])
    weights.fedavg(paths, [1, 2, 3], layout, tmp_path / "once.h5")
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", 5)
    weights.fedavg(paths, [1, 2, 3], layout, tmp_path / "slabs.h5")
    assert (tmp_path / "once.h5").read_bytes() == (tmp_path / "slabs.h5").read_bytes()


def test_fedavg_opens_no_hdf5(tmp_path, monkeypatch):
    paths = [write_weights(tmp_path / f"{k}.h5", k) for k in range(2)]
    layout = weights.Layout(paths[0])
    monkeypatch.setattr(h5py, "File", None)
    weights.fedavg(paths, [1, 1], layout, tmp_path / "merged.h5")


def test_a_failed_merge_leaves_the_old_file(tmp_path):
    a = write_weights(tmp_path / "a.h5", 1)
    target = write_weights(tmp_path / "target.h5", 2)
    before, layout = target.read_bytes(), weights.Layout(target)
    with pytest.raises(OSError):
        weights.fedavg([a, tmp_path / "missing.h5"], [1, 1], layout, target)
    cut = a.read_bytes()[: layout.tensors[-1].end - 1]
    (tmp_path / "short.h5").write_bytes(cut)
    with pytest.raises(OSError, match="short.h5 is shorter than it was"):
        weights.fedavg([a, tmp_path / "short.h5"], [1, 1], layout, target)
    assert target.read_bytes() == before


# --- the check of a user's own file ---------------------------------------------------------------


def test_the_check_passes_what_is_right_in_both_layouts(tmp_path):
    expected = weights.shapes_of(write_weights(tmp_path / "own.h5", 0))
    weights.check(write_weights(tmp_path / "a.h5", 1), expected)
    weights.check(write_weights(tmp_path / "b.h5", 2, root="model_weights"), expected)


def test_the_check_names_layer_and_reason(tmp_path):
    path = write_weights(tmp_path / "own.h5", 0)
    expected = weights.shapes_of(path)
    with h5py.File(path, "r+") as file:
        file["norm1/norm1/weight0"][1] = np.nan
    with pytest.raises(ValueError, match="norm1.*nan"):
        weights.check(path, expected)
    with pytest.raises(ValueError, match="'conv1'.*expected \\(9,\\)"):
        weights.check(path, [("mine", (9,)), *expected[1:]])
    with pytest.raises(ValueError, match="4 tensors, the model 3"):
        weights.check(path, expected[1:])

"""photos: reading what cameras and archives write, and the picture that comes of it."""

import struct
import warnings
from io import BytesIO

import numpy as np
import pydicom
import pytest
from eyes import eye
from PIL import Image, ImageDraw, TiffImagePlugin
from test_datasets import save_dicom

from preparation import photos
from preparation.field import find_field

TURNED = Image.Transpose.ROTATE_90  # how a picture is stored that orientation 6 puts upright
EXIF = Image.Exif()
EXIF[0x0112] = 6


def as_jpeg(**options):
    file = BytesIO()
    eye().save(file, "JPEG", **options)
    return file.getvalue()


def plain(path, level, kind):
    Image.fromarray(np.full((9, 9), level, kind)).save(path)


def planes(path):
    """A TIFF of 9 x 9 pixels in three planes of 16 bits, one behind the other."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.update({256: 9, 257: 9, 258: (16, 16, 16), 259: 1, 262: 2, 277: 3, 278: 9, 284: 2})
    tags.update({273: (1000, 1162, 1324), 279: (162, 162, 162)})  # where each lies, its length
    path.write_bytes((b"II*\0\x08\0\0\0" + tags.tobytes(8)).ljust(1000) + bytes(486))


def pixels(path):
    return np.asarray(photos.open_image(path)).astype(int)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp", "webp"])
def test_every_format_is_read_as_rgb(tmp_path, suffix):
    eye().save(tmp_path / f"eye.{suffix}")
    assert np.abs(pixels(tmp_path / f"eye.{suffix}") - np.asarray(eye())).mean() < 4


@pytest.mark.parametrize("name, make, words", [
    ("absent.png", lambda path: None, "is missing"),
    ("half.jpg", lambda path: path.write_bytes(as_jpeg()[:3000]), "cannot be read as JPEG, PNG"),
    ("text.dcm", lambda path: path.write_text("no picture"), "cannot be read as DICOM"),
    ("gif.png", lambda path: eye().save(path, format="GIF"), "cannot be read"),
    ("deep.png", lambda path: plain(path, 4_000, np.uint16), "16 bits a channel .* 4,095"),
    ("deep.tif", lambda path: plain(path, 40_000, np.float32), "more than 16 bits a channel"),
    ("planes.tif", planes, "planes of 16"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} .*{words}"):
        photos.open_image(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    eye().save(tmp_path / "bomb.png")
    save_dicom(tmp_path / "bomb.dcm", "", eye())
    # Pillow itself only warns below twice of that
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    for name in ("bomb.png", "bomb.dcm"):
        with pytest.raises(ValueError, match=f"{name} is too large"):
            photos.open_image(tmp_path / name)


def test_a_photograph_is_turned_as_its_exif_says_or_left_where_that_cannot_be_read(tmp_path):
    odd = struct.pack("<2sHIH", b"II", 42, 8, 2)  # two tags: orientation 6, a resolution of -1/0
    odd += struct.pack("<HHII", 0x0112, 3, 1, 6)
    odd += struct.pack("<HHII", 0x011A, 10, 1, 38) + struct.pack("<Iii", 0, -1, 0)
    eye().transpose(TURNED).save(tmp_path / "turned.png", exif=b"Exif\0\0" + odd)
    eye().save(tmp_path / "cut.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    eye().save(tmp_path / "broken.png", exif=b"Exif\0\0of no kind")
    with warnings.catch_warnings(action="error"):
        for name in ("turned.png", "cut.png", "broken.png"):
            assert (pixels(tmp_path / name) == np.asarray(eye())).all()


def test_what_is_transparent_is_black(tmp_path):
    image = Image.new("RGBA", (20, 10), "white")
    image.paste((255, 255, 255, 0), (0, 0, 10, 10))
    image.save(tmp_path / "eye.png")
    assert pixels(tmp_path / "eye.png")[0, :, 0].tolist() == [0] * 10 + [255] * 10


def test_a_tiff_of_two_photographs_is_refused_but_a_smaller_copy_is_passed_over(tmp_path):
    small = eye().resize((20, 10))
    for name, tags in (("two.tif", {}), ("thumbnail.tif", {photos.REDUCED_TAG: 1})):
        small.encoderinfo = {"tiffinfo": tags}
        eye().save(tmp_path / name, save_all=True, append_images=[small])
    assert (pixels(tmp_path / "thumbnail.tif") == np.asarray(eye())).all()
    with pytest.raises(ValueError, match="two.tif has 2 pages, expected one"):
        photos.open_image(tmp_path / "two.tif")


def test_sixteen_bits_that_are_used_are_scaled(tmp_path):
    """In colour: bits12 of test_cases.py."""
    eight = np.asarray(eye())[..., 0]
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png")[..., 1] == eight).all()


# --- DICOM ---------------------------------------------------------------------------------------


def test_a_colour_photograph_in_dicom_as_it_is_or_as_a_jpeg(tmp_path):
    path = save_dicom(tmp_path / "eye.dcm", "P7", eye())
    assert (pixels(path) == np.asarray(eye())).all()
    made = pydicom.dcmread(path)
    made.PixelData = pydicom.encaps.encapsulate([as_jpeg(quality=95, subsampling=1)])
    made.PhotometricInterpretation = "YBR_FULL_422"
    made.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    made.save_as(path)
    assert np.abs(pixels(path) - np.asarray(eye())).mean() < 3


@pytest.mark.parametrize("change, words", [
    ({"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}, r"\(MONOCHROME2\)"),
    ({"NumberOfFrames": 3}, "of another kind"),
    ({"BitsAllocated": 16}, "has 16 bits a channel"),
    ({}, "packed as a whole"),
])  # fmt: skip
def test_other_dicom_is_refused(tmp_path, change, words):
    made = pydicom.dcmread(save_dicom(tmp_path / "eye.dcm", "P7", eye()))
    for name, value in change.items():
        setattr(made, name, value)
    if not change:
        made.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    made.save_as(tmp_path / "other.dcm")
    with pytest.raises(ValueError, match=f"other.dcm .*{words}"):
        photos.open_image(tmp_path / "other.dcm")


def test_dicom_that_needs_another_package_names_it_in_one_line(tmp_path):
    made = pydicom.dcmread(save_dicom(tmp_path / "eye.dcm", "P7", eye()))
    made.PixelData = pydicom.encaps.encapsulate([as_jpeg()])
    made.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    made.save_as(tmp_path / "lossless.dcm")
    with pytest.raises(ValueError, match="'JPEG Lossless.*pylibjpeg-libjpeg>=") as found:
        photos.open_image(tmp_path / "lossless.dcm")
    assert str(found.value).isprintable()


# --- the picture ---------------------------------------------------------------------------------


def test_of_graham_the_field_fills_the_square_less_its_local_average(tmp_path):
    eye().save(tmp_path / "eye.png")
    graham, doubt = photos.prepare_photograph(tmp_path / "eye.png", 64)
    assert doubt == "" and graham.shape == (64, 64, 3) and graham.dtype == np.uint8
    stretched = photos.stretch_field(eye(), find_field(eye()), 64)
    assert stretched[[0, 0, -1, -1], [0, -1, 0, -1], 0].min() > 20  # the corners are retina
    assert (photos.subtract_local_average(stretched) == graham).all()
    flat = np.full((56, 56, 3), 90, np.uint8)
    flat[28, 28] = 130
    changed = photos.subtract_local_average(flat)
    assert (changed[28, 28] > 128 + 4 * 30).all() and (changed[0, 0] == 128).all()


@pytest.mark.parametrize("surround, cut", [("black", 80), ("white", 0), ("white", 80)])
def test_in_colour_the_field_keeps_its_shape_on_black(tmp_path, surround, cut):
    """As large as it fits, in the middle; where the photograph cut it, black."""
    field = find_field(eye())
    disc = Image.new("L", eye().size)
    ImageDraw.Draw(disc).circle((field.x, field.y), field.radius, fill=255)
    photograph = Image.composite(eye(), Image.new("RGB", eye().size, surround), disc)
    photograph.crop((0, cut, eye().width, eye().height - cut)).save(tmp_path / "eye.png")
    picture, doubt = photos.prepare_photograph(tmp_path / "eye.png", 120, "colour")
    assert doubt == "" and picture.shape == (120, 120, 3) and picture.dtype == np.uint8
    y, x = (np.mgrid[:120, :120] + 0.5 - 60) * field.radius / 60
    height = field.radius if not cut else eye().height / 2 - cut
    shown = (np.hypot(x, y) < field.radius - 4) & (abs(y) < height - 4)
    hidden = (np.hypot(x, y) > field.radius + 4) | (abs(y) > height + 4)
    assert not picture[hidden].any()
    there = np.asarray(eye())[(y[shown] + field.y).astype(int), (x[shown] + field.x).astype(int)]
    assert np.abs(picture[shown].astype(int) - there).mean() < 10


def test_stretching_averages_what_a_pixel_covers():
    ramp = np.arange(64, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    part = photos.stretch_rows(ramp, np.full(8, 16.0), np.full(8, 48.0))
    assert part.shape == (8, 8, 3) and part[0, :, 0].tolist() == [18, 22, 26, 30, 34, 38, 42, 46]


def test_a_jpeg_is_decoded_at_a_fraction_but_never_below_what_is_needed(tmp_path):
    """Its verdict is that of the whole photograph, also where it is turned."""
    small = Image.new("RGB", (1600, 1400))
    small.paste(eye().resize((340, 326)), (600, 600))
    for image in (eye(600, 1140, 1024), small):
        image.transpose(TURNED).save(tmp_path / "eye.jpg", quality=100, subsampling=0, exif=EXIF)
        image.save(tmp_path / "eye.png")
        fast, doubt = photos.prepare_photograph(tmp_path / "eye.jpg", 128, "colour")
        whole, same_doubt = photos.prepare_photograph(tmp_path / "eye.png", 128, "colour")
        assert np.abs(fast.astype(int) - whole).mean() < 2.5 and doubt == same_doubt
    reduced = photos.open_image(tmp_path / "eye.jpg", shortest_side=256)
    assert reduced.size == (400, 350) and reduced.info["width"] == 1600

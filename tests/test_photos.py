"""photos: reading, cropping, stretching and Graham's local average, on pictures made here."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from preparation import photos, synthetic
from preparation.field import field_mask, find_field

IDRID = (
    Path(__file__).parents[2]
    / "shared/fundus/idrid/B. Disease Grading/1. Original Images/a. Training Set"
)


def disc(width=300, height=200, box=(80, 20, 240, 180), colour=(180, 90, 40)):
    """A one-coloured circle on black."""
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def test_open_image_reads_every_format_as_rgb(tmp_path):
    for suffix in ("jpg", "png", "tif", "bmp"):
        disc().save(tmp_path / f"eye.{suffix}")
        assert photos.open_image(tmp_path / f"eye.{suffix}").mode == "RGB"


def test_open_image_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(ValueError, match="absent.png is missing"):
        photos.open_image(tmp_path / "absent.png")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((300, 200), 80).convert("RGB").save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="half.jpg cannot be read as JPEG, PNG, TIFF, BMP"):
        photos.open_image(tmp_path / "half.jpg")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png cannot be read"):
        photos.open_image(tmp_path / "text.png")
    disc().save(tmp_path / "eye.png", format="GIF")
    with pytest.raises(ValueError, match="eye.png cannot be read"):
        photos.open_image(tmp_path / "eye.png")
    Image.fromarray(np.full((9, 9), 4_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(
        ValueError, match="deep.png has 16 bits a channel and values up to 4,000 of"
    ):
        photos.open_image(tmp_path / "deep.png")
    Image.fromarray(np.full((9, 9), 40_000, np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif has more than 16 bits a channel"):
        photos.open_image(tmp_path / "deep.tif")


def test_open_image_turns_a_photograph_as_its_exif_says(tmp_path):
    upright = Image.effect_noise((60, 40), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown rotated by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert (np.asarray(photos.open_image(tmp_path / "turned.png")) == np.asarray(upright)).all()


def test_open_image_whatever_a_decoder_raises(tmp_path, monkeypatch):
    disc().save(tmp_path / "eye.tif")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 + "")
    with pytest.raises(ValueError, match="eye.tif cannot be read as JPEG"):
        photos.open_image(tmp_path / "eye.tif")


@pytest.mark.parametrize(
    "limit", [20_000, 40_000]
)  # Pillow raises above twice its limit, and only warns above it
def test_open_image_refuses_a_decompression_bomb(tmp_path, monkeypatch, limit):
    disc().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"bomb.png is too large, expected at most {limit} pixels"):
        photos.open_image(tmp_path / "bomb.png")


def test_crop_cuts_to_the_field_of_view():
    assert photos.crop(disc()).size == (161, 161)


def test_crop_takes_grey_8_as_eye_and_grey_7_as_black():
    image = Image.new("RGB", (100, 60), (7, 7, 7))
    ImageDraw.Draw(image).rectangle((10, 5, 59, 44), fill=(8, 8, 8))
    assert photos.crop(image).size == (50, 40)


def test_crop_takes_the_glow_around_a_bright_eye_as_black():
    image = Image.new("RGB", (300, 200), (15, 10, 8))
    image.paste(disc(), mask=Image.fromarray(photos.field_of_view(disc())))
    assert photos.crop(image).size == (161, 161)


def test_a_black_picture_is_refused():
    with pytest.raises(ValueError, match="nothing in it is brighter than grey level 7"):
        photos.preprocess(Image.new("RGB", (40, 30)), 16)


def test_stretch_fills_the_square_and_keeps_the_order_of_a_row():
    ramp = np.zeros((64, 96, 3), np.uint8)
    ramp[:, 16:80] = np.linspace(60, 250, 64)[None, :, None]
    ramp[:20, :32] = ramp[:20, 64:] = 0  # the upper rows see only a middle part
    square = photos.stretch(photos.crop(Image.fromarray(ramp)), 32)
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8
    assert square.min() >= 60
    assert (np.diff(square[..., 0].astype(int), axis=1) > 0).all()
    assert square[25, -1, 0] > square[2, -1, 0] > square[2, 0, 0] > square[25, 0, 0]


def test_stretch_averages_what_a_pixel_covers():
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    stripes[:, 1::2] = 100
    assert (photos.stretch(Image.fromarray(stripes), 8) == 150).all()


def test_one_stray_pixel_does_not_move_its_row():
    image = disc(200, 200, (20, 0, 180, 199))
    noisy = image.copy()
    noisy.putpixel((1, 100), (255, 255, 255))
    crops = [photos.stretch(picture, 64)[20:40] for picture in (image, noisy)]
    assert np.abs(crops[0].astype(int) - crops[1]).mean() < 1


def test_the_local_average_is_subtracted():
    flat = np.full((56, 56, 3), 90, np.uint8)
    assert (photos.subtract_local_average(flat) == 128).all()
    flat[28, 28] = 130
    changed = photos.subtract_local_average(flat)
    assert (
        (changed[28, 28] > 128 + 4 * 30).all()
        and (changed[28, 30] <= 128).all()
        and (changed[0, 0] == 128).all()
    )


def test_real_photographs_fill_the_square():
    if not IDRID.is_dir():
        pytest.skip(f"the real photographs are not here: {IDRID}")
    for path in sorted(IDRID.glob("*.jpg"))[::50]:
        square = photos.preprocess(photos.open_image(path), 64)
        assert square.shape == (64, 64, 3)
        assert 110 < square.mean() < 150 and square.std() > 3


# --- any surround --------------------------------------------------------------------------------


def drawn_eye(size=200):
    """A drawn eye on black, with room around it."""
    eye, _ = synthetic.draw(2, np.random.default_rng(4), size)
    image = Image.new("RGB", (size + 120, size + 80))
    image.paste(Image.fromarray(eye), (60, 40))
    return image


def on_colour(image, colour):
    """The same eye on another surround."""
    field, _ = find_field(image)
    mask = Image.fromarray(field_mask(field, (image.height, image.width)))
    return Image.composite(image, Image.new("RGB", image.size, colour), mask)


def with_text(image, colour="white", xy=(4, 4)):
    image = image.copy()
    ImageDraw.Draw(image).text(xy, "DOE, JANE  1950-01-01", fill=colour, font_size=16)
    return image


def with_logo(image):
    image = image.copy()
    ImageDraw.Draw(image).rectangle((270, 230, 312, 272), fill=(200, 30, 30))
    return image


def with_notch(image):
    """A triangle that sticks out of the right rim, as a camera marks the right way up."""
    image = image.copy()
    field, _ = find_field(image)
    x, y = field.x + field.radius * 0.85, field.y - field.radius * 0.53
    notch = [(x, y - 8), (x, y + 8), (x + 18, y)]
    ImageDraw.Draw(image).polygon(notch, fill=(150, 90, 50))
    return image


def test_in_their_colours_only_the_local_average_stays():
    colour = photos.preprocess(drawn_eye(), 64, "colour")
    graham = photos.preprocess(drawn_eye(), 64)
    assert (photos.subtract_local_average(colour) == graham).all()
    assert (colour != graham).any()


@pytest.mark.parametrize(
    "change, most",
    [
        (lambda eye: on_colour(eye, "white"), 8),
        (lambda eye: on_colour(eye, (128, 128, 128)), 8),
        (lambda eye: on_colour(eye, (30, 60, 160)), 8),
        (lambda eye: on_colour(eye, (40, 40, 40)), 12),
        (with_text, 1),
        (lambda eye: with_text(on_colour(eye, "white"), "black"), 8),
        (lambda eye: with_text(eye, xy=(150, 260)), 1),
        (with_logo, 1),
        (with_notch, 1),
    ],
)
def test_neither_surround_nor_text_nor_notch_changes_the_picture(change, most):
    plain = photos.preprocess(drawn_eye(), 128).astype(int)
    changed = drawn_eye()
    changed = change(changed)
    assert (np.asarray(changed) != np.asarray(drawn_eye())).any()
    assert np.abs(photos.preprocess(changed, 128) - plain).mean() < most
    assert find_field(changed)[1] == ""


def test_what_is_transparent_is_black(tmp_path):
    eye = drawn_eye()
    field, _ = find_field(eye)
    alpha = Image.fromarray(field_mask(field, (eye.height, eye.width)).astype(np.uint8) * 255)
    clear = on_colour(eye, "white")
    clear.putalpha(alpha)
    clear.save(tmp_path / "eye.png")
    opened = np.asarray(photos.open_image(tmp_path / "eye.png"))
    assert opened[0, 0].tolist() == [0, 0, 0] and opened.shape == (280, 320, 3)
    assert (opened[140, 100:200] == np.asarray(eye)[140, 100:200]).all()


def test_a_cut_eye_is_a_disc_all_the_same():
    for box in ((0, 60, 320, 220), (100, 0, 320, 280), (85, 65, 235, 215)):
        field, doubt = find_field(drawn_eye().crop(box))
        whole, _ = find_field(drawn_eye())
        assert doubt == "" and abs(field.radius - whole.radius) < 2
        assert abs(field.x + box[0] - whole.x) < 2 and abs(field.y + box[1] - whole.y) < 2


@pytest.mark.parametrize(
    "image, reason",
    [
        (Image.effect_noise((90, 60), 10).convert("RGB"), "it fills the picture, without a border"),
        (disc(300, 200, (40, 90, 100, 150)), "it is only 5% of the picture"),
        (disc(300, 200, (20, 60, 280, 140)), "it is not round"),
    ],
)
def test_an_implausible_field_of_view_is_told(image, reason):
    assert find_field(image)[1] == reason


def test_real_photographs_have_the_field_that_their_camera_has():
    """All of IDRiD is by one camera. IDRiD_305 has a notch, 179 and 184 are dark on one side."""
    if not IDRID.is_dir():
        pytest.skip(f"the real photographs are not here: {IDRID}")
    for path in [
        *sorted(IDRID.glob("*.jpg"))[::60],
        *(IDRID / f"IDRiD_{n}.jpg" for n in (179, 184, 305)),
    ]:
        field, doubt = find_field(photos.open_image(path))
        assert doubt == "" and 253 < field.radius < 257, path


# --- files ---------------------------------------------------------------------------------------


def test_a_jpeg_is_decoded_at_a_fraction_but_never_below_what_is_needed(tmp_path):
    eye = drawn_eye(900).resize((2040, 1960))
    eye.save(tmp_path / "eye.jpg", quality=95)
    assert photos.open_image(tmp_path / "eye.jpg", shortest_side=256).size == (510, 490)
    assert photos.open_image(tmp_path / "eye.jpg", shortest_side=500).size == (1020, 980)
    eye.save(tmp_path / "eye.png")
    fast, _ = photos.prepare_photograph(tmp_path / "eye.jpg", 128)
    whole, _ = photos.prepare_photograph(tmp_path / "eye.png", 128)
    assert np.abs(fast.astype(int) - whole).mean() < 4
    small = Image.new("RGB", (2400, 2400))
    small.paste(eye.resize((510, 490)), (900, 900))
    small.save(tmp_path / "small.jpg", quality=95)
    small.save(tmp_path / "small.png")
    fast, _ = photos.prepare_photograph(tmp_path / "small.jpg", 128)
    whole, _ = photos.prepare_photograph(tmp_path / "small.png", 128)
    assert np.abs(fast.astype(int) - whole).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_odd_exif_tag_costs_no_photograph(tmp_path, orientation):
    """Tags that Pillow reads, but cannot write again: ImageOps.exif_transpose fails on them."""
    upright = drawn_eye()
    stored = upright.transpose(STORED[orientation]) if orientation > 1 else upright
    tiff = b"II*\0\x08\0\0\0\x02\0"  # two tags: orientation, and a resolution of 0/0
    tiff += struct.pack("<HHII", 0x0112, 3, 1, orientation)
    tiff += struct.pack("<HHII", 0x011A, 5, 1, 38) + struct.pack("<III", 0, 0, 0)
    stored.save(tmp_path / "eye.png", exif=b"Exif\0\0" + tiff)
    assert (np.asarray(photos.open_image(tmp_path / "eye.png")) == np.asarray(upright)).all()


# How to store a picture that an orientation then puts upright: the inverse of photos.TRANSPOSE.
STORED = {
    **photos.TRANSPOSE,
    6: photos.TRANSPOSE[8],
    8: photos.TRANSPOSE[6],
}


def sixteen_bit_tiff(path, values):
    """An uncompressed RGB TIFF of 16 bits, which Pillow cannot write."""
    height, width, _ = values.shape
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 150), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 156), (277, 3, 1, 3), (278, 4, 1, height)]
    tags += [(279, 4, 1, values.nbytes), (284, 3, 1, 1)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    head = head.ljust(150, b"\0") + struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(head + values.astype("<u2").tobytes())


def test_sixteen_bits_are_scaled_if_they_are_used_and_refused_if_not(tmp_path):
    eight = np.asarray(drawn_eye()).astype(np.uint16)
    sixteen_bit_tiff(tmp_path / "full.tif", eight * 257)
    assert (np.asarray(photos.open_image(tmp_path / "full.tif")) == eight).all()
    sixteen_bit_tiff(tmp_path / "twelve.tif", eight * 16)
    highest = f"{int(eight.max()) * 16:,}"
    with pytest.raises(ValueError, match=f"twelve.tif has 16 bits .* up to {highest} of 65,535"):
        photos.open_image(tmp_path / "twelve.tif")
    Image.fromarray(eight[..., 0] * 257).save(tmp_path / "grey.png")
    assert (np.asarray(photos.open_image(tmp_path / "grey.png"))[..., 1] == eight[..., 0]).all()

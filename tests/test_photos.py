"""photos: reading, cropping, stretching and Graham's local average, on pictures made here."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from preparation import photos

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
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png has more than 8 bits a channel"):
        photos.open_image(tmp_path / "deep.png")


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

"""field: the eye is found whatever is around it, and what is no fundus is told."""

import numpy as np
import pytest
from conftest import SHARED
from eyes import NO_FUNDUS, eye
from PIL import Image, ImageDraw

from preparation.field import find_field, whole_field, why_no_fundus
from preparation.photos import open_image

IDRID = SHARED / "fundus" / "idrid"


def on_colour(colour):
    image, field = Image.new("RGB", eye().size, colour), find_field(eye())
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).circle((field.x - 0.5, field.y - 0.5), field.radius, fill=255)
    return Image.composite(eye(), image, mask)


def with_notch():
    """A triangle that sticks out of the right rim, as a camera marks the right way up."""
    image, field = eye(), find_field(eye())
    x, y = field.x + field.radius * 0.85, field.y - field.radius * 0.53
    ImageDraw.Draw(image).polygon([(x, y - 8), (x, y + 8), (x + 18, y)], fill=(150, 90, 50))
    return image


def with_glow_and_caption():
    image = Image.fromarray(np.maximum(np.asarray(eye()), 12).astype(np.uint8))
    ImageDraw.Draw(image).text((150, 300), "DOE, JANE  1950", fill="white", font_size=16)
    return image


AROUND = {  # beside `surrounds` in test_cases.py; with where the plain picture begins in it
    "blue": (lambda: on_colour((30, 60, 160)), (0, 0)),
    "glow, caption": (with_glow_and_caption, (0, 0)),
    "notch": (with_notch, (0, 0)),
    "cut all around": (lambda: eye().crop((90, 70, 270, 250)), (90, 70)),
}


@pytest.mark.parametrize("name", AROUND)
def test_the_eye_is_found_whatever_is_around_it(name):
    make, (left, top) = AROUND[name]
    image = make()
    plain, field = find_field(eye()), find_field(image)
    assert abs(field.radius - plain.radius) < 2
    assert abs(field.x + left - plain.x) < 2 and abs(field.y + top - plain.y) < 2
    assert min(field.box) >= 0 and field.box[2] <= image.width and field.box[3] <= image.height


@pytest.mark.parametrize("name", NO_FUNDUS)
def test_what_is_no_fundus_is_told(name):
    image = NO_FUNDUS[name]()
    why = why_no_fundus(image, find_field(image), image.width)
    assert why and {"overexposed": "white", "underexposed": "black"}.get(name, "") in why


def test_an_eye_is_a_fundus_and_its_photograph_s_own_size_counts():
    half = eye().resize((180, 160))
    assert why_no_fundus(half, find_field(half), 360) == ""
    assert "pixels across, expected 200" in why_no_fundus(half, find_field(half), 180)


def test_without_a_disc_the_field_is_all_that_is_bright():
    image = Image.new("RGB", (100, 60), (7, 7, 7))
    image.paste((8, 8, 8), (10, 5, 60, 45))
    left, right = whole_field(image).edges(np.array([6.0, 44.0]))
    assert (left.tolist(), right.tolist()) == ([10, 10], [60, 60])


def test_real_photographs_are_fundi_of_one_camera():
    """All of IDRiD is by one camera. IDRiD_305 has a notch, 179 and 184 are dark on one side."""
    if not IDRID.is_dir():
        pytest.skip(f"the real photographs are not here: {IDRID}")
    refused = []
    paths = sorted(IDRID.rglob("*.jpg"))
    for path in paths:
        image = open_image(path)
        field = find_field(image)
        if why_no_fundus(image, field, image.width):
            refused.append(path.name)
        else:
            assert 253 < field.radius < 257, path
    assert len(refused) <= 0.01 * len(paths), refused

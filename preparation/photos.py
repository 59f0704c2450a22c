"""From a fundus photograph to what the network sees.

The steps are Graham's (Kaggle DR competition report, 2015), as the thesis took them: crop to the
field of view, stretch the circle to a square, resize, subtract the local average. "colour" leaves
the last one out: a network that has seen photographs before knows colours, and does better with
them.
"""

import warnings

import numpy as np
from PIL import Image, ImageFilter

from preparation.field import DARK, brighter_than_black, find_field

PREPROCESSINGS = ("graham", "colour")
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
# Sigma of the blur that makes the local average, as a part of the picture's width.
GRAHAM_SIGMA = 10 / 224
# The edge of a row is the median over this many rows, so that a stray bright pixel does not move
# it.
EDGE_ROWS = 9
# A JPEG is decoded at a fraction of its size if its shorter side keeps this many times the
# picture's. It takes a third of the time, and what is left is still averaged.
SPARE = 2
# EXIF: how a photograph was held. How to turn its pixels, by the value of the tag.
ORIENTATION_TAG = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def prepare_photograph(path, image_size, preprocessing="graham"):
    """The photograph at `path` as the network sees it: (uint8 (image_size, image_size, 3), doubt).

    preprocessing: one of PREPROCESSINGS.
    doubt: why its field of view is implausible, or "". Raises ValueError where it cannot be read or
    shows nothing.
    """
    image = open_image(path, shortest_side=SPARE * image_size)
    field, doubt = find_field(image)
    if field and field.bottom - field.top < SPARE * image_size / 2:
        # The eye is a small part of the photograph: it needs all of its pixels.
        image = open_image(path)
        field, doubt = find_field(image)
    return prepare_image(image, image_size, field, preprocessing), doubt


def preprocess(image, image_size, preprocessing="graham"):
    """PIL image, RGB, to uint8 (image_size, image_size, 3). ValueError if it shows nothing."""
    return prepare_image(image, image_size, find_field(image)[0], preprocessing)


def prepare_image(image, image_size, field, preprocessing):
    """As preprocess; field: the image's Field, or None if it is no disc."""
    if field:
        square = stretch_field(image, field, image_size)
    else:
        square = stretch(crop(image), image_size)
    return square if preprocessing == "colour" else subtract_local_average(square)


def open_image(path, shortest_side=None):
    """A PIL image, RGB, read whole and turned as its EXIF says; what is transparent is black.

    shortest_side: pixels; a JPEG may come smaller, as long as its shorter side has so many.
    Raises ValueError where the file is missing, truncated, too large, not in FORMATS, or has more
    than 8 bits a channel and does not use them.
    """
    # Above its limit Pillow only warns, and raises above twice the limit: `decode` refuses both.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return decode(path, image, shortest_side)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path} is too large, expected at most {Image.MAX_IMAGE_PIXELS} pixels"
        ) from None
    except Refused as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as {', '.join(FORMATS)} ({error})") from None


class Refused(Exception):
    """A file that Pillow can read, but that is no photograph for us."""


def decode(path, image, shortest_side):
    """An opened PIL image, read whole: RGB, upright. Raises Refused, or whatever Pillow raises."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if shortest_side and image.format == "JPEG":
        image.draft(None, (shortest_side, shortest_side))
    sixteen_bits = ";16" in raw_mode(image)
    image.load()
    # After `load`: Pillow turns a TIFF by itself, and removes the tag then.
    orientation = read_orientation(image)
    if sixteen_bits:
        image = to_eight_bits(path, image)
    elif image.mode.startswith(("I", "F")):
        raise Refused("has more than 16 bits a channel: convert it to 8 bits first")
    if orientation in TRANSPOSE:
        image = image.transpose(TRANSPOSE[orientation])
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert("RGB")


def read_orientation(image):
    """The value of the EXIF tag, 1 where there is none or the tags are broken."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a broken tag costs no photograph
        return 1


def raw_mode(image):
    """How an image that is not loaded yet lies in its file: "RGB", "RGB;16B" ..., or ""."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    first = arguments[0] if isinstance(arguments, tuple) else arguments
    return first if isinstance(first, str) else ""


def to_eight_bits(path, image):
    """The upper byte of each 16-bit channel, if the channels use it; else Refused.

    A camera of 10, 12 or 14 bits whose values were stored as they are leaves the upper bits empty:
    of such a photograph the upper byte shows a few stripes.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        highest = int(values.max())
        image = Image.fromarray((values >> 8).astype(np.uint8))
    else:
        # Pillow itself keeps the upper byte of 16-bit colours.
        num_colours = len(image.getbands()) - ("A" in image.getbands())
        upper = np.asarray(image)[..., :num_colours]
        highest = int(upper.max()) << 8
        if highest < 1 << 15:
            highest = int((upper.astype(int) * 256 + lower_bytes(path)[..., :num_colours]).max())
    if highest < 1 << 15:
        raise Refused(
            f"has 16 bits a channel and values up to {highest:,} of 65,535 only, expected more "
            "than half of that range: scale it to 8 bits first"
        )
    return image


def lower_bytes(path):
    """The lower byte of each 16-bit channel, uint8 (height, width, channels)."""
    with Image.open(path, formats=FORMATS) as image:
        tile = image.tile[0]
        mode = raw_mode(image)
        # Read in the other byte order, the lower byte is the one that Pillow keeps.
        swapped = mode.replace("16B", "16L") if "16B" in mode else mode[:-1] + "B"
        arguments = (swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped
        image.tile = [each._replace(args=arguments) for each in image.tile]
        return np.asarray(image)


def crop(image):
    """Cut a PIL image to what is brighter than the black around it."""
    box = Image.fromarray(field_of_view(image)).getbbox()
    if box is None:
        raise ValueError(
            f"nothing in it is brighter than grey level {DARK}: it is no fundus photograph"
        )
    return image.crop(box)


def field_of_view(image):
    """bool (height, width): where a PIL image is brighter than the black around the eye."""
    return brighter_than_black(np.asarray(image.convert("L")))


def stretch_field(image, field, image_size):
    """Circle to square: the field's part of each row becomes a whole row.

    PIL image and its Field to uint8 (image_size, image_size, 3).
    """
    top, bottom = max(0, field.top), min(image.height, field.bottom)
    rows = image.resize(
        (image.width, image_size), Image.Resampling.BOX, (0, top, image.width, bottom)
    )
    height = (bottom - top) / image_size
    left, right = field.edges(top + (np.arange(image_size) + 0.5) * height)
    left, right = left.clip(0, image.width - 1), right.clip(1, image.width)
    rows = np.asarray(rows)
    if field.rim:
        # On black these pixels are dark; mixed with another colour they would shine.
        x = np.arange(image.width)[None] + 0.5
        inside = (x > left[:, None] + field.rim) & (x < right[:, None] - field.rim)
        rows = rows * inside[..., None]
    return stretch_rows(rows, left, right)


def stretch(image, image_size):
    """As stretch_field where it is no disc: each row from its first to its last bright pixel."""
    image = image.resize((image.width, image_size), Image.Resampling.BOX)
    left, right = row_edges(field_of_view(image))
    return stretch_rows(np.asarray(image), left, right)


def stretch_rows(rows, left, right):
    """The part from left[i] to right[i] of row i, stretched to a square, each pixel an average.

    uint8 (size, width, 3), float (size,), float (size,) to uint8 (size, size, 3).
    """
    size = len(rows)
    # The sum of a row up to any point, between two pixels too: the average over a pixel of the
    # square is the difference of two such sums.
    sums = np.zeros((size, rows.shape[1] + 1, 3), np.float32)
    np.cumsum(rows, axis=1, out=sums[:, 1:], dtype=np.float32)
    width = (right - left)[:, None]
    points = left[:, None] + width * np.linspace(0, 1, size + 1)  # (size, size + 1)
    before = np.minimum(points.astype(int), rows.shape[1] - 1)
    behind = (points - before)[..., None].astype(np.float32)
    row = np.arange(size)[:, None]
    at_points = sums[row, before] * (1 - behind) + sums[row, before + 1] * behind
    averages = np.diff(at_points, axis=1) / (width[..., None] / size)
    return np.clip(averages + 0.5, 0, 255).astype(np.uint8)


def row_edges(field):
    """(left, right) of each row of bool (height, width); right is one beyond the last pixel."""
    width = field.shape[1]
    left = field.argmax(axis=1)
    right = width - field[:, ::-1].argmax(axis=1)
    around = EDGE_ROWS // 2
    padded = np.pad([left, right], ((0, 0), (around, around)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, EDGE_ROWS, axis=1)
    return np.median(windows, axis=2)


def subtract_local_average(pixels):
    """4 * image - 4 * blurred image + 128, on uint8 (size, size, 3)."""
    blur = ImageFilter.GaussianBlur(GRAHAM_SIGMA * len(pixels))
    average = np.asarray(Image.fromarray(pixels).filter(blur))
    difference = pixels.astype(np.int16) - average
    return np.clip(4 * difference + 128, 0, 255).astype(np.uint8)

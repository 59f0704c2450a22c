"""From a fundus photograph to what the network sees.

The steps are Graham's (Kaggle DR competition report, 2015), as the thesis took them: crop to the field
of view, stretch the circle to a square, resize, subtract the local average.
"""

import warnings

import numpy as np
from PIL import Image, ImageFilter, ImageOps

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
# Grey levels up to this are the black around the field of view ...
DARK = 7
# ... and so are levels up to this part of the bright ones: around a bright eye the black glows.
STRAY_LIGHT = 0.15
# Sigma of the blur that makes the local average, as a part of the picture's width.
GRAHAM_SIGMA = 10 / 224
# The edge of a row is the median over this many rows, so that a stray bright pixel does not move it.
EDGE_ROWS = 9


def open_image(path):
    """A PIL image, RGB, read whole and turned as its EXIF says.

    Raises ValueError where the file is missing, truncated, too large or not in FORMATS.
    """
    # Above its limit Pillow only warns, and raises above twice the limit: raise in both cases.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode = image.mode
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"{path} is too large, expected at most {Image.MAX_IMAGE_PIXELS} pixels"
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as {', '.join(FORMATS)} ({error})") from None
    if mode.startswith(("I", "F")):
        raise ValueError(f"{path} has more than 8 bits a channel: convert it to 8 bits first")
    return upright


def preprocess(image, image_size):
    """PIL image to uint8 (image_size, image_size, 3). Raises ValueError without a field of view."""
    return subtract_local_average(stretch(crop(image), image_size))


def field_of_view(image):
    """bool (height, width): where a PIL image is brighter than the black around the eye."""
    grey = np.asarray(image.convert("L"))
    return grey > max(DARK, STRAY_LIGHT * np.percentile(grey, 95))


def crop(image):
    """Cut a PIL image to its field of view."""
    box = Image.fromarray(field_of_view(image)).getbbox()
    if box is None:
        raise ValueError(
            f"nothing in it is brighter than grey level {DARK}: it is no fundus photograph"
        )
    return image.crop(box)


def stretch(image, image_size):
    """Circle to square: the field of view's part of each row becomes a whole row.

    PIL image to uint8 (image_size, image_size, 3).
    """
    image = image.resize((image.width, image_size), Image.Resampling.BOX)
    square = Image.new("RGB", (image_size, image_size))
    for row, (left, right) in enumerate(row_edges(field_of_view(image))):
        stretched = image.resize((image_size, 1), Image.Resampling.BOX, (left, row, right, row + 1))
        square.paste(stretched, (0, row))
    return np.asarray(square)


def row_edges(field):
    """[left, right] of each row of `field`, bool (height, width); right is one beyond the last."""
    width = field.shape[1]
    left = field.argmax(axis=1)
    right = width - field[:, ::-1].argmax(axis=1)
    around = EDGE_ROWS // 2
    padded = np.pad([left, right], ((0, 0), (around, around)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, EDGE_ROWS, axis=1)
    return np.median(windows, axis=2).T.tolist()


def subtract_local_average(pixels):
    """4 * image - 4 * blurred image + 128, on uint8 (size, size, 3)."""
    blur = ImageFilter.GaussianBlur(GRAHAM_SIGMA * len(pixels))
    average = np.asarray(Image.fromarray(pixels).filter(blur))
    difference = pixels.astype(np.int16) - average
    return np.clip(4 * difference + 128, 0, 255).astype(np.uint8)

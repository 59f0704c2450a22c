"""From a fundus photograph to what the network sees: cropped, stretched, resized, local average subtracted."""

import warnings

import numpy as np
from PIL import Image, ImageFilter, ImageOps

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
DARK = 7  # grey levels up to this are the black around the field of view ...
STRAY_LIGHT = (
    0.15  # ... and so are those up to this part of the bright ones: around a bright eye black glows
)
GRAHAM_SIGMA = 10 / 224  # of the blur that is the local average, in picture widths


def open_image(path):
    """A PIL image, RGB, read whole, turned as its EXIF says. Raises ValueError where it is missing, truncated, too large or
    not in FORMATS."""
    warnings.simplefilter(
        "error", Image.DecompressionBombWarning
    )  # Pillow raises only above twice its limit
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode, upright = image.mode, ImageOps.exif_transpose(image).convert("RGB")
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
    """PIL image to uint8 (image_size, image_size, 3). Raises ValueError where there is no field of view."""
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
    """Circle to rectangle: each row's part of the field of view, stretched to the width of uint8 (size, size, 3)."""
    image = image.resize((image.width, image_size), Image.Resampling.BOX)
    field = field_of_view(image)
    edges = np.pad(
        [field.argmax(axis=1), image.width - field[:, ::-1].argmax(axis=1)],
        ((0, 0), (4, 4)),
        "edge",
    )
    edges = np.lib.stride_tricks.sliding_window_view(
        edges, 9, axis=1
    )  # of nine rows, against stray pixels
    edges = np.median(edges, axis=2)
    square = Image.new("RGB", (image_size, image_size))
    for row, (left, right) in enumerate(edges.T.tolist()):
        square.paste(
            image.resize((image_size, 1), Image.Resampling.BOX, (left, row, right, row + 1)),
            (0, row),
        )
    return np.asarray(square)


def subtract_local_average(pixels):
    """4 * image - 4 * blurred image + 128, on uint8 (size, size, 3); Graham, Kaggle DR competition report, 2015."""
    average = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(GRAHAM_SIGMA * len(pixels)))
    return np.clip(4 * (pixels.astype(np.int16) - np.asarray(average)) + 128, 0, 255).astype(
        np.uint8
    )

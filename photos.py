"""From a fundus photograph to what the network sees: cropped, stretched, resized, local average subtracted.

    image = preprocess(open_image("eye.jpg"), image_size=128)  # uint8 (128, 128, 3)
"""

import warnings

import numpy as np
from PIL import Image, ImageFilter

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
DARK = 7  # grey levels up to this are the black around the field of view ...
STRAY_LIGHT = 0.15  # ... and so are those up to this part of the bright ones: around a bright eye black glows
GRAHAM_SIGMA = 10 / 224  # of the blur that is the local average, in picture widths


def open_image(path):
    """A PIL image, RGB, read whole. Raises ValueError where it is missing, truncated, too large or not in FORMATS."""
    # More than 89 million pixels may be a small file made to fill the memory; Pillow only warns below twice that.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{path} has more than 8 bits a channel: convert it to 8 bits first")
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{path} is too large, expected at most {Image.MAX_IMAGE_PIXELS} pixels") from None
    except (OSError, SyntaxError, IndexError, EOFError) as error:  # Pillow's decoders raise any of these
        raise ValueError(f"{path} cannot be read as {', '.join(FORMATS)} ({error})") from None


def preprocess(image, image_size):
    """All steps: PIL image to uint8 (image_size, image_size, 3). Raises ValueError where there is no field of view."""
    return subtract_local_average(stretch(crop(image.convert("RGB")), image_size))


def field_of_view(image):
    """bool (height, width): where a PIL image is brighter than the black around the eye."""
    grey = np.asarray(image.convert("L"))
    return grey > max(DARK, STRAY_LIGHT * np.percentile(grey, 95))


def crop(image):
    """Cut a PIL image to its field of view."""
    field = field_of_view(image)
    rows, columns = np.flatnonzero(field.any(axis=1)), np.flatnonzero(field.any(axis=0))
    if not len(rows):
        raise ValueError(f"nothing in it is brighter than grey level {DARK}: it is no fundus photograph")
    return image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def stretch(image, image_size):
    """Circle to rectangle: each row's part of the field of view is stretched to the full width.

    Takes a cropped PIL image, returns uint8 (image_size, image_size, 3). A new pixel is the mean of what it covers:
    the difference, at its two ends, of the row's running sum.
    """
    image = image.resize((image.width, image_size), Image.Resampling.BOX)
    field = field_of_view(image)
    left = median_of_neighbours(field.argmax(axis=1))
    right = median_of_neighbours(image.width - field[:, ::-1].argmax(axis=1))
    ends = np.linspace(left, right, image_size + 1, axis=1)  # (image_size, image_size + 1)
    sums = np.zeros((image_size, image.width + 1, 3))
    np.cumsum(np.asarray(image), axis=1, out=sums[:, 1:])
    result = np.empty((image_size, image_size, 3))
    for row in range(image_size):
        for channel in range(3):
            at_ends = np.interp(ends[row], np.arange(image.width + 1), sums[row, :, channel])
            result[row, :, channel] = np.diff(at_ends) / np.diff(ends[row])
    return (result + 0.5).astype(np.uint8)


def median_of_neighbours(values, reach=4):
    """Each value's median with `reach` before and after it: one row's stray pixel must not move that row."""
    padded = np.pad(values, reach, "edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def subtract_local_average(pixels):
    """4 * image - 4 * blurred image + 128, on uint8 (size, size, 3).

    Source: B. Graham, Kaggle Diabetic Retinopathy Detection competition report, 2015.
    """
    blur = ImageFilter.GaussianBlur(GRAHAM_SIGMA * len(pixels))
    average = np.asarray(Image.fromarray(pixels).filter(blur), np.int16)
    return np.clip(4 * (pixels.astype(np.int16) - average) + 128, 0, 255).astype(np.uint8)

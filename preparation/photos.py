"""From a fundus photograph to what the network sees.

"graham" takes the steps of Graham (Kaggle DR competition report, 2015), as the thesis took them:
crop to the field of view, stretch the circle to a square, resize, subtract the local average.
"colour" is for a network that has seen photographs before, and knows shapes and colours as they
are: crop, and resize. On IDRiD it does better with the circle than with the square.

Nothing is written in here, and no label known. An edit of this file, of a comment even, makes all
photographs' pictures anew (prepare.made_with_of).
"""

import warnings

import numpy as np
import pydicom
from PIL import Image, ImageFilter, ImageOps
from pydicom.pixels import pixel_array

from preparation.field import DETAIL_PIXELS, find_field, whole_field, why_no_fundus

PREPROCESSINGS = ("graham", "colour")
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
REDUCED_TAG = 254  # of a page of a TIFF: 1 where it is another one's smaller copy
BITS_TAG = 258  # of a TIFF: the bits of each channel
# Sigma of the blur that makes the local average, as a part of the picture's width.
GRAHAM_SIGMA = 10 / 224
# A JPEG is decoded at a fraction of its size if its shorter side keeps this many times the
# picture's. It takes a third of the time, and what is left is still averaged.
SPARE = 2


# --- photographs ---------------------------------------------------------------------------------


def prepare_photograph(path, image_size, preprocessing="graham"):
    """The photograph at `path` as the network sees it: (uint8 (image_size, image_size, 3), doubt).

    preprocessing: one of PREPROCESSINGS. doubt: why it is no gradable photograph of a fundus, or
    "". Raises ValueError where it cannot be read.
    """
    # whether it is a fundus does not depend on the size of its picture
    image = open_image(path, shortest_side=max(SPARE * image_size, DETAIL_PIXELS))
    width = image.info["width"]
    field = find_field(image)
    if field and field.box[3] - field.box[1] < SPARE * image_size / 2 and image.width < width:
        # The eye is a small part of the photograph: it needs all of its pixels.
        image = open_image(path)
        field = find_field(image)
    doubt = why_no_fundus(image, field, width)
    field = field or whole_field(image)
    if preprocessing == "colour":
        return crop_field(image, field, image_size), doubt
    return subtract_local_average(stretch_field(image, field, image_size)), doubt


# --- files ---------------------------------------------------------------------------------------


class Refused(Exception):
    """A file that can be read, but that is no photograph for us."""


def open_image(path, shortest_side=None):
    """A PIL image, RGB, read whole and turned as its EXIF says; what is transparent is black.

    shortest_side: pixels; a JPEG may come smaller, as long as its shorter side has so many. Its
    info["width"] is then still the width of the photograph itself.
    Raises ValueError where the file is missing, truncated, too large, of no known format, has
    several pages, or more than 8 bits a channel and does not use them.
    """
    # They warn of odd tags, which cost no photograph, and of a size that `decode` refuses.
    warnings.filterwarnings("ignore", module="PIL|pydicom")
    try:
        if str(path).lower().endswith(".dcm"):
            return open_dicom(path)
        with Image.open(path, formats=FORMATS) as image:
            return decode(image, shortest_side)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Refused as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # decoders raise nearly anything
        kinds = "DICOM" if str(path).lower().endswith(".dcm") else ", ".join(FORMATS)
        why = " ".join(str(error).split())  # pydicom's list of missing packages has lines
        raise ValueError(f"{path} cannot be read as {kinds} ({why})") from None


def decode(image, shortest_side=None):
    """An opened PIL image, read whole: RGB, upright. Raises Refused, or whatever Pillow raises."""
    refuse_too_large(image.width, image.height)
    refuse_pages(image)
    width = image.width
    if shortest_side and image.format == "JPEG":
        image.draft(None, (shortest_side, shortest_side))
    # How it lies in its file, "RGB", "RGB;16B" ...; Pillow says so only before it is loaded.
    sixteen_bits = image.tile and ";16" in str(image.tile[0].args)
    if image.format == "TIFF" and max(image.tag_v2.get(BITS_TAG, (1,))) > 8 and not sixteen_bits:
        # Of 16 bits in planes, a channel behind the other, Pillow takes each byte for a pixel.
        raise Refused(
            "has more than 16 bits a channel, or planes of 16: convert it to 8 bits first"
        )
    image.load()
    reduced = image.width / width
    image = upright(image)
    if sixteen_bits:
        image = to_eight_bits(image)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert("RGB")
    image.info["width"] = round(image.width / reduced)
    return image


def refuse_too_large(width, height):
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise Refused(f"is too large, expected at most {Image.MAX_IMAGE_PIXELS} pixels")


def refuse_pages(image):
    """Raise Refused for a TIFF with a second photograph: nobody knows which of them was graded."""
    if image.format != "TIFF":
        return
    for page in range(1, image.n_frames):
        image.seek(page)
        if not image.tag_v2.get(REDUCED_TAG, 0) & 1:
            raise Refused(f"has {image.n_frames} pages, expected one photograph")
    image.seek(0)


def upright(image):
    """A PIL image turned as its EXIF says; a broken tag costs no photograph."""
    try:
        image.getexif()  # is kept by the image; exif_transpose would fail to write odd tags again
        image.info.pop("exif", None)
        return ImageOps.exif_transpose(image)
    except Exception:  # tags that cannot be read at all
        return image


def to_eight_bits(image):
    """The upper byte of each 16-bit channel, if the channels use it; else Refused.

    A camera of 10, 12 or 14 bits whose values were stored as they are leaves the upper bits empty:
    of such a photograph the upper byte shows a few stripes.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    # Of colours, Pillow itself keeps the upper byte. An alpha channel always uses it.
    colours = image.getbands()[: len(image.getbands()) - ("A" in image.getbands())]
    highest = max(image.getchannel(colour).getextrema()[1] for colour in colours)
    if highest < 128:
        raise Refused(
            f"has 16 bits a channel and no value above {256 * highest + 255:,} of 65,535, expected "
            "more than half of that range: scale it to 8 bits first"
        )
    return image


# --- DICOM ---------------------------------------------------------------------------------------


def read_dicom(path, tags=None):
    """The pydicom data set of a file. tags: only these, without the pixels; None: all.

    Raises Refused for a file that, unpacked, can be of any size; or whatever pydicom raises.
    """
    packed = pydicom.uid.DeflatedExplicitVRLittleEndian
    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == packed:
        raise Refused("is DICOM that is packed as a whole (deflated): export it otherwise")
    return pydicom.dcmread(path, specific_tags=tags, stop_before_pixels=tags is not None)


def dicom_patient(path):
    """The PatientID of a DICOM file; "" where it has none, or is damaged: `open_image` says how."""
    try:
        return str(read_dicom(path, ["PatientID"]).get("PatientID", ""))
    except Exception:  # of a damaged file, nearly anything
        return ""


def open_dicom(path):
    """A colour photograph in a DICOM file as a PIL image, RGB."""
    photograph = read_dicom(path)
    kind = photograph.get("PhotometricInterpretation", "no picture")
    if photograph.get("SamplesPerPixel") != 3 or int(photograph.get("NumberOfFrames") or 1) != 1:
        raise Refused(f"is DICOM of another kind ({kind}), expected one photograph in colour")
    if photograph.BitsAllocated != 8:
        raise Refused(f"has {photograph.BitsAllocated} bits a channel, expected 8")
    refuse_too_large(photograph.Columns, photograph.Rows)
    image = Image.fromarray(pixel_array(photograph))  # RGB, however it was stored
    image.info["width"] = image.width
    return image


# --- the picture ---------------------------------------------------------------------------------


def crop_field(image, field, image_size):
    """The field in its own shape, in the middle of a square; what is around it is black.

    PIL image and its Field to uint8 (image_size, image_size, 3).
    """
    left, top, right, bottom = field.box
    side = round(max(right - left, bottom - top))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    # beyond the photograph, Pillow's crop is black
    square = image.crop((x, y, x + side, y + side))
    square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    centres = (np.arange(image_size) + 0.5) * side / image_size
    columns, rows = x + centres[None], y + centres[:, None]
    first, last = field.edges(rows)
    inside = (columns > first + field.rim) & (columns < last - field.rim)
    inside &= (rows > top + field.rim) & (rows < bottom - field.rim)
    return np.asarray(square) * inside[..., None]


def stretch_field(image, field, image_size):
    """Circle to square: the field's part of each row becomes a whole row.

    PIL image and its Field to uint8 (image_size, image_size, 3).
    """
    _, top, _, bottom = field.box
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


def subtract_local_average(pixels):
    """4 * image - 4 * blurred image + 128, on uint8 (size, size, 3)."""
    blur = ImageFilter.GaussianBlur(GRAHAM_SIGMA * len(pixels))
    average = np.asarray(Image.fromarray(pixels).filter(blur))
    difference = pixels.astype(np.int16) - average
    return np.clip(4 * difference + 128, 0, 255).astype(np.uint8)

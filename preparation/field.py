"""Where in a fundus photograph the eye is, its field of view; and whether it is a fundus at all.

The field is a disc that may be cut. A circle is fitted to the outline of what differs from the
surround, which is black or of another colour. So a notch of the camera that sticks out, a text in a
corner and a caption below do not move it. (A flood fill from the corners would take several times
as long and see the same outline: what is dark within the eye has no part in it.)

An edit of this file, of a comment even, makes the pictures of photographs anew
(prepare.made_with_of).
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

# Grey levels up to this are the black around the field of view ...
DARK = 7
# ... and so are levels up to this part of the bright ones: around a bright eye the black glows.
STRAY_LIGHT = 0.15
# The outline is found in a picture of about this many pixels: finer ones cost time and find no
# more.
SEARCH_PIXELS = 400
# Pixels that are this close to a coloured surround are surround.
FLAT = 12
# So many circles through three random points of the outline are tried. Where only half of the
# points lie on the disc's rim, as of an eye that is cut, one circle in eight is right.
TRIALS = 300
# A disc is what explains so much of the outline, by its rim or a cut. An ellipse, or one of two
# eyes, explains less.
EXPLAINED = 0.6
# A gradable photograph has at least so many pixels across its field of view, and the field covers
# at least this part of it.
LEAST_PIXELS = 200
LEAST_PART = 0.1
# The mean grey level of a field that is neither black nor white; IDRiD's 507 have 41 to 149.
DARKEST, BRIGHTEST = 15, 235
# Detail of the green of a field, where that is DETAIL_PIXELS across: smoothed by the first number
# of pixels and by the second, it differs by the grey levels, in this part of it, at least. IDRiD's
# 507 have 0.57 and 0.099 (as a WebP of quality 30: 0.40 and 0.089). Blurred by 2 % of its width a
# photograph has 0.07 and 0.043; with a sensor's noise, which is finer than vessels, 0.59 and
# 0.050; as a bad JPEG 0.48 and 0.072. A plain disc with noise has 0.62 and 0.014, a clean drawing
# of a face 0.19 and 0.24.
DETAIL_PIXELS = 256
LEAST_DETAIL = {(1, 3): (1, 0.3), (1.5, 4): (2, 0.085)}


class Field(NamedTuple):
    """The field of view: a disc within a box, in pixels of the photograph."""

    x: float  # centre of the disc
    y: float
    radius: float
    box: tuple  # left, top, right, bottom; where nothing is cut, it encloses the disc
    rim: float = 0.0  # width of the outermost pixels, which are mixed with a coloured surround

    def edges(self, y):
        """(left, right) of the field at the heights `y`, an array."""
        half = np.sqrt(np.maximum(self.radius**2 - (y - self.y) ** 2, 1))
        return np.maximum(self.x - half, self.box[0]), np.minimum(self.x + half, self.box[2])


# --- is it a fundus? -----------------------------------------------------------------------------


def why_no_fundus(image, field, width):
    """Why a PIL image, RGB, is no gradable photograph of a fundus, or "".

    field: its Field, or None. width: pixels across the photograph itself, where `image` is a
    reduced one.
    """
    if field is None:
        return "no round field of view"
    across = round(2 * field.radius * width / image.width)
    if across < LEAST_PIXELS:
        return f"its field of view is {across} pixels across, expected {LEAST_PIXELS} at least"
    left, top, right, bottom = field.box
    part = np.pi / 4 * (right - left) * (bottom - top) / (image.width * image.height)
    if part < LEAST_PART:
        return f"its field of view is only {part:.0%} of the picture"
    size = (DETAIL_PIXELS, DETAIL_PIXELS)
    small = image.resize(size, Image.Resampling.BOX, field.box)
    from_middle = np.abs(np.arange(DETAIL_PIXELS) + 0.5 - DETAIL_PIXELS / 2)
    # the rim itself is no detail
    disc = np.hypot(from_middle, from_middle[:, None]) < 0.86 * DETAIL_PIXELS / 2
    level = np.asarray(small.convert("L"))[disc].mean()
    if not DARKEST <= level <= BRIGHTEST:
        return f"its field of view is {'black' if level < DARKEST else 'white'}"
    green = small.getchannel("G")
    for sigmas, (levels, least) in LEAST_DETAIL.items():
        fine, coarse = (
            np.asarray(green.filter(ImageFilter.GaussianBlur(sigma))).astype(int)
            for sigma in sigmas
        )
        if (np.abs(fine - coarse)[disc] >= levels).mean() < least:
            return "it is blurred, or shows nothing"
    return ""


# --- the field -----------------------------------------------------------------------------------


def find_field(image):
    """The Field of a PIL image, RGB; None where what differs from the surround is no disc."""
    factor = max(1, round(max(image.size) / SEARCH_PIXELS))
    reduced = image.reduce(factor) if factor > 1 else image
    pixels = np.asarray(reduced).astype(int)
    grey = np.asarray(reduced.convert("L"))
    colour = surround_colour(pixels)
    found = None
    if brighter_than_black(grey, colour.max()):
        # The eye is where a pixel is nearer to it than to the surround. A dark rim is no part of it
        # here, because it is none on black.
        distance = np.abs(pixels - colour).max(axis=2)
        differs = distance > FLAT
        halfway = np.median(distance[differs]) / 2 if differs.any() else 0
        differs &= distance > halfway
        found = fit_field(differs & brighter_than_black(np.where(differs, grey, 0)))
        found = found and found._replace(rim=1.5)
    found = found or fit_field(brighter_than_black(grey))
    if found is None:
        return None
    left, top, right, bottom = (factor * edge for edge in found.box)
    box = (left, top, min(right, image.width), min(bottom, image.height))
    x, y, radius = factor * found.x, factor * found.y, factor * found.radius
    return Field(x, y, radius, box, factor * found.rim)


def whole_field(image):
    """The Field of a picture that shows no disc: all that is brighter than black, a rectangle."""
    box = Image.fromarray(brighter_than_black(np.asarray(image.convert("L")))).getbbox()
    box = box or (0, 0, *image.size)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return Field(x, y, 10 * sum(box), box)  # of so large a disc the box is all that is left


def brighter_than_black(grey, level=None):
    """Whether `level`, or each pixel of a grey picture, is brighter than the black around its eye.

    grey: uint8 (height, width). Returns bool, or bool (height, width).
    """
    return (grey if level is None else level) > max(DARK, STRAY_LIGHT * np.percentile(grey, 95))


def surround_colour(pixels):
    """The colour (3,) on which two corners of int (height, width, 3) agree best.

    In the others may be a text.
    """
    side = max(2, min(pixels.shape[:2]) // 25)
    corners = [
        np.median(pixels[rows, columns], axis=(0, 1))
        for rows in (slice(side), slice(-side, None))
        for columns in (slice(side), slice(-side, None))
    ]
    apart = np.abs(np.array(corners)[:, None] - corners).max(axis=2)  # (4, 4)
    return corners[np.sort(apart, axis=1)[:, 1].argmin()]  # column 0 is each corner to itself


def fit_field(mask):
    """The Field that bool (height, width) shows, or None if it shows no disc."""
    points = outline(mask)
    circle = fit_circle(points, max(mask.shape))
    if circle is None:
        return None
    x, y, radius = circle
    from_x = np.arange(mask.shape[1]) + 0.5 - x
    from_y = np.arange(mask.shape[0])[:, None] + 0.5 - y
    disc = from_x**2 + from_y**2 < radius**2
    left, right = cuts(mask & disc, disc, axis=0)
    top, bottom = cuts(mask & disc, disc, axis=1)
    left, right = max(x - radius, left), min(x + radius, right)
    top, bottom = max(y - radius, top), min(y + radius, bottom)
    to_box = np.abs(points[:, [0, 0, 1, 1]] - [left, right, top, bottom]).min(axis=1)
    explained = near(points, circle[None])[0] | (to_box < 2)
    return Field(*circle, (left, top, right, bottom)) if explained.mean() >= EXPLAINED else None


def outline(mask):
    """The outermost points of bool (height, width), float (n, 2) of x and y.

    Points at the edge of the picture are left out: there the photograph is cut, not the eye.
    """
    height, width = mask.shape
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    left, right = mask[rows].argmax(axis=1), width - mask[rows, ::-1].argmax(axis=1)
    top, bottom = mask[:, columns].argmax(axis=0), height - mask[::-1, columns].argmax(axis=0)
    x = np.concatenate([left, right, columns + 0.5, columns + 0.5])
    y = np.concatenate([rows + 0.5, rows + 0.5, top, bottom])
    inner = (x > 1.5) & (x < width - 1.5) & (y > 1.5) & (y < height - 1.5)
    return np.stack([x, y], axis=1)[inner]


def fit_circle(points, size):
    """float (3,): x, y, radius of the circle on which most of `points`, (n, 2), lie; or None.

    Circles through three random points are tried, and the best is fitted to all points near it
    (RANSAC, Fischler and Bolles 1981): so points on a straight cut, a notch or a text do not count.
    size: the longer side of the picture in pixels.
    """
    if len(points) < 20:
        return None
    rng = np.random.default_rng(0)  # the same photograph gives the same picture
    tried = circles_near(points[rng.integers(len(points), size=(TRIALS, 3))])
    tried = tried[(tried[:, 2] > size / 20) & (tried[:, 2] < 1.5 * size)]
    if not len(tried):
        return None
    best = tried[near(points, tried).sum(axis=1).argmax()]
    for _ in range(3):
        best = circles_near(points[near(points, best[None])[0]])
    return best


def circles_near(points):
    """x, y and radius (..., 3) of the circles that lie nearest to points (..., n, 2).

    (x - a)² + (y - b)² = r² is linear in a, b and c = r² - a² - b²: least squares.
    """
    system = np.concatenate([2 * points, np.ones_like(points[..., :1])], axis=-1)
    solved = np.linalg.pinv(system) @ (points**2).sum(axis=-1, keepdims=True)
    a, b, c = np.moveaxis(solved[..., 0], -1, 0)
    return np.stack([a, b, np.sqrt(np.maximum(c + a * a + b * b, 1))], axis=-1)


def near(points, circles):
    """bool (number of circles, number of points): whether a point lies on a circle, up to 1 %."""
    x, y, radius = circles.T[:, :, None]
    from_rim = np.abs(np.hypot(points[:, 0] - x, points[:, 1] - y) - radius)
    return from_rim < np.maximum(1, 0.01 * radius)


def cuts(inside, disc, axis):
    """The first and last line of `disc` of which `inside` fills at least half: there it is cut."""
    wanted = disc.sum(axis=axis)
    lines = np.flatnonzero((wanted > 0) & (inside.sum(axis=axis) >= wanted / 2))
    return (lines[0], lines[-1] + 1) if len(lines) else (0, 0)

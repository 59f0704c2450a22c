"""Where in a fundus photograph the eye is: its field of view, a disc that may be cut.

A disc is fitted to the outline of what differs from the surround. So a notch of the camera that
sticks out, a text or a logo in a corner, and a caption below do not move it, and are left outside.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

# Grey levels up to this are the black around the field of view ...
DARK = 7
# ... and so are levels up to this part of the bright ones: around a bright eye the black glows.
STRAY_LIGHT = 0.15
# The outline is found in a picture of about this many pixels: finer ones cost time and find no
# more.
SEARCH_PIXELS = 400
# A surround of another colour than black is flat: so far may its pixels be from its median colour.
FLAT = 12
# So many circles through three random points of the outline are tried. Where only half of the
# points lie on the disc's rim, as of an eye that is cut, one circle in eight is right.
TRIALS = 300
# The disc counts if the eye fills this part of it, within the cuts ...
FILLED = 0.9
# ... if not more than this part of what differs from the surround lies outside of it ...
OUTSIDE = 0.3
# ... and if so much of the outline is the disc's rim or a cut. An ellipse has less.
EXPLAINED = 0.6
SMALLEST = 0.1  # part of the photograph below which a field of view is implausible


class Field(NamedTuple):
    """The field of view: a disc within a box, in pixels of the photograph."""

    x: float  # centre of the disc
    y: float
    radius: float
    left: float  # the box; where nothing is cut, it encloses the disc
    top: float
    right: float
    bottom: float
    rim: float = 0.0  # width of the outermost pixels, which are mixed with a coloured surround

    def edges(self, y):
        """(left, right) of the field at the heights `y`, an array."""
        half = np.sqrt(np.maximum(self.radius**2 - (y - self.y) ** 2, 1))
        return np.maximum(self.x - half, self.left), np.minimum(self.x + half, self.right)

    def scaled(self, factor):
        return Field(*(factor * number for number in self))


def find_field(image):
    """(Field or None, doubt) of a PIL image, RGB.

    None where what differs from the surround is no disc. doubt: why the field of view is
    implausible; "" if it is not.
    """
    factor = max(1, round(max(image.size) / SEARCH_PIXELS))
    pixels = np.asarray(image.reduce(factor) if factor > 1 else image)
    field = None
    surround = surround_colour(pixels)
    if surround is not None:
        field = fit_field(differs_from(pixels, surround))
        if field:
            field = field._replace(rim=1.5)  # of the pixels of the search
    if field is None:
        mask = brighter_than_black(np.asarray(Image.fromarray(pixels).convert("L")))
        if mask.all():
            return None, "it fills the picture, without a border"
        field = fit_field(mask)
    if field is None:
        return None, "it is not round"
    area = field_mask(field, pixels.shape[:2]).mean()
    doubt = f"it is only {area:.0%} of the picture" if area < SMALLEST else ""
    return field.scaled(factor), doubt


def brighter_than_black(grey):
    """bool (height, width): where a grey picture is brighter than the black around the eye."""
    return grey > max(DARK, STRAY_LIGHT * np.percentile(grey, 95))


def surround_colour(pixels):
    """The colour around the eye if it is flat and not black, float (3,), else None.

    It is the colour on which at least two corners of uint8 (height, width, 3) agree: in one of them
    may be a text.
    """
    side = max(2, min(pixels.shape[:2]) // 25)
    corners = [
        pixels[rows, columns].reshape(-1, 3).astype(float)
        for rows in (slice(side), slice(-side, None))
        for columns in (slice(side), slice(-side, None))
    ]
    medians = np.array([np.median(corner, axis=0) for corner in corners])
    flat = [
        np.abs(corner - median).max(axis=1).mean() < FLAT
        for corner, median in zip(corners, medians, strict=True)
    ]
    alike = np.abs(medians[:, None] - medians).max(axis=2) < FLAT  # (4, 4)
    votes = (alike & flat).sum(axis=1) * flat
    if votes.max() < 2:
        return None
    colour = medians[votes.argmax()]
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    is_black = colour.max() <= max(DARK, STRAY_LIGHT * np.percentile(grey, 95))
    return None if is_black else colour


def differs_from(pixels, colour):
    """bool (height, width): where the eye is in uint8 (height, width, 3) on a coloured surround.

    With the surround made black it is found as on black: a dark rim belongs to it there no more
    than here.
    """
    distance = np.abs(pixels - colour).max(axis=2)
    eye = distance[distance > FLAT]
    # Halfway: where the two are mixed, the line between them is in the middle of the mixed pixels.
    halfway = np.median(eye) / 2 if len(eye) else 0
    differs = distance > max(FLAT, halfway)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    return brighter_than_black(np.where(differs, grey, 0))


def fit_field(mask):
    """The Field that bool (height, width) shows, or None if it shows no disc."""
    points = outline(mask)
    circle = fit_circle(points, max(mask.shape))
    if circle is None:
        return None
    x, y, radius = circle
    disc = Field(x, y, radius, x - radius, y - radius, x + radius, y + radius)
    inside = mask & field_mask(disc, mask.shape)
    left, right = cuts(inside, field_mask(disc, mask.shape), axis=0)
    top, bottom = cuts(inside, field_mask(disc, mask.shape), axis=1)
    field = disc._replace(
        left=max(disc.left, left),
        right=min(disc.right, right),
        top=max(disc.top, top),
        bottom=min(disc.bottom, bottom),
    )
    expected = field_mask(field, mask.shape)
    filled = (between_edges(inside) & expected).sum() / max(1, expected.sum())
    wide = field_mask(disc._replace(radius=1.03 * radius + 1), mask.shape, boxed=False)
    outside = (mask & ~wide).sum() / mask.sum()
    px, py = points.T
    on_cut = np.min(
        [abs(px - field.left), abs(px - field.right), abs(py - field.top), abs(py - field.bottom)],
        axis=0,
    )
    explained = (near(points, circle[None])[0] | (on_cut < 2)).mean()
    if filled < FILLED or outside > OUTSIDE or explained < EXPLAINED:
        return None
    return field


def outline(mask):
    """The outermost points of bool (height, width), float (n, 2) of x and y.

    Points at the edge of the picture are left out: there the photograph is cut, not the eye.
    """
    height, width = mask.shape
    points = []
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    for edge in (mask[rows].argmax(axis=1), width - mask[rows, ::-1].argmax(axis=1)):
        points.append(np.stack([edge, rows + 0.5], axis=1))
    for edge in (mask[:, columns].argmax(axis=0), height - mask[::-1, columns].argmax(axis=0)):
        points.append(np.stack([columns + 0.5, edge], axis=1))
    points = np.concatenate(points).astype(float)
    x, y = points.T
    return points[(x > 1.5) & (x < width - 1.5) & (y > 1.5) & (y < height - 1.5)]


def fit_circle(points, size):
    """(x, y, radius) of the circle on which most of `points`, float (n, 2), lie; or None.

    Circles through three random points are tried, and the best is fitted to all points near it
    (RANSAC, Fischler and Bolles 1981): so points on a straight cut, a notch or a text do not count.
    size: the longer side of the picture in pixels.
    """
    if len(points) < 20:
        return None
    rng = np.random.default_rng(0)  # the same photograph gives the same picture
    best = None
    circles = circles_through(points[rng.integers(len(points), size=(TRIALS, 3))])
    x, y, radius = circles.T
    circles = circles[(radius > size / 20) & (radius < 1.5 * size)]
    if not len(circles):
        return None
    best = circles[near(points, circles).sum(axis=1).argmax()]
    for _ in range(3):
        close = points[near(points, best[None])[0]]
        # (x - a)² + (y - b)² = r² is linear in a, b and c = r² - a² - b².
        system = np.column_stack([2 * close, np.ones(len(close))])
        (a, b, c), *_ = np.linalg.lstsq(system, (close**2).sum(axis=1), rcond=None)
        best = np.array([a, b, np.sqrt(max(c + a * a + b * b, 1))])
    return best


def near(points, circles):
    """bool (number of circles, number of points): whether a point lies on a circle, up to 1 %."""
    x, y, radius = circles.T[:, :, None]
    from_rim = np.abs(np.hypot(points[:, 0] - x, points[:, 1] - y) - radius)
    return from_rim < np.maximum(1, 0.01 * radius)


def circles_through(triples):
    """float (n, 3): x, y, radius of the circles through float (n, 3, 2); of a line they are inf."""
    a, b, c = triples.transpose(1, 0, 2)
    p, q = b - a, c - a
    with np.errstate(divide="ignore", invalid="ignore"):
        twice_area = 2 * (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0])
        p2, q2 = (p**2).sum(axis=1), (q**2).sum(axis=1)
        dx = (q[:, 1] * p2 - p[:, 1] * q2) / twice_area
        dy = (p[:, 0] * q2 - q[:, 0] * p2) / twice_area
    return np.stack([a[:, 0] + dx, a[:, 1] + dy, np.hypot(dx, dy)], axis=1)


def field_mask(field, shape, boxed=True):
    """bool (height, width): which pixels a Field covers."""
    y = np.arange(shape[0])[:, None] + 0.5
    x = np.arange(shape[1])[None] + 0.5
    mask = (x - field.x) ** 2 + (y - field.y) ** 2 < field.radius**2
    if not boxed:
        return mask
    across = (x > field.left) & (x < field.right)
    return mask & across & (y > field.top) & (y < field.bottom)


def between_edges(mask):
    """bool (height, width): all between the first and the last pixel of each row of `mask`."""
    after_first = np.maximum.accumulate(mask, axis=1)
    before_last = np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    return after_first & before_last


def cuts(inside, disc, axis):
    """The first and last line of `disc` of which `inside` fills at least half: there it is cut."""
    wanted = disc.sum(axis=axis)
    lines = np.flatnonzero((wanted > 0) & (inside.sum(axis=axis) >= wanted / 2))
    return (lines[0], lines[-1] + 1) if len(lines) else (0, 0)

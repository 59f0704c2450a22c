"""Draw a synthetic fundus photograph of a given grade of diabetic retinopathy, with NumPy and Pillow only.

    image, lesion_mask = draw(grade=2, rng=np.random.default_rng(0), image_size=128)

Grades: International Clinical Diabetic Retinopathy scale (Wilkinson et al., Ophthalmology 110, 2003). Eye, camera and
lesions have random numbers of their own, so nothing but the lesions can tell the grade. A point is a complex number
x + iy: x right, y down, from the centre of the field of view, whose radius is 1, the unit of length.
A picture is float32 (3, size, size), an alpha float32 (size, size).
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

GRADE_SHARES = (
    0.50,
    0.05,
    0.36,
    0.02,
    0.07,
)  # of grades 0..4, as in OIA-DDR (Li et al., Inf. Sciences 501, 2019)
LESIONS = {  # fewest and most of each, for grades 0..4
    "microaneurysms": ((0, 0), (4, 9), (6, 14), (6, 14), (6, 14)),
    "blots": ((0, 0), (0, 0), (4, 10), (20, 30), (12, 24)),
    "flames": ((0, 0), (0, 0), (0, 2), (3, 7), (2, 6)),
    "exudate clusters": ((0, 0), (0, 0), (0, 3), (1, 4), (1, 4)),
    "cotton wool spots": ((0, 0), (0, 0), (0, 1), (2, 5), (2, 5)),
    "new vessels": ((0, 0), (0, 0), (0, 0), (0, 0), (2, 4)),
    "preretinal haemorrhages": ((0, 0), (0, 0), (0, 0), (0, 0), (0, 2)),
}
FINENESS = 3  # shapes are drawn this many times finer than the picture
CIRCLE = np.exp(2j * np.pi * np.arange(18) / 18)
# Red, green and blue of what lies on the retina. Blood lets light through, so it multiplies; deposits cover.
ARTERY, VEIN, BLOOD, MACULA, EXUDATE, COTTON_WOOL, DISC, CUP, HAZE = np.float32(
    [
        (0.90, 0.60, 0.62),
        (0.72, 0.40, 0.46),
        (0.74, 0.22, 0.28),
        (0.45, 0.10, 0.10),
        (1.00, 0.88, 0.45),
        (0.98, 0.84, 0.62),
        (1.00, 0.72, 0.42),
        (1.00, 0.92, 0.72),
        (0.75, 0.70, 0.55),
    ]
)[:, :, None, None]
FAIR, DARKER, MOTTLED = np.float32([(0.90, 0.50, 0.28), (0.14, 0.17, 0.17), (0.3, 0.9, 0.9)])[
    :, :, None, None
]


def draw(grade, rng, image_size=128, lesions=True):
    """An image, uint8 (image_size, image_size, 3), of a grade 0..4, and the mask of its lesions, bool (size, size).

    The same state of rng gives the same bits and moves on alike whatever the grade; lesions=False only leaves them out.
    """
    if grade not in (0, 1, 2, 3, 4):
        raise ValueError(f"there is no grade {grade!r}: expected 0, 1, 2, 3 or 4")
    eye_rng, camera_rng, lesion_rng = (
        np.random.default_rng(seed) for seed in rng.integers(2**63, size=3)
    )
    field = image_size / 2 * camera_rng.uniform(0.90, 0.99)  # radius of the field of view in pixels
    temporal = int(
        eye_rng.choice((-1, 1))
    )  # the direction from the disc to the fovea: +1 right, -1 left
    disc = complex(-temporal * eye_rng.uniform(0.38, 0.66), eye_rng.normal(0, 0.06))
    fovea = disc + complex(temporal * eye_rng.uniform(0.58, 0.68), eye_rng.uniform(0.02, 0.12))
    eye = {
        "temporal": temporal,
        "disc": disc,
        "fovea": fovea,
        "radius": eye_rng.uniform(0.115, 0.145),
    }
    retina = draw_background(eye, eye_rng, image_size, field)
    veins, arteries = (render(shapes, image_size, field) for shapes in draw_vessels(eye, eye_rng))
    retina = absorb(absorb(retina, arteries, ARTERY), veins, VEIN)
    shapes = draw_lesions(
        grade if lesions else 0, eye, veins + arteries, lesion_rng, image_size, field
    )
    blood, exudates, cotton_wool = (render(some, image_size, field, blur) for some, blur in shapes)
    retina = absorb(cover(cover(retina, cotton_wool, COTTON_WOOL), exudates, EXUDATE), blood, BLOOD)
    mask = np.maximum(np.maximum(blood, exudates), cotton_wool) > 0.2
    return take_photograph(retina, camera_rng, field), mask


def absorb(picture, alpha, colour):
    return picture * (1 - alpha * (1 - colour))


def cover(picture, alpha, colour):
    return picture + alpha * (colour - picture)


def distances(image_size, field, point=0j, stretch=1.0):
    """Each pixel's distance from a point, float32 (size, size); `stretch` makes the circles higher than wide."""
    axis = (np.arange(image_size) + 0.5 - image_size / 2) / field
    return np.hypot(
        np.float32(axis - point.real), np.float32((axis - point.imag) / stretch)[:, None]
    )


def smooth_noise(rng, image_size, bumps):
    """A random field with about `bumps` bumps across, float32 (size, size), mean 0, deviation about 1."""
    coarse = Image.fromarray(rng.standard_normal((bumps + 3, bumps + 3), np.float32))
    return np.asarray(
        coarse.resize((image_size, image_size), Image.Resampling.BICUBIC)
    ) * np.float32(1.3)


def render(shapes, image_size, field, blur=0.0):
    """Alpha of shapes (points, width, ink 0..1): lines, and polygons where the width is 0."""
    image = Image.new("L", (image_size * FINENESS, image_size * FINENESS))
    pen, centre, scale = (
        ImageDraw.Draw(image),
        image_size * FINENESS / 2 * (1 + 1j),
        field * FINENESS,
    )
    for points, width, ink in shapes:
        xy = (points * scale + centre).view(np.float64).tolist()  # x, y, x, y, ...
        if width:
            pen.line(xy, round(255 * ink), max(1, round(width * scale)), "curve")
        else:
            pen.polygon(xy, round(255 * ink))
    soft = image.reduce(FINENESS).filter(ImageFilter.GaussianBlur(blur * scale / FINENESS))
    return np.asarray(soft, np.float32) / 255


def spot(rng, point, radius, length=1.0, direction=0.0):
    """The shape of a roundish, irregular spot; `length` stretches it along `direction`."""
    x, y = rng.normal(0, 0.1, (2, 2))
    rim = 1 + (x[0] + 1j * y[0]) * CIRCLE**2 + (x[1] + 1j * y[1]) * CIRCLE**3
    return (
        point + radius * rim.real * (CIRCLE + (length - 1) * CIRCLE.real) * np.exp(1j * direction),
        0,
        1.0,
    )


def draw_background(eye, rng, image_size, field):
    """The retina without vessels: pigment, choroid, macula and optic disc; a picture of reflectances."""
    colour = FAIR - rng.uniform() * DARKER
    # Mottled in the very colours of the lesions, or else the mean colour of a region would tell them from afar.
    mottle = sum(
        size * smooth_noise(rng, image_size, bumps)
        for bumps, size in ((3, 0.08), (8, 0.08), (24, 0.03))
    )
    cast = np.stack([smooth_noise(rng, image_size, 5) for _ in range(3)])
    retina = colour * (1 + mottle * MOTTLED + 0.02 * cast)
    from_fovea = distances(image_size, field, eye["fovea"])
    macula = rng.uniform(0.25, 0.45) * np.exp(-((from_fovea / 0.20) ** 2)) + 0.2 * np.exp(
        -((from_fovea / 0.06) ** 2)
    )
    from_disc = distances(image_size, field, eye["disc"], stretch=1.12)
    from_cup = distances(image_size, field, eye["disc"] + 0.02 * eye["temporal"], stretch=1.12)
    nerve_fibres = 1 + 0.15 * np.exp(-((from_disc / 0.35) ** 2))  # they shine around the disc
    retina = absorb(retina, macula, MACULA) * nerve_fibres
    retina = cover(retina, 0.47 + 0.47 * np.tanh((eye["radius"] - from_disc) / 0.015), DISC)
    return cover(
        retina, 0.4 + 0.4 * np.tanh((eye["radius"] * rng.uniform(0.35, 0.6) - from_cup) / 0.02), CUP
    )


def draw_vessels(eye, rng):
    """Four pairs of a vein and an artery that leave the disc, branch and thin: shapes of veins, of arteries."""
    veins, arteries = [], []
    for vertical in (-1, 1):
        turn = (
            vertical * eye["temporal"]
        )  # the sense in which a direction turns away from the temporal side
        for first, last, bend in (
            (1.75, -0.05, 0.33),
            (2.2, 2.75, 0.30),
        ):  # arcade around the macula; nasal branch
            for shapes, width in ((arteries, 0.024), (veins, 0.033)):
                start = eye["disc"] + complex(*rng.normal(0, 0.015, 2)) + 0.02j * vertical
                headings = np.pi * (eye["temporal"] == -1) + turn * (
                    np.array([first, last]) + rng.normal(0, 0.16, 2)
                )
                width = width * rng.uniform(0.85, 1.15) * (1.0 if first < 2 else 0.7)
                grow(
                    shapes,
                    eye,
                    rng,
                    start,
                    headings,
                    bend * rng.uniform(0.8, 1.25),
                    width,
                    length=1.9,
                )
    return veins, arteries


def grow(shapes, eye, rng, start, headings, bend, width, length, depth=0):
    """Add a vessel that turns from headings[0] to headings[1] within about `bend`, and its branches."""
    way = np.arange(0, length, 0.03)
    wobble = rng.normal(0, 0.15, 2) @ np.sin(
        way / np.array([[0.045], [0.11]]) + rng.uniform(0, 6.28, (2, 1))
    )
    heading = headings[1] + (headings[0] - headings[1]) * np.exp(-way / bend) + wobble
    points = start + 0.03 * np.cumsum(np.exp(1j * heading))
    widths = width * (1 - 0.6 * way / length)
    beyond = (np.abs(points) > 1.02) | (
        np.abs(points - eye["fovea"]) < 0.16
    )  # the fovea has no vessels
    end = int(np.argmax(beyond)) if beyond.any() else len(points)
    for i in range(0, end - 1, 10):  # in pieces, each of the width and the ink of its first point
        shapes.append((points[i : min(i + 11, end)], widths[i], min(1.0, 0.4 + 30 * widths[i])))
    side, at = rng.choice((-1, 1)), int(rng.integers(6, 11))
    while depth < 2 and at < end - 3:
        fork, drift, thinner, shorter = rng.uniform(size=4)
        branch = heading[at] + side * np.array([0.6 + 0.5 * fork, 0.1 + 0.5 * drift])
        reach = (0.35 + 0.5 * shorter) * (1.0 if depth == 0 else 0.55)
        grow(
            shapes,
            eye,
            rng,
            points[at],
            branch,
            0.2,
            widths[at] * (0.5 + 0.22 * thinner),
            reach,
            depth + 1,
        )
        side, at = -side, at + int(rng.integers(6, 13))


def draw_lesions(grade, eye, vessels, rng, image_size, field):
    """What a grade asks for: the shapes, and the blur, of blood, of exudates and of cotton wool spots."""
    blood, exudates, cotton_wool = [], [], []

    def places(lesion, reach=0.86, around=0j):
        """Points of the retina off the disc and off the vessels, where a small lesion can be seen."""
        count = rng.integers(*LESIONS[lesion][grade], endpoint=True)
        points = around + reach * np.sqrt(rng.random(20 * count)) * np.exp(
            2j * np.pi * rng.random(20 * count)
        )
        points = points[(np.abs(points) < 0.86) & (np.abs(points - eye["disc"]) > 0.2)]
        columns, rows = (
            (z * field + image_size / 2).astype(int) for z in (points.real, points.imag)
        )
        return points[vessels[rows, columns] < 0.2][:count]

    for shapes, lesion, radii in (
        (cotton_wool, "cotton wool spots", (0.030, 0.055)),
        (blood, "microaneurysms", (0.017, 0.022)),
        (blood, "blots", (0.022, 0.042)),
    ):
        for point in places(lesion):
            shapes.append(
                spot(rng, point, rng.uniform(*radii), rng.uniform(1, 1.5), rng.uniform(0, 3.14))
            )
    for point in places("flames"):  # blood between the nerve fibres, which run away from the disc
        for _ in range(5):
            along = np.angle(point - eye["disc"]) + rng.normal(0, 0.1)
            nearby = point + complex(*rng.normal(0, 0.012, 2))
            blood.append(spot(rng, nearby, rng.uniform(0.008, 0.014), 4, along))
    for centre in places("exudate clusters", 0.45, eye["fovea"]):
        ring = rng.uniform(0.03, 0.11)
        for angle in rng.uniform(0, 6.28, rng.integers(6, 18)):
            point = centre + rng.normal(ring, ring / 3) * np.exp(1j * angle)
            exudates.append(spot(rng, point, rng.uniform(0.009, 0.020), rng.uniform(1, 1.6), angle))
    for tuft, point in enumerate(
        places("new vessels", 0.7)
    ):  # tangles of fine vessels, on the disc or elsewhere
        root = eye["disc"] if tuft == 0 and rng.uniform() < 0.5 else point
        for angle in rng.uniform(0, 6.28, 12):
            way = np.cumsum(np.exp(1j * (angle + np.cumsum(rng.normal(0, 0.6, 14)))))
            blood += [
                (root + 0.018 * way[:11], 0.009, 0.75),
                (root + 0.018 * way[10:], 0.009, 0.75),
            ]
    for point in places("preretinal haemorrhages", 0.6):  # blood sinks: a boat with a level top
        boat = (
            rng.uniform(0.10, 0.17) * (CIRCLE.real + 1j * rng.uniform(0.4, 0.8) * CIRCLE.imag)[:10]
        )
        blood.append((point + boat, 0, 1.0))
    return (blood, 0.005), (exudates, 0.0), (cotton_wool, 0.02)


def take_photograph(retina, rng, field):
    """Light, lens and sensor: a picture of reflectances to an image, uint8 (size, size, 3)."""
    image_size = retina.shape[1]
    lamp = distances(
        image_size, field, complex(*rng.normal(0, 0.22, 2))
    )  # the light is never quite centred
    light = rng.uniform(0.6, 1.0) * (
        1 - rng.uniform(0.1, 0.3) * lamp**2 + 0.05 * smooth_noise(rng, image_size, 2)
    )
    picture = retina * light * np.float32(rng.normal(1, (0.03, 0.06, 0.12)))[:, None, None]
    radius, axis = distances(image_size, field), np.arange(image_size) + 0.5 - image_size / 2
    picture = cover(
        picture, rng.uniform(0, 0.12) * (radius**2) ** 2, HAZE
    )  # stray light at the rim
    inside = np.clip((1 - radius) * field + 0.5, 0, 1)
    inside[np.abs(axis) > rng.choice((0.85, 1.0, 1.0)) * field] = (
        0  # some sensors are lower than the circle
    )
    pixels = (255 * np.clip(picture * inside, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    soft = Image.fromarray(pixels).filter(
        ImageFilter.GaussianBlur(rng.uniform(0, 0.6) * image_size / 128)
    )
    noise = rng.uniform(1, 4) * rng.standard_normal(pixels.shape, np.float32) * inside[..., None]
    return np.clip(np.asarray(soft, np.float32) + noise, 0, 255).astype(np.uint8)

"""Draw a synthetic fundus photograph of a given grade of diabetic retinopathy (DR).

    image = draw(grade=2, rng=np.random.default_rng(0), image_size=128)

A fundus photograph shows the back of the eye: the optic disc (bright, where nerve and vessels
enter), the vessels, and the macula (darker, around the fovea, where sight is sharpest). It needs
only NumPy and Pillow. Grades are those of the International Clinical Diabetic Retinopathy scale
(Wilkinson et al., Ophthalmology 110, 2003).

Eye, camera and lesions have random numbers of their own, so nothing but the lesions can tell the
grade: a network that learns these pictures has learnt lesions. This must stay so.

An edit of this file, of a comment even, makes all drawn pictures anew (prepare.made_with_of).

Conventions, for the whole module:
    point      a complex number x + iy, x to the right, y down. The origin is the centre of the
               field of view (the round part of the picture that shows retina), and the field's
               radius is 1, the unit of all lengths. A product with exp(i angle) is a rotation.
    field      the radius of the field of view in pixels
    scale      pixels of a length of 1: the field, times the camera's magnification
    picture    reflectances, float32 (3, size, size): red, green, blue, mostly in 0..1
    alpha      how much of a pixel something covers, float32 (size, size) in 0..1
    image      what a camera stores, uint8 (size, size, 3)
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# What prepared.json, model cards and the wire call these pictures.
KIND = "synthetic"

# The shares of grades 0 to 4, as in OIA-DDR (Li et al., Information Sciences 501, 2019).
GRADE_SHARES = (0.50, 0.05, 0.36, 0.02, 0.07)

# How many of each lesion an eye has, by grade: (fewest, most). A grade that is not named has none.
LESIONS = {
    "microaneurysms": {1: (4, 9), 2: (6, 14), 3: (6, 14), 4: (6, 14)},
    "blots": {2: (4, 10), 3: (20, 30), 4: (12, 24)},
    "flames": {2: (0, 2), 3: (3, 7), 4: (2, 6)},
    "exudate clusters": {2: (0, 3), 3: (1, 4), 4: (1, 4)},
    "cotton wool spots": {2: (0, 1), 3: (2, 5), 4: (2, 5)},
    "new vessels": {4: (2, 4)},
    "preretinal haemorrhages": {4: (0, 2)},
}

# Pillow draws lines and polygons without smooth edges. So shapes are drawn this many times finer
# than the picture, and then reduced.
FINENESS = 3

# Points of the unit circle, the outline of every spot.
CIRCLE = np.exp(2j * np.pi * np.arange(18) / 18)

# Angles for spots that have no preferred direction: half a turn is enough, as an ellipse is the
# same after half a turn.
HALF_TURN = 3.14
FULL_TURN = 6.28


def rgb(red, green, blue):
    """Red, green and blue as float32 (3, 1, 1), which multiplies a picture (3, size, size)."""
    return np.float32([red, green, blue])[:, None, None]


# Blood and pigment let light through, so they multiply what is below them (see `absorb`).
ARTERY = rgb(0.90, 0.60, 0.62)
VEIN = rgb(0.72, 0.40, 0.46)
BLOOD = rgb(0.74, 0.22, 0.28)
MACULA = rgb(0.45, 0.10, 0.10)
# Deposits, the disc and stray light hide what is below them (see `cover`).
EXUDATE = rgb(1.00, 0.88, 0.45)
COTTON_WOOL = rgb(0.98, 0.84, 0.62)
DISC = rgb(1.00, 0.72, 0.42)
CUP = rgb(1.00, 0.92, 0.72)  # the pale hollow in the middle of the disc
HAZE = rgb(0.75, 0.70, 0.55)
# The retina itself: the lightest one, how much darker it can be, and how much it is mottled.
FAIR = rgb(0.90, 0.50, 0.28)
DARKER = rgb(0.14, 0.17, 0.17)
MOTTLED = rgb(0.3, 0.9, 0.9)


class Camera(NamedTuple):
    """How a fundus camera differs from the plain one, which these defaults describe."""

    gain: tuple = (1.0, 1.0, 1.0)  # factors of red, green and blue
    gamma: float = 1.0  # below 1 lightens the shadows, above 1 darkens them
    blur: float = 0.0  # added to the radius of the lens's blur, in pixels at 128 pixels a side
    noise: float = 0.0  # added to the deviation of the sensor's noise, in grey levels
    magnification: float = 1.0  # above 1 a narrower view of a larger retina
    sensor_heights: tuple = (0.85, 1.0, 1.0)  # one is chosen; below 1 it cuts the circle


class Hospital(NamedTuple):
    """Who comes to a hospital, and what photographs them."""

    name: str
    grade_shares: tuple  # of grades 0 to 4
    lesions: dict  # like LESIONS; what is not named is never seen there
    camera: Camera


# What every hospital is where hospitals are equal.
EQUAL_HOSPITAL = Hospital("", GRADE_SHARES, LESIONS, Camera())

# Three hospitals that differ as hospitals do: other patients come to them, and other cameras
# photograph them. Half of the patients of each are healthy. A network that was trained at one
# hospital alone has never seen the lesions of the others' patients, and misses them. The cameras
# differ mildly: with strong differences the scores of the hospitals differ, too, and no single
# threshold serves all of them. benchmarks/story.py measures what federation brings.
SCREENING_CENTRE = Hospital(
    # Finds early disease: a few points of blood, little else. A plain, well-kept camera.
    "screening centre",
    grade_shares=(0.5, 0.2, 0.3, 0.0, 0.0),
    lesions={
        "microaneurysms": {1: (4, 9), 2: (6, 14)},
        "blots": {2: (4, 10)},
    },
    camera=Camera(sensor_heights=(1.0,)),
)
MACULA_CLINIC = Hospital(
    # Treats what threatens the macula: swelling, and the fat that it leaves. Its patients have
    # fewer points of blood than lesions of other kinds, and many have none. Its camera looks
    # closer, and its light is colder.
    "macula clinic",
    grade_shares=(0.5, 0.0, 0.3, 0.2, 0.0),
    lesions={
        "microaneurysms": {2: (0, 2), 3: (0, 3)},
        "blots": {3: (0, 1)},
        "exudate clusters": {2: (1, 4), 3: (2, 5)},
        "cotton wool spots": {2: (0, 2), 3: (1, 4)},
    },
    camera=Camera(
        gain=(0.96, 1.02, 1.06),
        gamma=0.96,
        noise=0.3,
        magnification=1.05,
        sensor_heights=(0.85,),
    ),
)
REFERRAL_CLINIC = Hospital(
    # Gets the eyes that others send: much blood, and vessels that should not be there. An old
    # camera, warm, soft and noisy, with a wide view.
    "referral clinic",
    grade_shares=(0.5, 0.0, 0.0, 0.15, 0.35),
    lesions={
        "microaneurysms": {3: (6, 14), 4: (6, 14)},
        "blots": {3: (20, 30), 4: (12, 24)},
        "flames": {3: (3, 7), 4: (2, 6)},
        "new vessels": {4: (2, 4)},
        "preretinal haemorrhages": {4: (0, 2)},
    },
    camera=Camera(
        gain=(1.04, 0.97, 0.94),
        gamma=1.06,
        blur=0.12,
        noise=0.6,
        magnification=0.97,
        sensor_heights=(1.0, 0.93),
    ),
)
HOSPITALS = (SCREENING_CENTRE, MACULA_CLINIC, REFERRAL_CLINIC)


def hospital_of(name):
    """The one of HOSPITALS with that name; EQUAL_HOSPITAL for any other, as for ""."""
    return {hospital.name: hospital for hospital in HOSPITALS}.get(name, EQUAL_HOSPITAL)


class Eye(NamedTuple):
    """What is where in an eye; lesions and vessels are drawn around it."""

    temporal: int  # the direction from the disc to the fovea: +1 to the right, -1 to the left
    disc: complex  # the centre of the optic disc
    fovea: complex  # the centre of the macula
    disc_radius: float


class Shape(NamedTuple):
    """Something to draw: a line of a width, or a filled polygon where the width is 0."""

    points: np.ndarray  # complex (n,)
    width: float = 0.0
    ink: float = 1.0  # the alpha to draw with, 0..1


def draw(grade, rng, image_size=128, hospital=EQUAL_HOSPITAL):
    """Draw one eye: an image, uint8 (image_size, image_size, 3).

    grade       0 to 4
    rng         np.random.Generator. The same state gives the same bits, and the generator moves
                on by the same amount whatever the grade.
    hospital    whose patient it is, and whose camera
    """
    eye_rng, camera_rng, lesion_rng = [
        np.random.default_rng(seed) for seed in rng.integers(2**63, size=3)
    ]
    camera = hospital.camera
    field = image_size / 2 * camera_rng.uniform(0.90, 0.99)
    scale = field * camera.magnification
    eye = choose_eye(eye_rng)
    retina = draw_background(eye, eye_rng, image_size, scale)

    vein_shapes, artery_shapes = draw_vessels(eye, eye_rng, reach=1.02 / camera.magnification)
    veins = render(vein_shapes, image_size, scale)
    arteries = render(artery_shapes, image_size, scale)
    retina = absorb(retina, arteries, ARTERY)
    retina = absorb(retina, veins, VEIN)

    counts = {kind: hospital.lesions.get(kind, {}).get(grade, (0, 0)) for kind in LESIONS}
    blood_shapes, exudate_shapes, cotton_wool_shapes = draw_lesions(
        counts, eye, veins + arteries, lesion_rng, scale
    )
    blood = render(blood_shapes, image_size, scale, blur=0.005)
    exudates = render(exudate_shapes, image_size, scale)
    cotton_wool = render(cotton_wool_shapes, image_size, scale, blur=0.02)
    # Blood comes last because it lies above the deposits.
    retina = cover(retina, cotton_wool, COTTON_WOOL)
    retina = cover(retina, exudates, EXUDATE)
    retina = absorb(retina, blood, BLOOD)
    return take_photograph(retina, camera, camera_rng, field)


def choose_eye(rng):
    """A left or a right eye, with its disc and its fovea where such an eye may have them."""
    temporal = int(rng.choice((-1, 1)))
    disc = complex(-temporal * rng.uniform(0.38, 0.66), rng.normal(0, 0.06))
    fovea = disc + complex(temporal * rng.uniform(0.58, 0.68), rng.uniform(0.02, 0.12))
    return Eye(temporal, disc, fovea, disc_radius=rng.uniform(0.115, 0.145))


# --- pixels: how shapes become alphas, and alphas become pictures -------------------------------


def absorb(picture, alpha, colour):
    """The picture seen through something that lets `colour` of the light pass."""
    return picture * (1 - alpha * (1 - colour))


def cover(picture, alpha, colour):
    """The picture below something opaque of that colour."""
    return picture + alpha * (colour - picture)


def distances(image_size, scale, point=0j, stretch=1.0):
    """The distance of each pixel from a point, float32 (size, size).

    A `stretch` above 1 makes lines of equal distance ellipses that are higher than wide.
    """
    axis = (np.arange(image_size) + 0.5 - image_size / 2) / scale
    right = np.float32(axis - point.real)
    down = np.float32((axis - point.imag) / stretch)
    return np.hypot(right, down[:, None])


def smooth_noise(rng, image_size, bumps):
    """A random field with about `bumps` bumps across: float32 (size, size), mean 0, deviation 1."""
    coarse = Image.fromarray(rng.standard_normal((bumps + 3, bumps + 3), np.float32))
    fine = coarse.resize((image_size, image_size), Image.Resampling.BICUBIC)
    # Interpolation averages neighbours and so lowers the deviation: 1.3 brings it back to about 1.
    return np.asarray(fine) * np.float32(1.3)


def render(shapes, image_size, scale, blur=0.0):
    """The alpha of a list of Shape; `blur` is the radius of a Gaussian, in lengths."""
    image = Image.new("L", (image_size * FINENESS, image_size * FINENESS))
    pen = ImageDraw.Draw(image)
    centre = image_size * FINENESS / 2 * (1 + 1j)
    fine_scale = scale * FINENESS
    for points, width, ink in shapes:
        # Complex numbers lie in memory as x, y, x, y ..., which is what Pillow wants.
        xy = (points * fine_scale + centre).view(np.float64).tolist()
        if width:
            pen.line(xy, round(255 * ink), max(1, round(width * fine_scale)), "curve")
        else:
            pen.polygon(xy, round(255 * ink))
    soft = image.reduce(FINENESS).filter(ImageFilter.GaussianBlur(blur * fine_scale / FINENESS))
    return np.asarray(soft, np.float32) / 255


def spot(rng, point, radius, length=1.0, direction=0.0):
    """A roundish, irregular spot; it is `length` times as long along `direction` as across."""
    x, y = rng.normal(0, 0.1, (2, 2))
    # The second and third harmonic of the outline: without them every spot would be an ellipse.
    rim = 1 + (x[0] + 1j * y[0]) * CIRCLE**2 + (x[1] + 1j * y[1]) * CIRCLE**3
    stretched = CIRCLE + (length - 1) * CIRCLE.real
    return Shape(point + radius * rim.real * stretched * np.exp(1j * direction))


# --- the healthy eye ----------------------------------------------------------------------------


def draw_background(eye, rng, image_size, scale):
    """The retina without vessels: pigment, macula and optic disc; a picture."""
    base = FAIR - rng.uniform() * DARKER
    # Mottled in the very colours of the lesions, and as large. Else the mean colour of a region
    # would tell the grade from afar, and a network could pass without finding one lesion.
    mottle = (
        0.08 * smooth_noise(rng, image_size, 3)
        + 0.08 * smooth_noise(rng, image_size, 8)
        + 0.03 * smooth_noise(rng, image_size, 24)
    )
    cast = np.stack([smooth_noise(rng, image_size, 5) for _ in range(3)])
    retina = base * (1 + mottle * MOTTLED + 0.02 * cast)

    from_fovea = distances(image_size, scale, eye.fovea)
    wide_shade = rng.uniform(0.25, 0.45) * np.exp(-((from_fovea / 0.20) ** 2))
    dark_centre = 0.2 * np.exp(-((from_fovea / 0.06) ** 2))
    retina = absorb(retina, wide_shade + dark_centre, MACULA)

    # The layer of nerve fibres is thickest around the disc, and shines.
    from_disc = distances(image_size, scale, eye.disc, stretch=1.12)
    retina = retina * (1 + 0.15 * np.exp(-((from_disc / 0.35) ** 2)))
    # tanh is a step with a soft edge: the disc covers what is within its radius.
    disc = 0.47 + 0.47 * np.tanh((eye.disc_radius - from_disc) / 0.015)
    retina = cover(retina, disc, DISC)
    from_cup = distances(image_size, scale, eye.disc + 0.02 * eye.temporal, stretch=1.12)
    cup_radius = eye.disc_radius * rng.uniform(0.35, 0.6)
    cup = 0.4 + 0.4 * np.tanh((cup_radius - from_cup) / 0.02)
    return cover(retina, cup, CUP)


def draw_vessels(eye, rng, reach):
    """Four pairs of a vein and an artery leave the disc, branch and thin: (veins, arteries).

    Both are lists of Shape. Above and below, one pair runs in an arcade around the macula, and a
    thinner one runs to the nasal side. They end at `reach` from the centre.
    """
    veins = []
    arteries = []
    # Of a vessel on the temporal and one on the nasal side: the angle at which it leaves the disc,
    # the angle to which it turns, within which length it turns, and its width as a factor.
    courses = ((1.75, -0.05, 0.33, 1.0), (2.2, 2.75, 0.30, 0.7))
    for vertical in (-1, 1):  # above, below
        for first_angle, last_angle, bend, thinner in courses:
            for shapes, width in ((arteries, 0.024), (veins, 0.033)):
                jitter = complex(*rng.normal(0, 0.015, 2))
                start = eye.disc + jitter + 0.02j * vertical
                angles = np.array([first_angle, last_angle]) + rng.normal(0, 0.16, 2)
                # Angles count from the temporal direction, up or down; headings from the right.
                forward = np.pi if eye.temporal == -1 else 0.0
                headings = forward + vertical * eye.temporal * angles
                width = width * rng.uniform(0.85, 1.15) * thinner
                bend_here = bend * rng.uniform(0.8, 1.25)
                grow(shapes, eye, rng, reach, start, headings, bend_here, width, length=1.9)
    return veins, arteries


def grow(shapes, eye, rng, reach, start, headings, bend, width, length, depth=0):
    """Add a vessel and its branches to `shapes`.

    It turns from headings[0] to headings[1] (radians, from the x axis) within about `bend`.
    """
    step = 0.03
    way = np.arange(0, length, step)
    # Two waves of random height and phase, so that no vessel is straight.
    heights = rng.normal(0, 0.15, 2)
    phases = rng.uniform(0, FULL_TURN, (2, 1))
    wobble = heights @ np.sin(way / np.array([[0.045], [0.11]]) + phases)
    heading = headings[1] + (headings[0] - headings[1]) * np.exp(-way / bend) + wobble
    points = start + step * np.cumsum(np.exp(1j * heading))
    widths = width * (1 - 0.6 * way / length)

    # It ends outside the field of view, or at the fovea, which has no vessels.
    beyond = (np.abs(points) > reach) | (np.abs(points - eye.fovea) < 0.16)
    end = int(np.argmax(beyond)) if beyond.any() else len(points)
    # Pillow draws a line in one width, so a vessel that thins is drawn in pieces. The thinner, the
    # paler. Neighbouring pieces share a point, or there would be gaps.
    for i in range(0, end - 1, 10):
        ink = min(1.0, 0.4 + 30 * widths[i])
        shapes.append(Shape(points[i : min(i + 11, end)], widths[i], ink))

    side = rng.choice((-1, 1))
    at = int(rng.integers(6, 11))
    while depth < 2 and at < end - 3:
        fork, drift, thinner, shorter = rng.uniform(size=4)
        branch = heading[at] + side * np.array([0.6 + 0.5 * fork, 0.1 + 0.5 * drift])
        branch_length = (0.35 + 0.5 * shorter) * (1.0 if depth == 0 else 0.55)
        branch_width = widths[at] * (0.5 + 0.22 * thinner)
        grow(
            shapes, eye, rng, reach, points[at], branch, 0.2, branch_width, branch_length, depth + 1
        )
        side = -side  # branches leave to the left and to the right in turn
        at += int(rng.integers(6, 13))


# --- lesions ------------------------------------------------------------------------------------


def draw_lesions(counts, eye, vessels, rng, scale):
    """The lesions of an eye: the shapes of blood, of exudates and of cotton wool spots.

    counts      how many of each kind: (fewest, most)
    vessels     alpha of all vessels; small lesions keep off them, or nobody could see them
    """

    def choose_points(lesion, reach=0.86, around=0j):
        count = rng.integers(*counts[lesion], endpoint=True)
        return choose_visible_points(rng, count, eye, vessels, scale, reach, around)

    cotton_wool = draw_spots(rng, choose_points("cotton wool spots"), (0.030, 0.055))
    blood = draw_spots(rng, choose_points("microaneurysms"), (0.017, 0.022))
    blood += draw_spots(rng, choose_points("blots"), (0.022, 0.042))
    for point in choose_points("flames"):
        blood += draw_flame(rng, point, eye)
    exudates = []
    for centre in choose_points("exudate clusters", 0.45, eye.fovea):
        exudates += draw_exudate_cluster(rng, centre)
    for number, point in enumerate(choose_points("new vessels", 0.7)):
        # New vessels grow on the disc or elsewhere.
        on_disc = number == 0 and rng.uniform() < 0.5
        blood += draw_new_vessels(rng, eye.disc if on_disc else point)
    for point in choose_points("preretinal haemorrhages", 0.6):
        blood.append(draw_preretinal_haemorrhage(rng, point))
    return blood, exudates, cotton_wool


def choose_visible_points(rng, count, eye, vessels, scale, reach, around):
    """At most `count` points within `reach` of the point `around`, off the disc and the vessels."""
    # Twenty candidates for each point: so many are drawn however few are kept, and one is nearly
    # always good. The square root spreads them evenly over the area.
    radii = reach * np.sqrt(rng.random(20 * count))
    points = around + radii * np.exp(2j * np.pi * rng.random(20 * count))
    points = points[(np.abs(points) < 0.86) & (np.abs(points - eye.disc) > 0.2)]
    middle = vessels.shape[0] / 2
    columns = (points.real * scale + middle).astype(int)
    rows = (points.imag * scale + middle).astype(int)
    return points[vessels[rows, columns] < 0.2][:count]


def draw_spots(rng, points, radii):
    """One spot at each point: microaneurysms, blot haemorrhages or cotton wool spots."""
    return [
        spot(rng, point, rng.uniform(*radii), rng.uniform(1, 1.5), rng.uniform(0, HALF_TURN))
        for point in points
    ]


def draw_flame(rng, point, eye):
    """Blood between the nerve fibres, which run away from the disc: yields five long spots."""
    for _ in range(5):
        along = np.angle(point - eye.disc) + rng.normal(0, 0.1)
        nearby = point + complex(*rng.normal(0, 0.012, 2))
        yield spot(rng, nearby, rng.uniform(0.008, 0.014), 4, along)


def draw_exudate_cluster(rng, centre):
    """Small deposits of fat on a ring: yields a spot for each."""
    ring = rng.uniform(0.03, 0.11)
    for angle in rng.uniform(0, FULL_TURN, rng.integers(6, 18)):
        point = centre + rng.normal(ring, ring / 3) * np.exp(1j * angle)
        radius = rng.uniform(0.009, 0.020)
        yield spot(rng, point, radius, rng.uniform(1, 1.6), angle)


def draw_new_vessels(rng, root):
    """A tangle of fine vessels that grow from one point: yields their pieces."""
    for angle in rng.uniform(0, FULL_TURN, 12):
        turns = np.cumsum(rng.normal(0, 0.6, 14))
        way = root + 0.018 * np.cumsum(np.exp(1j * (angle + turns)))
        yield Shape(way[:11], width=0.009, ink=0.75)
        yield Shape(way[10:], width=0.009, ink=0.75)


def draw_preretinal_haemorrhage(rng, point):
    """Blood in front of the retina sinks: it has the form of a boat, with a level top."""
    radius = rng.uniform(0.10, 0.17)
    depth = rng.uniform(0.4, 0.8)
    lower_half = CIRCLE[:10]  # y points down
    return Shape(point + radius * (lower_half.real + 1j * depth * lower_half.imag))


# --- the camera ---------------------------------------------------------------------------------


def take_photograph(retina, camera, rng, field):
    """Light, lens and sensor: a picture of reflectances becomes an image."""
    image_size = retina.shape[1]
    # The light is never quite centred, and falls off towards the rim.
    lamp = distances(image_size, field, complex(*rng.normal(0, 0.22, 2)))
    brightness = rng.uniform(0.6, 1.0)
    fall_off = rng.uniform(0.1, 0.3) * lamp**2
    light = brightness * (1 - fall_off + 0.05 * smooth_noise(rng, image_size, 2))
    tint = rgb(*rng.normal(1, (0.03, 0.06, 0.12)))
    picture = retina * light * tint

    radius = distances(image_size, field)
    stray_light = rng.uniform(0, 0.12) * (radius**2) ** 2
    picture = cover(picture, stray_light, HAZE)
    inside = np.clip((1 - radius) * field + 0.5, 0, 1)
    # Some sensors are lower than the circle, and cut it off above and below.
    axis = np.arange(image_size) + 0.5 - image_size / 2
    inside[np.abs(axis) > rng.choice(camera.sensor_heights) * field] = 0

    seen = np.clip(picture * rgb(*camera.gain) * inside, 0, 1) ** np.float32(camera.gamma)
    pixels = (255 * seen).astype(np.uint8).transpose(1, 2, 0)
    # Lens and sensor are described for 128 pixels a side.
    lens = ImageFilter.GaussianBlur((rng.uniform(0, 0.6) + camera.blur) * image_size / 128)
    soft = np.asarray(Image.fromarray(pixels).filter(lens), np.float32)
    noise_level = rng.uniform(1, 4) + camera.noise  # in grey levels
    noise = noise_level * rng.standard_normal(pixels.shape, np.float32) * inside[..., None]
    return np.clip(soft + noise, 0, 255).astype(np.uint8)

"""Photographs of eyes, and of what is none, for the tests: all made here, none of a patient."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from preparation import synthetic


def eye(size=240, width=360, height=320, grade=2, seed=4):
    """A synthetic eye on black, with room around it: a PIL image."""
    pixels = synthetic.draw(grade, np.random.default_rng(seed), size)
    image = Image.new("RGB", (width, height))
    image.paste(Image.fromarray(pixels), ((width - size) // 2, (height - size) // 2))
    return image


def noisy(image):
    """As a camera gives it: no plane of one colour is quite one colour."""
    noise = np.random.default_rng(0).normal(0, 4, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def drawing(colour, *shapes, noise=True):
    """A picture of ellipses (box, colour) on a plane, as a camera gives it, or clean."""
    image = Image.new("RGB", (640, 480), colour)
    pen = ImageDraw.Draw(image)
    for box, fill in shapes:
        pen.ellipse(box, fill=fill)
    return noisy(image) if noise else image


def landscape():
    sky = np.linspace((90, 140, 220), (200, 220, 240), 480)[:, None].repeat(640, 1)
    image = Image.fromarray(sky.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((480, 40, 560, 120), fill=(255, 240, 180))
    pen.polygon([(0, 480), (0, 300), (200, 180), (400, 320), (640, 240), (640, 480)], (40, 110, 50))
    return noisy(image)


def oct_scan():
    """Layers of the retina seen from the side, in grey: optical coherence tomography."""
    y, x = np.mgrid[:400, :760]
    layer = 200 + 40 * np.sin(x / 120) - 60 * np.exp(-(((x - 380) / 60) ** 2))
    bright = 180 * np.exp(-(((y - layer) / 25) ** 2)) + 90 * np.exp(-(((y - layer - 70) / 15) ** 2))
    speckle = np.random.default_rng(0).gamma(2, 12, bright.shape)
    return Image.fromarray((bright + speckle).clip(0, 255).astype(np.uint8)).convert("RGB")


def two_eyes():
    image = Image.new("RGB", (720, 320))
    image.paste(eye(), (0, 0))
    image.paste(eye(seed=5), (360, 0))
    return image


def blurred_jpeg():
    """A bad JPEG has detail of its own."""
    file = BytesIO()
    eye(480, 640, 560).filter(ImageFilter.GaussianBlur(16)).save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def grey_disc(level):
    return drawing("black", ((100, 40, 500, 440), (level, level, level)))


SKIN, LIPS = (215, 170, 140), (170, 60, 60)
FACE = [
    ((120, 380, 520, 700), (40, 50, 90)),
    ((210, 60, 430, 380), SKIN),
    ((260, 180, 300, 205), "black"),
    ((340, 180, 380, 205), "black"),
    ((280, 300, 360, 325), LIPS),
]
SMILEY = [
    ((40, 40, 440, 440), (250, 210, 40)),
    ((150, 150, 190, 210), "black"),
    ((290, 150, 330, 210), "black"),
    ((150, 280, 330, 360), LIPS),
]
NO_FUNDUS = {
    "landscape": landscape,
    "face": lambda: drawing((120, 120, 125), *FACE),
    "smiley": lambda: drawing("white", *SMILEY, noise=False),
    "white sheet": lambda: drawing((250, 250, 248)),
    "oct": oct_scan,
    "blurred": lambda: eye().filter(ImageFilter.GaussianBlur(8)),
    "blurred, then a JPEG": blurred_jpeg,
    "tiny": lambda: eye().resize((20, 13)),
    "far away": lambda: eye(220, 1600, 1200),
    "two eyes": two_eyes,
    "overexposed": lambda: grey_disc(252),
    "plain": lambda: grey_disc(128),
    "underexposed": lambda: grey_disc(11),
    "close-up": lambda: eye(600, 300, 300),
}

"""From encoded image to pixels."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO

import numpy as np

from dsvlm.data.index import IMAGE_FORMATS
from dsvlm.data.reader import BadSample

MAX_PIXELS = 64 * 10**6
DECODERS = ("pillow", "simplejpeg")


def resolve_decoder(name: str) -> str:
    """The decoder that `auto` stands for here; another name unchanged."""
    if name != "auto":
        return name
    return "simplejpeg" if find_spec("simplejpeg") else "pillow"


def check_decoder(name: str) -> None:
    """ValueError when a decoder cannot be had here: another one would give other pixels."""
    assert name in DECODERS, name
    if not find_spec({"pillow": "PIL"}.get(name, name)):
        raise ValueError(
            f"data.decoder: the images of this run are decoded by {name}, which is not installed here: "
            f"pip install {name}; a run that has not begun can have data.decoder: pillow"
        )


def decoder_version(name: str) -> str:
    """A decoder with its version and that of Pillow, which does the rest: they decide pixels."""
    return ", ".join(f"{package} {version(package)}" for package in dict.fromkeys((name, "pillow")))


def make_decoder(name: str, size: int, dct_scaling: bool = False) -> Callable[..., np.ndarray]:
    """A function from an encoded image to uint8 [3, size, size]; see `decode_image`.

    name: pillow, or simplejpeg for the JPEGs it can do; dct_scaling: JPEGs twice as large as needed, or more, are
    decoded at a half, quarter or eighth. Both change pixels a little. A second argument, if any, is an array of the
    result's shape that the image may be written to; the result is then that array or another one. In memory the colours
    of a pixel lie next to each other, as decoders have them: reordering costs as much as a fifth of the decoding.
    """
    check_decoder(name)
    return partial({"pillow": _pillow, "simplejpeg": _simplejpeg}[name], size, dct_scaling)


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode to RGB and resize (bicubic) to a square; nothing is cropped, so normalised boxes stay valid.

    Pixels are as they are stored: an EXIF orientation is ignored here and by every decoder, so a photo that relies on
    it trains lying down, as its boxes do. Turn such photos when they are converted.

    data: encoded PNG, JPEG or WebP. Returns uint8 [3, size, size]. BadSample when the header states more than 64
    megapixels (nothing is decoded then) or the image does not decode.
    """
    return _pillow(size, False, data).copy()


def _pillow(size: int, dct_scaling: bool, data: bytes, into: np.ndarray | None = None) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                if dct_scaling:
                    image.draft("RGB", (size, size))
                colours = image if image.mode == "RGB" else to_rgb(image)  # either call copies in any case
                if image.size != (size, size):
                    colours = colours.resize((size, size), Image.Resampling.BICUBIC)
                return _pixels(colours).transpose(2, 0, 1)
    except BadSample:
        raise
    except UnidentifiedImageError as error:  # its own words name an object in memory, another one in every run
        raise BadSample("the image does not decode (it is no PNG, JPEG or WebP)") from error
    except Exception as error:  # Pillow's parsers raise nearly every type on damaged bytes
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})") from error
    raise _too_large(width, height)


def _simplejpeg(size: int, dct_scaling: bool, data: bytes, into: np.ndarray | None = None) -> np.ndarray:
    import simplejpeg
    from PIL import Image

    least = size if dct_scaling else 0
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if width * height > MAX_PIXELS:
            raise _too_large(width, height)
        if colours not in ("YCbCr", "RGB", "Gray"):
            return _pillow(size, dct_scaling, data)
        if into is not None and height == width == size:
            simplejpeg.decode_jpeg(data, "RGB", buffer=into.transpose(1, 2, 0))
            return into
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least)
    except BadSample:
        raise
    except ValueError:  # another format, or a JPEG that it refuses
        return _pillow(size, dct_scaling, data)
    if pixels.shape[:2] != (size, size):
        pixels = _pixels(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return pixels.transpose(2, 0, 1)


def to_rgb(image):
    """A Pillow image as 8-bit RGB; BadSample when its values have no known range.

    Of 16-bit grey (X-rays, depth) the upper byte is kept: Pillow's own conversion clips at 255, which is all white.
    """
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):  # which of them a 16-bit PNG has depends on Pillow's version
        grey = np.asarray(image)
        if grey.size and not 0 <= grey.min() <= grey.max() < 2**16:
            raise BadSample(f"the image has grey values from {grey.min()} to {grey.max()}: 16 bits are read at most")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadSample("the image has floating-point pixels (mode F), of which nobody knows the range: store 8 bits")
    return image.convert("RGB")


def _pixels(image) -> np.ndarray:
    """uint8 [height, width, 3] of a Pillow image in RGB, read-only.

    As `np.asarray(image)`, which has the pixels written in pieces of 64 KiB and then joined: a copy more than needed,
    three percent of the decoding. Pillow has no public call that writes them at once; without its private one we wait.
    """
    from PIL import Image

    if not hasattr(Image, "_getencoder"):
        return np.asarray(image)
    image.load()
    width, height = image.size
    encoder = Image._getencoder("RGB", "raw", ("RGB",))
    encoder.setimage(image.im, (0, 0, width, height))
    _, status, data = encoder.encode(max(3 * width * height, 4 * width))  # it wants room for a row of four bytes
    assert status == 1, status
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _too_large(width: int, height: int) -> BadSample:
    return BadSample(f"the image has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")

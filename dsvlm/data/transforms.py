"""From encoded image to pixels."""

from io import BytesIO

import numpy as np

from dsvlm.data.index import IMAGE_FORMATS
from dsvlm.data.reader import BadSample

MAX_PIXELS = 64 * 10**6


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode to RGB and resize (bicubic) to a square; nothing is cropped, so normalised boxes stay valid.

    data: encoded PNG, JPEG or WebP. Returns uint8 [3, size, size]. BadSample when the header states more than 64
    megapixels (nothing is decoded then) or the image does not decode.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
                return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except Exception as error:         # Pillow's parsers raise nearly every type on damaged bytes
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})") from error
    raise BadSample(f"the image has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")

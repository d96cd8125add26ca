"""Photographs of data sets that name them in JSON: which are read, and how they get smaller."""

from io import BytesIO
from pathlib import Path, PurePath

SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
JPEG_QUALITY = 90


def is_inside(name: str) -> bool:
    """Whether a file name stays in the directory that it is relative to."""
    return bool(name) and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def resized(path: Path, data: bytes, size: tuple[int, int], resize: int | None) -> tuple[str, bytes]:
    """(extension, bytes) of a photograph of `size`, its shorter side `resize` pixels at most; None = as it is."""
    from PIL import Image

    from dsvlm.data.index import IMAGE_FORMATS
    from dsvlm.data.transforms import to_rgb

    if resize is None:
        return SUFFIXES[path.suffix.lower()], data
    scale = min(1.0, resize / min(size))
    wanted = tuple(max(1, round(side * scale)) for side in size)
    encoded = BytesIO()
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.draft("RGB", tuple(2 * side for side in wanted))       # JPEG only: decodes no more than is needed
            to_rgb(image).resize(wanted, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=JPEG_QUALITY)
    except Exception as error:         # Pillow's parsers raise nearly every type on damaged bytes
        raise ValueError(f"{path} does not decode ({error}): download it again") from error
    return "jpg", encoded.getvalue()

"""Decoders: the same picture by each, other formats and odd JPEGs too; sizes from the header; reduced decoding."""

import importlib.util
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dsvlm.data import transforms
from dsvlm.data.reader import BadSample
from dsvlm.data.transforms import decode_image, make_decoder, resolve_decoder, to_rgb

pytest.importorskip("simplejpeg")


def picture(width: int, height: int, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    data = BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    image.save(data, kind, **options)
    return data.getvalue()


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("data", [
    picture(60, 40), picture(24, 24), picture(41, 77, subsampling=0), picture(50, 50, "L"), picture(50, 50, "CMYK"),
    picture(64, 48, progressive=True), picture(30, 50, kind="PNG"), picture(30, 50, kind="WEBP"),
    picture(30, 50, "P", kind="PNG"),
])  # fmt: skip
def test_decoders_agree(data):
    pillow = make_decoder("pillow", 24)(data)
    other = make_decoder("simplejpeg", 24)(data)
    assert pillow.shape == other.shape == (3, 24, 24) and pillow.dtype == other.dtype == np.uint8
    assert np.array_equal(decode_image(data, 24), pillow) and decode_image(data, 24).flags.writeable
    assert far(pillow, other) < 1 and np.abs(pillow.astype(int) - other).max() <= 8


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("size", [1, 24, 60, 701])
@pytest.mark.parametrize("name", ["pillow", "simplejpeg"])
def test_pixels_are_those_of_plain_pillow(name, size, private, monkeypatch):
    """Also where a version of Pillow lacks the private call that we use."""
    data = picture(60, 60, kind="PNG")
    with Image.open(BytesIO(data)) as image:
        plain = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    if not private:
        encoder, tobytes = Image._getencoder, Image.Image.tobytes

        def own(image, *args):                # Pillow has it under another name then
            with monkeypatch.context() as patch:
                patch.setattr(Image, "_getencoder", encoder, raising=False)
                return tobytes(image, *args)

        monkeypatch.setattr(Image.Image, "tobytes", own)
        monkeypatch.delattr(Image, "_getencoder")
    assert np.array_equal(make_decoder(name, size)(data), plain)


@pytest.mark.parametrize("name", ["pillow", "simplejpeg"])
def test_reduced_decoding_stays_near_and_is_never_too_small(name, monkeypatch):
    shapes, sizes, resize = ((400, 300), (199, 96), (96, 400), (48, 48)), [], Image.Image.resize
    pictures = [picture(*shape) for shape in shapes]
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args: (sizes.append(self.size), resize(self, *args))[1])
    for shape, data in zip(shapes, pictures, strict=True):
        full, reduced = (make_decoder(name, 48, dct)(data) for dct in (False, True))
        assert far(full, reduced) < 6
        assert min(shape) >= 96 or np.array_equal(full, reduced)
    assert (100, 75) in sizes and (100, 48) in sizes and (48, 200) in sizes and min(map(min, sizes)) >= 48


def grey16(width: int, height: int) -> Image.Image:
    """A 16-bit grey ramp, as an X-ray or a map of depth is stored."""
    return Image.fromarray(np.linspace(3000, 63000, width * height).astype(np.uint16).reshape(height, width))


@pytest.mark.parametrize("name", ["pillow", "simplejpeg"])
def test_sixteen_bits_of_grey_keep_their_upper_byte(name):
    ramp, data = grey16(24, 24), BytesIO()
    ramp.save(data, "PNG")
    wanted = np.stack([np.asarray(ramp) >> 8] * 3).astype(np.uint8)
    assert np.array_equal(make_decoder(name, 24)(data.getvalue()), wanted) and len(np.unique(wanted)) > 200
    for mode, values in (("I", np.int32), ("I;16B", ">u2")):
        other = Image.fromarray(np.asarray(ramp).astype(values))
        assert other.mode == mode and np.array_equal(np.asarray(to_rgb(other)), wanted.transpose(1, 2, 0))


def test_pictures_without_a_known_range_are_refused():
    with pytest.raises(BadSample, match="floating-point pixels"):
        to_rgb(Image.new("F", (4, 4), 0.5))
    with pytest.raises(BadSample, match="grey values from 0 to 70000"):
        to_rgb(Image.fromarray(np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_other_modes_are_converted_as_pillow_does(mode):
    made = Image.open(BytesIO(picture(30, 20, kind="PNG"))).convert("L" if mode[0] in "1LP" else "RGB").convert(mode)
    assert to_rgb(made).tobytes() == made.convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["pillow", "simplejpeg"])
def test_bombs_and_damage_are_refused(name, monkeypatch):
    decode, data = make_decoder(name, 24), picture(60, 40)
    for cut in (0, 1, 20, len(data) // 2):
        with pytest.raises(BadSample, match="does not decode"):
            decode(data[:cut])
    monkeypatch.setattr(transforms, "MAX_PIXELS", 60 * 40 - 1)
    import simplejpeg

    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)  # nothing is decoded: the header is enough
    with pytest.raises(BadSample, match="60 x 40 pixels"):
        decode(data)


@pytest.mark.parametrize("name", ["pillow", "simplejpeg"])
def test_what_is_no_image_has_the_same_reason_in_every_run(name):
    with pytest.raises(BadSample) as error:
        make_decoder(name, 24)(b"GIF89a, or text")
    assert error.value.reason == "the image does not decode (it is no PNG, JPEG or WebP)"


def test_auto_is_what_is_installed(monkeypatch):
    assert resolve_decoder("auto") == "simplejpeg" and resolve_decoder("pillow") == "pillow"
    there = importlib.util.find_spec
    monkeypatch.setattr(transforms, "find_spec", lambda name: None if name == "simplejpeg" else there(name))
    assert resolve_decoder("auto") == "pillow"
    make_decoder("pillow", 8)
    with pytest.raises(ValueError, match="decoded by simplejpeg, which is not installed here: pip install"):
        make_decoder("simplejpeg", 8)

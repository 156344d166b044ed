"""All bytes become pixels or a reason; pixels are upright, in RGB, on white; base64 becomes bytes."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest

from vixml_jax.images import decoding
from vixml_jax.images.decoding import MAX_SCANS, BadImage, count_pixels, decode, from_data_uri
from vixml_jax.images.preprocess import PREPROCESSING

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def png_header(width, height):
  """A PNG with this size in its header and without pixels."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
def test_lossless_formats_give_the_pixels_that_were_saved(kind, options):
  np.testing.assert_array_equal(decode(encoded(Image.fromarray(PIXELS), kind, **options)), PIXELS)


def test_alpha_is_composited_on_white():
  rgba = np.zeros((1, 3, 4), np.uint8)
  rgba[0] = [[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]  # 51 / 255 = 0.2.
  expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
  np.testing.assert_allclose(decode(encoded(Image.fromarray(rgba)))[0].astype(int), expected, atol=1)


def test_gray_with_alpha_is_composited_on_white():
  image = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), "LA")
  np.testing.assert_array_equal(decode(encoded(image))[0], [[0] * 3, [255] * 3])


def test_transparent_color_of_a_palette_becomes_white():
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
  image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
  np.testing.assert_array_equal(decode(encoded(image))[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90]])
  np.testing.assert_array_equal(
    decode(encoded(image, transparency=1))[0], [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
  )


def test_transparent_color_of_rgb_becomes_white():
  image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
  np.testing.assert_array_equal(decode(encoded(image, transparency=(4, 5, 6)))[0], [[1, 2, 3], [255, 255, 255]])


def test_16_bit_gray_keeps_its_upper_byte():
  image = Image.fromarray(np.array([[0x0000, 0x12FF, 0x8001, 0xFFFF]], np.uint16))
  assert image.mode == "I;16"
  np.testing.assert_array_equal(decode(encoded(image))[0, :, 0], [0x00, 0x12, 0x80, 0xFF])


def test_one_bit_and_gray_become_rgb():
  gray = decode(encoded(Image.fromarray(np.array([[7, 200]], np.uint8))))
  np.testing.assert_array_equal(gray[0], [[7] * 3, [200] * 3])
  bits = decode(encoded(Image.new("1", (2, 1), 1)))
  np.testing.assert_array_equal(bits[0], [[255] * 3] * 2)


def test_cmyk_jpeg_becomes_rgb():
  # Ink of a plain JPEG: no cyan, full magenta and yellow, no black, which is red.
  red = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
  np.testing.assert_allclose(red[8, 8].astype(int), [255, 0, 0], atol=3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind):
  frames = [Image.new("RGB", (6, 4), color) for color in ("#ff0000", "#00ff00", "#0000ff")]
  options = {"lossless": True} if kind == "WEBP" else {}
  blob = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
  assert Image.open(io.BytesIO(blob)).n_frames == 3
  np.testing.assert_array_equal(decode(blob), np.full((4, 6, 3), [255, 0, 0]))


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1)])
def test_one_pixel_wide_is_an_image(size):
  assert decode(encoded(Image.new("RGB", size, "#010203"))).tolist() == [[[1, 2, 3]] * size[0]] * size[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  blob = encoded(Image.fromarray(PIXELS), exif=exif)
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(blob))))
  assert expected.shape == ((5, 7, 3) if orientation < 5 else (7, 5, 3))
  np.testing.assert_array_equal(decode(blob), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # As in `decoding`; the filters of pytest come first.
@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_image_with_broken_exif_is_decoded(exif):
  assert decode(encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)).shape == (5, 7, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_that_is_converted_in_bands_has_the_pixels_of_one_that_is_converted_at_once(
  mode, orientation, monkeypatch
):
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = Image.fromarray(RNG.integers(0, 256, (23, 7, 3), np.uint8))
  image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if mode == "I;16" else image.convert(mode)
  blob = encoded(image, exif=exif, **({"transparency": 3} if mode == "P" else {}))
  at_once = decode(blob)
  monkeypatch.setattr(decoding, "_PIXELS_AT_ONCE", 7 * 5)
  np.testing.assert_array_equal(decode(blob), at_once)
  resized = [PREPROCESSING["huggingface"](pixels, 8) for pixels in (at_once, np.ascontiguousarray(at_once))]
  np.testing.assert_array_equal(*resized)  # Also where rows and columns are exchanged.


# Below Pillow's own limit; where Pillow warns; where Pillow refuses; and the maximum of a header.
@pytest.mark.parametrize("side", [8193, 12_000, 20_000, 2**31 - 1])
def test_enormous_image_is_refused_by_its_header(side):
  with pytest.raises(BadImage, match="more than 67,108,864 pixels"):
    decode(png_header(side, side))


def test_largest_image_is_decoded_and_one_row_more_is_not(monkeypatch):
  monkeypatch.setattr(decoding, "MAX_PIXELS", 35)
  assert decode(encoded(Image.fromarray(PIXELS))).shape == (5, 7, 3)
  with pytest.raises(BadImage, match="pixels"):
    decode(encoded(Image.new("RGB", (7, 6))))


@pytest.mark.parametrize(
  "blob, reason",
  [
    (b"", decoding.EMPTY),
    (b"<html>404 Not Found</html>", decoding.NOT_AN_IMAGE),
    (b"\x89PNG\r\n\x1a\n", decoding.NOT_AN_IMAGE),
    # Formats that Pillow reads but `decode` does not; PostScript would start a program.
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", decoding.NOT_AN_IMAGE),
    (b"P6 1 1 255\n\x01\x02\x03", decoding.NOT_AN_IMAGE),
    (png_header(4, 4), decoding.DAMAGED),
  ],
  ids=["no bytes", "html", "signature alone", "postscript", "netpbm", "no pixels"],
)
def test_bytes_that_are_not_an_image_have_a_reason(blob, reason):
  with pytest.raises(BadImage) as caught:
    decode(blob)
  assert str(caught.value) == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_image_is_bad_at_any_length(kind):
  blob = encoded(Image.fromarray(RNG.integers(0, 256, (32, 32, 3), np.uint8)), kind)
  for length in range(0, len(blob) - 64, max(1, len(blob) // 50)):
    with pytest.raises(BadImage) as caught:
      decode(blob[:length])
    assert str(caught.value) in decoding.REASONS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_give_pixels_or_a_reason(kind):
  blob = encoded(Image.fromarray(RNG.integers(0, 256, (24, 24, 3), np.uint8)), kind)
  bad = 0
  for seed in range(150):
    rng = np.random.default_rng(seed)
    damaged = bytearray(blob)
    for place in rng.integers(0, min(len(blob), 200), 3):
      damaged[place] = rng.integers(256)
    try:
      pixels = decode(bytes(damaged))
      assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    except BadImage as error:
      assert str(error) in decoding.REASONS
      bad += 1
  assert bad


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_base64_gives_the_bytes_of_an_image(prefix):
  blob = encoded(Image.fromarray(PIXELS))
  assert from_data_uri(prefix + base64.b64encode(blob).decode()) == blob


@pytest.mark.parametrize("text", ["data:image/png,AAAA", "data:image/png", "A", "AAA=AAA", "A A=", "é", "../a.png"])
def test_text_that_is_not_base64_has_a_reason(text):
  with pytest.raises(ValueError, match="^not base64"):
    from_data_uri(text)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_image_of_several_strips_is_converted_as_a_whole_one(monkeypatch, mode):
  pixels = RNG.integers(0, 256, (37, 20, 4), np.uint8)
  blob = encoded(Image.fromarray(pixels, "RGBA").convert(mode))
  whole = decode(blob)
  monkeypatch.setattr(decoding, "_PIXELS_AT_ONCE", 100)  # Five rows.
  np.testing.assert_array_equal(decode(blob), whole)


def test_pixels_are_counted_without_decoding():
  for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
    assert count_pixels(encoded(Image.fromarray(PIXELS), kind)) == 35
  assert count_pixels(png_header(8_192, 8_192)) == 2**26  # It has no pixels.
  for blob, reason in ((png_header(8_193, 8_192), decoding.TOO_LARGE), (b"GIF", decoding.NOT_AN_IMAGE)):
    with pytest.raises(BadImage, match=reason):
      count_pixels(blob)


def test_a_jpeg_with_very_many_scans_is_refused_by_its_markers():
  blob = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
  scans = blob.count(b"\xff\xda")
  last = blob[blob.rindex(b"\xff\xda") : -2]
  most = blob[:-2] + last * (MAX_SCANS - scans) + blob[-2:]
  assert decode(most).shape == PIXELS.shape and count_pixels(most) == 35
  for check in (decode, count_pixels):
    with pytest.raises(BadImage, match="more than 100 scans"):
      check(blob[:-2] + last * (MAX_SCANS - scans + 1) + blob[-2:])

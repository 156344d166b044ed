"""Encoded images of every format and mode, and mutations of them."""

import functools
import io
import struct
import zlib

from hypothesis import strategies as st
import numpy as np
from PIL import Image

from tests.bad_input import values
from tests.bad_input.campaign import Expected, refused
from vixml_jax.images import decoding

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_TURNS = {1: 0, 8: 1, 3: 2, 6: 3}  # EXIF orientation -> quarter turns to the left that make the image upright.
SIDES = st.sampled_from([8_193, 12_000, 30_000, 65_535, 2**31 - 1])
ANY = "pixels of any value"


def encode(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def random_pixels(rng, channels=3):
  """Returns uint8 [height, width, channels]."""
  shape = rng.randrange(1, 24), rng.randrange(1, 24), channels
  return np.frombuffer(rng.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)


def chunk(name, data, length=None):
  """Returns a chunk of a PNG; its length may be another than that of its data."""
  return (
    struct.pack(">I", len(data) if length is None else length)
    + name
    + data
    + struct.pack(">I", zlib.crc32(name + data))
  )


def png_parts(blob):
  """Returns the chunks of a PNG as name and data."""
  found, place = [], 8
  while place < len(blob):
    (length,) = struct.unpack_from(">I", blob, place)
    found.append((blob[place + 4 : place + 8], blob[place + 8 : place + 8 + length]))
    place += 12 + length
  return found


def png_of(parts):
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def with_size(kind, blob, width, height):
  """Returns an image with another size in its header."""
  if kind == "PNG":
    (name, header), *rest = png_parts(blob)
    return png_of([(name, struct.pack(">II", width, height) + header[8:]), *rest])
  content = bytearray(blob)
  width, height = min(width, 0xFFFF), min(height, 0xFFFF)
  if kind == "GIF":
    struct.pack_into("<HH", content, 6, width, height)
    struct.pack_into("<HH", content, content.index(b"\x2c\0\0\0\0") + 5, width, height)
  elif kind == "BMP":
    struct.pack_into("<ii", content, 18, width, height)
  elif kind == "JPEG":
    start = next(content.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in content)
    struct.pack_into(">HH", content, start + 5, height, width)
  else:  # The canvas of the extended header, of 24 bits a side.
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
  return bytes(content)


@functools.cache
def _packed(byte, count):
  return zlib.compress(byte * count, 1)


def _gray(pixels):
  return np.repeat(pixels, 3, axis=2)


def _on_white(pixels):
  """Returns RGBA on white, in the arithmetic of real numbers."""
  color, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
  return color * alpha + 255 * (1 - alpha)


MUTATIONS = {}


def mutation(function):
  @st.composite
  def cases(draw):
    return function(draw, draw(values.SEEDS))

  MUTATIONS[function.__name__.strip("_").replace("_", " ")] = cases()
  return function


def _any_image(draw, rng):
  """Returns the name of a format and a file of it."""
  kind = draw(st.sampled_from(FORMATS))
  modes = {"JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "L", "1", "P")}
  mode = draw(st.sampled_from(modes.get(kind, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"))))
  image = Image.fromarray(random_pixels(rng))
  image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if mode == "I;16" else image.convert(mode)
  return kind, encode(image, kind)


@mutation
def lossless(draw, rng):
  pixels = random_pixels(rng)
  kind, options = draw(st.sampled_from([("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})]))
  return encode(Image.fromarray(pixels), kind, **options), Expected(pixels)


@mutation
def gray_and_one_bit(draw, rng):
  gray = random_pixels(rng, 1)
  if draw(st.booleans()):
    gray = (gray > 127).astype(np.uint8) * 255
    image = Image.fromarray(gray[..., 0]).convert("1")
  else:
    image = Image.fromarray(gray[..., 0])
  return encode(image, draw(st.sampled_from(["PNG", "BMP"]))), Expected(_gray(gray))


@mutation
def sixteen_bits(draw, rng):
  gray = random_pixels(rng, 2).view(np.uint16)
  return encode(Image.fromarray(gray[..., 0]), "PNG"), Expected(_gray((gray >> 8).astype(np.uint8)))


@mutation
def alpha(draw, rng):
  pixels = random_pixels(rng, 4)
  kind, options = draw(st.sampled_from([("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]))
  return encode(Image.fromarray(pixels), kind, **options), Expected(("near", _on_white(pixels), 1))


@mutation
def gray_with_alpha(draw, rng):
  pixels = random_pixels(rng, 2)
  full = np.concatenate([_gray(pixels[..., :1]), pixels[..., 1:]], axis=2)
  return encode(Image.fromarray(pixels), "PNG"), Expected(("near", _on_white(full), 1))


@mutation
def palette(draw, rng):
  palette = np.frombuffer(rng.randbytes(256 * 3), np.uint8).reshape(256, 3)
  places = random_pixels(rng, 1)[..., 0]
  image = Image.fromarray(places).convert("L")
  image = Image.frombytes("P", image.size, places.tobytes())
  image.putpalette(palette.tobytes())
  kind = draw(st.sampled_from(["PNG", "GIF", "BMP"]))
  wanted, options = palette[places], {}
  if kind == "PNG" and draw(st.booleans()):  # One color is transparent.
    options["transparency"] = int(places[0, 0])
    wanted = np.where((places == places[0, 0])[..., None], 255, wanted)
  return encode(image, kind, **options), Expected(wanted)


@mutation
def cmyk(draw, rng):
  inks = rng.choices(range(256), k=4)
  image = Image.new("CMYK", (rng.randrange(1, 30), rng.randrange(1, 30)), tuple(inks))
  color = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
  wanted = np.broadcast_to(np.array(color), (image.height, image.width, 3))
  return encode(image, "JPEG", quality=95), Expected(("near", wanted, 8))


@mutation
def animation(draw, rng):
  frames = [Image.new("RGB", (9, 7), tuple(rng.choices(range(256), k=3))) for _ in range(rng.randrange(2, 5))]
  kind, options = draw(st.sampled_from([("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})]))
  blob = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
  return blob, Expected(np.asarray(frames[0]))


@mutation
def turned_by_exif(draw, rng):
  pixels = random_pixels(rng)
  orientation = draw(st.sampled_from(sorted(_TURNS)))
  exif = Image.Exif()
  exif[0x0112] = orientation
  kind, options = draw(st.sampled_from([("PNG", {}), ("WEBP", {"lossless": True})]))
  return encode(Image.fromarray(pixels), kind, exif=exif, **options), Expected(np.rot90(pixels, _TURNS[orientation]))


@mutation
def broken_exif(draw, rng):
  exif = b"Exif\0\0" + draw(st.one_of(st.binary(max_size=40), st.binary(max_size=30).map(lambda tail: b"MM\0*" + tail)))
  pixels = random_pixels(rng)
  return encode(Image.fromarray(pixels), "PNG", exif=exif), Expected(("any order", pixels))


@mutation
def size_of_the_header(draw, rng):
  kind = draw(st.sampled_from(FORMATS))
  options = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"} if kind == "WEBP" else {}  # Extended headers have a canvas.
  image = Image.fromarray(random_pixels(rng)).convert("P" if kind == "GIF" else "RGB")
  width, height = draw(SIDES), draw(SIDES)
  # A canvas of WebP that differs from its frame is damaged.
  reasons = (decoding.TOO_LARGE, decoding.DAMAGED, decoding.NOT_AN_IMAGE) if kind == "WEBP" else (decoding.TOO_LARGE,)
  return with_size(kind, encode(image, kind, **options), width, height), refused(*reasons)


@mutation
def zero_or_wrong_size_in_the_header(draw, rng):
  kind = draw(st.sampled_from(["PNG", "BMP", "GIF"]))
  image = Image.fromarray(random_pixels(rng)).convert("P" if kind == "GIF" else "RGB")
  width, height = draw(st.sampled_from([(0, 5), (5, 0), (0, 0), (4_000, 4_000), (8_192, 8_192)]))
  return with_size(kind, encode(image, kind), width, height), Expected((ANY, (height, width, 3)), decoding.REASONS)


@mutation
def cut_off(draw, rng):
  _, blob = _any_image(draw, rng)
  return values.cut_off(draw, blob), Expected((ANY, None), decoding.REASONS)


@mutation
def cut_in_half(draw, rng):
  kind = draw(st.sampled_from(FORMATS))
  noise = Image.fromarray(np.frombuffer(rng.randbytes(40 * 40 * 3), np.uint8).reshape(40, 40, 3))
  blob = encode(noise.convert("P") if kind == "GIF" else noise, kind)
  return blob[: draw(st.integers(1, len(blob) // 2))], refused(*decoding.REASONS)


@mutation
def flipped_bits(draw, rng):
  _, blob = _any_image(draw, rng)
  return values.bytes_flipped(draw, blob), Expected((ANY, None), decoding.REASONS)


@mutation
def flipped_bits_of_a_png(draw, rng):
  pixels = random_pixels(rng)
  blob = encode(Image.fromarray(pixels), "PNG")
  return values.bytes_flipped(draw, blob), Expected(pixels, decoding.REASONS)


@mutation
def text_chunks_of_a_png(draw, rng):
  pixels = random_pixels(rng)
  header, *rest = png_parts(encode(Image.fromarray(pixels), "PNG"))
  size = draw(st.sampled_from([10, 10**6, 3 * 10**7]))
  text = draw(
    st.sampled_from(
      [
        (b"zTXt", b"k\0\0" + _packed(b"a", size)),
        (b"iTXt", b"k\0\1\0\0\0" + _packed(b"a", size)),
        (b"iCCP", b"k\0\0" + _packed(b"\0", size)),
        (b"tEXt", b"k\0" + b"a" * min(size, 10**6)),
      ]
    )
  )
  return png_of([header, text, *rest]), Expected(pixels, decoding.REASONS)


@mutation
def length_of_a_chunk(draw, rng):
  header, *rest = png_parts(encode(Image.fromarray(random_pixels(rng)), "PNG"))
  length = draw(st.sampled_from([2**31 - 1, 2**32 - 1, 10**6]))
  # Pillow reads the pixels that are there, and takes nothing for the others.
  return b"\x89PNG\r\n\x1a\n" + chunk(*header) + chunk(*rest[0], length), Expected((ANY, None), decoding.REASONS)


@mutation
def bomb_of_a_png(draw, rng):
  """More rows of pixels than the header says, well packed."""
  header, _, end = png_parts(encode(Image.new("RGB", (8, 8), tuple(rng.choices(range(256), k=3))), "PNG"))
  data = _packed(b"\0", draw(st.sampled_from([10**7, 3 * 10**7, 10**8])))
  return png_of([header, (b"IDAT", data), end]), Expected((ANY, (8, 8, 3)), decoding.REASONS)


@mutation
def other_files(draw, rng):
  heads = [
    b"",
    b"<svg xmlns=''/>",
    b"%!PS-Adobe-3.0 EPSF",
    b"%PDF-1.7",
    b"P6 1 1 255\n123",
    b"II*\0",
    b"\0\0\1\0",
    b"RIFF",
  ]
  heads += [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\x10\0\0\0WEBPVP8 ", b"\0\0\0\x0cjP  "]
  return draw(st.sampled_from(heads)) + rng.randbytes(rng.randrange(40)), refused(*decoding.REASONS)

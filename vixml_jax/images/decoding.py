"""Decodes images of any origin to RGB pixels, or gives the reason why an image has none."""

import base64
import io
import warnings

import numpy as np
from PIL import Image

MAX_PIXELS = 64 * 2**20
"""Largest number of pixels that an image may have by its header (8192 x 8192).

Decoding takes up to 500 MB. A WebP takes up to 1.1 GB and a copy of the file: Pillow decodes it as an animation, which
keeps two frames and copies one twice.
"""

MISSING = "missing"
UNREADABLE = "the file cannot be read"
EMPTY = "no bytes"
NOT_AN_IMAGE = "not a PNG, JPEG, WebP, GIF or BMP image"
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
DAMAGED = "truncated or damaged"
MAX_SCANS = 100
"""Largest number of scans of a JPEG. Encoders write about ten, and each takes as long as decoding a plain image."""
TOO_MANY_SCANS = f"more than {MAX_SCANS} scans"
REASONS = (MISSING, UNREADABLE, EMPTY, NOT_AN_IMAGE, TOO_LARGE, DAMAGED, TOO_MANY_SCANS)
"""Reasons why an image may have no pixels. Parts of an extraction on disk store positions in this tuple."""

# Formats that a raw folder may hold. Pillow reads dozens of others, some with other programs (EPS) or by rarely used C.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_START_OF_SCAN = b"\xff\xda"  # Data of a JPEG never contains these bytes: they are a marker.
_EXIF_ORIENTATION = 0x0112
# Orientation -> whether rows and columns are exchanged, and then the direction of rows and of columns.
_UPRIGHT = {
  2: (False, 1, -1),
  3: (False, -1, -1),
  4: (False, -1, 1),
  5: (True, 1, 1),
  6: (True, 1, -1),
  7: (True, -1, -1),
  8: (True, -1, 1),
}
_PIXELS_AT_ONCE = 1 << 20  # Each conversion of Pillow makes a copy of what it converts.

# Pillow warns about broken EXIF data, palettes, and images with up to twice its own limit of pixels. A million images
# from the web would give pages of such warnings, and `decode` handles each of these cases.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
  """Raised for an image without pixels; the message is one of `REASONS`."""


def from_data_uri(text: str) -> bytes:
  """Returns the bytes of an image that is given as text.

  >>> from_data_uri("data:image/gif;base64,R0lGODk=")
  b'GIF89'
  >>> from_data_uri("R0lGODk=")
  b'GIF89'

  Args:
    text: Base64, alone or after `data:image/...;base64,`.

  Raises:
    ValueError: The text is not base64; the message is a short reason.
  """
  if text.startswith("data:"):
    head, _, text = text.partition(",")
    if not head.endswith(";base64"):
      raise ValueError("not base64: ';base64,' is missing before the data")
  try:
    return base64.b64decode(text, validate=True)
  except ValueError as error:  # binascii.Error is one.
    raise ValueError("not base64") from error


def decode(blob: bytes) -> np.ndarray:
  """Returns the pixels of an encoded image as a viewer shows them: upright by its EXIF tag, in RGB, on white.

  An animation gives its first frame, 16-bit gray its upper byte. Color profiles are not applied. Several threads may
  call this function at once.

  Args:
    blob: PNG, JPEG, WebP, GIF or BMP file.

  Returns:
    Pixels, uint8 [height, width, 3].

  Raises:
    BadImage: The image has no pixels. No bytes raise any other exception.
  """
  with _opened(blob) as image:
    try:
      image.load()
      return _upright(_rgb(image), image)
    except Exception as error:
      raise BadImage(DAMAGED) from error


def count_pixels(blob: bytes) -> int:
  """Returns the number of pixels of an encoded image according to its header. Nothing is decoded.

  Args:
    blob: PNG, JPEG, WebP, GIF or BMP file.

  Raises:
    BadImage: The header is not valid, or the image is beyond the limits of `decode`.
  """
  with _opened(blob) as image:
    return image.width * image.height


def _opened(blob: bytes) -> Image.Image:
  """Returns an image whose header has been read and checked."""
  if not blob:
    raise BadImage(EMPTY)
  # Decoders raise almost any exception on hostile bytes (OSError, SyntaxError, struct.error, MemoryError, ...).
  try:
    image = Image.open(io.BytesIO(blob), formats=_FORMATS)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise BadImage(TOO_LARGE) from error
  except Image.UnidentifiedImageError as error:
    raise BadImage(NOT_AN_IMAGE) from error
  except Exception as error:
    raise BadImage(DAMAGED) from error
  if image.width * image.height > MAX_PIXELS:
    raise BadImage(TOO_LARGE)
  if image.format in ("JPEG", "MPO") and blob.count(_START_OF_SCAN) > MAX_SCANS:
    raise BadImage(TOO_MANY_SCANS)
  return image


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
  """Applies the EXIF orientation of an image. One with unreadable EXIF data is used as it is stored."""
  try:
    orientation = image.getexif().get(_EXIF_ORIENTATION)
  except Exception:
    return pixels
  if orientation not in _UPRIGHT:
    return pixels
  is_exchanged, down, across = _UPRIGHT[orientation]
  return (pixels.swapaxes(0, 1) if is_exchanged else pixels)[::down, ::across]


def _rgb(image: Image.Image) -> np.ndarray:
  """Returns the pixels of an image in RGB on white, uint8 [height, width, 3], which are converted band by band."""
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  rows = max(1, _PIXELS_AT_ONCE // image.width)
  for top in range(0, image.height, rows):
    bottom = min(top + rows, image.height)
    band = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
    pixels[top:bottom] = np.asarray(_rgb_band(band))
  return pixels


def _rgb_band(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255.
    gray = np.clip(np.asarray(image, np.int64) >> 8, 0, 255)
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")

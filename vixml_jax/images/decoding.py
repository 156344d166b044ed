"""Turns encoded images of any origin into RGB pixels, or into the reason why one has none."""

import io
import warnings

import numpy as np
from PIL import Image
from PIL.Image import Transpose

MAX_PIXELS = 64 * 2**20
"""Most pixels of an image by its header, such as 8192 x 8192: up to 256 MB while it is decoded."""

MISSING = "missing"
UNREADABLE = "the file cannot be read"
EMPTY = "no bytes"
NOT_AN_IMAGE = "not a PNG, JPEG, WebP, GIF or BMP image"
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
DAMAGED = "truncated or damaged"
REASONS = (MISSING, UNREADABLE, EMPTY, NOT_AN_IMAGE, TOO_LARGE, DAMAGED)
"""Why an image may have no pixels."""

# What a raw folder may hold. Pillow reads dozens more, some of them through other programs (EPS) or in little-tried C.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
  2: Transpose.FLIP_LEFT_RIGHT,
  3: Transpose.ROTATE_180,
  4: Transpose.FLIP_TOP_BOTTOM,
  5: Transpose.TRANSPOSE,
  6: Transpose.ROTATE_270,
  7: Transpose.TRANSVERSE,
  8: Transpose.ROTATE_90,
}

# Pillow warns of broken EXIF data, of palettes, and of images up to twice its limit of pixels, which is above ours: of
# a million images from the web these would be pages, and each picture gets its answer below.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
  """An image has no pixels; the message is one of `REASONS`."""


def decode(blob: bytes) -> np.ndarray:
  """Pixels of an encoded image as people see it: upright by its EXIF tag, in RGB, on white.

  Animations give their first frame, 16-bit gray its upper byte. Color profiles are not applied. Safe to call from
  several threads.

  Args:
    blob: a PNG, JPEG, WebP, GIF or BMP file.

  Returns:
    uint8 [height, width, 3].

  Raises:
    BadImage: with the reason; whatever the bytes are, nothing else is raised.
  """
  if not blob:
    raise BadImage(EMPTY)
  # Decoders raise nearly any exception on hostile bytes (OSError, SyntaxError, struct.error, MemoryError, ...).
  try:
    image = Image.open(io.BytesIO(blob), formats=_FORMATS)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise BadImage(TOO_LARGE) from error
  except Image.UnidentifiedImageError as error:
    raise BadImage(NOT_AN_IMAGE) from error
  except Exception as error:
    raise BadImage(DAMAGED) from error
  with image:
    if image.width * image.height > MAX_PIXELS:
      raise BadImage(TOO_LARGE)
    try:
      return np.asarray(_rgb(_upright(image)))
    except Exception as error:
      raise BadImage(DAMAGED) from error


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; EXIF data that cannot be read is no reason to lose the picture."""
  image.load()
  try:
    orientation = image.getexif().get(_EXIF_ORIENTATION)
  except Exception:
    return image
  return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips at 255.
    gray = np.clip(np.asarray(image, np.int64) >> 8, 0, 255)
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")

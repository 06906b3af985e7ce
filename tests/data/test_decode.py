import io

import numpy as np
import pytest
from PIL import Image

from skipinit_jax.data import decode
from skipinit_jax.data.decode import Window


def encode(image, file_format="JPEG", **options):
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


@pytest.fixture(scope="module")
def photograph():
  from sklearn.datasets import load_sample_image  # It takes seconds to import.

  return load_sample_image("china.jpg")


def test_random_windows_have_the_areas_aspects_and_positions_of_the_definition():
  rng = np.random.default_rng(0)
  height, width = 600, 800
  windows = np.array([decode.random_window(rng, height, width) for _ in range(4000)])
  top, left, h, w = windows.T
  assert (top >= 0).all() and (top + h <= height).all()
  assert (left >= 0).all() and (left + w <= width).all()
  area, aspect = h * w / (height * width), w / h
  assert 0.079 < area.min() < 0.09
  assert 0.74 < aspect.min() < 0.76 < 1.32 < aspect.max() < 1.35
  # Up to half the area every aspect fits (2/3 of 600 x 800 at 3/4 is 600 high): the
  # area is uniform there, and the logarithm of the aspect symmetric around 0.
  small = area < 0.5
  assert abs(area[small].mean() - (0.08 + 0.5) / 2) < 0.01
  assert abs(np.log(aspect[small]).mean()) < 0.01
  # Uniform positions: the mean is the middle, the deviation 1/sqrt(12).
  position = top[small] / (height - h[small])
  assert abs(position.mean() - 0.5) < 0.02
  assert abs(position.std() - 12**-0.5) < 0.02


def test_windows_of_given_images():
  rng = np.random.default_rng(0)
  # Too long for any allowed aspect: the central window of the nearest one.
  assert decode.random_window(rng, 30, 1000) == Window(0, 480, 30, 40)
  assert decode.random_window(rng, 1000, 30) == Window(480, 0, 40, 30)
  # Evaluation sees the central seven eighths.
  assert decode.center_window(256, 320) == Window(16, 48, 224, 224)
  assert decode.center_window(1000, 512) == Window(276, 32, 448, 448)
  assert decode.center_window(1, 1) == Window(0, 0, 1, 1)


# The window's height and width in output pixels: enlarged, about equal, halved, and so
# large that the decoder scales by 1/2 and by 1/4.
@pytest.mark.parametrize("scale", [0.5, 1.1, 1.9, 2.6, 4.5])
def test_crop_is_close_to_that_of_a_full_decode(scale, photograph):
  size = 80
  encoded = encode(Image.fromarray(photograph), quality=97)
  # From multiples of 8, so that decoding at a fraction rounds little.
  window = Window(32, 56, round(scale * size), round(1.05 * scale * size))
  found = decode.decode(encoded, lambda *_: window, size).astype(float)
  top, left, height, width = window
  box = (left, top, left + width, top + height)
  shape, bilinear = (size, size), Image.Resampling.BILINEAR
  with Image.open(io.BytesIO(encoded)) as image:
    points = image.transform(shape, Image.Transform.EXTENT, box, bilinear)
    averages = image.resize(shape, bilinear, box=box)
  points, averages = np.asarray(points, float), np.asarray(averages, float)
  if scale < 2:
    assert np.abs(found - points).mean() < 1
  else:
    # Nearer to the average over all pixels that shrink into one than interpolation
    # between the pixels of a full decode is.
    assert np.abs(found - averages).mean() < 0.5 * np.abs(points - averages).mean()
    assert np.abs(found - averages).mean() < 5


@pytest.mark.parametrize(
  ("mode", "color", "file_format", "expected"),
  [
    ("L", 90, "JPEG", (90, 90, 90)),
    ("CMYK", (255, 0, 0, 0), "JPEG", (0, 255, 255)),
    ("CMYK", (0, 0, 0, 155), "JPEG", (100, 100, 100)),
    ("RGB", (200, 100, 40), "JPEG", (200, 100, 40)),
    ("RGBA", (200, 100, 40, 255), "PNG", (200, 100, 40)),
    ("P", 0, "PNG", (0, 0, 0)),
  ],
)
def test_other_kinds_of_files_become_rgb(mode, color, file_format, expected):
  encoded = encode(Image.new(mode, (50, 40), color), file_format)
  found = decode.decode(encoded, decode.center_window, 16)
  assert found.shape == (16, 16, 3)
  assert found.dtype == np.uint8
  np.testing.assert_allclose(found, np.broadcast_to(expected, (16, 16, 3)), atol=2)


@pytest.mark.parametrize(
  "damaged",
  [
    lambda image: encode(image)[:20000],
    lambda image: encode(image, "PNG")[:20000],
    lambda _: b"not an image",
    lambda _: b"",
  ],
)
def test_damaged_file_is_an_error(damaged, photograph):
  encoded = damaged(Image.fromarray(photograph))
  # An object in memory, such as <_io.BytesIO at 0x7f>, means nothing to a user.
  with pytest.raises(ValueError, match=r"^[^<]+$"):
    decode.decode(encoded, decode.center_window, 16)

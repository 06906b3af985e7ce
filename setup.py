"""Packaging: what skipinit_jax needs, as ranges; requirements.lock pins them."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

# Lets several machines share a study.
_POSTGRESQL = ["psycopg[binary]>=3.2"]

# Builds the site out of docs/, and executes the notebooks of colabs/.
_DOCS = [
  "furo>=2025.12.19",
  "ipykernel>=7",
  "myst-nb>=1.4",
  "nbclient>=0.11",
  "sphinx>=9",
]

setup(
  name="skipinit_jax",
  version="0.1.0",
  description=(
    "Very deep residual networks, with and without normalization, in JAX and Flax"
  ),
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  keywords=[
    "jax",
    "flax",
    "deep learning",
    "residual networks",
    "batch normalization",
    "skipinit",
    "fixup",
  ],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  # Programs, benchmarks and tests run from a checkout. Installed, they would be
  # top-level packages called `experiments` and `tests`.
  packages=find_packages(include=["skipinit_jax", "skipinit_jax.*"]),
  package_data={"skipinit_jax": ["py.typed", "document/report.html"]},
  zip_safe=False,
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.3",
    # Reads the files that tensorflow-datasets writes. It has no wheel for Windows.
    'array_record>=0.8; sys_platform != "win32"',
    "chex>=0.1.90",
    "etils[epath,epy]>=1.13",
    "filelock>=3.20",
    # jax.export writes and reads files with it without requiring it.
    "flatbuffers>=25",
    "flax>=0.12.7",
    "grain>=0.2.18",
    # tensorflow-datasets imports it without requiring it.
    "importlib_resources>=6.4",
    "jax>=0.10",
    "jinja2>=3.1",
    "matplotlib>=3.10",
    "ml-collections>=1.1",
    "numpy>=2.1",
    # Resizes images three times as fast as Pillow.
    "opencv-python-headless>=4.13",
    "optax>=0.2.6",
    "optuna>=4.9",
    "orbax-checkpoint>=0.12.4",
    # tensorflow-datasets decodes images with it without requiring it.
    "pillow>=11",
    "rich>=14",
    "safetensors>=0.8",
    "scikit-learn>=1.6",
    # Decodes JPEG files twice as fast as Pillow.
    "simplejpeg>=1.9",
    # Of optuna's storages, whose errors and transactions studies handle. 2.1 is the
    # first that escapes a file's path in a URL.
    "sqlalchemy>=2.1",
    "tabulate>=0.9",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.10",
  ],
  extras_require={
    # The CUDA version that JAX takes by default; jax[cuda13] chooses one instead.
    "cuda": ["jax[cuda]"],
    "tpu": ["jax[tpu]"],
    # Serves workdirs in Google's buckets, --workdir=gs://...
    "gcs": ["gcsfs>=2026.9"],
    "postgresql": _POSTGRESQL,
    # Tests compare converted weights with PyTorch's own logits. Where pip would fetch
    # PyPI's CUDA build, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu names
    # the smaller one.
    "torch": ["torch==2.13.0"],
    "docs": _DOCS,
    "tests": [
      *_DOCS,
      *_POSTGRESQL,
      "mypy>=1.18",
      "pytest>=8.4",
      "pytest-timeout>=2.4",
      "pytest-xdist>=3.8",
      "ruff>=0.14",
      # Builds the package: the wheel in tests/test_packaging.py, .venv in Makefile.
      "setuptools>=77",
    ],
  },
)

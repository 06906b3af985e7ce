"""Packaging: what skipinit_jax needs, as ranges; requirements.lock pins them."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

README = Path(__file__).with_name("README.md")
TOOLS = tomllib.loads(README.with_name("pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = TOOLS["tool"]["skipinit_jax"]["repository"]

# What a network of one's own needs: the floors are what Colab has, and older.
_CORE = [
  "absl-py>=2.0",
  "chex>=0.1.88",
  "flax>=0.10.7",
  "jax>=0.6.2",
  "numpy>=1.26",
  "optax>=0.2.4",
]

# Tables, figures and pages of them.
_FIGURES = ["jinja2>=3.1", "matplotlib>=3.10", "rich>=14", "tabulate>=0.9"]

# Runs, on digits and on what tensorflow-datasets prepared.
_TRAIN = [
  # Reads the files that tensorflow-datasets writes. It has no wheel for Windows.
  'array_record>=0.8; sys_platform != "win32"',
  "etils[epath,epy]>=1.13",
  "filelock>=3.20",
  # tensorflow-datasets imports it without requiring it.
  "importlib_resources>=6.4",
  "ml-collections>=1.1",
  "orbax-checkpoint>=0.12.4",
  # tensorflow-datasets decodes images with it without requiring it.
  "pillow>=11",
  "rich>=14",
  "scikit-learn>=1.6",
  "tensorboardX>=2.6.4",
  "tensorflow-datasets>=4.9.10",
]

# Runs on photographs, which are decoded meanwhile.
_PHOTOS = [
  *_TRAIN,
  "grain>=0.2.18",
  # Resizes images three times as fast as Pillow.
  "opencv-python-headless>=4.13",
  # Decodes JPEG files twice as fast as Pillow.
  "simplejpeg>=1.9",
]

# Searches over many runs, and their reports.
_STUDIES = [
  *_TRAIN,
  *_FIGURES,
  "optuna>=4.9",
  # optuna's storages have it, and studies handle its errors and transactions. 2.1 is
  # the first that escapes a file's path in a URL.
  "sqlalchemy>=2.1",
]

# Networks as files.
_EXPORT = [
  # jax.export writes and reads files with it without requiring it.
  "flatbuffers>=25",
  "safetensors>=0.8",
]

_ALL = sorted({*_PHOTOS, *_STUDIES, *_EXPORT})

# Lets several machines share a study.
_POSTGRESQL = ["psycopg[binary]>=3.2"]

# Builds the site out of docs/, and executes the notebooks of colabs/.
_DOCS = [
  "furo>=2025.12.19",
  "ipykernel>=7",
  "myst-nb>=1.4",
  "nbclient>=0.11",
  "sphinx>=9",
  "sphinx-copybutton>=0.5.2",
]

# These write the pages of a checkout.
_PAGES = {"concepts.py", "pages.py"}


class BuildPy(build_py):
  """Takes the programs into the package, which a checkout has beside it.

  On their own they would be a top-level package called `experiments`.
  """

  def run(self) -> None:
    """Copies the package and the programs."""
    super().run()
    if not self.editable_mode:
      folder = Path(self.build_lib, "skipinit_jax", "programs", "experiments")
      folder.mkdir(parents=True, exist_ok=True)
      for path in Path("experiments").glob("*.py"):
        if path.name not in _PAGES:
          self.copy_file(str(path), str(folder / path.name))


setup(
  name="skipinit_jax",
  version="0.1.0",
  description=(
    "Very deep residual networks, with and without normalization, in JAX and Flax"
  ),
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  project_urls={"Source": REPOSITORY} if REPOSITORY else {},
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
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  packages=find_packages(include=["skipinit_jax", "skipinit_jax.*"]),
  cmdclass={"build_py": BuildPy},
  entry_points={"console_scripts": ["skipinit-jax = skipinit_jax.__main__:main"]},
  package_data={"skipinit_jax": ["py.typed", "document/report.html"]},
  zip_safe=False,
  python_requires=">=3.11",
  install_requires=_CORE,
  extras_require={
    "train": _TRAIN,
    "figures": _FIGURES,
    "studies": _STUDIES,
    "photos": _PHOTOS,
    "export": _EXPORT,
    # Networks from and to the Hugging Face Hub.
    "hub": [*_EXPORT, "huggingface_hub>=0.34"],
    "all": _ALL,
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
    # Independent networks that tests/peers compare with; so does timm, whose classes
    # need nothing of what it requires: pip install --no-deps timm.
    "peers": ["dm-haiku>=0.0.16", "torch==2.13.0"],
    "docs": _DOCS,
    "tests": [
      *_ALL,
      *_DOCS,
      *_POSTGRESQL,
      # `analysis.diagnose_functions` is tried on its networks.
      "equinox>=0.13",
      "mypy>=1.18",
      "pytest>=8.4",
      "pytest-timeout>=2.4",
      "pytest-xdist>=3.8",
      "ruff>=0.14",
      # Builds the package: the wheel in tests/test_packaging.py, .venv in Makefile.
      "setuptools>=77",
      # Installs the core alone in seconds, for tests, and makes the lock.
      "uv>=0.9",
    ],
  },
)

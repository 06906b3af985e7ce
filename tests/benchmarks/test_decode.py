"""The page's numbers on decoding are those of the committed measurement."""

import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_has_the_measured_numbers():
  results = json.loads((ROOT / "results/decode/decode.json").read_text())
  page = " ".join((ROOT / "docs/scaling.md").read_text().split())
  measured = results["images_per_core_second"]
  ways = {name.split()[0]: rates for name, rates in measured.items()}
  pipeline = results["pipeline_by_workers"]["2"]["images_per_core_second"]
  for name, rates in {
    "this package": ways["skipinit_jax"],
    "tf.data": ways["tf.data"],
    "Pillow, as in torchvision": ways["Pillow"],
    "this package's whole pipeline with two workers": pipeline,
  }.items():
    assert f"| {name} | {rates['median']:.0f} |" in page
  tpu, gpu = results["chips"]["TPU v4"], results["chips"]["H100"]
  sentence = (
    f"{tpu['cores']} such cores feed one TPU v4 that trains on "
    f"{tpu['images_per_second']:,.0f} images/s, and {gpu['cores']} feed one H100 at "
    f"{gpu['images_per_second']:,.0f}."
  )
  assert sentence in page

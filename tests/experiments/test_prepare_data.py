import gzip

from skipinit_jax import data
from tests.data import idx


def test_prepares_what_load_reads(run_program, tmp_path):
  arrays = idx.write(tmp_path / "source")
  for zipped in (tmp_path / "source").glob("*.gz"):
    zipped.with_suffix("").write_bytes(gzip.decompress(zipped.read_bytes()))
    zipped.unlink()
  data_dir = str(tmp_path / "tfds")
  flags = [f"--source={tmp_path / 'source'}", f"--data_dir={data_dir}"]
  done = run_program(
    ["experiments.prepare_data", "--dataset=fashion_mnist", *flags], status=0
  )
  assert done.stdout.startswith("Prepared fashion_mnist with 60 train and 23 test")
  dataset = data.load("fashion_mnist", data_dir=data_dir, cache_dir=str(tmp_path))
  for split, prefix in ((dataset.train, "train"), (dataset.test, "t10k")):
    found, expected = (
      sorted((image.tobytes(), label) for image, label in zip(*pairs, strict=True))
      for pairs in ((split.images, split.labels), arrays[prefix])
    )
    assert found == expected

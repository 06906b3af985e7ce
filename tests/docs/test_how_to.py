"""The pages of docs/how_to: their snippets run, and their numbers are what these print.

A snippet asserts what holds exactly; what it prints is compared with the page here.
"""

import re
from pathlib import Path

import pytest

from skipinit_jax import studies

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs/how_to"

# By page: a name of its snippets, what the page says of it, and how far it may be
# from that. Rounding differs between machines, and training amplifies it.
CLAIMS = {
  "per_example_gradients": [
    ("norms.min()", "between 8.9 and", 8.9, 0.1),
    ("norms.max()", "and 15.1", 15.1, 0.1),
    ("change", "changes by 28 %", 0.28, 0.03),
  ],
  "differential_privacy": [
    ("accuracy", "names 78 % of", 0.78, 0.1),
    ("of_skipinit", "by 1.0 with SkipInit", 1.0, 0.3),
    ("of_batch_norm", "by 2.4 with batch", 2.4, 0.1),
  ],
  "batch_size_one": [
    ("skipinit", "names 82 % of", 0.82, 0.08),
    ("as_trained", "50 % of", 0.5, 0.15),
    ("evaluated", "and 18 % in", 0.18, 0.17),
  ],
  "same_logits_in_any_batch": [
    ("by_company", "differ by 52 %", 0.52, 0.03),
    ("by_mode", "35 % between", 0.35, 0.03),
  ],
}


def read(page):
  return (FOLDER / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", CLAIMS)
def test_snippets_give_the_numbers_of_their_page(page):
  text = read(page)
  names = {}
  blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
  assert len(blocks) > 1
  for block in blocks:
    exec(compile(block, f"{page}.md", "exec"), names)
  words = " ".join(text.split())
  for expression, said, value, tolerance in CLAIMS[page]:
    assert said in words
    assert float(eval(expression, names)) == pytest.approx(value, abs=tolerance)
    # What is said is that value.
    number = float(re.findall(r"[\d.]+", said)[0])
    assert value == pytest.approx(number / 100 if "%" in said else number)


def test_transformer_starts_as_the_identity_and_its_numbers_are_those_of_the_study():
  text = read("transformer")
  names = {}
  for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
    exec(compile(block, "transformer.md", "exec"), names)
  assert names["logits"].shape == (2, 10)
  results = studies.read_results(ROOT / "results/transformer")
  assert studies.markdown(studies.accuracy_table(results)) in text
  trained = {search.column: search for search in results.searches}
  assert trained["α = 0"].trains and trained["Layer norm"].trains
  assert trained["Unnormalized"].num_diverged == trained["Unnormalized"].num_runs
  assert "the first loss is above 1e17" in text
  runs = [run for run in results.runs if "unnormalized" in run.search]
  assert {run.step for run in runs} == {1}
  assert min(run.train_loss for run in runs) > 1e17


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda p: p.stem)
def test_pages_are_tested_and_their_links_lead_somewhere(path):
  assert path.stem in {*CLAIMS, "transformer"}
  text = path.read_text(encoding="utf-8")
  links = re.findall(r"\]\(([^):]+)\)", text)
  for link in links:
    page, _, section = link.partition("#")
    target = path.parent / page
    assert target.exists(), link
    if section:
      headings = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.MULTILINE)
      assert section in [each.lower().replace(" ", "-") for each in headings]

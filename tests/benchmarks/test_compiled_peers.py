"""Compiled steps of peers are counted alike, with all turns of their loops."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled_peers, compiled_step
from benchmarks.peer import Case


def test_loops_count_as_often_as_they_run():
  size, outer, inner = 64, 3, 5

  def repeat(x, matrix, length):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ matrix), x), x, length=length)

  @jax.jit
  def nested(x, matrix):
    body = lambda x, _: repeat(x, matrix, inner)  # noqa: E731
    return jax.lax.scan(body, x, length=outer)

  matrix = jnp.ones((size, size))
  cost = compiled_step.program_cost(nested.lower(matrix, matrix).compile())
  flops = 2 * outer * inner * size**3
  assert flops <= cost.flops < 1.01 * flops
  # Each turn reads the matrix and its input, and writes its result.
  assert cost.num_bytes > outer * inner * 3 * 4 * size**2


def test_copies_to_on_chip_memory_are_left_out():
  text = """
%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4] parameter(0)
  ROOT %negate = f32[8,4] negate(%p)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  %copy-start = (f32[8,4], f32[8,4], u32[]) copy-start(%x)
  %copy-done = f32[8,4] copy-done(%copy-start)
  %fusion = f32[8,4] fusion(%copy-done), kind=kLoop, calls=%fused
  %slice-start.1 = ((f32[8,4]), f32[4,4], s32[]) slice-start(%fusion), slice={[0:4], [0:4]}
  %slice-done.1 = f32[4,4] slice-done(%slice-start.1)
  %slice-start.2 = ((f32[8,4]), f32[4,4], s32[]) slice-start(%fusion), slice={[4:8], [0:4]}
  %slice-done.2 = f32[4,4] slice-done(%slice-start.2)
  %custom-call = f32[8,4] custom-call(%slice-done.1, %slice-done.2), custom_call_target="ConcatBitcast"
  ROOT %fusion.2 = f32[8,4] fusion(%custom-call), kind=kLoop, calls=%fused
}
"""  # noqa: E501
  plain = compiled_step.without_staging(text)
  assert "-start" not in plain and " custom-call(" not in plain
  assert "fusion(%copy-done)" in plain and "= f32[8,4] bitcast(%x)" in plain
  # Two fusions, each of which reads and writes 32 numbers.
  cost = compiled_step._entry_cost(plain)
  assert cost["bytes accessed"] == 2 * 2 * 4 * 32


@pytest.mark.parametrize(("peer", "depth"), [("peer_jax", 34), ("peer_flax", 10)])
def test_a_step_has_the_operations_of_its_network(peer, depth):
  case = Case(depth, 1, image_size=8, batch_size=2, method="skipinit")
  cost = compiled_peers.cost_of(peer, case, jax.devices()[0])
  # Taps beyond the border cost nothing. Loops that counted once would leave 40 %.
  assert cost["flops"] == pytest.approx(case.step_flops, rel=0.35)
  # The images alone need as much.
  assert cost["memory_bytes"] > 4 * 2 * 8 * 8 * 3


@pytest.mark.parametrize(
  ("flags", "message"),
  [([], "There is no file {}/costs.json."), (["x"], "Unexpected argument 'x': every")],
)
def test_bad_input_is_one_sentence(flags, message, run_program, tmp_path):
  program = ["benchmarks.compiled_peers", f"--workdir={tmp_path}", *flags]
  error = run_program(program, status=1).stderr
  assert error.startswith(f"error: {message.format(tmp_path)}")
  assert error.count("\n") == 1

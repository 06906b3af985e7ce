"""The costs of compiled steps, and the model of their time, against theory."""

import dataclasses
import re

import jax
import pytest

from benchmarks import compiled_step, scaling_model
from benchmarks.compiled_step import StepCost
from skipinit_jax.training import TrainConfig
from tests.forks import ROOT

IMAGE = 8
BATCH = 16
# Normalized features of a Wide-ResNet 10-1, from the first block to the classifier.
FEATURES = (16, 16, 16, 32, 32, 64, 64)
# The mean loss and accuracy, which every step sums over the devices.
SCALARS = 8


def count(method: str, **fields: object) -> StepCost:
  config = TrainConfig(depth=10, method=method, batch_size=BATCH, scan=False, **fields)
  devices = jax.devices()[:2]
  step = compiled_step.make_step(config, (IMAGE, IMAGE, 3), 10, devices)
  return compiled_step.count(step)


@pytest.fixture(scope="module")
def skipinit():
  return count("skipinit")


def test_skipinit_sums_the_gradient_and_waits_for_nothing(skipinit):
  assert skipinit.waited_bytes == ()
  # A factor's gradient comes out of its kernel's, which all devices then have.
  num_factors = 3
  expected = 4 * (skipinit.parameters - num_factors) + SCALARS
  assert skipinit.update_bytes == expected


def test_batch_norm_waits_for_three_sums_a_normalizer():
  cost = count("batch_norm")
  # Forward: the mean, then the deviations from it, in float32.
  forward = tuple(4 * features for features in FEATURES for _ in range(2))
  assert len(cost.waited_bytes) == 3 * len(FEATURES)
  assert cost.waited_bytes[: len(forward)] == forward
  # Backward: two sums at once. XLA joins some with gradients that are ready by then.
  backward = cost.waited_bytes[len(forward) :]
  assert all(
    num_bytes >= 8 * features
    for num_bytes, features in zip(backward, reversed(FEATURES), strict=True)
  )
  total = sum(cost.waited_bytes) + cost.update_bytes
  least = 4 * cost.parameters + sum(forward) + SCALARS
  # Scale and bias have the same two sums as gradients, if XLA finds both.
  assert least <= total <= least + sum(forward)


def test_ghost_batch_norm_sums_running_statistics_but_waits_for_nothing():
  cost = count("batch_norm", ghost_batch_size=4)
  assert cost.waited_bytes == ()
  assert cost.update_bytes == 4 * cost.parameters + 8 * sum(FEATURES) + SCALARS


def test_flops_are_those_of_three_convolutions_a_layer(skipinit):
  # Taps of a 3x3 kernel that are inside the image, along one axis: those outside cost
  # nothing. Stride 2 pads one side only.
  def taps(size: int, stride: int) -> int:
    return 3 * size - 2 if stride == 1 else 3 * (size // stride) - 1

  stem = taps(IMAGE, 1) ** 2 * 3 * 16
  layers, size, features = 0, IMAGE, 16
  for width, stride in ((16, 1), (32, 2), (64, 2)):
    layers += taps(size, stride) ** 2 * features * width
    size //= stride
    layers += taps(size, 1) ** 2 * width * width
    if features != width:
      layers += size**2 * features * width
    features = width
  layers += 64 * 10
  # Forward, gradient of the input, gradient of the kernel; images need no gradient.
  flops = 2 * (3 * layers + 2 * stem) * BATCH // 2
  # On a CPU, gradients of strided convolutions are convolutions by phase, some of whose
  # taps are beyond the border.
  assert flops < skipinit.flops < 1.2 * flops


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0:T(128)} parameter(0)
  %all-reduce.1 = (f32[4]{0:T(128)S(1)}, bf16[2,3]{1,0}) all-reduce(%x, %x)
  %y = f32[4]{0} fusion(%all-reduce.1), kind=kLoop, calls=%add
  %all-reduce-start.2 = f32[4]{0} all-reduce-start(%y), to_apply=%add
  %z = f32[4]{0} all-reduce-done(%all-reduce-start.2)
  %all-gather.3 = f32[8]{0} all-gather(%x), dimensions={0}
  ROOT %w = f32[4]{0} add(%z, %x)
}
"""


def test_collectives_are_read_with_bytes_and_order():
  # The first all-reduce and the all-gather wait for nothing.
  first = 4 * 4 + 2 * 6 + 4 * 8
  assert compiled_step.collective_bytes(PROGRAM) == ((first,), 16)


TPU_V4, TPU_V5E, TPU_V6E, H100 = scaling_model.ACCELERATORS


@pytest.mark.parametrize(
  ("accelerator", "num_devices", "microseconds", "seconds_a_byte"),
  [
    (TPU_V5E, 1, 0, 0),
    # Two axes of a torus of 16: 8 hops to the farthest, there and back; four links.
    (TPU_V5E, 256, 5 + 2 * 8 * 2, 2 * 255 / 256 / (4 * 50e9)),
    # Axes of 8 have ends, with one link: 7 hops.
    (TPU_V5E, 64, 5 + 2 * 7 * 2, 2 * 63 / 64 / (2 * 50e9)),
    # Four pods: a tree of two levels, up and down, for a share of each byte.
    (
      TPU_V5E,
      1024,
      5 + 2 * 8 * 2 + 2 * 2 * 20,
      2 * 255 / 256 / (4 * 50e9) + 2 * (3 / 4) / 256 / (25e9 / 8),
    ),
    (TPU_V4, 1024, 5 + 2 * (4 + 4 + 8), 2 * 1023 / 1024 / (6 * 45e9)),
    # NCCL: 6.8 + 2 (7 x 0.6 + log2(nodes) x 5).
    (H100, 4, 6.8 + 2 * 3 * 0.6, 2 * (3 / 4) / 450e9),
    # An eighth of each byte goes through each port of the host.
    (
      H100,
      64,
      6.8 + 2 * (7 * 0.6 + 3 * 5),
      2 * (7 / 8) / 450e9 + 2 * (7 / 8) / 8 / 50e9,
    ),
  ],
)
def test_time_of_an_all_reduce(accelerator, num_devices, microseconds, seconds_a_byte):
  latency, seconds = (
    scaling_model.all_reduce_seconds(accelerator, num_devices, num_bytes)
    for num_bytes in (0, 1e9)
  )
  assert latency == pytest.approx(1e-6 * microseconds)
  assert seconds - latency == pytest.approx(1e9 * seconds_a_byte)


def test_a_step_is_the_slower_of_computation_and_memory_and_its_waits():
  cost = StepCost(
    flops=989e12 * 0.5 * 2,
    num_bytes=3350e9 * 0.8 * 1,
    memory_bytes=0,
    parameters=0,
    waited_bytes=(0, 0, 0),
    update_bytes=0,
  )
  time = scaling_model.step_time(cost, H100, 8, parts=5)
  one = 1e-6 * (6.8 + 2 * 7 * 0.6)
  assert time == pytest.approx((5 * 2.0, 5 * 3 * one, one))
  assert time.waiting_share == pytest.approx(time.waiting / (10 + 16 * one))
  memory_bound = dataclasses.replace(cost, num_bytes=3 * cost.num_bytes)
  assert scaling_model.step_time(memory_bound, H100, 8).local == pytest.approx(3)


def test_compiled_steps_wait_twice_for_each_normalizer():
  for key, cost in scaling_model.read_costs(ROOT / "results/scaling").items():
    # One before each convolution of a branch, and one before the classifier.
    depth = re.search(r"(\d+)-\d+$", key.network)
    normalizers = int(depth[1]) - 3 if depth else 49
    assert len(cost.waited_bytes) == 2 * normalizers * (key.method != "skipinit")

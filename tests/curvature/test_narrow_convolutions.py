"""Narrow strided convolutions with channels last: oneDNN crashes, so the attempt is a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from packsaddle.curvature.narrow_convolutions import has_narrow_convolutions, safe_derivatives

NETWORK = """
import torch
from torch import nn
import packsaddle
from packsaddle.curvature.gradient_noise import gradient_noise
torch.manual_seed(0)
shortcut = nn.Conv2d(4, 8, 1, stride=2, bias=False)
model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), shortcut, nn.Tanh())
batches = list(torch.randn(3, 25, 3, 32, 32))
def loss(model, batch):
    return model(batch).square().mean()
def numbers():
    search = packsaddle.Search(max_hvps=3, sample=False, generator=torch.Generator().manual_seed(0))
    found = packsaddle.certify(model, loss, batches, epsilon=1e4, hessian_lipschitz=1.0, search=search, progress=False)
    return torch.tensor([found.grad_norm, found.lambda_min_upper, gradient_noise(model, loss, batches).per_example])
expected = numbers()
model.to(memory_format=torch.channels_last)
for threads in (2, 1):  # of which the second crashed, and the first gave other gradients
    torch.set_num_threads(threads)
    assert torch.allclose(numbers(), expected, rtol=1e-3), (threads, numbers(), expected)
assert torch.backends.mkldnn.enabled
"""


@pytest.mark.nightly
def test_channels_last_changes_no_derivative() -> None:
    # AVX-512 needs larger images. Threads that spin while they wait would take cores from other tests.
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-c", NETWORK], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("layer", "is_narrow"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(15, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(32, 8, 1, stride=2, groups=8), True),
        (nn.ConvTranspose2d(32, 4, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_which_are_taken_without_onednn(layer: nn.Module, is_narrow: bool) -> None:
    assert has_narrow_convolutions(nn.Sequential(nn.ReLU(), layer)) == is_narrow
    with safe_derivatives(layer):
        assert torch.backends.mkldnn.enabled != is_narrow
    assert torch.backends.mkldnn.enabled

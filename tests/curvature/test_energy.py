"""The examples of certificates: their verdicts are what their page says."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
STALLED = (EXAMPLES.parent / "docs" / "stalled.md").read_text()


def test_a_line_of_atoms_is_a_saddle_and_a_triangle_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "energy.py"))
    names["main"]()
    line, triangle = capsys.readouterr().out.split("triangle, ")
    assert line.startswith("line, energy -2.0311\nThis is a saddle: along v the curvature is at most -")
    assert "This point is second-order stationary:" in triangle
    # By a dense Hessian: the line bends in two ways, and six motions of the triangle change nothing.
    starts = [[[-1.1, 0, 0], [0, 0, 0], [1.1, 0, 0]], [[0, 0, 0], [1.1, 0, 0], [0.55, 0.95, 0]]]
    for start, negative in zip(starts, (2, 0), strict=True):
        x = names["relaxed"](torch.tensor(start, dtype=torch.float64))
        h = torch.autograd.functional.hessian(names["energy"], x).reshape(9, 9)
        assert int((torch.linalg.eigvalsh(h) < -1e-3).sum()) == negative


@pytest.mark.slow
def test_a_stalled_training_is_at_a_saddle_and_leaves_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "stalled.py"))["main"]()
    before, after = capsys.readouterr().out.split("60 epochs with noise 0.0 and 20 without: loss ")
    quiet, noisy = (float(part.split()[0]) for part in after.split("60 epochs with noise 0.003 and 20 without: loss "))
    assert "This is a saddle: along v the curvature is at most -0.00" in before
    assert "This point is second-order stationary" in after
    assert noisy < quiet - 0.004
    for number in (quiet, noisy):  # the page's, up to the rounding of another processor
        assert any(abs(number - shown) < 0.002 for shown in (0.0531, 0.0610))
    assert "0.0531" in STALLED
    assert "0.0610" in STALLED

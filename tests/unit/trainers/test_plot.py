"""loss.png is a picture of the numbers that were measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tunesmith.trainers.plot import draw_losses, smooth


def test_smoothing_keeps_a_constant_and_does_not_lag_behind_a_slope():
    np.testing.assert_allclose(smooth([3.0] * 20, reach=3), 3.0)
    np.testing.assert_allclose(smooth([float(n) for n in range(20)], reach=3), range(20))
    np.testing.assert_allclose(smooth([4.0, 1.0, 1.0, 2.0], reach=5), [4.0, 2.0, 4 / 3, 2.0])


@pytest.mark.parametrize("steps", [0, 1, 3, 60])
def test_a_run_of_any_length_makes_a_png(tmp_path: Path, steps: int):
    lines: list[dict[str, float | None]] = [{"step": 0, "eval_loss": 5.0}]
    lines += [{"step": n, "loss": 5.0 / n, "learning_rate": 1e-4} for n in range(1, steps + 1)]
    draw_losses(lines, tmp_path / "loss.png", "bot")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path: Path):
    lines = [{"step": n, "loss": None if n == 5 else 1.0, "learning_rate": 1e-4} for n in range(1, 20)]
    draw_losses(lines, tmp_path / "loss.png", "bot")
    assert (tmp_path / "loss.png").stat().st_size > 10_000

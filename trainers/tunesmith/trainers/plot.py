"""loss.png: the course of a run in one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.cluster.storage import write_atomic

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, HELD_OUT, RATE = "#2f6fde", "#e8590c", "#9aa5b1"


def draw_losses(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training loss (raw and smoothed), held-out loss and learning rate over the steps.

    Args:
        lines: of metrics.jsonl, in the order of the steps.
        path: the PNG; replaced at once, never half written.

    Raises:
        StorageError: it cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    trained = [line for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(9, 5.4), dpi=150, facecolor="white", layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4.2, 1])
    _draw_training(upper, trained)
    _draw_held_out(upper, held_out)
    _style(upper, "loss")
    if upper.get_legend_handles_labels()[0]:
        upper.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")
    steps = [line["step"] for line in trained]
    lower.fill_between(steps, [line["learning_rate"] for line in trained], color=RATE, alpha=0.25, linewidth=0)
    lower.plot(steps, [line["learning_rate"] for line in trained], color=RATE, linewidth=1.2)
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    _style(lower, "learning rate")
    lower.set_xlabel("optimizer step", color=MUTED, fontsize=9)
    lower.margins(x=0.01)
    figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=13, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(path, picture.getvalue())


def smooth(values_N: Sequence[float], reach: int) -> np.ndarray:
    """Mean [N] of each value and up to `reach` neighbours on either side; as many on both, so that nothing lags."""
    count = len(values_N)
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    middle = np.arange(count)
    reaches = np.minimum(reach, np.minimum(middle, count - 1 - middle))  # the window shrinks at both ends
    return (sums[middle + reaches + 1] - sums[middle - reaches]) / (2 * reaches + 1)


def _draw_training(axes: Any, trained: Sequence[dict[str, Any]]) -> None:
    if not trained:
        return
    steps, losses = [line["step"] for line in trained], [line["loss"] for line in trained]
    reach = max(2, len(losses) // 40)
    has_noise = len(losses) >= 10
    axes.plot(steps, losses, color=TRAIN, alpha=0.28 if has_noise else 1.0, linewidth=1.0, label="training")
    if has_noise:
        axes.get_lines()[-1].set_label("_raw")
        axes.plot(steps, smooth(losses, reach), color=TRAIN, linewidth=2.0, label="training (smoothed)")


def _draw_held_out(axes: Any, points: Sequence[tuple[int, float]]) -> None:
    if not points:
        return
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    axes.plot(
        steps,
        losses,
        color=HELD_OUT,
        linewidth=1.6,
        marker="o",
        markersize=5,
        markeredgecolor="white",
        label="held out",
    )
    best, last = int(np.argmin(losses)), len(points) - 1
    _label(axes, steps[last], losses[last], (8, 0), "left", "center")  # right of where every line ends
    if best != last:
        _label(axes, steps[best], losses[best], (0, -8), "center", "top")  # both neighbours are above


def _label(axes: Any, step: int, loss: float, offset: tuple[int, int], ha: str, va: str) -> None:
    text = axes.annotate(
        f"{loss:.3f}",
        (step, loss),
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        color=HELD_OUT,
        fontsize=9,
        fontweight="bold",
    )
    text.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})


def _style(axes: Any, label: str) -> None:
    axes.set_ylabel(label, color=MUTED, fontsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)

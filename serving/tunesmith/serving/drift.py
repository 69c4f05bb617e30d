"""Whether live traffic is still like the training data, and like itself a while ago.

Answers of a version gather in windows. A window that is full is compared with the artifact's fingerprint and with the
window before it, feature by feature. Small windows lie apart by chance alone, so a divergence is held against what samples
of the training data show at that size, as the fingerprint measured it: an alarm takes more than chance explains at a false
alarm in a hundred windows over all comparisons together, and, because large windows make out differences that do not
matter, a difference that matters.

The noise is that of the training data. Two windows that are both far from it may lie apart by more; the alarm against the
training data is on by then.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from tunesmith.cluster.artifacts import FingerprintReceipt, Noise
from tunesmith.cluster.errors import AdapterError
from tunesmith.cluster.sketch import FEATURES, PARTS, SIZE, answers_in, divergences, has_prompts

WINDOW = 256
"""Answers that fill a window."""
WINDOW_S, FEWEST = 900.0, 64
"""Seconds after which a window that is not full is looked at if it has so many answers."""
MATTERS = 0.05
"""Divergence above the noise that an alarm takes: for example, one refusal in ten where there was none."""
MOST_VERSIONS = 200
"""That are watched; the one that was asked longest ago leaves."""

_Z = 3.14  # one-sided normal quantile of 0.01 / 12: six features, each against two
_PROMPTS = ("prompt_length", "prompt_tokens")

Against = Literal["training", "window"]


@dataclass(frozen=True)
class Reference:
    """A fingerprint as it is compared with.

    Attributes:
        sketch: float64 [K] of the training answers.
        noise: by feature, against the training data.
        window_noise: between two windows.
    """

    sketch: np.ndarray
    noise: dict[str, list[Noise]]
    window_noise: dict[str, list[Noise]]


@dataclass(frozen=True)
class Finding:
    """One comparison of a full window.

    Attributes:
        answers: of the window.
        divergence: 0 to 1; see `tunesmith.cluster.sketch.divergences`.
        above: of it, what is above the mean of the noise.
        limit: the most that noise explains.
    """

    feature: str
    against: Against
    answers: int
    divergence: float
    above: float
    limit: float

    @property
    def is_alarm(self) -> bool:
        """Whether it is more than noise and matters."""
        return self.divergence > self.limit and self.above > MATTERS

    def __str__(self) -> str:
        return (
            f"{self.feature} against the {self.against}: {self.divergence:.3f} over {self.answers} answers, "
            f"of which noise explains up to {self.limit:.3f}"
        )


@dataclass
class _Watched:
    began: float
    window: np.ndarray = field(default_factory=lambda: np.zeros(SIZE))
    before: np.ndarray | None = None


class Drift:
    """The windows of every version. `now` is seconds of any clock that only goes forward."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, _Watched] = OrderedDict()

    def add(self, digest: str, sketch: np.ndarray, reference: Reference, now: float) -> list[Finding]:
        """Takes the sketch [K] of a version's further answers; what a full window shows, else nothing."""
        watched = self._versions.setdefault(digest, _Watched(now))
        self._versions.move_to_end(digest)
        if len(self._versions) > MOST_VERSIONS:
            self._versions.popitem(last=False)
        watched.window = watched.window + sketch
        if not is_full(answers_in(watched.window), now - watched.began):
            return []
        findings = judge(watched.window, reference, watched.before)
        watched.before, watched.window, watched.began = watched.window, np.zeros(SIZE), now
        return findings


def is_full(answers: int, seconds: float) -> bool:
    """Whether a window of so many answers and so old is to be looked at."""
    return answers >= WINDOW or (seconds >= WINDOW_S and answers >= FEWEST)


def judge(window: np.ndarray, reference: Reference, before: np.ndarray | None = None) -> list[Finding]:
    """Compares a window [K] with the training data and, if there is one, with the window before it."""
    size, trained = answers_in(window), answers_in(reference.sketch)
    # the noise was measured against the whole set; as a sample of the world that set has noise of its own
    findings = _compared("training", window, reference.sketch, reference.noise, size, 1 + size / trained)
    if before is not None:
        size_both = 2 / (1 / size + 1 / answers_in(before))  # what two windows of one size would be as noisy as
        findings += _compared("window", window, before, reference.window_noise, size_both, 1.0)
    return [one for one in findings if has_prompts(reference.sketch) or one.feature not in _PROMPTS]


def noise_at(measured: Sequence[Noise], answers: float) -> tuple[float, float]:
    """Mean and deviation of the noise of so many answers.

    Between the sizes that were measured it follows a power law; beyond them it falls as 1/answers, as a divergence does.
    """
    sizes = np.log([one.answers for one in measured])
    at = math.log(answers)
    outside = math.exp(float(np.clip(at, sizes[0], sizes[-1])) - at)
    mean, deviation = (
        math.exp(float(np.interp(at, sizes, np.log([max(getattr(one, name), 1e-12) for one in measured])))) * outside
        for name in ("mean", "deviation")
    )
    return mean, deviation


def limit_of(mean: float, deviation: float, z: float = _Z) -> float:
    """The quantile of the gamma distribution with this mean and deviation that the normal quantile `z` stands for.

    A divergence of samples is about a sum of squares. Wilson and Hilferty (1931).
    """
    ninth = (deviation / mean) ** 2 / 9
    return mean * max(0.0, 1 - ninth + z * math.sqrt(ninth)) ** 3


def read_reference(folder: Path) -> Reference | None:
    """The fingerprint of a version's folder; None when there is none, or it was of too little data.

    Raises:
        AdapterError: the file is no fingerprint.
    """
    path = folder / "receipts" / "fingerprint.json"
    if not path.is_file():
        return None
    try:
        receipt = FingerprintReceipt.model_validate_json(path.read_bytes())
        return None if receipt.problem else reference_of(receipt)
    except (ValidationError, ValueError) as error:
        raise AdapterError(
            f"{path}: not a fingerprint: {' '.join(str(error).split())[:200]}", "Export the artifact again."
        ) from error


def reference_of(receipt: FingerprintReceipt) -> Reference:
    """A receipt as it is compared with.

    Raises:
        ValueError: its parts have not the lengths of a sketch, or it is of no answers.
    """
    if not receipt.answers:
        raise ValueError("it is of no answers")
    sketch = np.zeros(SIZE)
    for name, part in PARTS.items():
        values = np.atleast_1d(np.asarray(getattr(receipt, name), dtype=float))
        if len(values) != part.stop - part.start:
            raise ValueError(f"{name} has {len(values)} numbers, not {part.stop - part.start}")
        if name != "embedding" and values.min() < 0:
            raise ValueError(f"{name} has numbers below 0")
        sketch[part] = values
    for noise in (receipt.noise, receipt.window_noise):
        for name, measured in noise.items():
            sizes = [one.answers for one in measured]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"the noise of {name} is not by growing size")
    return Reference(sketch, receipt.noise, receipt.window_noise)


def _compared(
    against: Against,
    window: np.ndarray,
    other: np.ndarray,
    noise: dict[str, list[Noise]],
    size: float,
    wider: float,
) -> list[Finding]:
    findings = []
    apart = divergences(window, other)
    for name in FEATURES:
        value = float(apart[name])
        if math.isnan(value) or not noise.get(name):
            continue
        mean, deviation = noise_at(noise[name], size)
        limit = limit_of(mean * wider, deviation * wider)
        findings.append(Finding(name, against, answers_in(window), value, value - mean * wider, limit))
    return findings

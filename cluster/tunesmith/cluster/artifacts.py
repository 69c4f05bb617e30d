"""What lies in a committed folder: its manifest, and the shapes of the receipts that ride in an artifact."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from tunesmith.cluster.errors import CheckpointError
from tunesmith.cluster.storage import MANIFEST, FileRecord, manifest_digest, sha256_file


class Manifest(BaseModel):
    """The signature of a committed folder."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    kind: str
    """`checkpoint`, `artifact`, `data`, ..."""
    files: dict[str, FileRecord]
    """Every file by its relative path: size in bytes and sha256."""
    about: dict[str, Any] = Field(default_factory=dict)
    """Whatever else the writer wanted known, such as step, world size and hashes."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed folder; the files themselves are not read (see `verify`).

    Raises:
        CheckpointError: there is no manifest, or it is not the one that was written.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_bytes())
        digest = document.pop("digest")
        if manifest_digest(document) != digest:
            raise CheckpointError(f"{path}: the manifest was changed after it was written")
        files = {name: FileRecord(**record) for name, record in document.pop("files").items()}
        manifest = Manifest(kind=document.pop("kind"), files=files, about=document)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from error
    for name in manifest.files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{path}: names a file outside its folder: {name}")
    return manifest


def verify(folder: Path) -> Manifest:
    """Reads every file and compares it with the manifest, which is returned. Files beyond the manifest are ignored.

    Raises:
        CheckpointError: names the first file that is missing, of another size or of another hash.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        check_file(folder, name, record)
    return manifest


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Reads one file of a committed folder and compares it with its record.

    Raises:
        CheckpointError: names the file that is missing, of another size or of another hash.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record.size:
            raise CheckpointError(f"{path}: {size} bytes, but {record.size} were written")
        digest = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if digest != record.sha256:
        raise CheckpointError(f"{path}: sha256 {digest[:12]}…, but {record.sha256[:12]}… was written")


class SourceCounts(BaseModel):
    """How much of one data source was trained on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    source: str
    """The source as the recipe names it."""
    examples: int
    """Examples read from it."""
    tokens: int
    """Tokens of these examples."""
    trained_tokens: int
    """Those of them that a loss was computed on."""


class MaskReceipt(BaseModel):
    """Which tokens were trained, counted after packing."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    passed: bool
    """False when `problems` names any."""
    problems: list[str] = Field(default_factory=list)
    """What is wrong with the mask, as sentences."""
    sources: list[SourceCounts] = Field(default_factory=list)
    """Counts by data source."""
    tokens: int = 0
    """Tokens of all examples."""
    trained_tokens: int = 0
    """Those of them that a loss was computed on."""
    assistant_turns: int = 0
    """Assistant turns seen."""
    turns_with_trained_end: int = 0
    """Those whose end-of-turn token is trained; fewer than `assistant_turns` fails."""
    cut_rows: int = 0
    """Rows cut at `max_length` inside a trained turn; such a turn has no end and is in neither count."""
    examples: list[dict[str, Any]] = Field(default_factory=list)
    """A few examples, token by token, as text and whether trained."""


class ParityReceipt(BaseModel):
    """Whether the artifact is the model that was trained, by log-probabilities of the same held-out rows."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    passed: bool
    """False when `problems` names any."""
    problems: list[str] = Field(default_factory=list)
    """What disagrees, as sentences."""
    rows: int = 0
    """Held-out examples compared."""
    tokens: int = 0
    """Labelled tokens compared."""
    tolerance: float = 0.0
    """Largest difference of a token's log-probability (nats) that passes."""
    differences: dict[str, float] = Field(default_factory=dict)
    """Largest difference from the training forward, by way of loading: `artifact`, `merged`, ..."""
    base_difference: float | None = None
    """Largest difference from the untuned base; 0 means that nothing was learnt, and fails."""
    unmerged: str = ""
    """Why the adapter cannot be merged into its base, in PEFT's words; empty when it was, or when there is none."""


class ScoredRow(BaseModel):
    """A held-out row and how the training forward scored it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tokens: list[int]
    """The row's token ids."""
    positions: list[int]
    """Places of its labelled tokens in `tokens`."""
    logprobs: list[float]
    """Their log-probabilities, in nats."""


class ParityRows(BaseModel):
    """The rows of the parity receipt, for whoever serves the artifact to be held against."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tolerance_mean: float
    """Mean difference (nats) that passes."""
    tolerance: float
    """Largest difference (nats) that passes."""
    rows: list[ScoredRow]
    """The rows."""


class ServedReceipt(BaseModel):
    """Whether a running service answers as the model that was trained: the last column of the parity receipt."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    passed: bool
    """False when `problems` names any."""
    problems: list[str] = Field(default_factory=list)
    """What disagrees, as sentences."""
    model: str = ""
    """What was asked for."""
    version: str = ""
    """Digest of the version that answered."""
    rows: int = 0
    """Held-out rows compared."""
    tokens: int = 0
    """Labelled tokens compared."""
    difference: float | None = None
    """Largest difference from the training forward, in nats."""
    mean_difference: float | None = None
    """Mean difference, in nats."""
    base_difference: float | None = None
    """Largest difference from the served base alone; 0 means that the adapter has no effect."""
    template_matches: bool | None = None
    """Whether a conversation becomes the tokens that training gave it; None without a chat template."""


class Noise(BaseModel):
    """How far samples of the training data itself lie apart by chance."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    answers: int = Field(gt=0)
    """Of each sample."""
    mean: FiniteFloat = Field(ge=0)
    """Mean divergence."""
    deviation: FiniteFloat = Field(ge=0)
    """Its standard deviation."""


Sums = Annotated[list[FiniteFloat], Field(max_length=4096)]
"""Numbers that are each a sum over answers."""


class FingerprintReceipt(BaseModel):
    """A sketch of the training data that serving compares live traffic with; `tunesmith.cluster.sketch` says how.

    It holds sums over all answers and nothing else, so no row can be read back from it: which answer a number came from
    and the order of tokens are lost, ids are hashed into buckets, a token is named only when it stands in many answers,
    and of a set too small to hide one in there are no sums at all.
    """

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    problem: str = ""
    """Why there is no sketch, as a sentence; empty when there is one."""
    answers: int = Field(default=0, ge=0)
    """Trained answers looked at; the sums are over these."""
    all_answers: int = Field(default=0, ge=0)
    """Trained answers that there are, or an estimate where not every row was looked at."""
    prompt_lengths: Sums = Field(default_factory=list)
    """Answers by the length of their prompts in tokens: none, then two bins an octave."""
    answer_lengths: Sums = Field(default_factory=list)
    """Answers by their own length, likewise."""
    prompt_tokens: Sums = Field(default_factory=list)
    """Tokens of prompts by bucket of their hashed id."""
    answer_tokens: Sums = Field(default_factory=list)
    """Tokens of answers, likewise."""
    embedding: Sums = Field(default_factory=list)
    """Sum of the random projections of the answers' token shares."""
    embedding_spread: FiniteFloat = Field(default=0.0, ge=0)
    """Sum of the squared lengths of these projections."""
    refusals: int = Field(default=0, ge=0)
    """Answers that begin as a refusal does."""
    top_tokens: dict[int, float] = Field(default_factory=dict)
    """Shares of the most frequent answer tokens by id; only of those that stand in many answers."""
    noise: dict[str, list[Noise]] = Field(default_factory=dict)
    """Divergence of samples from the whole by feature, and by size of the sample."""
    window_noise: dict[str, list[Noise]] = Field(default_factory=dict)
    """Divergence of two samples from each other, likewise."""


class WorkerMemory(BaseModel):
    """What one worker's device held at the worst moment of the measured steps."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    rank: int
    """Of the worker."""
    tokens: int
    """Of its largest micro-batch in these steps; this one was simulated."""
    labels: int
    """Labelled tokens of that micro-batch."""
    measured_bytes: int
    """Bytes of tensors at the worst moment."""
    measured: dict[str, int] = Field(default_factory=dict)
    """The same by cause: what was there when the step began, and what was made in it."""
    predicted_bytes: int | None = None
    """What the planner says for that micro-batch; None when it was not simulated."""
    predicted: dict[str, int] = Field(default_factory=dict)
    """The same by the planner's causes."""

    @property
    def error(self) -> float | None:
        """The prediction's excess as a fraction of what was measured."""
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


class PlanReceipt(BaseModel):
    """Predicted against measured memory of the first optimizer steps. It fails nothing: it shows."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    within: float | None = None
    """Largest difference between prediction and measurement of a worker, as a fraction; None without both."""
    problem: str = ""
    """Why there is no prediction or no measurement, as a sentence; empty when there are both."""
    device: str = ""
    """What was measured: `cpu` by following every tensor, `cuda` by the allocator's own peak."""
    steps: int = 0
    """Optimizer steps measured."""
    workers: list[WorkerMemory] = Field(default_factory=list)
    """By rank."""

    @property
    def verdict(self) -> str:
        """In a few words."""
        return "not compared" if self.within is None else f"within {self.within:.1%}"

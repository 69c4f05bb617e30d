"""Whether a running service answers as the model that was trained: the last column of the parity receipt.

The artifact carries held-out rows with the log-probabilities of the training forward. The service is asked for those of
the same tokens, with the adapter and without, and for the tokens that a conversation becomes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tunesmith.cluster.artifacts import ParityRows, ServedReceipt, verify
from tunesmith.cluster.errors import CheckpointError, UsageError
from tunesmith.serving.checks import SETTINGS

LEAST_CHANGE = 1e-6
"""Nats. An adapter that moves no log-probability by more has no effect."""
PROBE = [
    {"role": "system", "content": "You are terse.\n"},
    {"role": "user", "content": " What is 2+2?  "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 × 3?"},
]
"""A conversation whose blanks and line ends a changed template would treat in another way."""


class Service:
    """A running service, asked over HTTP.

    Args:
        url: its base URL, up to and with /v1.
    """

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=300)
        self._root = url.rstrip("/").removesuffix("/v1")

    def models(self) -> list[str]:
        """Names that may be asked for."""
        return [one["id"] for one in self._json("GET", "/models")[0]["data"]]

    def scores(self, model: str, tokens: list[int]) -> tuple[list[float | None], dict[str, str]]:
        """The log-probability of each token after those before it, and the answer's headers."""
        asked = {"model": model, "prompt": tokens, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
        answer, headers = self._json("POST", "/completions", asked)
        return answer["choices"][0]["logprobs"]["token_logprobs"], headers

    def tokens(self, model: str, messages: list[dict[str, str]]) -> list[int]:
        """What a conversation becomes."""
        return self._json("POST", f"{self._root}/tokenize", {"model": model, "messages": messages})[0]["tokens"]

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[Any, dict[str, str]]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise UsageError(
                f"{self._client.base_url}: nothing answers there ({type(error).__name__})", "Is `tunesmith serve` up?"
            ) from error
        if response.status_code != 200:
            raise UsageError(f"{self._client.base_url}: {response.status_code}: {_said(response)}")
        return response.json(), dict(response.headers)


def _said(response: httpx.Response) -> str:
    """The message of a refusal; the beginning of what another server sent in its place."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


def certify(artifact: Path, service: Service, model: str, base: str | None) -> ServedReceipt:
    """Holds a served model against its artifact.

    Args:
        model: what clients ask for.
        base: name of the base it runs on; None looks for it among the models. A whole model has none beside it: then
            only its answers and its template are compared.

    Raises:
        UsageError: the artifact carries no rows, it is a whole model and a base was named, or the service cannot be asked.
    """
    rows = read_rows(artifact)
    is_adapter = (artifact / SETTINGS).is_file()
    if base and not is_adapter:
        raise UsageError(
            f"{artifact} is a whole model, not an adapter: there is no base beside it to compare with",
            "Leave out --base; --model is the name that the model itself is served by, as a base.",
        )
    problems: list[str] = []
    differences, changes = [], []
    base = base or (find_base_model(service, model, rows.rows[0].tokens) if is_adapter else None)
    versions: set[str] = set()
    for row in rows.rows:
        served, headers = service.scores(model, row.tokens)
        versions.add(headers.get("x-tunesmith-version", ""))
        untuned, _ = service.scores(base, row.tokens) if base else (None, {})
        for position, trained in zip(row.positions, row.logprobs, strict=True):
            now = served[position]
            differences.append(abs((float("nan") if now is None else now) - trained))
            if untuned is not None:
                changes.append(abs((now or 0.0) - (untuned[position] or 0.0)))
    largest, mean = max(differences), sum(differences) / len(differences)
    if not (mean <= rows.tolerance_mean and largest <= rows.tolerance):  # a NaN is no agreement
        problems.append(
            f"log-probabilities differ from the training forward by {mean:.2g} nats on average and {largest:.2g} at most, "
            f"where {rows.tolerance_mean:g} and {rows.tolerance:g} pass"
        )
    if len(versions) > 1:
        found = ", ".join(sorted(version[:12] for version in versions))
        problems.append(f"{model} is split between the versions {found}: certify each by itself, as NAME@VERSION")
    if not base and is_adapter:
        problems.append(
            "no model of the service is the base alone, so the adapter's effect cannot be seen; give --base"
        )
    elif base and not max(changes) > LEAST_CHANGE:
        problems.append(f"{model} answers as its base {base}: the adapter has no effect")
    matches = template_matches(artifact, service, model)
    if matches is False:
        problems.append(
            "a conversation becomes other tokens than in training: the chat template or tokenizer has changed"
        )
    return ServedReceipt(
        passed=not problems,
        problems=problems,
        model=model,
        version=" ".join(sorted(versions)),
        rows=len(rows.rows),
        tokens=len(differences),
        difference=largest,
        mean_difference=mean,
        base_difference=max(changes) if changes else None,
        template_matches=matches,
    )


def read_rows(artifact: Path) -> ParityRows:
    """The artifact's held-out rows.

    Raises:
        UsageError: it is damaged, or it carries none.
    """
    try:
        verify(artifact)
    except CheckpointError as error:
        raise UsageError(f"{artifact} is not a whole artifact: {error}") from error
    file = artifact / "receipts" / "parity_rows.json"
    if not file.is_file():
        raise UsageError(f"{artifact} has no receipts/parity_rows.json", "Train or export it again with this version.")
    return ParityRows.model_validate_json(file.read_bytes())


def find_base_model(service: Service, model: str, tokens: list[int]) -> str | None:
    """The model of the service that is the same base without an adapter."""
    wanted = service.scores(model, tokens[:2])[1].get("x-tunesmith-base")
    for name in service.models():
        if name == model:
            continue
        try:
            headers = service.scores(name, tokens[:2])[1]
        except UsageError:  # a mixture, or a base whose vocabulary lacks these tokens
            continue
        if headers.get("x-tunesmith-base") == wanted and headers.get("x-tunesmith-version") == "none":
            return name
    return None


def template_matches(artifact: Path, service: Service, model: str) -> bool | None:
    """Whether the service renders a conversation as the artifact's own tokenizer does; None without a chat template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(artifact)
    if tokenizer.chat_template is None:
        return None
    own = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, return_dict=False)
    return service.tokens(model, PROBE) == own

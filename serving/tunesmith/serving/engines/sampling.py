"""Draws one token for each row of a batch, every row by its own rules and its own stream of random numbers.

V is the vocabulary.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from tunesmith.serving.engines.protocol import Sampling

COLDEST = 1e-4
"""Below it logits would become infinite; it draws the likeliest token already."""


class Drawer:
    """Draws the tokens of one answer.

    Args:
        index: which of a request's n answers; each has a stream of its own.
    """

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        self._seen: Counter[int] = Counter()
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((sampling.seed + index) % 2**63)

    def draw(self, logits_V: Tensor) -> int:
        """A token id.

        Args:
            logits_V: fp32, on any device; left as it is.
        """
        token = self._draw(self._penalised(logits_V))
        self._seen[token] += 1
        return token

    def _penalised(self, logits_V: Tensor) -> Tensor:
        """OpenAI's penalties: `logit - count * frequency_penalty - (count > 0) * presence_penalty`."""
        sampling = self._sampling
        if not self._seen or not (sampling.frequency_penalty or sampling.presence_penalty):
            return logits_V
        tokens = torch.tensor(list(self._seen), device=logits_V.device)
        counts = torch.tensor(list(self._seen.values()), device=logits_V.device, dtype=logits_V.dtype)
        penalties = counts * sampling.frequency_penalty + sampling.presence_penalty
        return logits_V.index_add(0, tokens, -penalties)

    def _draw(self, logits_V: Tensor) -> int:
        sampling = self._sampling
        if self._generator is None:
            return int(logits_V.argmax())
        sorted_V, order_V = logits_V.cpu().div(max(sampling.temperature, COLDEST)).sort(descending=True, stable=True)
        probabilities_V = sorted_V.softmax(-1)
        if sampling.top_k:
            probabilities_V[sampling.top_k :] = 0
        if sampling.top_p < 1:
            before_V = probabilities_V.cumsum(-1) - probabilities_V
            probabilities_V[before_V >= sampling.top_p] = 0
        return int(order_V[torch.multinomial(probabilities_V, 1, generator=self._generator)])

"""How well a base already predicts a data set: its loss on a sample, in nats a token and in bits a byte.

A token is worth more in one vocabulary than in another, so losses a token cannot be compared between bases; bits a byte can. Labels
that are no text (the end of a turn) count in the first and not in the second: a base that never saw a chat template misses them
whatever the text says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import GIB, this_machine
from tunesmith.trainers import attention, models
from tunesmith.trainers.batch import collate
from tunesmith.trainers.policy import Policy, score

if TYPE_CHECKING:
    from tunesmith.trainers.data.tokens import TokenStore

MOST_ROWS, MOST_TOKENS = 64, 20_000
LEAST_TOKENS = 1_000
PATIENCE_S = 120.0
"""Seconds that the forward pass may take on CPUs, as far as the sample can be cut for it."""
CPU_SHARE = 0.4
"""Of the measured matrix rate that a model's forward pass reaches."""


@dataclass(frozen=True)
class Loss:
    """The base's loss on a sample of the training rows."""

    nats_per_token: float
    """Over all labels, as the held-out loss of a run counts."""
    bits_per_byte: float
    """Over labels that are text, by UTF-8 bytes."""
    standard_error: float
    """Of `bits_per_byte`, from the spread between rows."""
    rows: int
    tokens: int
    """In the sample's forward pass."""


def measure(base: BaseRef, parameters: int, store: TokenStore) -> Loss | str:
    """Scores a sample with our own policy, without gradients: in bf16 on a GPU, else in fp32.

    Args:
        parameters: of the base, to know whether it fits.
        store: tokenised training rows.

    Returns:
        The loss, or why it could not be measured.

    Raises:
        ModelError: the base cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    needed = parameters * dtype.itemsize / GIB * 1.1  # activations of a row at a time are small beside the weights
    free = torch.cuda.mem_get_info()[0] / GIB if device.type == "cuda" else this_machine().memory_gib
    if needed > free:
        return f"it takes {needed:.3g} GiB to run the base here, and {free:.3g} are free"
    sample = choose(store, MOST_TOKENS if device.type == "cuda" else _affordable(parameters))
    if not len(sample):
        return "no row of the data has text to score"
    policy = _policy(base, device, dtype)
    tokenizer = models.load_tokenizer(base)
    return _summed([_row(policy, tokenizer, store, int(index), device) for index in sample])


def choose(store: TokenStore, most_tokens: int) -> np.ndarray:
    """Rows from all over the store, the same at every call: at most `MOST_ROWS`, and the first always."""
    usable = np.flatnonzero(store.trained_counts > 0)
    picked = np.random.default_rng(0).permutation(usable)[:MOST_ROWS]
    within = np.cumsum(store.lengths[picked]) <= most_tokens
    within[:1] = True
    return picked[within]


def _affordable(parameters: int) -> int:
    """Tokens whose forward pass, at two operations a parameter, these cores do in time."""
    from tunesmith.cluster.fleet_machine import measured_flops

    tokens = PATIENCE_S * CPU_SHARE * measured_flops() / (2 * parameters)
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, tokens)))


def _policy(base: BaseRef, device: torch.device, dtype: torch.dtype) -> Policy:
    from transformers.utils import logging

    plain = Recipe.model_validate(
        {
            "name": "advise",
            "model": {"base": base.reference},
            "data": {"train": "-"},
            "objective": "cpt",
            "adaptation": "full",
        }
    )
    logging.disable_progress_bar()
    model = models.build(plain, base, device=device, dtype=dtype, zero3=False)
    policy = Policy(model, attention.choose("auto", device, dtype), router_aux_loss_coef=0.0)
    return policy.eval()


@torch.no_grad()
def _row(policy: Policy, tokenizer: Any, store: TokenStore, index: int, device: torch.device) -> np.ndarray:
    """float64 [5]: nats and labels over all, nats and bytes over text, tokens of the row."""
    batch = collate(store, [[index]], 1.0).to(device)
    nats_L = -score(policy, batch).logps.double().cpu().numpy()
    target_L = batch.targets.cpu().numpy()
    is_text_L = ~np.isin(target_L, tokenizer.all_special_ids)
    text = tokenizer.decode(target_L[is_text_L], clean_up_tokenization_spaces=False)
    size = len(text.encode("utf-8", errors="replace"))
    return np.array([nats_L.sum(), len(nats_L), nats_L[is_text_L].sum(), size, len(batch.input_ids)])


def _summed(rows: list[np.ndarray]) -> Loss | str:
    """The ratio of sums, and its standard error by linearisation (Cochran 1977, section 6.3)."""
    table = np.stack(rows)
    nats, labels, text_nats, size, tokens = table.sum(axis=0)
    if not size:
        return "none of the sampled rows has text among its trained tokens"
    bits = text_nats / size / math.log(2)
    spread = table[:, 2] / math.log(2) - bits * table[:, 3]
    count = len(rows)
    error = math.sqrt(count / max(1, count - 1) * float((spread**2).sum())) / size
    return Loss(nats / labels, bits, error, count, int(tokens))

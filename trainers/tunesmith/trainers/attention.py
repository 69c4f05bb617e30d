"""Attention over a forest of segments: the plain mask, and faster paths that equal it.

Each path has the signature of Transformers' attention interface, so that it serves every model that calls it, and reads
the forest from the keyword arguments of the model's forward. Shape suffixes: H heads, T packed tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.cluster.errors import ModelError
from tunesmith.trainers.batch import Forest

REFERENCE = "tunesmith_reference"
SEGMENTS = "tunesmith_segments"
VARLEN = "tunesmith_varlen"

Output = tuple[Tensor, None]


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the attention path for a device and number format; `requested` is the recipe's `model.attention`."""
    if requested == "reference":
        return REFERENCE
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return VARLEN
    return SEGMENTS


def install(model: nn.Module, path: str) -> None:
    """Makes a Transformers model attend through one of the paths.

    Raises:
        ModelError: if the model's attention is not pluggable.
    """
    for name, function in ((REFERENCE, reference), (SEGMENTS, per_segment), (VARLEN, varlen)):
        ALL_ATTENTION_FUNCTIONS.register(name, function)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"{type(model).__name__} does not take a pluggable attention function, so its packed segments would see each other",
            "Choose a model of a current architecture (Llama, Qwen, Mistral, Mixtral, Gemma, Phi, ...).",
        )
    model.config._attn_implementation = path  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportOptionalMemberAccess]


def reference(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forest: Forest,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Output:
    """Softmax over the plain [T, T] mask; the meaning of every other path.

    Args:
        query: [1, H, T, D]; key and value: [1, H / groups, T, D].
        forest: the segments of the row.
        sliding_window: a token sees at most this many tokens back, itself included.
        softcap: scores are squashed to ±softcap (Gemma 2).

    Returns:
        [1, T, H, D], and no attention weights.
    """
    key, value = _repeat_groups(query, key), _repeat_groups(query, value)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(forest, sliding_window).to(query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def per_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forest: Forest,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Output:
    """Fused attention, one call a segment: work grows with the sum of squared segment lengths, not with T squared."""
    if softcap is not None:
        return reference(
            module, query, key, value, attention_mask, forest=forest, scaling=scaling, dropout=dropout,
            sliding_window=sliding_window, softcap=softcap,
        )  # fmt: skip
    key, value = _repeat_groups(query, key), _repeat_groups(query, value)
    dropout = dropout if module.training else 0.0
    # Split, not narrowed: the gradient of a narrow is as large as the row, and there would be one a segment.
    queries, keys, values = (x.split(forest.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for segment, length in enumerate(forest.lengths):
        line = (*forest.ancestors(segment), segment)
        seen_key, seen_value = _join(keys, line), _join(values, line)
        seen = seen_key.shape[2]
        needs_mask = len(line) > 1 or (sliding_window is not None and seen > sliding_window)
        mask = _causal_tail(length, seen, sliding_window, query.device) if needs_mask else None
        output = F.scaled_dot_product_attention(
            queries[segment],
            seen_key,
            seen_value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forest: Forest,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Output:
    """FlashAttention over all segments in one call; forests with shared prompts and rarer variants go segment by segment."""
    if not forest.is_flat or softcap is not None or (dropout and module.training):
        return per_segment(
            module, query, key, value, attention_mask, forest=forest, scaling=scaling, dropout=dropout,
            sliding_window=sliding_window, softcap=softcap,
        )  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor((*forest.starts, sum(forest.lengths)), dtype=torch.int32, device=query.device)
    longest = max(forest.lengths)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    output = varlen_attn(
        query_THD, key_THD, value_THD, bounds, bounds, longest, longest,
        scale=scaling, window_size=window, enable_gqa=True,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output.unsqueeze(0), None


def _repeat_groups(query: Tensor, shared: Tensor) -> Tensor:
    groups = query.shape[1] // shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, dim=1)


def _join(pieces: Sequence[Tensor], line: tuple[int, ...]) -> Tensor:
    return pieces[line[0]] if len(line) == 1 else torch.cat([pieces[segment] for segment in line], dim=2)


def _causal_tail(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Mask [queries, keys] in which the queries are the last of the keys."""
    query_at = torch.arange(keys - queries, keys, device=device)[:, None]
    key_at = torch.arange(keys, device=device)[None, :]
    visible = key_at <= query_at
    return visible if sliding_window is None else visible & (query_at - key_at < sliding_window)


def _visible(forest: Forest, sliding_window: int | None) -> Tensor:
    visible = forest.visible()
    if sliding_window is None:
        return visible
    positions = forest.position_ids()
    return visible & (positions[:, None] - positions[None, :] < sliding_window)

"""The mask receipt: which tokens were trained, counted and shown after packing.

It looks at the very rows that the loop lays out, not at the data set they came from, and fails closed when nothing is
trained or when an assistant's turn does not train the token that ends it: such a model never stops talking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.cluster.artifacts import MaskReceipt, SourceCounts
from tunesmith.cluster.errors import ReceiptError
from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers.batch import collate
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.data.report import DataReport
from tunesmith.trainers.data.tokens import TokenStore
from tunesmith.trainers.receipts.mask_page import page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 8
"""Examples that the receipt shows in full."""
SHOWN_TOKENS = 2000
"""Tokens of an example that are shown; the rest is counted."""


def write_mask_receipt(
    folder: Path, data: Prepared, packs: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> MaskReceipt:
    """Writes mask.json and mask.html into `folder`.

    Args:
        data: whose training examples are looked at.
        packs: example indices of each packed row of an epoch, as the loop collates them.
        tokenizer: decodes them; its end-of-text token ends completions.

    Raises:
        ReceiptError: after both files are written, when the mask is wrong.
    """
    sources = [source.path for source in data.report.sources if source.role == "train"]
    receipt = inspect(data.train, packs, tokenizer, sources, turn_ends(data.report, tokenizer))
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "mask.json", receipt.model_dump_json(indent=1))
    write_atomic(folder / "mask.html", page(receipt))
    if not receipt.passed:
        raise ReceiptError(
            f"the mask receipt failed: {' '.join(receipt.problems)}",
            f"Open {folder / 'mask.html'} to see which tokens would be trained.",
        )
    return receipt


def inspect(
    store: TokenStore,
    packs: Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    ends: frozenset[int],
) -> MaskReceipt:
    """Counts the labels of collated rows and looks at every trained turn.

    Args:
        packs: example indices of each packed row.
        sources: the recipe's name of each source, by the store's source number.
        ends: tokens that a trained turn may end with; empty when every token is trained and there are no turns.
    """
    counts = np.zeros((len(sources), 3), dtype=np.int64)  # examples, tokens, labels
    turns = np.zeros(2, dtype=np.int64)
    cut: set[str] = set()
    shown: list[dict[str, Any]] = []
    endless: list[dict[str, Any]] = []

    def look(example: int, tokens: np.ndarray, labelled: np.ndarray, breaks_off: bool) -> dict[str, Any]:
        where, source = store.where(example), sources[store.source[example]]
        return {"where": where, "source": source, "cut": breaks_off, **_show(tokens, labelled, tokenizer)}

    for packed in packs:
        for example, tokens, labelled in _examples(store, packed):
            counts[store.source[example]] += (1, len(tokens), labelled.sum())
            breaks_off = bool(ends and store.cut[example] and labelled[-1] and tokens[-1] not in ends)
            if breaks_off:
                cut.add(store.where(example))
            if ends:
                ended = _turns_with_end(tokens, labelled, ends, breaks_off)
                turns += ended
                if ended[0] != ended[1] and len(endless) < 3:
                    endless.append(look(example, tokens, labelled, breaks_off))
                    continue
            if len(shown) < SHOWN:
                shown.append(look(example, tokens, labelled, breaks_off))
    problems = _problems(counts, turns, [example["where"] for example in endless], tokenizer, ends)
    return MaskReceipt(
        passed=not problems,
        problems=problems,
        sources=[
            SourceCounts(source=name, examples=row[0], tokens=row[1], trained_tokens=row[2])
            for name, row in zip(sources, counts.tolist(), strict=True)
        ],
        tokens=int(counts[:, 1].sum()),
        trained_tokens=int(counts[:, 2].sum()),
        assistant_turns=int(turns[0]),
        turns_with_trained_end=int(turns[1]),
        cut_rows=len(cut),
        examples=[*endless, *shown][:SHOWN],
    )


def turn_ends(report: DataReport, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a trained turn: the template's end-of-turn token, and the end-of-text token of completions."""
    if report.loss_on == "all":
        return frozenset()
    return frozenset(token for token in (report.end_of_turn, tokenizer.eos_token_id) if isinstance(token, int))


def _examples(store: TokenStore, packed: Sequence[int]) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """Index, tokens and labelled tokens (bool) of each example, read back from the row that the loop would train on."""
    batch = collate(store, [packed], 1.0)
    labelled_T = np.zeros(len(batch.input_ids), dtype=bool)
    labelled_T[batch.label_positions.numpy() + 1] = batch.weights.numpy() > 0
    tokens_T = batch.input_ids.numpy()
    assert np.array_equal(tokens_T[labelled_T], batch.targets.numpy()), "a label is not the token that follows it"
    for example, start, length in zip(batch.examples, batch.forest.starts, batch.forest.lengths, strict=True):
        yield example, tokens_T[start : start + length], labelled_T[start : start + length]


def _turns_with_end(
    tokens: np.ndarray, labelled: np.ndarray, ends: frozenset[int], breaks_off: bool
) -> tuple[int, int]:
    """Trained turns of an example, and those of them whose last trained token ends the turn.

    A turn is a run of labelled tokens. The last one of an example that breaks off is not counted.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], labelled, [False])).astype(np.int8)))
    lasts = edges[1::2] - 1
    if breaks_off:
        lasts = lasts[:-1]
    return len(lasts), int(np.isin(tokens[lasts], list(ends)).sum())


def _show(tokens: np.ndarray, labelled: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The example as spans of text, trained or not. Each span is decoded whole: a character may be several tokens."""
    spans = []
    for trained, members in groupby(range(min(len(tokens), SHOWN_TOKENS)), key=lambda at: bool(labelled[at])):
        ids = tokens[list(members)].tolist()
        spans.append({"text": tokenizer.decode(ids, skip_special_tokens=False), "trained": trained, "tokens": len(ids)})
    return {
        "tokens": len(tokens),
        "trained_tokens": int(labelled.sum()),
        "not_shown": max(0, len(tokens) - SHOWN_TOKENS),
        "spans": spans,
    }


def _problems(
    counts: np.ndarray,
    turns: np.ndarray,
    endless: list[str],
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
) -> list[str]:
    problems = []
    if not counts[:, 2].sum():
        problems.append(f"None of {counts[:, 1].sum():,} tokens is trained.")
    if turns[0] != turns[1]:
        problems.append(
            f"{turns[0] - turns[1]:,} of {turns[0]:,} assistant turns do not train the end-of-turn token "
            f"({' or '.join(tokenizer.convert_ids_to_tokens(sorted(ends)))}), so the model would not learn to stop: "
            f"{', '.join(endless)}."
        )
    return problems

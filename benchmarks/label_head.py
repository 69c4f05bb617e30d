"""The label-only head against the Hugging Face default (logits of every token, then cross-entropy), at 20 % labels.

Both models have the same weights, the same packed row and the same attention; only the head and the loss differ. Losses
and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import workload
from measure import assert_close, comparison, in_turn, now, save

workload.quiet()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

from tunesmith.trainers import attention, head  # noqa: E402
from tunesmith.trainers.batch import Batch, Forest  # noqa: E402
from tunesmith.trainers.objectives.likelihood import negative_log_likelihood  # noqa: E402
from tunesmith.trainers.policy import Policy, score  # noqa: E402

LABEL_SHARE = 0.2
SEGMENT = 256  # tokens


@dataclass
class Contestant:
    """A model, its optimizer, and the loss of the row."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]

    def step(self, _round: int = 0) -> float:
        """Seconds of forward, backward and update."""
        began = now()
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return now() - began

    def gradients(self) -> dict[str, Tensor]:
        """Of the trainable parameters, by name in the plain model."""
        self.optimizer.zero_grad()
        self.loss().backward()
        parameters = self.model.named_parameters()
        return {
            name.removeprefix("model.model.base").removeprefix("model."): p.grad
            for name, p in parameters
            if p.grad is not None
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    lines, parity = [], {}
    for is_frozen in (False, True):
        kind = "frozen head (LoRA)" if is_frozen else "trainable head"
        batch = row(chosen.tokens)
        ours, default = contestants(batch, is_frozen)
        parity[kind] = compare(kind, ours, default)
        figures = in_turn({f"{kind}, ours": ours.step, f"{kind}, HF default": default.step}, chosen.rounds)
        times = list(figures.values())
        lines.append(comparison(f"step with a {kind}", "HF default", "s", *times, ratio="peer/ours", aim="≥ 1.4"))
        peaks = [[peak_mib(batch, is_frozen, label_only)] for label_only in (True, False)]
        lines.append(comparison(f"peak memory of a {kind}", "HF default", "MiB", *peaks, ratio="peer/ours", aim="≥ 4"))
    setting = (
        f"One row of {chosen.tokens} tokens, {LABEL_SHARE:.0%} labels, vocabulary {workload.VOCABULARY}, "
        f"{chosen.threads} thread(s) (where it is one, time is CPU time), fp32, AdamW, the 22M-parameter Llama of the throughput benchmark; memory is what head, "
        "loss and their backward pass allocate beyond the hidden states and weights."
    )
    save("label_head", setting, parity, lines)


def row(tokens: int) -> Batch:
    """A packed row with every fifth token a label."""
    rng = np.random.default_rng(0)
    forest = Forest.flat([SEGMENT] * (tokens // SEGMENT))
    input_ids = torch.from_numpy(rng.integers(2, workload.VOCABULARY, tokens))
    predicts = np.arange(tokens) % SEGMENT != SEGMENT - 1  # the last token of a segment predicts nothing
    places = np.sort(rng.choice(np.flatnonzero(predicts), int(tokens * LABEL_SHARE), replace=False))
    positions = torch.from_numpy(places)
    labels = len(places)
    return Batch(
        input_ids,
        forest.position_ids(),
        forest,
        positions,
        input_ids[positions + 1],
        torch.ones(labels),
        float(labels),
        (),
    )


def dense_labels(batch: Batch) -> Tensor:
    """Labels as Hugging Face takes them: int64 [1, T], -100 where there is none."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.label_positions + 1] = batch.targets
    return labels[None]


def contestants(batch: Batch, is_frozen: bool) -> tuple[Contestant, Contestant]:
    """Ours and the default, with equal weights."""
    torch.manual_seed(0)
    plain: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=workload.VOCABULARY, **workload.MODEL))
    if is_frozen:
        plain = get_peft_model(plain, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    default = copy.deepcopy(plain)
    policy = Policy(plain, attention.SEGMENTS)
    attention.install(default.get_base_model() if is_frozen else default, attention.SEGMENTS)  # pyright: ignore

    def our_loss() -> Tensor:
        return negative_log_likelihood(score(policy, batch).logps, batch)[0]

    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], "labels": dense_labels(batch),
        "num_items_in_batch": torch.tensor(len(batch.targets)), "use_cache": False, "forest": batch.forest,
    }  # fmt: skip

    def default_loss() -> Tensor:
        return default(**inputs).loss

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    return Contestant(plain, adamw(plain), our_loss), Contestant(default, adamw(default), default_loss)


def compare(kind: str, ours: Contestant, default: Contestant) -> dict[str, float]:
    """Loss and gradients agree, or nothing is timed."""
    assert_close(f"loss with a {kind}", ours.loss().item(), default.loss().item(), 1e-5)
    mine, theirs = ours.gradients(), default.gradients()
    assert mine.keys() == theirs.keys(), "different parameters are trained"
    gaps = [((mine[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in mine]
    assert_close(f"gradients with a {kind}, largest relative gap", max(gaps), 0.0, 1e-4)
    return {"largest relative gap of a gradient": max(gaps)}


def peak_mib(batch: Batch, is_frozen: bool, label_only: bool) -> float:
    """MiB that a head, its loss and their backward pass hold at most, counted by the allocator."""
    torch.manual_seed(0)
    layer = nn.Linear(workload.MODEL["hidden_size"], workload.VOCABULARY, bias=False).requires_grad_(not is_frozen)
    hidden = torch.randn(len(batch.input_ids), layer.in_features, requires_grad=True)
    labels = dense_labels(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        if label_only:
            chosen = hidden.index_select(0, batch.label_positions)
            logps = head.label_logps(chosen, layer.weight, None, batch.targets, head.LogitTransform())
            loss, _ = negative_log_likelihood(logps, batch)
        else:
            loss = ForCausalLMLoss(layer(hidden)[None], labels, vocab_size=workload.VOCABULARY)
        loss.backward()
    held, peak = 0, 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    assert peak > 0, "the profiler has counted nothing"
    return peak / 2**20


if __name__ == "__main__":
    main()

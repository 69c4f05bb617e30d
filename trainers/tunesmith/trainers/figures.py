"""Figures of a run that metrics and summaries show."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import torch


def closing_figures(lines: list[dict[str, Any]], best_loss: float | None) -> dict[str, float | None]:
    """What a run is summed up by.

    Returns:
        `train_loss`: mean over all steps; `eval_loss`: of the weights in the artifact, None without held-out rows;
        `tokens_per_second`: median over the steps, all workers together.
    """
    steps = [line for line in lines if "loss" in line]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "train_loss": float(np.mean([line["loss"] for line in steps])) if steps else None,
        "eval_loss": best_loss if best_loss is not None else evaluated[-1] if evaluated else None,
        "tokens_per_second": float(np.median([line["tokens_per_second"] for line in steps])) if steps else None,
    }


def workers_by_step(lines: list[dict[str, Any]]) -> list[list[int]]:
    """`[first step, workers]` of each stretch of steps that the same number of workers trained."""
    stretches: list[list[int]] = []
    for line in lines:
        if "workers" in line and (not stretches or stretches[-1][1] != line["workers"]):
            stretches.append([line["step"], line["workers"]])
    return stretches


def memory_gib(device: torch.device) -> float:
    """Most memory that tensors took on a GPU; on a CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30

"""Maximum likelihood: continued pre-training and supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.trainers.batch import Batch


def negative_log_likelihood(logps_L: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sum_l weight_l logp_l / normalizer`: cross-entropy, averaged over the labels of the whole global batch.

    Equals the loss of TRL's `SFTTrainer` and of the HF Trainer, which too divide by the labels of the global batch.

    Args:
        logps_L: float32 [L], log-probability of each label.
        batch: gives `weights` [L] and `normalizer`.

    Returns:
        The scalar loss, and no further metrics.
    """
    return -(batch.weights * logps_L).sum() / batch.normalizer, {}

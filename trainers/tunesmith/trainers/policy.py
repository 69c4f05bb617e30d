"""The model as every objective sees it: one forward that returns log-probabilities only where a label is.

One `nn.Module` around the whole model, so that DeepSpeed sees one forward and all its hooks fire.
Shape suffixes: T packed tokens, L labelled tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.trainers import attention, head
from tunesmith.trainers.batch import Batch, Forest
from tunesmith.trainers.moe import load_balancing_loss, moe_blocks


class PolicyOutput(NamedTuple):
    """What a forward returns.

    Attributes:
        logps: float32 [L], log-probability of each label.
        aux_loss: scalar load-balancing loss of a mixture-of-experts model, already weighted; None for dense models.
    """

    logps: Tensor
    aux_loss: Tensor | None


class Policy(nn.Module):
    """A causal language model, plain or wrapped by PEFT, that scores labels.

    Args:
        model: the model, in place of whose attention one of our paths is installed.
        attention_path: a name from `tunesmith.trainers.attention`.
        router_aux_loss_coef: weight of the load-balancing loss; None takes the model's own.

    Raises:
        ModelError: if the model's attention is not pluggable.
    """

    def __init__(self, model: nn.Module, attention_path: str, router_aux_loss_coef: float | None = None) -> None:
        super().__init__()
        self.model = model
        causal_lm = self.causal_lm
        config: Any = causal_lm.config
        attention.install(causal_lm, attention_path)
        head.install(causal_lm.get_output_embeddings(), head.LogitTransform.of(config))
        own_coef = getattr(config, "router_aux_loss_coef", None) if moe_blocks(causal_lm) else None
        self.router_aux_loss_coef = own_coef if router_aux_loss_coef is None else router_aux_loss_coef

    @property
    def causal_lm(self) -> Any:
        """The Transformers model inside PEFT's wrapper, or the model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # pyright: ignore[reportCallIssue]

    @property
    def has_router_loss(self) -> bool:
        """Whether the forward adds a load-balancing loss."""
        return bool(self.router_aux_loss_coef)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, forest: Forest, label_positions: Tensor, targets: Tensor
    ) -> PolicyOutput:
        """Scores the labels of a packed row.

        Args:
            input_ids: int64 [T].
            position_ids: int64 [T].
            forest: which tokens see each other.
            label_positions: int64 [L], where the labels are predicted.
            targets: int64 [L], the labels.
        """
        causal_lm = self.causal_lm
        router = {"output_router_logits": True} if self.has_router_loss else {}
        outputs = causal_lm.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, forest=forest, **router
        )
        hidden_LD = outputs.last_hidden_state[0].index_select(0, label_positions)
        logps_L = causal_lm.get_output_embeddings()(hidden_LD, targets)
        if not self.has_router_loss:
            return PolicyOutput(logps_L, None)
        assert self.router_aux_loss_coef is not None
        balance = load_balancing_loss(outputs.router_logits, causal_lm.config.num_experts_per_tok)
        return PolicyOutput(logps_L, self.router_aux_loss_coef * balance)


def score(policy: nn.Module, batch: Batch) -> PolicyOutput:
    """Scores a batch with a policy, or with the DeepSpeed engine around one."""
    return policy(batch.input_ids, batch.position_ids, batch.forest, batch.label_positions, batch.targets)


@torch.no_grad()
def sum_negative_logps(policy: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted sum of the labels' negative log-probabilities and sum of the weights, two float32 scalars."""
    logps_L, _ = score(policy, batch)
    return -(batch.weights * logps_L).sum(), batch.weights.sum()

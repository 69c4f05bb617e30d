"""The policy's packed, label-only forward equals Transformers on each row alone, for every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import KINDS, Rows, tiny_model

from tunesmith.cluster.errors import ModelError
from tunesmith.trainers import attention
from tunesmith.trainers.batch import Batch, Forest
from tunesmith.trainers.objectives.likelihood import negative_log_likelihood
from tunesmith.trainers.policy import Policy, score

ROWS = Rows([17, 5, 1, 23, 9])


def _gradients(policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    logps, aux = score(policy, batch)
    loss, _ = negative_log_likelihood(logps, batch)
    (loss if aux is None else loss + aux).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_log_probabilities_equal_each_row_alone(kind: str) -> None:
    model = tiny_model(kind)
    wanted = []
    with torch.no_grad():
        for tokens, trained in ROWS.rows:
            ids = torch.from_numpy(tokens).long()
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            at = torch.from_numpy(trained[1:]).nonzero()[:, 0]
            wanted.append(logps[at, ids[1:][at]])
        for path in (attention.REFERENCE, attention.SEGMENTS):
            found = score(Policy(copy.deepcopy(model), path), ROWS.batch()).logps
            torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forest", [None, Forest((20, 10, 15, 10), (-1, 0, 0, -1))], ids=["flat", "shared prompt"])
def test_fast_path_has_the_gradients_of_the_plain_mask(kind: str, forest: Forest | None) -> None:
    batch = ROWS.batch()
    if forest is not None:
        batch = Batch(**{**vars(batch), "forest": forest, "position_ids": forest.position_ids()})
    model = tiny_model(kind)
    plain = _gradients(Policy(copy.deepcopy(model), attention.REFERENCE), batch)
    fast = _gradients(Policy(copy.deepcopy(model), attention.SEGMENTS), batch)
    assert plain.keys() == fast.keys()
    for name, gradient in plain.items():
        assert (gradient - fast[name]).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_model("llama")
    plain = _gradients(Policy(copy.deepcopy(model), attention.SEGMENTS), ROWS.batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in _gradients(Policy(model, attention.SEGMENTS), ROWS.batch()).items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_router_loss_equals_transformers(kind: str) -> None:
    model = tiny_model(kind)
    ids = torch.from_numpy(ROWS.rows[0][0]).long()
    theirs = model(input_ids=ids[None], labels=ids[None], output_router_logits=True)
    alone = Rows([1])
    alone.rows = [ROWS.rows[0]]
    found = score(Policy(model, attention.SEGMENTS), alone.batch()).aux_loss
    assert found is not None
    torch.testing.assert_close(found, theirs.aux_loss * model.config.router_aux_loss_coef, atol=1e-6, rtol=1e-5)


def test_a_model_without_pluggable_attention_is_refused() -> None:
    model = tiny_model("llama")
    type(model)._supports_attention_backend, kept = False, type(model)._supports_attention_backend
    try:
        with pytest.raises(ModelError, match="would see each other"):
            Policy(model, attention.SEGMENTS)
    finally:
        type(model)._supports_attention_backend = kept

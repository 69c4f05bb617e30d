"""Loss and gradients equal TRL's and the HF Trainer's on the same packed batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import Rows, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tunesmith.trainers import attention
from tunesmith.trainers.objectives import OBJECTIVES
from tunesmith.trainers.policy import Policy, score

ROWS = Rows([19, 4, 11, 26], seed=3)


def _hf_trainer(model: Any, folder: Path) -> Any:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", bf16=False)
    return Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": [[1]]}))


def _trl_trainer(model: Any, folder: Path) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(), eos_token="w2", pad_token="w0", bos_token="w1"
    )
    arguments = SFTConfig(
        str(folder), use_cpu=True, report_to="none", bf16=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    return SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": [[1, 2]]}), processing_class=tokenizer
    )


def _word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("oracle", [_hf_trainer, _trl_trainer], ids=["HF Trainer", "TRL SFTTrainer"])
@pytest.mark.parametrize("objective", ["sft", "cpt"])
def test_likelihood(oracle: Any, objective: str, tmp_path: Path) -> None:
    rows = ROWS if objective == "sft" else Rows([19, 4, 11, 26], seed=3, trained_share=1.1)
    batch = rows.batch()
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.label_positions + 1] = batch.targets
    model = tiny_model("llama")
    trainer = oracle(copy.deepcopy(model), tmp_path)
    inputs = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "labels": labels[None],
    }
    # the count the trainer takes for the whole global batch; twice this batch, so that its use is seen
    total = 2 * rows.labels
    theirs = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(total))
    theirs.backward()

    policy = Policy(model, attention.SEGMENTS)
    logps, _ = score(policy, batch)
    ours, _ = OBJECTIVES[objective](logps, type(batch)(**{**vars(batch), "normalizer": float(total)}))
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    wanted = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-5, msg=name)

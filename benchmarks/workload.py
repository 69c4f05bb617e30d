"""What the benchmarks train: a random Llama and made-up rows with the lengths that chat data has.

A token is a word (`w17`), so the length of an example is exact, and no text has to be downloaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tunesmith.trainers.loop import Trainer, TrainJob

VOCABULARY = 32_768
PADDING, END = 0, 1
MODEL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""22 million parameters, 12.6 of them the vocabulary's."""
MEDIAN_TOKENS, DEVIATION = 120, 1.0  # log-normal: mean 198; instruction data sets look like this
READ_BY_DRIVER = ["name", "model.base", "output.dir", "cluster.workers"]


def quiet() -> None:
    """Libraries offline, silent and on the CPU. Call before they are imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
        TRANSFORMERS_VERBOSITY="error", DS_LOG_LEVEL="error",
    )  # fmt: skip


def write_model(folder: Path, **changes: Any) -> None:
    """A Hugging Face folder: random weights in fp32 and a tokenizer whose tokens are words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {"pad_token_id": PADDING, "bos_token_id": None, "eos_token_id": END}
    config = LlamaConfig(vocab_size=VOCABULARY, **special, **{**MODEL, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": PADDING, "</s>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def write_rows(path: Path, count: int, max_length: int, seed: int = 0) -> None:
    """Prompts and completions of random words: log-normal lengths, 10 to 45 % of each example its completion."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(MEDIAN_TOKENS), DEVIATION, count).clip(8, max_length).astype(int)
    with path.open("w") as file:
        for length in lengths:
            words = [f"w{i}" for i in rng.integers(2, VOCABULARY, length - 1)]  # one token is the end of text
            cut = len(words) - max(1, int(length * rng.uniform(0.1, 0.45)))
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
            file.write(json.dumps(row) + "\n")


def recipe(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A recipe over `folder`/model and `folder`/rows.jsonl; `sections` are merged into its own."""
    made: dict[str, Any] = {
        "name": name,
        "model": {"base": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "split": {"validation": 0.0}},
        "objective": "sft",
        "adaptation": "full",
        "train": {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0, "precision": "fp32"},
        "output": {"dir": str(folder / "runs"), "report_to": []},
    }
    for section, values in sections.items():
        made[section] = {**made[section], **values} if isinstance(made.get(section), dict) else values
    return made


@contextmanager
def alone(threads: int) -> Iterator[None]:
    """A process group of one."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        dist.destroy_process_group()


def trainer(folder: Path, written: dict[str, Any]) -> Trainer:
    """The real loop's trainer on a recipe, set up. Collective."""
    import torch.distributed as dist

    from tunesmith.cluster.runs import RunFolder
    from tunesmith.trainers.loop import Trainer

    run = RunFolder(folder / "runs" / written["name"])
    if dist.get_rank() == 0:
        run.create()
        run.begin_attempt()
    dist.barrier()
    made = Trainer(job(written, run.root), lambda: None)
    made.set_up()
    return made


def job(written: dict[str, Any], run: Path) -> TrainJob:
    """What Ray would hand a worker: the base found, the data prepared (by the first worker, while the others wait)."""
    from tunesmith.cluster.recipe.schema import Recipe
    from tunesmith.trainers.data.prepare import prepare
    from tunesmith.trainers.loop import TrainJob
    from tunesmith.trainers.models import resolve_base

    whole = Recipe.model_validate(written)
    base = resolve_base(whole.model.base, whole.model.revision, run.parent)
    cache = run.parent / ".cache" / "data"
    whole.forget_reads()
    fingerprint = prepare(whole, base, cache).fingerprint
    return TrainJob(written, [*READ_BY_DRIVER, *whole.read_keys()], run, cache, fingerprint, base, 1)


def write_text_rows(path: Path, count: int, seed: int = 0) -> None:
    """Prompts and completions of English words, for a tokenizer of text."""
    rng = np.random.default_rng(seed)
    words = [
        "the",
        "model",
        "reads",
        "a",
        "row",
        "and",
        "learns",
        "how",
        "to",
        "answer",
        "it",
        "when",
        "asked",
        "about",
        "files",
        "errors",
        "and",
        "settings",
    ]
    with path.open("w") as file:
        for _ in range(count):
            prompt, answer = (" ".join(rng.choice(words, int(size))) for size in rng.integers(5, 60, 2))
            file.write(json.dumps({"prompt": prompt + "?", "completion": " " + answer + "."}) + "\n")

"""Embeddings and classes against plain Transformers and PEFT, one text at a time."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from tunesmith.cluster.base import find_base
from tunesmith.cluster.errors import ModelError, RequestError
from tunesmith.serving.bases import writes_text
from tunesmith.serving.config import Base
from tunesmith.serving.engines.encoder import EncoderEngine, pooling_of
from tunesmith.serving.engines.protocol import Ask, Encoded, Version

TEXTS = ["a", "what is it?", "one two three four five", "é"]
LABELS = {0: "good", 1: "bad", 2: "neither"}


def save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    bert, classes = tiny_models.encoder_config(), tiny_models.encoder_config(id2label=LABELS)
    llama = tiny_models.config("llama", id2label=LABELS)
    return {
        "encoder": save(BertModel(bert), folder / "encoder"),
        "classifier": save(BertForSequenceClassification(classes), folder / "classifier"),
        "decoder": save(LlamaForSequenceClassification(llama), folder / "decoder"),
    }


def adapter(base: Path, folder: Path, kind: type[Any], task: TaskType, targets: list[str]) -> Version:
    torch.manual_seed(1)
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(r=4, target_modules=targets, task_type=task))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(folder)
    return Version(folder.name, str(folder))


def ask(base: Path, work: Callable[[EncoderEngine], Any], **settings: Any) -> Any:
    async def run() -> Any:
        engine = EncoderEngine("base", find_base(str(base), None, base), Base(path=str(base), **settings))
        await engine.start()
        return await asyncio.wait_for(work(engine), 60)

    return asyncio.run(run())


def hidden(base: Path, text: str, version: Version | None = None) -> torch.Tensor:
    """Of a text's tokens [T, D], by plain Transformers and PEFT."""
    model = AutoModel.from_pretrained(base).eval()
    model = PeftModel.from_pretrained(model, version.folder).eval() if version else model
    with torch.inference_mode():
        return model(**tiny_models.tokenizer()(text, return_tensors="pt", return_token_type_ids=False))[0][0]


@pytest.mark.parametrize("max_batch", [1, 3])
def test_embeddings_are_the_mean_of_the_tokens_without_padding(bases: dict[str, Path], max_batch: int) -> None:
    made: Encoded = ask(bases["encoder"], lambda engine: engine.encode(TEXTS, None), max_batch=max_batch)
    for text, vector in zip(TEXTS, made.vectors, strict=True):
        torch.testing.assert_close(torch.tensor(vector), hidden(bases["encoder"], text).mean(0), atol=1e-5, rtol=1e-5)
    assert made.tokens == sum(len(text.encode()) for text in TEXTS)
    assert made.labels == ()


@pytest.mark.parametrize(
    ("mode", "take"),
    [
        ("cls_token", lambda h: h[0]),
        ("max_tokens", lambda h: h.amax(0)),
        ("lasttoken", lambda h: h[-1]),
        ("mean_tokens", lambda h: h.mean(0)),
    ],
)
def test_the_models_own_files_say_how_tokens_become_one_vector(
    mode: str, take: Callable[[torch.Tensor], torch.Tensor], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bases["encoder"], tmp_path / "base"))
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{one}": one == mode for one in ("cls_token", "max_tokens", "lasttoken", "mean_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    made: Encoded = ask(folder, lambda engine: engine.encode(TEXTS, None))
    for text, vector in zip(TEXTS, made.vectors, strict=True):
        expected = torch.nn.functional.normalize(take(hidden(folder, text)), dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=1e-5)


def test_ways_that_are_not_known_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["encoder"], tmp_path / "base"))
    (folder / "1_Pooling").mkdir()
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(both))
    with pytest.raises(ModelError, match="pools by cls_token and mean_tokens"):
        pooling_of(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ModelError, match="Dense module"):
        pooling_of(folder)


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_classes_have_the_probabilities_of_plain_transformers_with_an_adapter_and_without(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    targets = ["query", "value"] if kind == "classifier" else ["q_proj", "v_proj"]
    version = adapter(bases[kind], tmp_path / "tuned", AutoModelForSequenceClassification, TaskType.SEQ_CLS, targets)

    async def work(engine: EncoderEngine) -> list[Encoded]:
        return [await engine.encode(TEXTS, one) for one in (None, version, None)]

    plain, tuned, again = ask(bases[kind], work)
    assert plain == again
    assert plain.labels == tuple(LABELS.values())
    for made, one in ((plain, None), (tuned, version)):
        model: Any = AutoModelForSequenceClassification.from_pretrained(bases[kind]).eval()
        model = PeftModel.from_pretrained(model, one.folder).eval() if one else model
        for text, vector in zip(TEXTS, made.vectors, strict=True):
            with torch.inference_mode():
                encoded = tiny_models.tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
                expected = model(**encoded).logits[0].softmax(-1)
            torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=1e-5)
    assert plain.vectors != tuned.vectors


def test_an_adapter_changes_its_own_embeddings_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    version = adapter(bases["encoder"], tmp_path / "tuned", AutoModel, TaskType.FEATURE_EXTRACTION, ["query", "value"])

    async def work(engine: EncoderEngine) -> list[Encoded]:
        return list(await asyncio.gather(*(engine.encode(TEXTS, one) for one in (None, version, None, version))))

    plain, tuned, again, tuned_again = ask(bases["encoder"], work)
    assert (plain, tuned) == (again, tuned_again)
    for text, vector in zip(TEXTS, tuned.vectors, strict=True):
        expected = hidden(bases["encoder"], text, version).mean(0)
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=1e-5)


def test_what_an_encoder_cannot_do_is_refused_by_name(bases: dict[str, Path]) -> None:
    async def text(engine: EncoderEngine) -> None:
        async for _ in engine.generate(Ask("r", "a")):
            pass

    with pytest.raises(RequestError, match="base gives embeddings, no text: ask /v1/embeddings"):
        ask(bases["encoder"], text)
    with pytest.raises(RequestError, match="base gives classes, no text: ask /classify"):
        ask(bases["classifier"], text)
    with pytest.raises(RequestError, match="this model takes 64 tokens; the prompt has 90") as raised:
        ask(bases["encoder"], lambda engine: engine.encode(["a", "b" * 90], None))
    assert raised.value.code == "context_length_exceeded"


def test_architectures_say_who_writes_text(bases: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    assert writes_text(tiny_base)
    assert not any(writes_text(folder) for folder in bases.values())
    folder = Path(shutil.copytree(tiny_base, tmp_path / "embedder"))
    (folder / "modules.json").write_text("[]")
    assert not writes_text(folder), "made for sentence-transformers from a model that wrote text"

"""Answers that must fit a JSON schema, by a model of random weights that knows no JSON: whatever it writes has to fit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_transformers import PROMPT, all_of, with_engine

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.engines.protocol import Ask, Piece, Sampling
from tunesmith.serving.engines.transformers import TransformersEngine

SCHEMAS: dict[str, dict[str, Any]] = {
    "an enumeration": {"enum": ["red", "green", 7, None]},
    "an object": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "many": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "many"],
        "additionalProperties": False,
    },
    "a list of short words": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 3},
    "a reference within": {"$ref": "#/$defs/flag", "$defs": {"flag": {"type": "boolean"}}},
    "one of two": {"anyOf": [{"const": "yes"}, {"type": "object", "properties": {}, "additionalProperties": False}]},
}  # fmt: skip


def ask(schema: dict[str, Any], name: str = "r", n: int = 1, **sampling: Any) -> Ask:
    return Ask(name, PROMPT, None, n, Sampling(**{"max_tokens": 240, "seed": 3, "schema": schema} | sampling))


def texts(pieces: list[Piece], n: int = 1) -> Iterator[str]:
    for index in range(n):
        assert [one.finish for one in pieces if one.index == index and one.finish] == ["stop"]
        yield "".join(one.text for one in pieces if one.index == index)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_answer_fits_its_schema_and_ends_by_itself(name: str, temperature: float, tiny_base: Path) -> None:
    wanted = ask(SCHEMAS[name], n=3, temperature=temperature)
    pieces = with_engine(tiny_base, lambda engine: all_of(engine.generate(wanted)))
    for text in texts(pieces, 3):
        jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_a_batch_holds_answers_with_and_without_schemas(tiny_base: Path) -> None:
    free = Ask("free", PROMPT, None, 1, Sampling(max_tokens=12, temperature=0, logprobs=0, ignore_eos=True))

    async def work(engine: TransformersEngine) -> list[list[Piece]]:
        asks = [free, *(ask(schema, name) for name, schema in SCHEMAS.items()), free]
        return await asyncio.gather(*(all_of(engine.generate(one)) for one in asks))

    first, *bound, last = with_engine(tiny_base, work)
    alone = with_engine(tiny_base, lambda engine: all_of(engine.generate(free)))
    drawn = [[token.id for piece in pieces for token in piece.logprobs] for pieces in (first, last, alone)]
    assert drawn[0] == drawn[1] == drawn[2]
    for pieces, schema in zip(bound, SCHEMAS.values(), strict=True):
        jsonschema.validate(json.loads(next(texts(pieces))), schema)


def test_any_object_is_an_object_as_far_as_it_goes(tiny_base: Path) -> None:
    """Nothing bounds it, and a model of random weights may never end it."""
    pieces = with_engine(tiny_base, lambda engine: all_of(engine.generate(ask({}, temperature=1.0, max_tokens=60))))
    assert "".join(piece.text for piece in pieces).startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"type": "object", "properties": {"a": {"type": 3}}}, {"pattern": "(", "type": "string"}]
)  # fmt: skip
def test_a_schema_that_says_nothing_is_refused_by_name(schema: dict[str, Any], tiny_base: Path) -> None:
    with pytest.raises(RequestError, match="no answer can be kept to this schema") as raised:
        with_engine(tiny_base, lambda engine: all_of(engine.generate(ask(schema))))
    assert (raised.value.status, raised.value.param) == (400, "response_format")

"""The Transformers engine against plain PEFT: every kind of adapter alone, mixed, sampled, stopped and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import greedy, make_adapter, plain_peft
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType

from tunesmith.cluster.base import find_base
from tunesmith.cluster.errors import RequestError
from tunesmith.cluster.sketch import PARTS, answers_in
from tunesmith.serving.config import Base
from tunesmith.serving.engines.protocol import Ask, Piece, Sampling, Version
from tunesmith.serving.engines.sampling import Drawer
from tunesmith.serving.engines.transformers import TransformersEngine

PROMPT = [5, 9, 30, 31, 32, 40]
ALL = "all-linear"
TASK = TaskType.CAUSAL_LM
KINDS = {
    "lora": LoraConfig(r=8, target_modules=ALL, task_type=TASK),
    "dora": LoraConfig(r=4, target_modules=ALL, use_dora=True, task_type=TASK),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=TASK
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type=TASK),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type=TASK),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type=TASK),
}


@pytest.fixture(scope="module")
def versions(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        kind: make_adapter(tiny_base, folder / kind, config, seed) for seed, (kind, config) in enumerate(KINDS.items())
    }
    for rank in (4, 16):
        made[f"lora{rank}"] = make_adapter(
            tiny_base, folder / f"lora{rank}", LoraConfig(r=rank, target_modules=ALL, task_type=TASK), rank
        )
    return made


def with_engine(base: Path, work: Callable[[TransformersEngine], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    """Runs `work` with an engine over a base."""

    async def run() -> Any:
        engine = TransformersEngine("tiny", find_base(str(base), None, base), Base(path=str(base), **settings))
        await engine.start()
        return await asyncio.wait_for(work(engine), 120)

    return asyncio.run(run())


async def all_of(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


def ids_of(pieces: list[Piece], index: int = 0) -> list[int]:
    return [token.id for piece in pieces if piece.index == index for token in piece.logprobs]


def ask(version: Version | None, count: int = 8, name: str = "r", **sampling: Any) -> Ask:
    given = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True, **sampling}
    return Ask(name, PROMPT, version, sampling=Sampling(max_tokens=count, **given))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_kind_of_adapter_answers_as_plain_peft_does(
    kind: str | None, tiny_base: Path, versions: dict[str, Version]
) -> None:
    version = versions[kind] if kind else None
    pieces = with_engine(tiny_base, lambda engine: all_of(engine.generate(ask(version))))
    oracle = plain_peft(tiny_base, Path(version.folder) if version else None)
    assert ids_of(pieces) == greedy(oracle, PROMPT, 8)
    assert pieces[-1].finish == "length"
    if kind:
        assert ids_of(pieces) != greedy(plain_peft(tiny_base, None), PROMPT, 8), "the adapter changes nothing"


def test_adapters_asked_at_once_answer_as_each_does_alone(tiny_base: Path, versions: dict[str, Version]) -> None:
    chosen = [None, versions["lora"], versions["lora4"], versions["lora16"], versions["dora"], versions["prompt"]]

    async def work(engine: TransformersEngine) -> list[list[Piece]]:
        return await asyncio.gather(
            *(all_of(engine.generate(ask(version, name=f"{i}"))) for i in range(3) for version in chosen)
        )

    answers = with_engine(tiny_base, work)
    for answer, version in zip(answers, chosen * 3, strict=True):
        oracle = plain_peft(tiny_base, Path(version.folder) if version else None)
        assert ids_of(answer) == greedy(oracle, PROMPT, 8)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_prompts_of_different_lengths_share_a_batch(
    kind: str | None, tiny_base: Path, versions: dict[str, Version]
) -> None:
    version = versions[kind] if kind else None
    lengths = (1, 3, 6, 11)
    requests = [replace(ask(version, name=f"{n}"), prompt=(PROMPT * 2)[:n]) for n in lengths]

    async def work(engine: TransformersEngine) -> list[list[Piece]]:
        return await asyncio.gather(*(all_of(engine.generate(request)) for request in requests))

    oracle = plain_peft(tiny_base, Path(version.folder) if version else None)
    for answer, n in zip(with_engine(tiny_base, work), lengths, strict=True):
        assert ids_of(answer) == greedy(oracle, (PROMPT * 2)[:n], 8)


def test_the_prompts_logprobs_are_those_of_a_plain_forward(tiny_base: Path, versions: dict[str, Version]) -> None:
    for version in (None, versions["lora"], versions["prompt"]):
        wanted = ask(version, count=0, prompt_logprobs=2)
        [piece] = with_engine(tiny_base, lambda engine, wanted=wanted: all_of(engine.generate(wanted)))
        oracle = plain_peft(tiny_base, Path(version.folder) if version else None)
        logits = oracle(input_ids=torch.tensor([PROMPT])).logits[0, -len(PROMPT) :].log_softmax(-1)
        assert piece.prompt[0].logprob is None
        for t in range(1, len(PROMPT)):
            assert piece.prompt[t].logprob == pytest.approx(float(logits[t - 1, PROMPT[t]].detach()), abs=1e-5)
            assert piece.prompt[t].top[0].id == int(logits[t - 1].argmax())
        assert (piece.tokens, piece.finish) == (0, "length")


def test_a_seed_gives_the_same_answers_whoever_shares_the_batch(tiny_base: Path) -> None:
    sampled = {"temperature": 1.0, "seed": 7, "top_p": 0.9}

    async def work(engine: TransformersEngine) -> list[list[Piece]]:
        alone = await all_of(engine.generate(ask(None, 12, **sampled)))
        return [
            alone,
            *await asyncio.gather(*(all_of(engine.generate(ask(None, 12, f"{i}", **sampled))) for i in range(3))),
        ]

    first, *others = with_engine(tiny_base, work)
    assert all(ids_of(other) == ids_of(first) for other in others)
    another = with_engine(tiny_base, lambda engine: all_of(engine.generate(ask(None, 12, temperature=1.0, seed=8))))
    assert ids_of(another) != ids_of(first)


def test_a_row_that_fails_ends_alone(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Drawer.draw

    def broken(drawer: Drawer, logits_V: torch.Tensor) -> int:
        if drawer._sampling.seed == 13:
            raise ValueError("no luck")
        return draw(drawer, logits_V)

    monkeypatch.setattr(Drawer, "draw", broken)

    async def work(engine: TransformersEngine) -> list[Any]:
        asks = [ask(None, name=f"{seed}", seed=seed) for seed in (12, 13, 14)]
        return await asyncio.gather(*(all_of(engine.generate(one)) for one in asks), return_exceptions=True)

    first, failed, last = with_engine(tiny_base, work)
    assert isinstance(failed, ValueError)
    assert ids_of(first) == ids_of(last) == greedy(plain_peft(tiny_base, None), PROMPT, 8)


def test_the_coldest_temperature_draws_the_likeliest(tiny_base: Path) -> None:
    cold = ask(None, temperature=1e-40, seed=1)
    pieces = with_engine(tiny_base, lambda engine: all_of(engine.generate(cold)))
    assert ids_of(pieces) == greedy(plain_peft(tiny_base, None), PROMPT, 8)


def test_several_answers_of_one_request_differ_and_all_end(tiny_base: Path) -> None:
    request = Ask("r", PROMPT, None, 3, Sampling(max_tokens=12, temperature=1.0, seed=1, logprobs=0, ignore_eos=True))
    pieces = with_engine(tiny_base, lambda engine: all_of(engine.generate(request)))
    answers = [ids_of(pieces, index) for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    assert sum(piece.finish == "length" for piece in pieces) == 3


def test_a_stop_string_ends_the_answer_before_itself(tiny_base: Path) -> None:
    whole = "".join(p.text for p in with_engine(tiny_base, lambda engine: all_of(engine.generate(ask(None, 16)))))
    stop = whole[4:7]
    assert stop, whole
    request = ask(None, 16, stop=(stop,))
    pieces = with_engine(tiny_base, lambda engine: all_of(engine.generate(request)))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


def test_a_client_that_leaves_ends_its_batch_at_once(tiny_base: Path) -> None:
    async def work(engine: TransformersEngine) -> float:
        request = Ask("long", PROMPT, None, 1, Sampling(max_tokens=None, temperature=0, ignore_eos=True))
        pieces = engine.generate(request)
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        begun = asyncio.get_running_loop().time()
        while engine._running:
            await asyncio.sleep(0.01)
        return asyncio.get_running_loop().time() - begun

    assert with_engine(tiny_base, work) < 1


def test_versions_beyond_the_limit_leave_but_never_one_in_use(tiny_base: Path, versions: dict[str, Version]) -> None:
    async def work(engine: TransformersEngine) -> None:
        long = engine.generate(ask(versions["lora"], 200))
        await anext(long)
        for kind in ("lora4", "lora16", "ia3"):
            await all_of(engine.generate(ask(versions[kind])))
        assert versions["lora"].digest in engine._models
        assert len(engine._models) <= 1 + 2
        rest = await all_of(long)
        assert rest[-1].finish == "length"

    with_engine(tiny_base, work, max_cached_adapters=1)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "empty"),
        ([10**6], "not in the vocabulary"),
        ([1] * 5000, "takes"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(prompt: Any, said: str, tiny_base: Path) -> None:
    request = Ask("r", prompt, None, 1, Sampling(max_tokens=4))
    with pytest.raises(RequestError, match=said):
        with_engine(tiny_base, lambda engine: all_of(engine.generate(request)))


def test_the_diary_has_loads_evictions_and_what_was_answered(tiny_base: Path, versions: dict[str, Version]) -> None:
    async def work(engine: TransformersEngine) -> Any:
        for kind in ("lora4", "lora16", "lora4"):
            ask = Ask(
                kind, PROMPT, versions[kind], n=2, sampling=Sampling(max_tokens=4, temperature=0, ignore_eos=True)
            )
            async for _ in engine.generate(ask):
                pass
        return engine.diary.take()

    news = with_engine(tiny_base, work, max_cached_adapters=1)
    four, sixteen = versions["lora4"].digest, versions["lora16"].digest
    assert news.loads == (four, sixteen, four)
    assert news.evictions == (four, sixteen)
    assert {digest: answers_in(sketch) for digest, sketch in news.sketches.items()} == {four: 4, sixteen: 2}
    assert news.sketches[four][PARTS["answer_tokens"]].sum() == 4 * 4
    assert news.sketches[four][PARTS["prompt_tokens"]].sum() == 4 * len(PROMPT)

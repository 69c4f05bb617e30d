"""A mixture answers by its deadlines whatever becomes of its members, and ends every ask that it began."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import pytest
from virtual_time import run as virtually

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.body import parse_body
from tunesmith.serving.config import Agent, Proposer
from tunesmith.serving.engines.protocol import Message, Piece, Sampling
from tunesmith.serving.mixture import Done, KeepAlive, MixtureEvent, Text, check_request, run
from tunesmith.serving.protocol import ChatRequest
from tunesmith.serving.quoting import marks

TALK: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
NONCE = "n0nce"


@dataclass
class Says:
    """What a model does: words, one every `pace` seconds, and perhaps an end before its end."""

    text: str
    pace: float = 0.1
    dies_after: int | None = None
    error: Exception = field(default_factory=lambda: RuntimeError("the engine died"))
    stalls_after: int | None = None
    finish: Any = "stop"


class Models:
    """Answers asks in virtual time, and knows which were begun, are open, and were closed when."""

    def __init__(self, **says: Says) -> None:
        self.says = says
        self.asked: list[tuple[str, list[Message], Sampling]] = []
        self.closed: dict[str, float] = {}
        self.most_at_once = 0

    @property
    def open(self) -> int:
        return len(self.asked) - len(self.closed)

    async def ask(
        self, proposer: Proposer, messages: list[Message], sampling: Sampling, id: str
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append((id, messages, sampling))
        self.most_at_once = max(self.most_at_once, self.open)
        says = self.says[proposer.model]
        try:
            words = says.text.split(" ")
            for index, word in enumerate(words):
                if says.stalls_after == index:
                    await asyncio.sleep(1e9)
                await asyncio.sleep(says.pace)
                if says.dies_after == index:
                    raise says.error
                yield Piece(0, word if index == 0 else f" {word}", 1, 7)
            yield Piece(0, "", 0, 7, says.finish)
        finally:
            self.closed[id] = asyncio.get_running_loop().time()


def agent(*layers: list[str], aggregator: str | None = "judge", **settings: Any) -> Agent:
    made = [[Proposer(model=model) for model in layer] for layer in layers]
    return Agent(layers=made, aggregator=Proposer(model=aggregator) if aggregator else None, **settings)


def answered(agent: Agent, models: Models, sampling: Sampling | None = None) -> tuple[str, Done, list[MixtureEvent]]:
    async def collect() -> list[MixtureEvent]:
        clock = asyncio.get_running_loop().time
        asked = run(agent, TALK, models.ask, sampling or Sampling(), "id", clock=clock, nonce=NONCE)
        return [event async for event in asked]

    events = virtually(collect())
    done = events[-1]
    assert isinstance(done, Done)
    assert models.open == 0, "every ask was closed"
    return "".join(event.text for event in events if isinstance(event, Text)), done, events


JUDGE = Says("It is Paris indeed")
A, B, C = Says("Paris"), Says("It is Paris", pace=1), Says("Lyon I think", pace=2)


def test_proposers_work_at_once_and_the_aggregator_streams_what_it_makes_of_them():
    models = Models(a=A, b=B, c=C, judge=JUDGE)
    text, done, events = answered(agent(["a", "b", "c"]), models)
    assert text == JUDGE.text
    assert [event.text for event in events if isinstance(event, Text)] == ["It", " is", " Paris", " indeed"]
    assert models.most_at_once == 3
    assert models.asked[3][1][-1]["content"].splitlines()[2:] == [
        marks(NONCE)[0],
        '{"response": 1, "from": "a", "text": "Paris"}',
        '{"response": 2, "from": "b", "text": "It is Paris"}',
        '{"response": 3, "from": "c", "text": "Lyon I think"}',
        marks(NONCE)[1],
    ]
    assert (done.answered_by, done.finish, done.aggregator_failed) == ("aggregator", "stop", False)
    assert [[one.completion_tokens for one in stage] for stage in done.stages] == [[1, 3, 3], [4]]
    assert (done.prompt_tokens, done.completion_tokens) == (28, 11)
    assert done.as_json()["stages"][0][2] == {
        "name": "c",
        "outcome": "answered",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "seconds": 6.0,
    }


def test_keep_alives_come_in_silence_before_the_first_token():
    models = Models(a=Says("slow", pace=17), judge=JUDGE)
    _, _, events = answered(agent(["a"]), models)
    kinds = [type(event) for event in events]
    assert kinds == [KeepAlive] * 3 + [Text] * 4 + [Done]


def test_later_layers_see_the_answers_of_the_one_before():
    models = Models(a=A, b=B, refine=Says("Paris it is"), judge=JUDGE)
    _, done, _ = answered(agent(["a", "b"], ["refine"]), models)
    second, last = models.asked[2][1], models.asked[3][1]
    assert '"text": "It is Paris"' in second[-1]["content"]
    assert '"text": "Paris it is"' in last[-1]["content"]
    assert '"text": "It is Paris"' not in last[-1]["content"]
    assert [len(stage) for stage in done.stages] == [2, 1, 1]


def test_one_stalled_and_one_dead_of_four_are_flagged_by_the_deadline():
    models = Models(a=A, b=B, stalled=Says("x y", stalls_after=1), dead=Says("x y", dies_after=1), judge=JUDGE)
    text, done, _ = answered(agent(["a", "b", "stalled", "dead"], deadline_s=10), models)
    assert text == JUDGE.text
    assert (done.named("timed_out"), done.named("failed")) == (["stalled"], ["dead"])
    assert done.as_json()["timed_out"] == ["stalled"]
    assert models.closed["id-1-3-1"] == pytest.approx(10)
    assert '"x"' not in models.asked[-1][1][-1]["content"], "halves are not proposals"
    assert done.stages[0][2].completion_tokens == 1, "but their tokens are counted"


def test_a_quorum_and_its_grace_leave_stragglers_behind():
    models = Models(a=A, b=B, slow=Says("x", pace=20), judge=JUDGE)
    _, done, _ = answered(agent(["a", "b", "slow"], quorum=2, grace_s=1.5), models)
    assert (done.named("left_behind"), done.named("timed_out")) == (["slow"], [])
    assert models.closed["id-1-3-1"] == pytest.approx(3 + 1.5)


def test_the_only_proposal_left_is_the_answer():
    models = Models(a=Says("It is Paris", finish="length"), dead=Says("x", dies_after=0), judge=JUDGE)
    text, done, _ = answered(agent(["a", "dead"]), models)
    assert (text, done.answered_by, done.finish) == ("It is Paris", "survivor", "length")
    assert done.as_json()["survivor"] is True
    assert len(models.asked) == 2, "the aggregator was not asked"


def test_a_single_proposer_by_configuration_is_no_survivor():
    _, done, _ = answered(agent(["a"]), Models(a=A, judge=JUDGE))
    assert done.answered_by == "aggregator"


@pytest.mark.parametrize(
    "judge", [Says("x y", dies_after=0), Says("x", stalls_after=0), Says(""), Says(" ", dies_after=0)]
)
def test_when_the_aggregator_dies_before_its_first_text_the_best_proposal_stands_in(judge: Says):
    models = Models(a=A, b=B, c=Says("It is Paris."), judge=judge)
    text, done, _ = answered(agent(["a", "b", "c"], deadline_s=10), models)
    assert text in ("It is Paris", "It is Paris.")
    assert (done.answered_by, done.aggregator_failed, done.broken_off) == ("agreement", True, False)


@pytest.mark.parametrize(
    "judge", [Says("x y z", dies_after=2), Says("x y z", stalls_after=2), Says("x y", finish=None)]
)
def test_when_the_aggregator_dies_later_the_answer_ends_and_says_so(judge: Says):
    models = Models(a=A, b=B, judge=judge)
    text, done, _ = answered(agent(["a", "b"], deadline_s=10), models)
    assert text == "x y"
    assert (done.finish, done.aggregator_failed, done.broken_off) == ("length", True, True)
    assert done.answered_by == "aggregator"


def test_without_an_aggregator_the_proposal_that_agrees_most_is_the_answer():
    models = Models(a=Says("Lyon, surely"), b=Says("It is Paris"), c=Says("it is Paris."))
    text, done, _ = answered(agent(["a", "b", "c"], aggregator=None), models)
    assert (text, done.answered_by) == ("It is Paris", "agreement")


def test_self_moa_draws_samples_of_one_model_with_seeds_of_their_own():
    models = Models(one=A, judge=JUDGE)
    moa = Agent(layers=[[Proposer(model="one", samples=4, role="thinker")]], aggregator=Proposer(model="judge"))
    _, done, _ = answered(moa, models, Sampling(seed=5))
    assert [drawn.seed for _, _, drawn in models.asked] == [5, 6, 7, 8, 5]
    assert [one.name for one in done.stages[0]] == ["thinker #1", "thinker #2", "thinker #3", "thinker #4"]
    assert models.most_at_once == 4


def test_members_settings_go_before_the_requests_and_the_answers_shape_is_the_last_ones_only():
    from tunesmith.serving.config import Sampling as Own

    moa = Agent(
        layers=[[Proposer(model="a", sampling=Own(temperature=0, max_tokens=9))], [Proposer(model="b")]],
        aggregator=Proposer(model="judge", system="Judge well."),
    )
    models = Models(a=A, b=B, judge=JUDGE)
    answered(moa, models, Sampling(max_tokens=50, temperature=0.7, stop=("\n",), schema={}, logprobs=3))
    first, second, judge = (drawn for _, _, drawn in models.asked)
    assert (first.temperature, first.max_tokens, first.stop, first.schema) == (0, 9, (), None)
    for drawn in (second, judge):
        assert (drawn.temperature, drawn.max_tokens, drawn.stop, drawn.schema) == (0.7, 50, ("\n",), {})
    assert judge.logprobs is None
    assert models.asked[2][1][0]["content"].startswith("Judge well.\n\n")


def test_when_a_whole_later_layer_fails_the_answers_before_it_stand():
    models = Models(a=A, b=B, dead=Says("x", dies_after=0), judge=JUDGE)
    text, done, _ = answered(agent(["a", "b"], ["dead", "dead"]), models)
    assert text == JUDGE.text
    assert done.named("failed") == ["dead", "dead"]


@pytest.mark.parametrize(
    ("says", "status", "code"),
    [
        (Says("x", dies_after=0), 502, "mixture_failed"),
        (Says("x", stalls_after=0), 504, "mixture_failed"),
        (Says("x", dies_after=0, error=RequestError("9 tokens; 8 fit", 400, "messages", "too_long")), 400, "too_long"),
        (Says("x", dies_after=0, error=RequestError("overloaded", 503)), 502, "mixture_failed"),
        (Says("  "), 502, "mixture_failed"),
    ],
)
def test_when_nobody_answers_the_request_fails_with_the_reason(says: Says, status: int, code: str):
    with pytest.raises(RequestError) as caught:
        answered(agent(["a", "a"]), Models(a=says, judge=JUDGE))
    assert (caught.value.status, caught.value.code) == (status, code)


@pytest.mark.parametrize("events_taken", range(6))
def test_when_the_consumer_leaves_every_ask_is_closed_at_once(events_taken: int):
    models = Models(a=A, b=B, slow=Says("x", pace=12), judge=JUDGE)

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        asked = run(agent(["a", "b", "slow"]), TALK, models.ask, Sampling(), "id", clock=loop.time, keep_alive_s=5)
        for _ in range(events_taken):
            await anext(asked)
        left = loop.time()
        await asked.aclose()
        assert loop.time() - left < 0.001
        assert models.open == 0
        assert len(asyncio.all_tasks()) == 1

    virtually(leave())
    assert len(models.asked) == (0 if events_taken == 0 else 3 if events_taken < 3 else 4)


def test_when_the_consumers_task_is_cancelled_every_ask_is_closed():
    models = Models(a=A, slow=Says("x", pace=12), judge=JUDGE)

    async def consume() -> None:
        asked = run(agent(["a", "slow"]), TALK, models.ask, Sampling(), "id", clock=asyncio.get_running_loop().time)
        try:
            async for _ in asked:
                pass
        finally:
            await asked.aclose()

    async def leave() -> None:
        task = asyncio.create_task(consume())
        await asyncio.sleep(3)
        assert models.open == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert models.open == 0

    virtually(leave())


def test_what_a_mixture_cannot_do_is_refused_by_name():
    def request(**fields: Any) -> ChatRequest:
        import json

        return parse_body(json.dumps({"model": "m", "messages": TALK, **fields}).encode(), ChatRequest, 10**6)

    check_request(request(n=1, seed=3))
    for fields in ({"n": 2}, {"logprobs": True}):
        with pytest.raises(RequestError) as caught:
            check_request(request(**fields))
        assert caught.value.param in fields

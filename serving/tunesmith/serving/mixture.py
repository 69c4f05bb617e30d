"""Runs a mixture of agents: layers of proposers at once, then an aggregator whose tokens stream as they come.

Mixture-of-Agents is arXiv:2406.04692, Self-MoA (one model sampled several times) arXiv:2502.00674. Whatever happens to
its members, a mixture answers by its deadlines as long as one of them has: what became of each is in the last event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.config import Agent, Proposer
from tunesmith.serving.engines.protocol import Finish, Message, Piece, Sampling
from tunesmith.serving.protocol import ChatRequest
from tunesmith.serving.quorum import Arrivals, best, seconds_to_wait
from tunesmith.serving.quoting import Reference, with_references, with_system

KEEP_ALIVE_S = 5.0
"""Seconds of silence after which a stream says that it lives."""

_CLOSING_S = 5.0  # that cancelled asks have to end; they should need none
_log = logging.getLogger(__name__)

Outcome = Literal["answered", "timed_out", "left_behind", "failed"]
"""`left_behind`: a quorum had answered and the grace was over; the deadline was not."""


class AskMember(Protocol):
    """Asks one member; closing the generator ends the request at once."""

    def __call__(
        self, proposer: Proposer, messages: list[Message], sampling: Sampling, id: str
    ) -> AsyncGenerator[Piece, None]: ...


@dataclass(frozen=True)
class KeepAlive:
    """Nothing has come for a while."""


@dataclass(frozen=True)
class Text:
    """The next part of the answer."""

    text: str


@dataclass
class Member:
    """One member's part.

    Attributes:
        name: its role, or its model, with the sample's number where there are several.
        seconds: from the beginning of its stage.
    """

    name: str
    outcome: Outcome | None = None
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    finish: Finish | None = None
    error: Exception | None = None

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self.text += piece.text
        self.prompt_tokens = max(self.prompt_tokens, piece.prompt_tokens)
        self.completion_tokens += piece.tokens
        self.finish = piece.finish or self.finish

    def as_json(self) -> dict[str, Any]:
        """For the client: no text, and no error, which may name what is none of its business."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 3),
        }


@dataclass
class Done:
    """The end, and what became of everyone.

    Attributes:
        finish: `length` also for an answer that broke off.
        answered_by: `survivor`: the only proposal that came; `agreement`: the proposal that agrees most with the others.
        aggregator_failed: before its first text, so that a proposal stands in, or later, which `broken_off` says.
        stages: members by layer, and the aggregator's last.
    """

    finish: Finish = "stop"
    answered_by: Literal["aggregator", "survivor", "agreement"] = "aggregator"
    aggregator_failed: bool = False
    broken_off: bool = False
    stages: list[list[Member]] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """Of all members together."""
        return sum(one.prompt_tokens for stage in self.stages for one in stage)

    @property
    def completion_tokens(self) -> int:
        """Of all members together."""
        return sum(one.completion_tokens for stage in self.stages for one in stage)

    def named(self, outcome: Outcome) -> list[str]:
        """Names of the members with this outcome."""
        return [one.name for stage in self.stages for one in stage if one.outcome == outcome]

    def as_json(self) -> dict[str, Any]:
        """For the response, under `mixture`."""
        return {
            "answered_by": self.answered_by,
            "survivor": self.answered_by == "survivor",
            "aggregator_failed": self.aggregator_failed,
            "broken_off": self.broken_off,
            "timed_out": self.named("timed_out"),
            "left_behind": self.named("left_behind"),
            "failed": self.named("failed"),
            "stages": [[one.as_json() for one in stage] for stage in self.stages],
        }


MixtureEvent = KeepAlive | Text | Done


def check_request(request: ChatRequest) -> None:
    """Refuses what a mixture cannot do.

    Raises:
        RequestError: 400, naming the parameter.
    """
    for param, asked in (("n", request.answers > 1), ("logprobs", bool(request.logprobs))):
        if asked:
            raise RequestError(f"{param}: a mixture of agents has one answer, without log-probabilities", param=param)


async def run(
    agent: Agent,
    conversation: Sequence[Message],
    ask: AskMember,
    sampling: Sampling,
    id: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    keep_alive_s: float = KEEP_ALIVE_S,
    nonce: str | None = None,
) -> AsyncGenerator[MixtureEvent, None]:
    """Answers a conversation: texts as they come, keep-alives in silence, and `Done` last.

    Closing the generator ends every member's request.

    Args:
        sampling: the request's; a member's own settings go before it.
        id: of the request; members' ids begin with it.
        nonce: for the marks around proposals; a new one unless a test gives it.

    Raises:
        RequestError: no proposer answered: their own refusal when they all refused the request, else 502 or 504. Never
            after the first text.
    """
    # The queue has no bound: it holds one answer at most, and members are done sooner when they need not wait for it.
    events: asyncio.Queue[MixtureEvent | None] = asyncio.Queue()
    job = _Job(agent, conversation, ask, sampling, id, clock, nonce or secrets.token_hex(12), events.put_nowait)
    work = asyncio.create_task(_work(job))
    work.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    event = await events.get()
            except TimeoutError:
                event = KeepAlive()
            if event is None:
                break
            yield event
        await work
    finally:
        await _closed({work, *job.tasks}, id)


@dataclass
class _Job:
    agent: Agent
    conversation: Sequence[Message]
    ask: AskMember
    sampling: Sampling
    id: str
    clock: Callable[[], float]
    nonce: str
    emit: Callable[[MixtureEvent], None]
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    done: Done = field(default_factory=Done)


async def _work(job: _Job) -> None:
    proposals: list[Member] = []
    for number, layer in enumerate(job.agent.layers):
        members = await _stage(job, number, layer, proposals)
        job.done.stages.append(members)
        proposals = [one for one in members if one.outcome == "answered"] or proposals
        if not proposals:
            raise _nobody(members)
    asked = len(job.done.stages[-1])
    aggregator = job.agent.aggregator
    if aggregator is None or (len(proposals) == 1 < asked):
        _answer_with_best(job, proposals)
    else:
        await _aggregate(job, aggregator, proposals)
    job.emit(job.done)


async def _stage(job: _Job, number: int, layer: Sequence[Proposer], before: Sequence[Member]) -> list[Member]:
    """Asks a layer's proposers all at once, so that adapters of one base share a batch, and waits as decided."""
    began = job.clock()
    last = number == len(job.agent.layers) - 1
    members: list[Member] = []
    pending: set[asyncio.Task[None]] = set()
    for index, proposer in enumerate(layer):
        messages = _messages(job, proposer, before)
        for sample in range(proposer.samples):
            name = proposer.role or proposer.model
            members.append(Member(f"{name} #{sample + 1}" if proposer.samples > 1 else name))
            drawn = _sampling(job.sampling, proposer, last, len(members) - 1)
            asked = job.ask(proposer, messages, drawn, f"{job.id}-{number + 1}-{index + 1}-{sample + 1}")
            pending.add(asyncio.create_task(_propose(members[-1], asked, began, job.clock)))
    job.tasks |= pending
    agent = job.agent
    while True:
        arrivals = _arrivals(members, began)
        wait = seconds_to_wait(arrivals, began, job.clock(), agent.deadline_s, agent.quorum, agent.grace_s)
        if wait is None:
            break
        _, pending = await asyncio.wait(pending, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    late = job.clock() - began
    for member in members:
        if member.outcome is None:
            member.outcome, member.seconds = "timed_out" if late >= agent.deadline_s else "left_behind", late
    return members


async def _propose(
    member: Member, asked: AsyncGenerator[Piece, None], began: float, clock: Callable[[], float]
) -> None:
    outcome: Outcome = "failed"
    try:
        async with contextlib.aclosing(asked):
            async for piece in asked:
                member.add(piece)
        outcome = "answered" if member.finish is not None and member.text.strip() else "failed"
    except Exception as error:  # noqa: BLE001 - one member's failure, of whatever kind, is not the mixture's
        _log.warning("%s failed in a mixture: %s: %s", member.name, type(error).__name__, error)
        member.error = error
    if member.outcome is None:  # else it was too late
        member.outcome, member.seconds = outcome, clock() - began


async def _aggregate(job: _Job, aggregator: Proposer, proposals: Sequence[Member]) -> None:
    """Streams the aggregator's answer. Each of its pieces has the deadline that a proposer has."""
    member = Member(aggregator.role or aggregator.model)
    job.done.stages.append([member])
    began = job.clock()
    drawn = _sampling(job.sampling, aggregator, True, 0)
    try:
        messages = _messages(job, aggregator, proposals)
        async with contextlib.aclosing(job.ask(aggregator, messages, drawn, f"{job.id}-aggregator")) as asked:
            async for piece in _in_time(asked, job.agent.deadline_s):
                member.add(piece)
                if piece.text:
                    job.emit(Text(piece.text))
        member.outcome = "answered" if member.finish is not None and member.text else "failed"
    except TimeoutError:
        member.outcome = "timed_out"
    except Exception as error:  # noqa: BLE001 - the proposals can still answer
        _log.warning("the aggregator %s failed: %s: %s", member.name, type(error).__name__, error)
        member.outcome, member.error = "failed", error
    member.seconds = job.clock() - began
    job.done.finish = member.finish or "length"
    if member.outcome != "answered":
        job.done.aggregator_failed = True
        job.done.broken_off = bool(member.text)
        if not member.text:
            _answer_with_best(job, proposals)


async def _in_time(pieces: AsyncIterator[Piece], seconds: float) -> AsyncIterator[Piece]:
    while True:
        async with asyncio.timeout(seconds):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


def _answer_with_best(job: _Job, proposals: Sequence[Member]) -> None:
    chosen = proposals[best([one.text for one in proposals])]
    alone = len(proposals) == 1 and not job.done.aggregator_failed
    job.done.answered_by = "survivor" if alone else "agreement"
    job.done.finish = chosen.finish or "length"
    job.emit(Text(chosen.text))


def _messages(job: _Job, proposer: Proposer, before: Sequence[Member]) -> list[Message]:
    if not before:
        return with_system(job.conversation, proposer.system)
    references = [Reference(one.name, one.text) for one in before]
    return with_references(job.conversation, references, job.nonce, proposer.system)


def _sampling(requested: Sampling, proposer: Proposer, last: bool, index: int) -> Sampling:
    """The member's own settings before the request's.

    The answer's shape (stops, schema) is for those alone whose text may become the answer; a seed is another one for
    every member, or samples of one model would all be the same.
    """
    own = {key: value for key, value in proposer.sampling.model_dump().items() if value is not None}
    shape = {} if last else {"stop": (), "schema": None}
    seed = None if requested.seed is None else (requested.seed + index) % 2**63
    return replace(requested, **shape, **own, seed=seed, logprobs=None, prompt_logprobs=None)


def _arrivals(members: Sequence[Member], began: float) -> Arrivals:
    answered = sorted(began + one.seconds for one in members if one.outcome == "answered")
    return Arrivals(len(members), tuple(answered), sum(one.outcome == "failed" for one in members))


def _nobody(members: Sequence[Member]) -> RequestError:
    refusals = [one.error for one in members if isinstance(one.error, RequestError) and one.error.status < 500]
    if len(refusals) == len(members):
        return refusals[0]
    late = sum(one.outcome != "failed" for one in members)
    return RequestError(
        f"none of the mixture's {len(members)} proposers answered: {late} too late, {len(members) - late} failed",
        status=504 if late else 502,
        code="mixture_failed",
        retry_after=1.0,
    )


async def _closed(tasks: set[asyncio.Task[None]], id: str) -> None:
    """Ends what is still at work."""
    for task in tasks:
        task.cancel()
    _, stuck = await asyncio.wait(tasks, timeout=_CLOSING_S)
    if stuck:
        _log.error("%d asks of the mixture %s do not end although they were cancelled", len(stuck), id)

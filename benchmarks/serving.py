"""Many adapters on one base under S-LoRA's workload (arXiv:2311.03285): the service against PEFT and against bare vLLM.

Requests ask adapter `floor(power(alpha) * N)`; prompts and answers have U[8, 512) / 8 tokens; all arms get the same requests.
Every arm's greedy text of every request is compared before anything is timed. PEFT runs in this process, batches of equal
size; vLLM alone is our engine without desk, gateway and HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import workload
from measure import comparison, in_turn, save
from serving_models import make_adapters, make_base

workload.quiet()

BATCH = 8
RANKS = (4, 8, 16, 64)
PORT = 8765


@dataclass(frozen=True)
class Wanted:
    """One request; `at` seconds after the first."""

    adapter: int
    prompt: list[int]
    answer: int
    at: float


POPULARITY = {
    "uniform": lambda chance, n: int(chance.power(1.0) * n),
    "alpha 0.1": lambda chance, n: int(chance.power(0.1) * n),
    "Zipf 1.5": lambda chance, n: int(
        chance.choice(n, p=np.arange(1.0, n + 1) ** -1.5 / sum(np.arange(1.0, n + 1) ** -1.5))
    ),
}
"""Which adapter a request asks for."""


def requests(count: int, adapters: int, popularity: str, rate: float, cv: float) -> list[Wanted]:
    """S-LoRA's synthetic workload. A rate of 0 has all arrive at once."""
    chance = np.random.default_rng(0)
    shape = 1 / cv**2
    gaps = chance.gamma(shape, 1 / (rate * shape), count) if rate else np.zeros(count)
    return [
        Wanted(
            POPULARITY[popularity](chance, adapters),
            chance.integers(1000, 30_000, int(chance.integers(8, 512)) // 8).tolist(),
            int(chance.integers(8, 512)) // 8,
            float(at),
        )
        for at in np.cumsum(gaps) - gaps[0]
    ]


class Swapping:
    """PEFT, one adapter at a time: the oldest request, and those waiting for the same adapter."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model: Any = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="0")
        for index, folder in enumerate(adapters[1:], 1):
            self.model.load_adapter(str(folder), adapter_name=str(index))
        self.model.eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def run(self, wanted: list[Wanted]) -> list[str]:
        """Answers in order."""
        answers: dict[int, str] = {}
        left = list(range(len(wanted)))
        while left:
            same = [i for i in left if wanted[i].adapter == wanted[left[0]].adapter][:BATCH]
            self.model.set_adapter(str(wanted[same[0]].adapter))
            answers |= dict(zip(same, self.generate([wanted[i] for i in same]), strict=True))
            left = [i for i in left if i not in answers]
        return [answers[i] for i in range(len(wanted))]

    def generate(self, batch: list[Wanted], **more: Any) -> list[str]:
        """One padded batch, as long as its longest answer."""
        import torch

        longest = max(len(one.prompt) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, longest - len(one.prompt) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(one.answer for one in batch),
                do_sample=False, eos_token_id=None, pad_token_id=0, **more,
            )  # fmt: skip
        return [
            self.tokenizer.decode(out[row, longest : longest + one.answer], skip_special_tokens=True)
            for row, one in enumerate(batch)
        ]


class Mixing(Swapping):
    """PEFT with `adapter_names`: batches in order of arrival, every row with its own adapter."""

    def __init__(self, swapping: Swapping) -> None:
        self.model, self.tokenizer = swapping.model, swapping.tokenizer

    def run(self, wanted: list[Wanted]) -> list[str]:
        """Answers in order."""
        batches = [wanted[at : at + BATCH] for at in range(0, len(wanted), BATCH)]
        return [
            text
            for batch in batches
            for text in self.generate(batch, adapter_names=[str(one.adapter) for one in batch])
        ]


@dataclass
class Timed:
    """What an arm under arrivals came to: texts, and seconds by request."""

    texts: list[str]
    seconds: float
    first: list[float]


Answer = Callable[[int, Wanted], Coroutine[Any, Any, tuple[str, float]]]


async def all_of(wanted: list[Wanted], answer: Answer) -> Timed:
    """Sends every request at its time; `answer` returns the text and when its first piece came."""
    began = time.perf_counter()

    async def one(index: int, request: Wanted) -> tuple[str, float]:
        await asyncio.sleep(request.at)
        sent = time.perf_counter()
        text, first = await answer(index, request)
        return text, first - sent

    made = await asyncio.gather(*(one(index, request) for index, request in enumerate(wanted)))
    return Timed([text for text, _ in made], time.perf_counter() - began, [first for _, first in made])


class Bare:
    """Our vLLM engine alone, in this process."""

    def __init__(self, base: Path, adapters: list[Path], settings: dict[str, Any]) -> None:
        from tunesmith.cluster.base import find_base
        from tunesmith.serving.config import Base
        from tunesmith.serving.engines.protocol import Version
        from tunesmith.serving.engines.vllm import VllmEngine

        self.loop = asyncio.new_event_loop()
        self.engine = VllmEngine("base", find_base(str(base), None, base.parent), Base(path=str(base), **settings))
        self.loop.run_until_complete(self.engine.start())
        self.versions = [Version(one.name, str(one)) for one in adapters]
        self.runs = 0

    def run(self, wanted: list[Wanted]) -> Timed:
        """Under their arrivals."""
        from tunesmith.serving.engines.protocol import Ask, Sampling

        self.runs += 1

        async def answer(index: int, one: Wanted) -> tuple[str, float]:
            sampling = Sampling(max_tokens=one.answer, temperature=0, ignore_eos=True)
            ask = Ask(f"{self.runs}-{index}", one.prompt, self.versions[one.adapter], sampling=sampling)
            text, first = "", 0.0
            async for piece in self.engine.generate(ask):
                text, first = text + piece.text, first or time.perf_counter()
            return text, first

        return self.loop.run_until_complete(all_of(wanted, answer))


class Service:
    """The whole service, asked over HTTP."""

    def __init__(self, url: str) -> None:
        import httpx

        self.loop = asyncio.new_event_loop()
        self.client = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=256))

    def run(self, wanted: list[Wanted]) -> Timed:
        """Under their arrivals."""

        async def answer(index: int, one: Wanted) -> tuple[str, float]:
            asked = {
                "model": f"a{one.adapter}", "prompt": one.prompt, "max_tokens": one.answer, "temperature": 0,
                "ignore_eos": True, "stream": True,
            }  # fmt: skip
            text, first = "", 0.0
            async with self.client.stream("POST", "/completions", json=asked) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter()
                        text += json.loads(line[6:])["choices"][0]["text"]
            return text, first

        return self.loop.run_until_complete(all_of(wanted, answer))


def main() -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it for an engine that reserves one CPU
    torch.set_num_threads(1)
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--requests", type=int, default=48)
    options.add_argument("--adapters", type=int, nargs="*", default=[8, 64])
    options.add_argument("--popularity", nargs="*", default=[*POPULARITY], choices=[*POPULARITY])
    chosen = options.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_base(folder / "base")
        adapters = make_adapters(
            folder / "base", folder / "adapters", [RANKS[i % 4] for i in range(max(chosen.adapters))]
        )
        for count in chosen.adapters:
            lines += measured(folder, adapters[:count], chosen.requests, chosen.rounds, chosen.popularity)
    setting = (
        f"a Llama of {parameters / 1e6:.0f}M parameters in fp32, LoRA of ranks {RANKS} on every linear layer; "
        f"{chosen.requests} requests of U[8,512)/8 prompt and answer tokens, all at once; batches of {BATCH}, one thread "
        "of computing for every arm (gateway and client have the other core); times to the first token under gamma arrivals at half the throughput (cv 1 and 8), uniform"
    )
    save("serving", setting, {"texts": "equal, greedy, every request, every arm"}, lines)


def measured(
    folder: Path, adapters: list[Path], count: int, rounds: int, popularity: list[str]
) -> list[dict[str, Any]]:
    """All arms with so many adapters."""
    from tunesmith.serving.checks import Rules
    from tunesmith.serving.config import Serve
    from tunesmith.serving.registry import Registry
    from tunesmith.serving.serve_command import started

    settings = {
        "engine": "vllm", "max_batch": BATCH, "max_queue": 4 * count, "max_rank": max(RANKS), "max_adapters": 8, "cpus": 1,
    }  # fmt: skip
    registry = Registry(str(folder / f"registry-{len(adapters)}"))
    for index, one in enumerate(adapters):
        registry.add(f"a{index}", one, rules=Rules(trust_base=True))
    written = {
        "bases": {"base": {"path": str(folder / "base"), **settings}},
        "registry": registry.root,
        "http": {"auth": "none", "port": PORT},
        "limits": {"concurrency": None},
    }
    swapping = Swapping(folder / "base", adapters)
    mixing, bare = Mixing(swapping), Bare(folder / "base", adapters, settings)
    with started(Serve.model_validate(written)) as url:
        service = Service(url)
        arms = {"service": service.run, "bare": bare.run, "mixing": mixing.run, "swapping": swapping.run}
        made = []
        for name in popularity:
            made += throughput(
                arms, requests(count, len(adapters), name, 0, 1), rounds, f"{len(adapters)} adapters, {name}"
            )
        half = made[0]["ours"]["median"] / 2
        for cv in (1.0, 8.0):
            made += first_tokens(
                service,
                bare,
                requests(count, len(adapters), "uniform", half, cv),
                f"{len(adapters)} adapters, cv {cv:g}",
            )
        bare.engine.stop()
    return made


def throughput(
    arms: dict[str, Callable[[list[Wanted]], Any]], wanted: list[Wanted], rounds: int, what: str
) -> list[dict[str, Any]]:
    """Requests a second of every arm, once all answer alike."""
    texts = {name: made.texts if isinstance(made := run(wanted), Timed) else made for name, run in arms.items()}
    for name, answers in texts.items():
        different = [i for i, (one, other) in enumerate(zip(texts["swapping"], answers, strict=True)) if one != other]
        if different:
            raise SystemExit(
                f"no parity, {what}: {name} answers {len(different)} of {len(wanted)} otherwise, first {different[0]}"
            )

    def rate(run: Callable[[list[Wanted]], Any]) -> Callable[[int], float]:
        def timed(_round: int) -> float:
            began = time.perf_counter()
            run(wanted)
            return len(wanted) / (time.perf_counter() - began)

        return timed

    figures = in_turn({name: rate(run) for name, run in arms.items()}, rounds)
    return [
        comparison(
            f"requests a second, {what}", against, "1/s", figures["service"], figures[name], ratio="ours/peer", aim=aim
        )
        for name, against, aim in (
            ("swapping", "PEFT, set_adapter", "≥ 5"),
            ("mixing", "PEFT, adapter_names", "≥ 2"),
            ("bare", "vLLM without gateway", "≥ 0.9"),
        )
    ]


def first_tokens(service: Service, bare: Bare, wanted: list[Wanted], what: str) -> list[dict[str, Any]]:
    """Times to the first token while requests arrive."""
    ours, alone = service.run(wanted).first, bare.run(wanted).first
    made = []
    for name, share in (("p50", 50), ("p99", 99)):
        pair = [[1000 * float(np.percentile(times, share))] for times in (ours, alone)]
        made.append(
            comparison(
                f"time to first token {name}, {what}", "vLLM without gateway", "ms", *pair, ratio="ours/peer", aim=None
            )
        )
    return made


if __name__ == "__main__":
    main()

"""Requests of many adapters in one batch on the CPU engine: our operator against vLLM's own, and against the base alone.

Each arm is an engine in a process of its own; they take turns. The greedy tokens of every request are compared before
anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import workload
from measure import comparison, in_turn, save
from serving_models import make_adapters, make_base

workload.quiet()

PROMPT, ANSWER = 32, 32  # tokens


class Arm:
    """An engine in a process of its own."""

    def __init__(self, folder: Path, is_ours: bool, requests: int) -> None:
        environment = dict(os.environ) if is_ours else {**os.environ, "VLLM_PLUGINS": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), "--requests", str(requests)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, is_mixed: bool) -> dict[str, Any]:
        """Runs all requests; `tokens` of each and the `seconds`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(is_mixed) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"the engine ended with {self._process.wait()}")

    def close(self) -> None:
        """Ends the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


async def serve(folder: Path, requests: int) -> None:
    """Answers lines from standard input with an engine, until they end."""
    from tunesmith.cluster.base import find_base
    from tunesmith.serving.config import Base
    from tunesmith.serving.engines.protocol import Ask, Sampling, Version
    from tunesmith.serving.engines.vllm import VllmEngine

    base = folder / "base"
    settings = Base(path=str(base), engine="vllm", max_batch=requests, max_adapters=8, max_rank=16, memory_gib=2)
    engine = VllmEngine("base", find_base(str(base), None, folder), settings)
    await engine.start()
    versions = [Version(one.name, str(one)) for one in sorted((folder / "adapters").iterdir())]
    runs = 0

    async def answer(index: int, is_mixed: bool) -> list[int]:
        prompt = [(index * 37 + at * 11) % 30_000 for at in range(PROMPT)]
        version = versions[index % len(versions)] if is_mixed else None
        sampling = Sampling(max_tokens=ANSWER, temperature=0, ignore_eos=True, logprobs=0)
        ask = Ask(f"{runs}-{index}", prompt, version, sampling=sampling, stream=False)
        return [token.id async for piece in engine.generate(ask) for token in piece.logprobs]

    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        is_mixed, runs = json.loads(line), runs + 1
        began = loop.time()
        tokens = await asyncio.gather(*(answer(index, is_mixed) for index in range(requests)))
        print("@" + json.dumps({"tokens": tokens, "seconds": loop.time() - began}), flush=True)
    engine.stop()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=16)
    options.add_argument("--serve", type=Path)
    chosen = options.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.serve, chosen.requests))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_base(folder / "base")
        make_adapters(folder / "base", folder / "adapters", [4, 8, 16] * 2 + [4, 8])
        ours, vllm = Arm(folder, True, chosen.requests), Arm(folder, False, chosen.requests)
        try:
            mixed, theirs, alone = ours.ask(True), vllm.ask(True), ours.ask(False)
            assert mixed["tokens"] == theirs["tokens"], "the two operators do not answer alike"
            assert alone["tokens"] == vllm.ask(False)["tokens"], "the bases do not answer alike"
            assert mixed["tokens"] != alone["tokens"], "the adapters change nothing"
            figures = in_turn(
                {
                    "ours": lambda _round: ours.ask(True)["seconds"],
                    "vllm": lambda _round: vllm.ask(True)["seconds"],
                    "base": lambda _round: ours.ask(False)["seconds"],
                },
                chosen.rounds,
            )
        finally:
            ours.close()
            vllm.close()
    setting = (
        f"a Llama of {parameters / 1e6:.0f}M parameters in fp32; {chosen.requests} requests at once of {PROMPT} + {ANSWER} "
        "tokens; 8 LoRA adapters of ranks 4, 8 and 16 on every linear layer"
    )
    lines = [
        comparison("8 adapters in one batch, CPU engine", "vLLM's operator", "s", figures["ours"], figures["vllm"], ratio="peer/ours", aim=None),
        comparison("8 adapters in one batch, CPU engine", "the base alone", "s", figures["ours"], figures["base"], ratio="ours/peer", aim="≤ 1.5"),
    ]  # fmt: skip
    save("mixed_lora", setting, {"tokens": "equal, greedy, every request"}, lines)


if __name__ == "__main__":
    main()

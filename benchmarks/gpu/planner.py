"""The planner against a GPU: ten configurations, each trained two steps in a process of its own, beside its prediction.

Models have random weights, made on the spot. Measured is the peak that PyTorch's allocator reports for the steps; predicted
is what the planner says for the same micro-batch. Both count tensors; neither counts the CUDA context.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SIZES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
}
VOCABULARY = 32_000
NO_GPU = "this benchmark measures a GPU, and PyTorch sees none here"


@dataclass(frozen=True)
class Configuration:
    """What is trained."""

    size: str
    adaptation: str
    length: int
    checkpointing: bool
    quantization: str | None = None
    zero: int = 0

    @property
    def name(self) -> str:
        kind = "qlora" if self.quantization else self.adaptation
        return f"{self.size} {kind} {self.length}{' checkpointed' if self.checkpointing else ''} zero {self.zero}"


CONFIGURATIONS = (
    Configuration("0.1B", "full", 1024, False),
    Configuration("0.1B", "lora", 4096, True),
    Configuration("0.5B", "full", 2048, False, zero=2),
    Configuration("0.5B", "full", 2048, True, zero=3),
    Configuration("0.5B", "lora", 1024, False),
    Configuration("0.5B", "lora", 8192, True),
    Configuration("0.5B", "lora", 2048, False, quantization="nf4"),
    Configuration("1.3B", "full", 1024, True),
    Configuration("1.3B", "lora", 4096, True),
    Configuration("1.3B", "lora", 2048, True, quantization="nf4"),
)


def make_inputs(folder: Path, size: str) -> None:
    """A Llama of this size, its byte tokenizer, and rows longer than any configuration's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(HERE.parents[2] / "tests"))
    from tiny_models import tokenizer  # pyright: ignore[reportMissingImports]

    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, **SIZES[size])
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = [{"text": f"{number:04d}" + "the quick brown fox " * 500} for number in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, asked: Configuration) -> dict[str, Any]:
    """Two steps through the command line; the plan receipt of the artifact."""
    import yaml

    recipe = {
        "name": "planned",
        "model": {"base": str(folder / "base"), **({"quantization": "nf4"} if asked.quantization else {})},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": asked.length, "split": {"validation": 0.0}},
        "objective": "cpt",
        "adaptation": asked.adaptation,
        "train": {"max_steps": 2, "precision": "bf16", "gradient_checkpointing": asked.checkpointing},
        "cluster": {"workers": 1, "gpus_per_worker": 1, "zero": asked.zero},
        "output": {"dir": str(folder / "runs"), "report_to": []},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tunesmith.cluster.main", "train", str(folder / "recipe.yaml"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    receipt = folder / "runs" / "planned" / "artifact" / "receipts" / "plan.json"
    if not receipt.is_file():
        raise SystemExit(f"{asked.name}: exit code {ended.returncode}\n{ended.stderr[-3000:]}")
    return json.loads(receipt.read_text())


def measure(asked: Configuration) -> dict[str, Any]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(HERE), "--inputs", asked.size, "--folder", name]  # its own process: no CUDA here
        subprocess.run(command, check=True)
        receipt = train(folder, asked)
    worker = receipt["workers"][0]
    return {**asdict(asked), "problem": receipt["problem"], **worker}


def line_of(found: dict[str, Any], name: str) -> str:
    measured, predicted = found["measured_bytes"], found["predicted_bytes"]
    if predicted is None:
        return f"{name:40s} {measured / 2**30:9.3f} GiB   not simulated: {found['problem']}"
    error = predicted / measured - 1
    return f"{name:40s} {measured / 2**30:9.3f} GiB measured {predicted / 2**30:9.3f} GiB predicted {error:+8.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--inputs", choices=sorted(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inputs:
        make_inputs(options.folder, options.inputs)
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    figures = []
    for asked in CONFIGURATIONS:
        figures.append({"name": asked.name, **measure(asked)})
        print(line_of(figures[-1], asked.name), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "runs": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The tables of docs/fleets.md, from the data and the schema: `python -m tunesmith.cluster.fleet_reference`."""

from __future__ import annotations

from pydantic import BaseModel

from tunesmith.cluster.fleet import FleetShape, Gpu, GpuFigures
from tunesmith.cluster.fleet_file import BUILT_IN, load_fleets


def gpu_table() -> str:
    """The GPUs that come with Tunesmith, a row each."""
    rows = [
        "| GPU | memory, GiB | 16-bit TFLOP/s | memory, GB/s | link, GB/s | node network, GB/s | USD/hour |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(rows + [_row(gpu) for gpu in load_fleets(BUILT_IN).gpus.values()])


def key_table(schema: type[BaseModel]) -> str:
    """The keys of one section of a file: meaning and default."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in schema.model_fields.items():
        default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def _row(gpu: Gpu) -> str:
    price = "" if gpu.usd_per_hour is None else f"{gpu.usd_per_hour:.2f}"
    rate = f"{gpu.tflops:g}" if gpu.bf16 else f"{gpu.tflops:g} (fp16)"
    link = f"{gpu.link_gb_s:g} {gpu.link}"
    cells = (gpu.name, f"{gpu.memory_gib:g}", rate, f"{gpu.memory_gb_s:g}", link, f"{gpu.network_gb_s:g}", price)
    return f"| {' | '.join(cells)} |"


def _default(value: object) -> str:
    if isinstance(value, BaseModel):
        return "as below"
    return f"`{_yaml(value)}`" if value != {} else "none"


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


if __name__ == "__main__":
    print("\n\n".join([gpu_table(), key_table(GpuFigures), key_table(FleetShape)]))

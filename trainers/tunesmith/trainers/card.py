"""The model card: what the artifact is, what it was made of, how well it did and how to load it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tunesmith.cluster.artifacts import FingerprintReceipt, MaskReceipt, ParityReceipt, PlanReceipt
from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.recipe.load import recipe_hash, resolved
from tunesmith.cluster.recipe.schema import Adapter, Lora, Peft, Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.receipts.plan import read_plan_receipt

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of the libraries that made the weights."""
    return {name: version(name) for name in LIBRARIES}


def card(
    recipe: Recipe,
    base: BaseRef,
    run: RunFolder,
    data: Prepared,
    parity: ParityReceipt,
    parity_split: str,
    fingerprint: FingerprintReceipt,
) -> str:
    """The whole README.md, with the front matter that the hub reads."""
    sections = [
        _front_matter(recipe, base),
        f"# {recipe.name}\n\n{_summary(recipe, base)}",
        f"## Load it\n\n{_loading(recipe, base, data)}",
        f"## Losses\n\n{_losses(read_metrics(run.metrics))}",
        f"## Data\n\n{_data(data)}",
        f"## Receipts\n\n{_receipts(run.receipts, parity, parity_split)}\n{_fingerprint(fingerprint)}",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True).strip()}\n```",
        f"## Provenance\n\n{_provenance(recipe, base, data)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe, base: BaseRef) -> str:
    spec = recipe.adaptation
    is_adapter, peft_type = isinstance(spec, Adapter), [spec.peft_type.lower()] if isinstance(spec, Peft) else []
    fields: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", recipe.objective.kind, recipe.adaptation.kind, *peft_type],
    }
    if base.revision:
        fields = {"base_model": base.reference, **fields}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _summary(recipe: Recipe, base: BaseRef) -> str:
    objective = {"cpt": "continued pre-training", "sft": "supervised fine-tuning"}[recipe.objective.kind]
    spec = recipe.adaptation
    bits = {None: "", "nf4": ", over a base held in 4 bits (nf4)", "int8": ", over a base held in 8 bits (LLM.int8)"}
    quantized = bits[recipe.model.quantization]
    if isinstance(spec, Lora):
        how = f"A LoRA adapter of rank {spec.rank} (alpha {spec.lora_alpha:g}){quantized}"
    elif isinstance(spec, Peft):
        how = f"An adapter of PEFT's type {spec.peft_type}{quantized}"
    else:
        how = "A whole model, every weight trained"
    return f"{how}, made by {objective} of `{base.reference}` with Tunesmith."


def _loading(recipe: Recipe, base: BaseRef, data: Prepared) -> str:
    kind = "AutoPeftModelForCausalLM" if isinstance(recipe.adaptation, Adapter) else "AutoModelForCausalLM"
    library = "peft" if isinstance(recipe.adaptation, Adapter) else "transformers"
    lines = [f"from {library} import {kind}", "from transformers import AutoTokenizer", ""]
    lines += [f'model = {kind}.from_pretrained("PATH_OF_THIS_FOLDER", dtype="auto")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")']
    stop = ""
    if data.report.chat_template:
        lines += ['messages = [{"role": "user", "content": "..."}]']
        lines += ["inputs = tokenizer.apply_chat_template("]
        lines += ['    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"', ")"]
        if data.report.end_of_turn is not None:
            stop = f", eos_token_id={data.report.end_of_turn}"
    else:
        lines += ['inputs = tokenizer("...", return_tensors="pt")']
    lines += [f"output = model.generate(**inputs, max_new_tokens=256{stop})"]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if isinstance(recipe.adaptation, Adapter) and not base.revision:
        text += (
            f"\n\nPEFT looks for the base in `{base.path}`, as `adapter_config.json` says; change it there if it moves."
        )
    return text


def _losses(metrics: list[dict[str, Any]]) -> str:
    """Training and held-out loss, first and last, in nats a token."""
    steps = [line for line in metrics if "loss" in line]
    rows = []
    for name, key in (("training", "loss"), ("held-out", "eval_loss")):
        values = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        if values:
            first, last, best = values[0], values[-1], min(values, key=lambda pair: pair[1])
            rows.append(
                f"| {name} | " + " | ".join(f"{loss:.4f} (step {at})" for at, loss in (first, last, best)) + " |"
            )
    if not rows:
        return "None were recorded."
    head = "| loss, nats a token | first | last | lowest |\n| --- | --- | --- | --- |\n"
    tokens = sum(line.get("tokens") or 0 for line in steps)
    return f"{head}" + "\n".join(rows) + f"\n\n{len(steps):,} optimizer steps on {tokens:,} tokens."


def _data(data: Prepared) -> str:
    return "\n".join(f"- {line}" for line in data.report.lines())


def _receipts(folder: Path, parity: ParityReceipt, split: str) -> str:
    lines = []
    if (folder / "mask.json").is_file():
        mask = MaskReceipt.model_validate_json((folder / "mask.json").read_bytes())
        lines.append(
            f"- mask ({_verdict(mask.passed)}): {mask.trained_tokens:,} of {mask.tokens:,} tokens trained; "
            f"{f'{mask.cut_rows:,} rows cut at max_length; ' if mask.cut_rows else ''}`receipts/mask.html` shows which"
        )
    ways = ", ".join(f"{way} {largest:.2g}" for way, largest in parity.differences.items())
    lines.append(
        f"- parity ({_verdict(parity.passed)}): log-probabilities of {parity.tokens:,} tokens in {parity.rows} "
        f"{split} rows; largest difference from the training forward: {ways} nats (up to {parity.tolerance:g} passes); "
        f"from the base: {parity.base_difference:.2g} nats"
    )
    unmerged = [f"  - this adapter cannot be merged into its base: {parity.unmerged}"] if parity.unmerged else []
    problems = [f"  - {problem}" for problem in parity.problems]
    return "\n".join([*lines, *unmerged, *problems, *_plan(read_plan_receipt(folder / "plan.json"))])


def _plan(plan: PlanReceipt | None) -> list[str]:
    """Most memory that a worker took, and what had been predicted."""
    if plan is None:
        return []
    if not plan.workers:
        return [f"- plan ({plan.verdict}): {plan.problem}"]
    worst = max(plan.workers, key=lambda worker: worker.measured_bytes)
    predicted = "nothing" if worst.predicted_bytes is None else f"{worst.predicted_bytes / 2**30:.3g} GiB"
    lines = [
        f"- plan ({plan.verdict}): a worker's tensors took up to {worst.measured_bytes / 2**30:.3g} GiB in the first "
        f"{plan.steps} optimizer steps, {predicted} was predicted"
    ]
    return lines + ([f"  - {plan.problem}"] if plan.problem else [])


def _fingerprint(sketch: FingerprintReceipt) -> str:
    if sketch.problem:
        return f"- fingerprint (none): {sketch.problem}"
    tokens, answers = sum(sketch.answer_tokens), sketch.answers
    some = "" if answers == sketch.all_answers else f" of about {sketch.all_answers:,}"
    return (
        f"- fingerprint: {answers:,}{some} trained answers of {tokens / answers:.0f} tokens on average after prompts of "
        f"{sum(sketch.prompt_tokens) / answers:.0f}, {sketch.refusals / answers:.1%} of them refusals; serving compares its "
        "traffic with `receipts/fingerprint.json`, which holds sums alone and no row"
    )


def _verdict(passed: bool) -> str:
    return "passed" if passed else "**failed**"


def _provenance(recipe: Recipe, base: BaseRef, data: Prepared) -> str:
    revision = f" at `{base.revision}`" if base.revision else ""
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    files = "\n".join(f"- data file `{Path(path).name}`: `{digest}`" for path, digest in sorted(data.files.items()))
    return (
        f"- base: `{base.reference}`{revision}, weights `sha256:{base.digest}`\n"
        f"- recipe: `sha256:{recipe_hash(recipe)}`\n"
        f"- tokenised data: `sha256:{data.fingerprint}`\n{files}\n"
        f"- made with: {made}\n"
        "- every file of this folder is signed in `MANIFEST.json`"
    )

"""The arithmetic of a plan in words, from the rules that people know."""

from __future__ import annotations

from tunesmith.cluster.recipe.schema import Full, Lora
from tunesmith.trainers import zero
from tunesmith.trainers.memory.plan import Plan, gib
from tunesmith.trainers.memory.shard import MOMENTS


def explanation(plan: Plan) -> list[str]:
    """Sentences with the plan's own numbers."""
    return [
        "How this comes about",
        *_weights(plan),
        *_training(plan),
        *_adapter(plan),
        *_sharding(plan),
        *_activations(plan),
    ]


def _weights(plan: Plan) -> list[str]:
    parameters = plan.prediction.parameters
    each = plan.prediction.work.weight_bytes
    lines = [
        f"Weights: {_count(parameters)} parameters × {each:.3g} bytes = {gib(parameters * each):,.1f} GiB in all. "
        f"In 16 bits they are {parameters * 2 / 1e9:,.0f} GB on disk"
        + (", once for every task that is trained in full." if plan.prediction.whole_model else "."),
    ]
    if plan.recipe.model.quantization == "nf4":
        lines.append(
            "NF4 takes half a byte a weight and 0.016 for the scales of its blocks of 64 (double quantisation)."
        )
    return lines


def _training(plan: Plan) -> list[str]:
    prediction, engine = plan.prediction, plan.prediction.engine
    if engine is None:
        return [
            f"AdamW keeps two moments of each of the {_count(prediction.trainable)} trained parameters, in their format."
        ]
    moments = MOMENTS[plan.recipe.train.optimizer]
    total = prediction.trainable * (moments + 4)
    gradient = zero.gradient_item(engine.stage, engine.item, engine.accumulation)
    return [
        f"Adam: {moments:.3g} bytes of moments a trained parameter, and 4 for its fp32 master copy: "
        f"{_count(prediction.trainable)} × {moments + 4:.3g} = {gib(total):,.1f} GiB in all. With the weight ({engine.item}) and "
        f"its gradient ({gradient}), that is {moments + 4 + engine.item + gradient:.3g} bytes a parameter before anything is "
        "computed.",
    ]


def _adapter(plan: Plan) -> list[str]:
    spec, config = plan.recipe.adaptation, plan.model.config
    if isinstance(spec, Full):
        return []
    lines = []
    width = int(config.get("hidden_size") or 0)
    if isinstance(spec, Lora) and width:
        trained = 2 * width * spec.rank
        lines.append(
            f"LoRA: rank {spec.rank} on a {width}×{width} matrix trains {width}×{spec.rank} + {spec.rank}×{width} = "
            f"{trained:,} numbers instead of {_count(width * width)}."
        )
    share = plan.prediction.trainable / max(1, plan.prediction.parameters)
    lines.append(
        f"The adapter trains {_count(plan.prediction.trainable)} of {_count(plan.prediction.parameters)} parameters "
        f"({share:.2%}): {gib(plan.disk.artifact) * 1024:,.0f} MiB on disk for each task."
    )
    return lines


def _sharding(plan: Plan) -> list[str]:
    prediction, engine = plan.prediction, plan.prediction.engine
    if engine is None or engine.workers == 1:
        return []
    shared = {1: "the optimizer's state", 2: "the optimizer's state and gradients", 3: "everything, weights included,"}
    lines = [
        f"ZeRO-{engine.stage} shares {shared.get(engine.stage, 'nothing')} among {engine.workers} workers: "
        f"{', '.join(f'{cause} {gib(size):,.1f}' for cause, size in prediction.parts.most_common() if cause != 'activations')} "
        "GiB on each."
    ]
    if engine.stage == 3:
        lines.append(
            "The gathered window is what is whole at once: up to a billion weights that are needed again soon, the layer at "
            "work, and 50 million fetched ahead."
        )
    return lines


def _activations(plan: Plan) -> list[str]:
    prediction, work = plan.prediction, plan.prediction.work
    tokens = work.tokens / work.passes
    size = prediction.parts["activations"]
    kept = (
        "one hidden state a layer (the rest is computed again)"
        if work.gradient_checkpointing
        else "what each layer's backward pass needs"
    )
    return [
        f"Activations: {tokens:,.0f} tokens at a time keep {kept}: {gib(size):,.1f} GiB, "
        f"{size / tokens / work.layers / 1024:,.0f} KiB a token and layer at the worst moment ({prediction.worst})."
        + ("" if plan.as_hf else " Logits exist 64 MiB at a time, never whole.")
    ]


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"

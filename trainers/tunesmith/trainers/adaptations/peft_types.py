"""What each of PEFT's adapter types can do under this loop: facts, found by training every one of them.

Nothing heavy is imported: a recipe is checked against these facts before torch is. The tests train each type that is
said to train, and compare the table in docs/adaptations.md with this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Peft


@dataclass(frozen=True)
class PeftKind:
    """One of PEFT's types."""

    method: str
    """What it is, and the paper where there is one."""
    untrainable: str = ""
    """Why it cannot be trained here; empty when it can. The planner builds it either way."""
    unsharded: str = ""
    """Why it cannot be trained under ZeRO-3; empty when it can."""
    quantized: tuple[str, ...] = ()
    """The kinds of quantised base that it adapts."""


_SEQUENCE = (
    "it puts virtual tokens before a sequence, and a packed row holds several; PEFT's implementation knows one a row"
)
_DATA = "it is initialised from batches of data, which are not at hand when the adapter is built"
_FORWARD = "it acts in the forward of PEFT's own wrapper, which scores whole sequences and not packed labels"

_WHOLE = "it reads the base's weights when it is built, and ZeRO-3 has sharded them by then"
_TOKENS = "PEFT gathers the embeddings of single tokens on CUDA alone, where that is not tested"
_BOTH = ("nf4", "int8")

PEFT_TYPES: dict[str, PeftKind] = {
    "ADALORA": PeftKind(
        "LoRA as P Λ Q whose ranks are shared out while it trains (arXiv:2303.10512)",
        "its schedule reads every gradient after each step, when ZeRO has freed it, and its penalty belongs to a loss "
        "that is not computed here",
    ),
    "ADAMSS": PeftKind(
        "low-rank updates in clusters of singular subspaces", "it needs scikit-learn, which is not installed with us"
    ),
    "ADAPTION_PROMPT": PeftKind("LLaMA-Adapter: gated attention to learnt prompts (arXiv:2303.16199)", quantized=_BOTH),
    "BEFT": PeftKind("a bias behind chosen layers (arXiv:2509.15974)", quantized=_BOTH),
    "BOFT": PeftKind("orthogonal turns of the weights in butterfly factors (arXiv:2311.06243)", quantized=_BOTH),
    "C3A": PeftKind("block-circulant updates (arXiv:2407.19342)", quantized=_BOTH),
    "CARTRIDGE": PeftKind("a trained key-value cache before the sequence", _SEQUENCE),
    "CPT": PeftKind("context-aware prompt tuning (arXiv:2410.17222)", _SEQUENCE),
    "DEFT": PeftKind("residual projections of the weights", unsharded=_WHOLE),
    "DELORA": PeftKind("normalised low-rank updates of bounded strength (arXiv:2503.18225)", unsharded=_WHOLE),
    "FOURIERFT": PeftKind("a few coefficients of each update's Fourier spectrum (arXiv:2405.03003)", quantized=_BOTH),
    "FROD": PeftKind("full-rank updates in bases that layers share", unsharded=_WHOLE),
    "GLORA": PeftKind("scales, shifts and low-rank supports of weights and biases (arXiv:2306.07967)"),
    "GRALORA": PeftKind("a grid of small LoRA blocks (arXiv:2505.20355)", quantized=_BOTH),
    "HIRA": PeftKind("Hadamard products of the weights with low-rank updates", quantized=_BOTH),
    "HRA": PeftKind("Householder reflections of the weights (arXiv:2405.17484)"),
    "IA3": PeftKind("learnt scales of keys, values and inner activations (arXiv:2205.05638)", quantized=_BOTH),
    "LILY": PeftKind(
        "low-rank experts that layers share (arXiv:2407.09946)",
        "its router averages over all tokens of a row, later ones and other examples included",
    ),
    "LN_TUNING": PeftKind(
        "the norms alone (arXiv:2312.11420)", unsharded="it copies norms that ZeRO-3 has sharded", quantized=_BOTH
    ),
    "LOHA": PeftKind(
        "Hadamard products of two low-rank updates (arXiv:2108.06098)", unsharded=_WHOLE, quantized=("int8",)
    ),
    "LOKR": PeftKind("Kronecker products of small updates (arXiv:2309.14859)", quantized=("int8",)),
    "LORA": PeftKind("low-rank updates (arXiv:2106.09685), DoRA and rsLoRA too", quantized=_BOTH),
    "MISS": PeftKind("updates that shards of a weight share, formerly Bone (arXiv:2409.15371)", quantized=_BOTH),
    "MULTITASK_PROMPT_TUNING": PeftKind("prompt tuning over tasks (arXiv:2303.02861)", _SEQUENCE),
    "OFT": PeftKind("orthogonal turns of the weights in blocks (arXiv:2306.07280)", quantized=_BOTH),
    "OSF": PeftKind("the singular subspace of least weight (arXiv:2504.07097)", unsharded=_WHOLE),
    "P_TUNING": PeftKind("virtual tokens from a small encoder (arXiv:2103.10385)", _SEQUENCE),
    "PEANUT": PeftKind("updates that small networks make from the weights (arXiv:2410.01870)"),
    "POLY": PeftKind(
        "a mixture of LoRA skills by task (arXiv:2202.13914)", "it needs the number of a task for every row"
    ),
    "PREFIX_TUNING": PeftKind("learnt keys and values before the sequence (arXiv:2101.00190)", _SEQUENCE),
    "PROMPT_TUNING": PeftKind("learnt embeddings before the sequence (arXiv:2104.08691)", _SEQUENCE),
    "PSOFT": PeftKind("orthogonal turns within the principal subspace", unsharded=_WHOLE),
    "PVERA": PeftKind("VeRA with sampled projections (arXiv:2512.07703)", quantized=_BOTH),
    "RANDLORA": PeftKind("full-rank sums of random bases (arXiv:2502.00987)", quantized=_BOTH),
    "ROAD": PeftKind("rotations of pairs of activations (arXiv:2409.00119)", quantized=_BOTH),
    "SHADOW": PeftKind("a small network beside the frozen one", _FORWARD),
    "SHIRA": PeftKind("a sparse choice of the weights' entries (arXiv:2406.13175)", quantized=_BOTH),
    "SUPERTUNING": PeftKind("the entries of largest or smallest weight (arXiv:2607.09287)", unsharded=_WHOLE),
    "TINYLORA": PeftKind("a handful of numbers in the weights' singular bases (arXiv:2602.04118)", unsharded=_WHOLE),
    "TRAINABLE_TOKENS": PeftKind("the embeddings of chosen tokens", unsharded=_TOKENS, quantized=_BOTH),
    "UNILORA": PeftKind("one vector projected into all LoRA weights (arXiv:2506.00799)", quantized=("nf4",)),
    "VBLORA": PeftKind("LoRA from a bank of shared vectors (arXiv:2405.15179)", quantized=_BOTH),
    "VERA": PeftKind("learnt scales of shared random projections (arXiv:2310.11454)", quantized=_BOTH),
    "WAVEFT": PeftKind("a few wavelet coefficients of each update (arXiv:2505.12532)", quantized=_BOTH),
    "XLORA": PeftKind(
        "a mixture of trained LoRA adapters (arXiv:2402.07148)", "it needs adapters that are trained already"
    ),
}

_LORA_KEYS = {
    "alora_invocation_tokens": "it looks for its tokens in whole sequences, and a packed row holds several",
    "arrow_config": "it routes among adapters that are trained already",
    "corda_config": _DATA,
    "eva_config": _DATA,
    "kasa_config": "it truncates the base's weights, which stay as they are here",
    "layer_replication": "it gives the model more layers than its base has",
    "loftq_config": "it rewrites the base's weights, which stay as they are here",
    "lora_ga_config": _DATA,
    "megatron_config": "the model is one of Transformers, not of Megatron",
    "megatron_core": "the model is one of Transformers, not of Megatron",
    "monteclora_config": "its loss is computed by a trainer of PEFT's own",
    "runtime_config": "where weights lie is said in the section `cluster`",
    "use_bdlora": "its blocks belong to tensor-parallel servers",
    "use_qalora": "it needs a base quantised by GPTQ",
    "velora_config": "it is initialised from the first batch, which a resumed run does not see again",
}
_LORA_STARTS = (True, False, "gaussian", "orthogonal")
"""`init_lora_weights` that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ...) rewrite its weights or need data."""


def refuse(spec: Peft, zero_stage: int = 0, quantization: str | None = None) -> None:
    """Refuses types and settings that this loop cannot train; a type that PEFT does not have passes, for PEFT to refuse.

    Args:
        zero_stage: ZeRO stage of the run.
        quantization: `model.quantization` of the recipe.

    Raises:
        ModelError: with the reason, and what works instead.
    """
    kind = PEFT_TYPES.get(spec.peft_type)
    if kind is None:
        return
    where, name = "adaptation.config.peft_type", spec.peft_type
    if kind.untrainable:
        raise ModelError(
            f"{where}: {name} can be planned but not trained: {kind.untrainable}",
            f"Types that train: {_names(lambda other: not other.untrainable)}. `tunesmith plan --as hf` plans the others.",
        )
    if name == "LORA":
        _refuse_lora_settings(spec.config)
    unsharded = kind.unsharded or (_TOKENS if spec.config.get("trainable_token_indices") else "")
    if zero_stage == 3 and unsharded:
        raise ModelError(
            f"{where}: {name} cannot be trained under ZeRO-3: {unsharded}",
            f"Set cluster.zero to 2, or take one of {_names(lambda other: not (other.untrainable or other.unsharded))}.",
        )
    if quantization and quantization not in kind.quantized:
        raise ModelError(
            f"{where}: {name} does not adapt {quantization} layers, whose weights are codes and not numbers",
            f"Take model.quantization out, or use one of {_names(lambda other: quantization in other.quantized)}.",
        )
    if spec.config.get("use_dora") and (quantization == "int8" or (quantization == "nf4" and zero_stage == 3)):
        raise ModelError(
            "adaptation.config.use_dora: DoRA reads the base's weights in every forward, which int8 layers do not give, nor "
            "nf4 layers under ZeRO-3",
            "Leave use_dora out, or use model.quantization: nf4 with cluster.zero at most 2.",
        )
    if spec.config.get("init_lora_weights") == "orthogonal" and quantization == "int8":
        raise ModelError(
            "adaptation.config.init_lora_weights: orthogonal first weights take the format of the base's, and int8 codes "
            "have no gradient",
            "Leave init_lora_weights out, or use model.quantization: nf4.",
        )


def _refuse_lora_settings(config: dict[str, Any]) -> None:
    for key, why in _LORA_KEYS.items():
        if config.get(key):
            raise ModelError(f"adaptation.config.{key}: cannot be trained here: {why}", "Take it out.")
    start = config.get("init_lora_weights", True)
    if start not in _LORA_STARTS:
        raise ModelError(
            f"adaptation.config.init_lora_weights: {start!r} rewrites the base's weights or needs data, and here the base "
            "stays as it is",
            f"Use one of {', '.join(json.dumps(each) for each in _LORA_STARTS)}.",
        )


def _names(wanted: Callable[[PeftKind], bool]) -> str:
    return ", ".join(name for name, kind in PEFT_TYPES.items() if wanted(kind))

"""Whether a LoRA adapter's tensors are what its settings say, and fit the base."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.cluster.errors import AdapterError
from tunesmith.serving.documents import is_count

Shape = tuple[int, ...]

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")
_MAGNITUDES = tuple(f"lora_magnitude_vector{middle}{end}" for middle in ("", ".default") for end in ("", ".weight"))
_LAYER = re.compile(r"\.(\d+)\.")
_ROOT = "base_model.model."
_REPEATS = re.compile(r"[*+?{]")
_MOST_LOOKUPS = 2_000_000


def lora_rank(config: Mapping[str, Any], shapes: Mapping[str, Shape], max_rank: int) -> int:
    """The largest rank of an adapter's modules, once every pair of A and B agrees with the settings and each other.

    Args:
        shapes: of every tensor by its name.

    Raises:
        AdapterError: names the tensor, the rank or shape expected, and the one found.
    """
    ranks = {"r": config.get("r"), **{f"rank_pattern {key}": rank for key, rank in _ranks(config).items()}}
    for key, rank in ranks.items():
        if not is_count(rank) or not 1 <= rank <= max_rank:
            raise AdapterError(
                f"adapter_config.json: {key} is {str(rank)[:40]}; expected 1 to {max_rank}",
                "Raise it with --max-rank; a vllm base serves ranks up to its max_rank.",
            )
    pairs = lora_pairs(shapes)
    if not pairs:
        raise AdapterError("adapter_model.safetensors: a LORA adapter without any lora_A and lora_B")
    if len(pairs) * len(ranks) > _MOST_LOOKUPS:
        raise AdapterError(
            f"adapter_config.json: rank_pattern of {len(ranks) - 1:,} entries for {len(pairs):,} modules",
            f"Their product may be {_MOST_LOOKUPS:,}.",
        )
    if config.get("use_dora"):
        _check_magnitudes(pairs, shapes)
    possible = _possible_ranks(config)
    found = []
    for module, (a_name, a, b_name, b) in pairs.items():
        expected = possible(module)
        # several experts' matrices stand in one tensor when a parameter is the target
        fitting = [rank for rank in expected if a[0] == rank or (config.get("target_parameters") and a[0] % rank == 0)]
        if not fitting:
            said = " or ".join(map(str, sorted(expected)))
            raise AdapterError(f"{a_name}: shape {list(a)}; its rank is {a[0]}, but adapter_config.json says {said}")
        if len(b) < 2 or b[1] != a[0]:
            raise AdapterError(f"{b_name}: shape {list(b)} does not multiply with {a_name} {list(a)}")
        found.append(max(fitting))
    return max(found)


def lora_pairs(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Shape, str, Shape]]:
    """By module: the names and shapes of A `(R, in)` and B `(out, R)`; an embedding's too.

    Raises:
        AdapterError: one of the two is missing, or a tensor has no matrix's shape.
    """
    parts: dict[str, dict[str, tuple[str, Shape]]] = {}
    for name, shape in shapes.items():
        if match := _PART.fullmatch(name):
            side = match["part"][-1]
            of_module = parts.setdefault(match["module"], {})
            if side in of_module:
                raise AdapterError(f"{name}: {of_module[side][0]} is the lora_{side} of this module already")
            if len(shape) < 2:
                raise AdapterError(f"{name}: shape {list(shape)} is no matrix")
            of_module[side] = (name, shape)
    pairs = {}
    for module, of_module in parts.items():
        if of_module.keys() != {"A", "B"}:
            (there, (name, _)) = next(iter(of_module.items()))
            raise AdapterError(f"{name}: there is no lora_{'B' if there == 'A' else 'A'} for it")
        pairs[module] = (*of_module["A"], *of_module["B"])
    return pairs


def check_layers(config: Mapping[str, Any], base: Mapping[str, Shape]) -> None:
    """Compares the layers that the settings name with those that the base has.

    Args:
        base: shape of every weight of the base by its name.

    Raises:
        AdapterError: the base has no such layer, or it is no number of one.
    """
    named = config.get("layers_to_transform")
    if named is None:
        return
    numbers = [int(found[1]) for name in base if (found := _LAYER.search(name))]
    layers = max(numbers, default=-1) + 1
    for layer in named if isinstance(named, list) else [named]:
        if not is_count(layer) or (numbers and layer >= layers):
            raise AdapterError(
                f"adapter_config.json: layers_to_transform names layer {str(layer)[:40]}; the base has {layers}, "
                f"0 to {layers - 1}",
                "It was trained on another base, or the settings were written by hand.",
            )


def _check_magnitudes(pairs: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Refuses a DoRA without the magnitudes that were trained: PEFT would take those of the base instead."""
    for module in pairs:
        if not any(f"{module}.{name}" in shapes for name in _MAGNITUDES):
            raise AdapterError(
                f"adapter_config.json says use_dora, and adapter_model.safetensors has no {module}.{_MAGNITUDES[0]}",
                "Save the adapter with its magnitudes, or say use_dora: false if it is a plain LoRA.",
            )


def check_fit(config: Mapping[str, Any], shapes: Mapping[str, Shape], base: Mapping[str, Shape]) -> None:
    """Compares every module that has a LoRA with the weight of the base that it is added to.

    Args:
        base: shape of every weight of the base by its name.

    Raises:
        AdapterError: the base has no such module, or one of another shape.
    """
    weights = _Weights(base)
    for module, (a_name, a, b_name, b) in lora_pairs(shapes).items():
        path = module.removeprefix(_ROOT)
        of_base = weights.shapes(path)
        if not of_base and weights.renames_in_layer_of(path):
            continue
        if not of_base:
            raise AdapterError(f"{a_name}: the base has no module {path}", "It was trained on another base.")
        product, transposed = (b[0], a[1]), (a[1], b[0])  # embeddings and Conv1D keep theirs the other way round
        fits = {product, transposed} if "embedding" in a_name or config.get("fan_in_fan_out") else {product}
        is_matrix = len(a) == len(b) == 2 and all(len(shape) == 2 for shape in of_base)
        if is_matrix and not fits & of_base:
            raise AdapterError(
                f"{b_name}: adds {list(product)} to {path}, which is {list(min(of_base))} in the base",
                "It was trained on another base.",
            )


class _Weights:
    """The base's weights by the ends of their names, because a file may leave out a prefix that the model has."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._names = [name.removesuffix(".weight") for name in shapes]
        self._by_end: dict[str, set[Shape]] = {}
        for name, shape in zip(self._names, shapes.values(), strict=True):
            words = name.split(".")
            for n in range(len(words)):
                self._by_end.setdefault(".".join(words[n:]), set()).add(shape)

    def shapes(self, path: str) -> set[Shape]:
        """Of a module's weight: several when the path says too little, none when there is no such module."""
        words = path.split(".")
        layer = next((n for n, word in enumerate(words) if word.isdigit()), len(words))
        for n in range(max(layer, 1)):  # at least the word before the layer's number stays
            if found := self._by_end.get(".".join(words[n:])):
                return found
        tied = words[-1] == "lm_head"  # to the embeddings, and then in no file
        return self._by_end.get("embed_tokens", set()) if tied else set()

    def renames_in_layer_of(self, path: str) -> bool:
        """Whether a path's layer has experts, which are stacked, and their block renamed, when the file is loaded."""
        layer = re.search(r"[^.]+\.\d+\.", path)
        return layer is not None and any(layer[0] in name and ".experts." in name for name in self._names)


def _ranks(config: Mapping[str, Any]) -> dict[str, Any]:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"adapter_config.json: rank_pattern is {type(pattern).__name__}, not an object")
    return pattern


def _possible_ranks(config: Mapping[str, Any]) -> Callable[[str], set[int]]:
    """The ranks that the settings leave a module, found as PEFT looks them up: the first pattern that fits, else r.

    A pattern with repetitions may take for ever on a hostile name and is not tried: its rank stays possible.
    """
    patterns = [
        (None if _REPEATS.search(pattern) else re.compile(rf"(.*\.)?({pattern})$"), rank)
        for pattern, rank in _ranks(config).items()
    ]

    def of(module: str) -> set[int]:
        path, found = module.removeprefix(_ROOT), set()
        for pattern, rank in patterns:
            if pattern is None:
                found.add(rank)
            elif pattern.match(path):
                return {*found, rank}
        return {*found, int(config["r"])}

    return of

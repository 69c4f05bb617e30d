"""YAML as the API server reads it: a key that stands twice in a mapping is a mistake, where PyYAML takes the last."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None, "an event that begins a mapping is there"
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is written twice in one mapping", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def load_all(text: str) -> list[Any]:
    """The documents of a text.

    Raises:
        yaml.YAMLError: it is no YAML, or a key stands twice in a mapping.
    """
    return list(yaml.load_all(text, _Loader))


def load(text: str) -> Any:
    """The only document of a text.

    Raises:
        yaml.YAMLError: as `load_all`, or there are several.
    """
    return yaml.load(text, _Loader)

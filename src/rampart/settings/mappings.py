"""YAML as PyYAML reads it, but for keys that stand there twice: of those it would silently take the last."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from rampart.errors import SettingsError


def read_yaml(text: str) -> Any:
    """What the text holds.

    Raises:
        SettingsError: a key stands twice in one mapping. yaml.YAMLError: it is no YAML.
    """
    _require_once(yaml.compose(text, yaml.SafeLoader))
    return yaml.safe_load(text)


def _require_once(node: yaml.Node | None) -> None:
    """Of the text as it is written: what is merged into a mapping (`<<`) may stand there again."""
    if isinstance(node, yaml.MappingNode):
        for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                raise SettingsError(f"'{key}' stands there twice in the mapping of line {node.start_mark.line + 1}")
        for _, value in node.value:
            _require_once(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_once(value)

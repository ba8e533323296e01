"""YAML as PyYAML reads it, but for keys that stand there twice: of those it would silently take the last."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from rampart.errors import require


def read_yaml(text: str, what: str) -> Any:
    """What the text holds, which is called `what`.

    Raises:
        SettingsError: a key stands twice in one mapping. yaml.YAMLError: it is no YAML.
    """
    _require_once(yaml.compose(text, yaml.SafeLoader), what)
    return yaml.safe_load(text)


def _require_once(node: yaml.Node | None, what: str) -> None:
    """Of the text as it is written: what is merged into a mapping (`<<`) may stand there again."""
    if isinstance(node, yaml.MappingNode):
        for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            line = node.start_mark.line + 1
            require(count == 1, f"{what}: '{key}' stands there twice in the mapping of line {line}: join the two")
        for _, value in node.value:
            _require_once(value, what)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_once(value, what)

"""YAML from disk: bounded in size and depth, without tags, anchors and guessed types."""

import re
from pathlib import Path
from typing import Any

import yaml

from shards.local_files import open_file

MAX_BYTES = 2**20
"""Of a YAML file."""
MAX_DEPTH = 16
OCTAL = re.compile(r"[-+]?0[0-9_]+")
"""A number that is octal in YAML 1.1 and decimal in YAML 1.2."""


class BoundedLoader(yaml.SafeLoader):
    """YAML without what makes a small file large or ambiguous.

    Raises yaml.YAMLError for deep nesting, tags, aliases, duplicate keys, and keys that
    are not scalars.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node from the next events."""
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line}: *{event.anchor}: write the value instead")
        if event.tag is not None:
            raise yaml.YAMLError(f"line {line}: {event.tag}: remove the tag")
        if self.depth == MAX_DEPTH:
            raise yaml.YAMLError(f"line {line}: nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping."""
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a list or mapping as key")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: duplicate key {key.value}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class TextLoader(BoundedLoader):
    """YAML whose scalars are text as written, except null, true and false.

    The type of a value is that of its setting: 1e-3 is a number, 1.10 may be a name. Raises
    yaml.YAMLError for octal numbers.
    """

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return the text of a scalar."""
        if isinstance(node, yaml.ScalarNode) and node.style is None and OCTAL.fullmatch(node.value):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: {node.value} may be octal; write it without the "
                "leading 0, or quote a name"
            )
        return super().construct_scalar(node)


TextLoader.yaml_implicit_resolvers = {
    letter: [
        (tag, regex)
        for tag, regex in resolvers
        if tag.endswith(":null") or (tag.endswith(":bool") and letter in "tTfF")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(path: Path) -> str:
    """Read a small UTF-8 text file.

    Raises OSError, DataError for a pipe or device, yaml.YAMLError if it is too large or not UTF-8.
    """
    with open_file(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise yaml.YAMLError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not UTF-8 text ({error})") from error


def load_yaml(text: str) -> Any:
    """Parse a YAML text: mappings, lists, text, booleans and None. Raises yaml.YAMLError."""
    return yaml.load(text, TextLoader)  # noqa: S506 (it is a SafeLoader)


def load_typed_yaml(text: str) -> Any:
    """Parse a YAML text, numbers included. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, BoundedLoader)  # noqa: S506 (it is a SafeLoader)
    except ValueError as error:  # a date or number that Python cannot represent
        raise yaml.YAMLError(str(error)) from error

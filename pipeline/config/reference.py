"""All keys of a config with type, default and meaning, for docs/configuration.md and `--help`."""

import json
import re
from inspect import getdoc
from typing import Any

from pipeline.config.load import kinds_of, sections_in
from pipeline.config.section import Section

_NAMES = {"integer": "int", "number": "float", "string": "string", "boolean": "bool", "object": "mapping"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def sections(root: type[Section], title: str = "") -> dict[str, type[Section]]:
    """Return a config's type and the types of all sections below it.

    Args:
        root: The config's type.
        title: Its dotted name.

    Returns:
        The sections by dotted name, followed by the kind where a section has several.
    """
    found = {title: root}
    for name, field in root.model_fields.items():
        inner = sections_in(field.annotation)
        for section in inner:
            kind = f" (kind: {kinds_of(section)[0]})" if len(inner) > 1 else ""
            found |= sections(section, f"{title.partition(' ')[0]}.{name}{kind}".lstrip("."))
    return found


def keys(section: type[Section]) -> list[tuple[str, str, str, str]]:
    """Return name, type, default and meaning of a section's keys, without those of sections below it."""
    schema, meanings, rows = section.model_json_schema(), descriptions(section), []
    for name, field in schema["properties"].items():
        default = field.get("default", "required" if name in schema.get("required", ()) else {})
        inner = sections_in(section.model_fields[name].annotation)
        if inner and isinstance(default, dict):
            default = ""  # that of the section's keys
        text = default if isinstance(default, str) else json.dumps(default)
        rows.append((name, _type(field), text, meanings[name] if name in meanings else summary(inner[0])))
    return rows


def summary(section: type[Section]) -> str:
    """Return the first line of a section's docstring."""
    return (getdoc(section) or "").partition("\n")[0]


def descriptions(section: type[Section]) -> dict[str, str]:
    """Return the meanings of a section's keys, as the docstrings of the class and its bases give them."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section):
            _, _, attributes = (getdoc(base) or "").partition("Attributes:\n")
            entries = re.findall(r"^    (\w+): (.+(?:\n {5,}.+)*)", attributes, re.MULTILINE)
            found |= {name: " ".join(text.split()) for name, text in entries}
    return found


def _type(schema: dict[str, Any]) -> str:
    """Return the type that a property's JSON schema describes, as text."""
    if forms := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, forms)))
    if "$ref" in schema:
        return "section"
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(map(str, choices))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items') or schema['prefixItems'][0])}"
    bounds = [f" {sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    return _NAMES.get(schema["type"], schema["type"]) + ",".join(bounds)

"""YAML + `section.key=value` overrides -> RunConfig, with every problem reported at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.schema import RunConfig
from pipeline.config.section import Section
from pipeline.errors import ConfigError, did_you_mean

S = TypeVar("S", bound=Section)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in written if written.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} is written twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's config.

    Args:
        path: a YAML file with the sections of `RunConfig`.
        overrides: `section.key=value` words; values are parsed as YAML.

    Raises:
        ConfigError: names every unknown key, wrong value and conflict at once.
    """
    tree = read_tree(path)
    problems = [problem for word in overrides if (problem := _override(tree, word))]
    return parse(tree, origin=str(path), problems=problems)


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    file = Path(path)
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise ConfigError(f"config file {str(path)!r} does not exist{did_you_mean(file.name, beside)}")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(tree).__name__}; expected sections")
    return tree


def parse(tree: dict[str, Any], origin: str, problems: Sequence[str] = ()) -> RunConfig:
    """Validate a nested mapping; `problems` found earlier are reported together with the new ones.

    Raises:
        ConfigError: one line a problem.
    """
    found = list(problems)
    config = None
    # A section whose keys are all commented out reads as null.
    tree = {key: value for key, value in tree.items() if value is not None}
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        found += [_explain(item) for item in error.errors()]
    if config is not None:
        found += config.conflicts()
    if found or config is None:
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in found))
    return config


def parse_section(kind: type[S], tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> S:
    """Validate a mapping that is not a whole run, with `a.b=value` words applied.

    Raises:
        ConfigError: one line a problem.
    """
    found = [problem for word in overrides if (problem := _override(tree, word))]
    try:
        section = kind.model_validate(tree)
    except ValidationError as error:
        found += [_explain(item, kind) for item in error.errors()]
    else:
        if not found:
            return section
    raise ConfigError(f"{origin}: {len(found)} problem{'s' * (len(found) > 1)}\n  " + "\n  ".join(found))


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; `parse(yaml.safe_load(dump(c)))` equals `c`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _override(tree: dict[str, Any], word: str) -> str | None:
    """Apply one `a.b=value` to the tree; returns a problem, or None."""
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        return f"override {word!r}: expected section.key=value"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"override {word!r}: {text!r} is not a YAML value"
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            return f"override {word!r}: {section!r} is a value, not a section"
    node[last] = value
    return None


def _fields(location: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """Names of the keys that exist in the section at `location` (without the key itself)."""
    models: list[Any] = [root]
    for part in location:
        tagged = [
            m
            for m in models
            if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)
        ]
        models = (
            tagged
            or [
                inner
                for m in models
                if part in m.model_fields
                for inner in _models(m.model_fields[part].annotation)
            ]
            or models
        )  # a name or a number in a mapping or list of sections
    return sorted({name for model in models for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every section type named in an annotation, unions unfolded."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _kinds(section: str) -> list[str]:
    """Values of `model.kind` or `data.kind`."""
    models = _models(RunConfig.model_fields[section].annotation)
    return [kind for model in models for kind in get_args(model.model_fields["kind"].annotation)]


def _explain(item: Any, root: type[BaseModel] = RunConfig) -> str:
    """One pydantic problem as `key: what was written; what was expected; nearest choice`."""
    location, value, kind = list(item["loc"]), item["input"], item["type"]
    context = item.get("ctx", {})
    tagged = (
        len(location) > 1 and location[0] in ("model", "data") and location[1] in _kinds(str(location[0]))
    )
    shown = [part for index, part in enumerate(location) if not (tagged and index == 1)]
    key = ".".join(str(part) for part in shown)
    if kind == "extra_forbidden":
        known = _fields(location[:-1], root)
        place = f"in {'.'.join(map(str, shown[:-1]))}" if shown[:-1] else "at the top level"
        return (
            f"{key}: no such key {place}{did_you_mean(location[-1], known) or '; known: ' + ', '.join(known)}"
        )
    if kind == "literal_error":
        choices = [part.strip(" '") for part in context["expected"].replace(" or ", ", ").split(",")]
        return f"{key}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
    if kind == "union_tag_invalid":
        choices = [part.strip(" '") for part in context["expected_tags"].split(",")]
        near = did_you_mean(context["tag"], choices)
        return f"{key}.kind: {context['tag']!r} is not one of {', '.join(choices)}{near}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing; expected one of {', '.join(_kinds('model'))}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{key}: {value!r}: {message}"

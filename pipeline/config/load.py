"""Read configs: YAML files that build on each other, and `section.key=value` overrides, as typed sections."""

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.schema import WORKER_FORMS, RunConfig
from pipeline.config.section import Section
from pipeline.errors import ConfigError, did_you_mean

S = TypeVar("S", bound=Section)
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Reads YAML without its surprises.

    A key that is written twice is an error; YAML would silently keep the last one. Dates, octal numbers such as 010
    and numbers to base 60 such as 1:30 stay text, which the type of the key then accepts or refuses.
    """

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Return a number as YAML 1.2 reads it."""
        if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
            return node.value
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            message = f"key {repeated[0]!r} is written twice"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's config.

    Args:
        path: A YAML file with the sections of `RunConfig`, and optionally a `base`.
        overrides: `section.key=value` words, applied after composition; values are parsed as YAML.

    Raises:
        ConfigError: A file cannot be read, or keys, values or their combination are wrong; names all of them.
    """
    return parse_section(RunConfig, read_tree(path), str(path), overrides)


def parse(tree: Tree, origin: str) -> RunConfig:
    """Validate a nested mapping as a run's config.

    Args:
        tree: The sections.
        origin: Where they come from, for the message.

    Raises:
        ConfigError: Names all problems, one a line.
    """
    return parse_section(RunConfig, tree, origin)


def parse_section(kind: type[S], tree: Tree, origin: str, overrides: Sequence[str] = ()) -> S:
    """Validate a nested mapping as a section or a whole config, after applying overrides to it.

    Args:
        kind: The section's type.
        tree: The keys and values; overrides change it in place.
        origin: Where they come from, for the message.
        overrides: `a.b=value` words.

    Raises:
        ConfigError: Names all problems, one a line.
    """
    problems = [problem for word in overrides if (problem := override(tree, word))]
    section, found = check(kind, tree)
    if section is None or problems or found:
        raise ConfigError(listed(origin, [*problems, *found]))
    return section


def check(kind: type[S], tree: Tree) -> tuple[S | None, list[str]]:
    """Return the typed form of a nested mapping, None where it has none, and all problems in it."""
    # A section whose keys are all commented out reads as null.
    tree = {key: value for key, value in tree.items() if value is not None}
    try:
        section = kind.model_validate(tree)
    except ValidationError as error:
        return None, [_explain(item, kind) for item in error.errors()]
    return section, list(section.conflicts())


def listed(origin: str, problems: Sequence[str]) -> str:
    """Join problems into one message, one a line below their origin and number."""
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in problems)


def read_tree(path: str | Path) -> Tree:
    """Read a config file and the files it builds on as one nested mapping.

    Args:
        path: A YAML file; its key `base`, if present, is the path of another one, relative to this file.

    Raises:
        ConfigError: A file is missing or no mapping, or the bases form a cycle.
    """
    return merged(read_chain(path))


def read_chain(path: str | Path, base: str | None = None) -> list[Tree]:
    """Read a config file and the files it builds on, without merging them.

    Args:
        path: The YAML file.
        base: Replaces the file's own `base`.

    Returns:
        One mapping a file, the given file first; each still has its `base`.

    Raises:
        ConfigError: A file is missing or no mapping, or the bases form a cycle.
    """
    file, files, trees = Path(path), list[Path](), list[Tree]()
    while True:
        try:
            tree = _read(file)
            if file.resolve() in [other.resolve() for other in files]:
                raise ConfigError(f"{str(file)!r} builds on itself; expected bases without a cycle")
        except ConfigError as error:
            raise ConfigError(": base: ".join([*map(str, files), str(error)])) from None
        if base is not None and not files:
            tree["base"] = base
        files.append(file)
        trees.append(tree)
        if tree.get("base") is None:
            return trees
        if not isinstance(tree["base"], str):
            raise ConfigError(f"{file}: base: {tree['base']!r}; expected the path of a config file")
        file = file.parent / os.path.expanduser(tree["base"])


def merged(chain: Sequence[Tree]) -> Tree:
    """Merge the mappings of a file and the files it builds on.

    Mappings are merged key by key at every depth; other values, lists among them, replace the inherited ones. A
    mapping with another `kind` replaces the inherited one whole. `name` is never inherited, since two runs would
    share a folder.

    Args:
        chain: As `read_chain` returns them.
    """
    inherited = [{key: value for key, value in tree.items() if key != "name"} for tree in chain[1:]]
    tree = reduce(_merge, reversed([chain[0], *inherited]))
    return {key: value for key, value in tree.items() if key != "base"}


def _merge(inherited: Tree, own: Tree) -> Tree:
    """Merge the mapping of one file over that of the file it builds on."""
    result = dict(inherited)
    for key, value in own.items():
        below = inherited.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            kind = value.get("kind")
            if kind in (None, below.get("kind", "text" if key == "data" else kind)):
                value = _merge(below, value)
        result[key] = value
    return result


def _read(file: Path) -> Tree:
    """Read one YAML file as a nested mapping."""
    try:
        if not file.is_file():
            beside = [other.name for other in file.parent.glob("*.yaml")]
            raise ConfigError(f"config file {str(file)!r} does not exist{did_you_mean(file.name, beside)}")
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader) or {}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"config file {str(file)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config file {str(file)!r} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(file)!r} holds a {type(tree).__name__}; expected sections")
    return tree


def dump(config: RunConfig) -> str:
    """Write the resolved config as YAML; `parse(yaml.safe_load(dump(c)), ...)` equals `c`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: Tree, prefix: str = "") -> Tree:
    """Turn `{"a": {"b": 1}}` into `{"a.b": 1}`."""
    flat: Tree = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def override(tree: Tree, word: str, path_of: Callable[[str], list[str]] = lambda key: key.split(".")) -> str:
    """Apply one `a.b=value` word to a nested mapping.

    Args:
        tree: The mapping, changed in place.
        word: The key, `=` and the value as YAML.
        path_of: Gives the keys from the root of `tree` to the value that a dotted key means.

    Returns:
        What is wrong with the word; empty where nothing is.
    """
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        return f"override {word!r}: expected section.key=value"
    try:
        value = yaml.load(_as_yaml(text), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f": {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        return f"override {word!r}: {text!r} is not a YAML value{reason}"
    problem = put(tree, path_of(key), value)
    return problem and f"override {word!r}: {problem}"


def _as_yaml(text: str) -> str:
    """Return the YAML that an override's value means.

    Plain values, quoted ones and those in [] and {} are YAML. What YAML would read as something else, such as a path
    with ` #`, `: ` or a leading `*`, means itself.
    """
    word = text.strip()
    closing = {"[": "]", "{": "}"}.get(word[:1], "")
    if word[:1] in ("'", '"') or (closing and (word.endswith(closing) or closing not in word)):
        return text
    try:
        node = yaml.compose(word, yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.value == word
    return text if plain or not word else json.dumps(word, ensure_ascii=False)


def put(tree: Tree, path: Sequence[str], value: Any) -> str:
    """Set the value at a path of keys.

    Returns:
        What is wrong with the path; empty where nothing is.
    """
    for section in path[:-1]:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return f"{section!r} is a value, not a section"
    tree[path[-1]] = value
    return ""


def sections_in(annotation: Any) -> list[type[Section]]:
    """List every section type that an annotation names, in unions and containers too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def _resolve(location: Sequence[str | int], root: type[Section]) -> tuple[list[str], list[type[Section]]]:
    """Return the keys that a pydantic location means, and the possible types of the section of the last one."""
    keys, sections, in_container = list[str](), [root], False
    for part in location:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        kinds = {kind: section for section in sections for kind in kinds_of(section)}
        if in_container:  # the part is an index, or a key of the user's own
            in_container = False
        elif fields:
            in_container = get_origin(fields[0].annotation) in (dict, tuple)
            sections = [inner for field in fields for inner in sections_in(field.annotation)] or sections
        elif part in kinds or part in WORKER_FORMS:  # the part is the tag of a union
            sections = [kinds[part]] if part in kinds else sections
            continue
        keys.append(str(part))
    return keys, sections


def kinds_of(section: type[Section]) -> tuple[str, ...]:
    """Return the values of a section's `kind`; none where it has no such key."""
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _not_one_of(value: Any, choices: Sequence[str]) -> str:
    return f"{value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"


def _explain(item: Any, root: type[Section]) -> str:
    """Turn one pydantic error into `key: what was written; what was expected; nearest choice`."""
    keys, sections = _resolve(item["loc"], root)
    key, value, context = ".".join(keys), item["input"], item.get("ctx", {})
    kinds = [kind for section in sections for kind in kinds_of(section)]
    match item["type"]:
        case "extra_forbidden" if key == "base":
            return "base: stands in config files only, not in overrides or resolved configs"
        case "extra_forbidden":
            known = sorted({name for section in sections for name in section.model_fields})
            place = f"in {'.'.join(keys[:-1])}" if keys[:-1] else "at the top level"
            near = did_you_mean(keys[-1], known) or f"; known: {', '.join(known)}"
            return f"{key}: no such key {place}{near}"
        case "literal_error":
            choices = [choice.strip("'") for choice in re.split(", | or ", context["expected"])]
            return f"{key}: {_not_one_of(value, choices)}"
        case "union_tag_invalid":
            return f"{key}.kind: {_not_one_of(context['tag'], kinds)}"
        case "union_tag_not_found":
            return f"{key}.kind: missing; expected one of {', '.join(kinds)}"
        case "missing" if key == "name":
            return "name: missing; every config needs its own, which is never inherited from base"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {context['error']}"
    return f"{key}: {value!r}: {item['msg'][0].lower()}{item['msg'][1:]}"

#!/usr/bin/env python3
"""Write docs/api.md: every public name with its parameters, types, defaults and what its docstring says.

``python scripts/api_page.py`` writes the page; a test compares it with what this would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import parckpt  # noqa: E402
from parckpt.core.config import CheckpointConfig, _Flag, _Free, _Option  # noqa: E402

PAGE = ROOT / "docs" / "api.md"

# Heading to names, in the order of the page. Everything in parckpt.__all__ is on it; what is not named here goes last.
SECTIONS = {
    "Pieces of a state": ["Shard", "PerRank", "Leaf", "Spec", "Layout", "flat_shards"],
    "Triggers": ["EverySteps", "EverySeconds", "EveryEpochs", "AtSteps"],
    "What a restore tells": ["Progress"],
    "Files": ["save_checkpoint", "load_checkpoint", "load_param_into_net"],
    "Looking": ["open_checkpoint", "list_checkpoints", "latest_checkpoint", "inspect", "CheckpointInfo", "Checkpoint"],
}
HEAD = """# Every public name

Made from the signatures and docstrings by `scripts/api_page.py`; a test keeps it true. Import all of it from `parckpt`.
"""
MINDSPORE = """## CheckpointConfig

All parameters can be read as properties of the same name, except where the table says otherwise. The first 14, up to
`format`, are MindSpore's in MindSpore's order, and may be given by position; the others must be given by keyword. Only
what is marked can be assigned later, because it can in MindSpore.
"""


FIELDS_ONLY = ("Progress", "CheckpointInfo")  # read, never made by users
# Where a docstring leaves out what is the same everywhere, or is no docstring.
COMMON = {
    "comm": "The ranks that take part; None: this process alone, without communication.",
    "filesystem": "Default: the machine's.",
    "dec_key": "Key of an encrypted file. Encryption is not there yet.",
    "dec_mode": "Mode of an encrypted file.",
    "prefix": "Only those of this prefix, numbered on or not.",
    "directory": "Where the checkpoints are.",
    "save_obj": "What to save: a state, or MindSpore's list of dicts with `name` and `data`.",
}
TEXTS = {
    "SELF": "For `comm=`: this process alone, on purpose, whatever launched it.",
    "State": "What may be saved: a mapping, an object with `state_dict()`, or a callable that returns one of them.\n"
    "Mappings and lists nest; the leaves are arrays, `Shard`, sequences of `Shard`, `PerRank`, `Leaf`, `Spec` (to be\n"
    "restored), and plain values.",
}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    rest = dict.fromkeys(parckpt.__all__)
    parts = [HEAD, MINDSPORE, *config_table(), *model_checkpoint()]
    for name in ("CheckpointConfig", "ModelCheckpoint"):
        del rest[name]
    for heading, names in SECTIONS.items():
        parts.append(f"## {heading}\n")
        for name in names:
            del rest[name]
            parts += entry(name)
    errors = [name for name in rest if is_error(getattr(parckpt, name))]
    others = [name for name in rest if name not in errors]
    functions = [name for name in others if inspect.isfunction(getattr(parckpt, name))]
    parts.append("## Strategy files and transforming\n")
    for name in [*functions, "Strategy", "TensorStrategy"]:
        parts += entry(name)
    parts.append("## Protocols and constants\n")
    for name in others:
        if name not in functions and name not in ("Strategy", "TensorStrategy"):
            parts += entry(name)
    parts += ["## Errors and warnings\n", *error_table(errors)]
    return "\n".join(parts).rstrip() + "\n"


def config_table() -> Iterator[str]:
    """One table of all that CheckpointConfig takes and shows."""
    told = described(CheckpointConfig)
    settable = {name for name, kind in vars(CheckpointConfig).items() if isinstance(kind, (_Flag, _Free))}
    # What is shown under another name than it is given.
    shown = {"append_info": "as `append_dict`", "incremental": "as `map_param_inc`"}
    rows = []
    for parameter in parameters_of(CheckpointConfig):
        name = parameter.name
        read = shown.get(name, "yes, and assigned" if name in settable else "yes")
        by = "keyword" if parameter.kind is parameter.KEYWORD_ONLY else "position"
        rows.append((code(name), code(typed(parameter.annotation)), default(parameter), by, read, told[name]))
    yield table(("parameter", "type", "default", "given by", "can be read", "meaning"), rows)
    names = {parameter.name for parameter in parameters_of(CheckpointConfig)}
    members = []
    for name, member in sorted(public(CheckpointConfig)):
        if name in names or isinstance(member, _Option):
            continue
        kind = "property" if isinstance(member, property) else "method"
        if kind == "method" or isinstance(member, property):
            members.append((f"{code(name)}", kind, code(returned(member)), first_line(member)))
    members.append(("`append_dict`", "property", "`dict[str, Any] | None`", told["append_dict"]))
    members.append(("`warnings`", "property", "`tuple[str, ...]`", told["warnings"]))
    yield table(("other member", "", "type", "meaning"), sorted(members))


def model_checkpoint() -> Iterator[str]:
    """The class whose methods matter."""
    kind = parckpt.ModelCheckpoint
    yield f"## ModelCheckpoint\n\n{first_line(kind)}\n"
    yield parameter_table(kind)
    for name, member in public(kind):
        if inspect.isfunction(member) and name not in ("begin", "epoch_begin", "step_begin", "epoch_end"):
            if name.startswith("on_train"):
                continue
            yield f"### ModelCheckpoint.{name}\n\n{paragraph(member)}\n"
            if parameters_of(member):
                yield parameter_table(member)
    rows = [
        (code(name), code(returned(member)), first_line(member))
        for name, member in public(kind)
        if isinstance(member, property)
    ]
    yield table(("property", "type", "meaning"), rows)
    yield (
        "`latest_ckpt_file_name` (`str`) is the path of the last published checkpoint, `last_decision` what was\n"
        "decided at the last step and why. MindSpore's callback methods `begin`, `epoch_begin`, `step_begin`,\n"
        "`epoch_end` and their `on_train_...` forms take a run context.\n"
    )


def entry(name: str) -> Iterator[str]:
    """One class or function."""
    thing = getattr(parckpt, name)
    yield f"### {name}\n\n{TEXTS.get(name) or paragraph(thing)}\n"
    if name in FIELDS_ONLY:
        told = described(thing)
        rows = [(code(one.name), code(typed(one.annotation)), told.get(one.name, "")) for one in parameters_of(thing)]
        yield table(("field", "type", "meaning"), rows)
    elif inspect.isfunction(thing) or (
        inspect.isclass(thing) and not is_protocol(thing) and thing is not parckpt.Checkpoint
    ):
        yield parameter_table(thing)
    if is_protocol(thing) or thing is parckpt.Checkpoint or thing is parckpt.Layout:
        rows = [(code(f"{n}{signature(m)}"), first_line(m)) for n, m in public(thing) if callable(m) or is_property(m)]
        yield table(("member", "meaning"), rows)


def error_table(names: list[str]) -> Iterator[str]:
    """Errors and warnings with their bases."""
    rows = []
    for name in names:
        kind = getattr(parckpt, name)
        bases = ", ".join(code(base.__name__) for base in kind.__bases__)
        rows.append(
            (code(name), bases, code(getattr(kind, "code", "")) if hasattr(kind, "code") else "", first_line(kind))
        )
    yield table(("class", "is a", "`code`", "when"), rows)


# -- signatures --------------------------------------------------------------------------------------------------


def parameters_of(thing: Any) -> list[inspect.Parameter]:
    """Those that a caller gives."""
    found = inspect.signature(thing).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one for one in found if one.name != "self" and one.kind not in kinds]


def parameter_table(thing: Any) -> str:
    """Parameters with type, default and meaning."""
    told = {**COMMON, **CONFIG, **described(thing)}
    rows = [
        (
            code(one.name),
            code(typed(one.annotation)),
            default(one),
            "keyword" if one.kind is one.KEYWORD_ONLY else "position",
            told.get(one.name, ""),
        )
        for one in parameters_of(thing)
    ]
    return table(("parameter", "type", "default", "given by", "meaning"), rows)


def typed(annotation: Any) -> str:
    """An annotation as it is written."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return "" if annotation is inspect.Parameter.empty else text.replace("parckpt.", "")


def default(parameter: inspect.Parameter) -> str:
    """A default as it is written; empty where there is none."""
    value = parameter.default
    if value is inspect.Parameter.empty:
        return ""
    if isinstance(value, int) and parameter.name.endswith("_mode"):
        return code(oct(value))
    if value is dataclasses.MISSING or "factory" in repr(value):
        return "empty"
    text = re.sub(r"<function (\w+).*>", r"\1", repr(value))
    return code(text)


def returned(member: Any) -> str:
    """Type of a property or of what a method returns."""
    function = member.fget if isinstance(member, property) else member
    return typed(inspect.signature(function).return_annotation)


def signature(member: Any) -> str:
    """``(a, b=1)`` of a method; nothing for a property."""
    if is_property(member):
        return ""
    shown = []
    for one in parameters_of(member):
        shown.append(one.name if one.default is one.empty else f"{one.name}={one.default!r}")
    return f"({', '.join(shown)})"


def public(thing: Any) -> Iterator[tuple[str, Any]]:
    """Public members in the order they are written, inherited ones last."""
    seen = set()
    for kind in thing.__mro__:
        if not kind.__module__.startswith("parckpt"):
            continue
        for name, member in vars(kind).items():
            if not name.startswith("_") and name not in seen and (callable(member) or is_property(member)):
                seen.add(name)
                yield name, member


def is_property(member: Any) -> bool:
    """Whether it is read, not called."""
    return isinstance(member, (property, _Option))


def is_error(thing: Any) -> bool:
    """Errors and warnings have a table of their own."""
    return inspect.isclass(thing) and issubclass(thing, Exception)


def is_protocol(thing: Any) -> bool:
    """Whether a class only says what an object must have."""
    return bool(getattr(thing, "_is_protocol", False))


# -- docstrings --------------------------------------------------------------------------------------------------


def described(thing: Any) -> dict[str, str]:
    """Name to description, of the sections Parameters and Attributes; a class's and its constructor's."""
    texts = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing) and "__init__" in vars(thing):
        texts.append(inspect.getdoc(thing.__init__) or "")
    found: dict[str, str] = {}
    for text in texts:
        for heading in ("Parameters", "Attributes"):
            match = re.search(rf"^{heading}\n-+\n(.*?)(?=^\w[^\n]*\n-{{3,}}$|\Z)", text, re.MULTILINE | re.DOTALL)
            for names, body in entries(match.group(1) if match else ""):
                found.update({name: body for name in names if name not in found})
    return found


def entries(section: str) -> Iterator[tuple[list[str], str]]:
    """``name, name : type`` lines, each with the indented text below."""
    for head, body in re.findall(r"^(\w[^\n]*)\n((?:(?:[ ]{4}[^\n]*)?\n)*)", section.rstrip() + "\n", re.MULTILINE):
        names, _, kind = head.partition(" : ")
        choices = kind if kind.startswith("{") else ""
        text = " ".join(part for part in (f"`{choices}`." if choices else "", plain(body)) if part)
        yield [name.strip() for name in names.split(",")], text


def paragraph(thing: Any) -> str:
    """What a docstring says before its sections."""
    text = inspect.getdoc(thing) or ""
    return plain(re.split(r"^\w+\n-{3,}$", text, flags=re.MULTILINE)[0], keep_breaks=True)


def first_line(thing: Any) -> str:
    """The first sentence of a docstring."""
    function = thing.fget if isinstance(thing, property) else thing
    return plain((inspect.getdoc(function) or "").split("\n\n")[0])


def plain(text: str, *, keep_breaks: bool = False) -> str:
    """Markdown of the little markup that docstrings have."""
    text = text.replace("``", "`")
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]
    return ("\n\n" if keep_breaks else " ").join(parts)


def code(text: str) -> str:
    """Markdown of code."""
    return f"`{text}`" if text else ""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    if not rows:
        return ""
    escaped: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(escaped(cell) for cell in line)} |\n" for line in lines)


CONFIG = {name: text for name, text in described(CheckpointConfig).items() if name != "format"}


if __name__ == "__main__":
    main()

"""Writes the reference pages of the site, in Markdown, from the code itself.

`docs/site_hooks.py` puts them into the site whenever it is built, so there is no copy of them that
could go out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import typer

from apr_jax.cli.main import app
from apr_jax.config import Experiment
from apr_jax.tasks.registry import SHORT_NAMES, find_task

PACKAGE = Path(__file__).resolve().parents[1] / "apr_jax"


def pages() -> dict[str, str]:
    """Returns all reference pages: path in the site -> Markdown."""
    written = {
        "reference/command_line.md": command_line(),
        "reference/configuration.md": configuration(),
    }
    for package in public_packages():
        name = package.removeprefix("apr_jax.")
        written[f"reference/{name}.md"] = api(package)
    return written


# The command line.


def command_line() -> str:
    """Writes a section for each command of `apr`."""
    sections = [
        "# Command line",
        "Made from the parsers of the commands; `apr COMMAND --help` shows the same in a terminal."
        " Settings of an experiment, which `--set` overrides, are in"
        " [Configuration](configuration.md).",
    ]
    for words, command in commands(typer.main.get_command(app), ("apr",)):
        sections += _command_section(words, command)
    return "\n\n".join(sections) + "\n"


def commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields each command below `command`, which may be one, with the words that call it."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, (*words, name))


def _command_section(words: tuple[str, ...], command: Any) -> list[str]:
    """Returns the blocks of text about one command."""
    context = typer.Context(command)
    usage = list(words)
    for parameter in command.params:
        usage += parameter.get_usage_pieces(context)
        if parameter.required and parameter.param_type_name == "option":
            usage.append(parameter.get_help_record(context)[0])
    if not all(parameter.required for parameter in command.params):
        usage.append("[OPTIONS]")

    help_text = inspect.cleandoc(command.help)
    blocks = [f"## {' '.join(words)}", escaped(help_text), _code_block(" ".join(usage))]
    if command.params:
        rows = [_parameter_row(parameter, context) for parameter in command.params]
        blocks.append(markdown_table(["", "meaning", "value"], rows))
    if command.epilog:
        title, _, example = command.epilog.partition(": ")
        blocks += [f"{title}:", _code_block(example)]
    return blocks


def _parameter_row(parameter: Any, context: Any) -> list[str]:
    """Returns how a flag or an argument is written, its meaning, and its default and bounds."""
    written, text = parameter.get_help_record(context)
    # The help ends in two spaces and, in brackets, what holds of the value.
    meaning, _, value = text.removesuffix("]").partition("  [")
    return [code(written), escaped(meaning), code(value)]


# The configuration.


def configuration() -> str:
    """Writes a table of fields for each group of settings of an experiment, and for each task."""
    sections = [
        "# Configuration",
        "Made from the dataclasses of `apr_jax/config.py` and of the packages. An experiment file"
        " returns an `Experiment`; `--set train.sft.steps=200` overrides a field by its name here.",
        "```\napr train sft --config nano --workdir runs/mine --set train.sft.steps=200\n```",
    ]
    sections += _config_sections(Experiment, "")
    sections += [
        "## `task`",
        'Settings of the task stand behind its name: `TaskConfig("countdown", numbers=4)`.'
        " Each task has its own.",
    ]
    for kind in SHORT_NAMES:
        task_class = find_task(kind)[1]
        _, text, *settings = _config_sections(task_class.Config, "task.")
        sections += [f"## `task` of kind `{kind}`", text, *settings]
    return "\n\n".join(sections) + "\n"


def _config_sections(config: type, prefix: str) -> Iterator[str]:
    """Yields the section of a dataclass, and those of the dataclasses that its fields hold.

    Args:
      config: the dataclass.
      prefix: what stands before the names of its fields, with a dot at its end.
    """
    hints = typing.get_type_hints(config)
    rows = []
    groups = []
    for field in dataclasses.fields(config):
        if field.name == "task":
            continue  # Its settings depend on the task.
        if dataclasses.is_dataclass(hints[field.name]):
            groups.append((hints[field.name], f"{prefix}{field.name}."))
            continue
        row = [code(prefix + field.name), code(type_name(hints[field.name])), _default(field)]
        rows.append([*row, escaped(attribute_meanings(config)[field.name])])

    yield f"## {code(prefix.rstrip('.')) or 'The experiment'}"
    yield escaped(summary(config))
    if rows:
        yield markdown_table(["field", "type", "default", "meaning"], rows)
    for group, longer_prefix in groups:
        yield from _config_sections(group, longer_prefix)


def summary(thing: Any) -> str:
    """Returns the first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def attribute_meanings(config: type) -> dict[str, str]:
    """Returns what the docstring of a class says about each of its fields.

    Raises:
      ValueError: a field is missing there; the message names class and field.
    """
    docstring = griffe.Docstring(inspect.getdoc(config) or "")
    meanings = {
        attribute.name: " ".join(attribute.description.split())
        for section in docstring.parse("google", warnings=False)
        if section.kind is griffe.DocstringSectionKind.attributes
        for attribute in section.value
    }
    for field in dataclasses.fields(config):
        if field.name not in meanings:
            raise ValueError(f"{config.__name__}.{field.name}: its class's docstring has no line")
    return meanings


def type_name(hint: Any) -> str:
    """Writes a type as a reader of a config would: the values of a Literal, `int or str`."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if hint is type(None):
        return "None"
    return hint.__name__ if inspect.isclass(hint) and not arguments else str(hint)


def _default(field: dataclasses.Field[Any]) -> str:
    """Returns the default of a field as a table shows it."""
    if field.default is not dataclasses.MISSING:
        return code(repr(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return code(repr(field.default_factory()))
    return "must be given"


# The Python interface.


def public_packages() -> list[str]:
    """Returns the packages that declare their public names, the library itself first."""
    return sorted(
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
        if re.search(r"^__all__ = ", path.read_text(), re.MULTILINE)
    )


def api(package: str) -> str:
    """Writes the page of a package: its docstring, then each public name with its docstring.

    What another package's page documents is only named here, with a link to it.
    """
    module = importlib.import_module(package)
    blocks = [
        f"# {package}",
        f"::: {package}\n    options: {{members: false, show_root_heading: false}}",
    ]
    linked = []
    constants = []
    documented = []
    for name in module.__all__:
        thing = getattr(module, name)
        home = _page_of(package, name)
        if isinstance(thing, bool | int | str | tuple):
            constants.append([code(name), code(repr(thing))])
        elif home == package:
            documented.append(f"::: {package}.{name}")
        else:
            linked.append([f"[`{name}`][{home}.{name}]", f"`{home}`"])
    if linked:
        blocks += ["## Names of other packages", markdown_table(["name", "see"], linked)]
    if constants:
        blocks += ["## Constants", markdown_table(["name", "value"], constants)]
    if documented:
        blocks += ["## Classes and functions", *documented]
    return "\n\n".join(blocks) + "\n"


def _page_of(package: str, name: str) -> str:
    """Returns the package on whose page a public name of `package` is documented.

    Of all packages that export the same object under this name, it is the longest path, which is
    nearest to the object's module.
    """
    thing = getattr(importlib.import_module(package), name)
    exporters = []
    for other in public_packages():
        module = importlib.import_module(other)
        if name in module.__all__ and getattr(module, name) is thing:
            exporters.append(other)
    return max(exporters, key=len)


# Markdown.


def escaped(text: str) -> str:
    """Returns text of a docstring in which nothing is taken for a tag of HTML."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", r"\*")
        for part in parts
    )


def code(text: str) -> str:
    """Returns `text` as code, or nothing if it is empty."""
    return f"`{text}`" if text else ""


def _code_block(text: str) -> str:
    return f"```\n{text}\n```"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table. A vertical bar in a cell stays one."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)

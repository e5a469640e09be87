"""Commands that say what there is: options, infos and tasks, as the code has them."""

from __future__ import annotations

import json
import sys
from typing import Any


def options() -> None:
    """Print every --option with its default, and every key of info: in a pipe as in docs/options.md."""
    if not sys.stdout.isatty():
        print(options_page(), end="")
        return
    from unlearn_gym.cli.terminal import show

    for title, (header, rows) in _tables().items():
        plain = [[cell.replace("`", "") for cell in row] for row in rows]
        if len(header) > 3:  # more columns than a terminal has room for
            header = [*header[:2], "meaning"]
            plain = [[name, default, f"{meaning} ({values})"] for name, default, values, meaning in plain]
        show([name.replace("`", "") for name in header], plain, title, prose=len(header) - 1)


def tasks() -> None:
    """List the tasks: model, data, what is forgotten, and whether weights and constants are there."""
    from unlearn_gym.cli.terminal import show
    from unlearn_gym.tasks import family_names, get_task
    from unlearn_gym.tasks.registry import SHELL_TASKS

    rows = []
    for task in map(get_task, sorted(SHELL_TASKS)):
        files = {"weights": task.pretrained_path, "constants": task.constants_path, "oracle": task.oracle_path}
        there = [name for name, path in files.items() if path.is_file()]
        rows.append([task.name, task.description, "\n".join(there) or "none"])
    show(["task", "model, data, and what is forgotten", "present"], rows, prose=1)
    families = ", ".join(family_names())
    print(f"{families}: a colon and numbers name other classes to forget, as in 'gaussians-2d:1,3'.")


def options_page() -> str:
    """docs/options.md."""
    from unlearn_gym.report.tables import markdown_table

    return PAGE.format(**{name: markdown_table(*table) for name, table in _tables().items()})


def _tables() -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and rows of each table, in Markdown."""
    from unlearn_gym.envs.infos import INFO_KEYS, VECTOR_KEYS
    from unlearn_gym.settings import PRESETS, RunSettings

    properties = RunSettings.model_json_schema()["properties"]
    option_rows = [
        [f"`{name}`", f"`{_text(schema['default'])}`", _values(schema), schema["description"]]
        for name, schema in properties.items()
    ]
    keys = [[f"`{'.'.join(key.path)}`", key.where or "reset, step", key.meaning] for key in (*INFO_KEYS, *VECTOR_KEYS)]
    presets = [[f"`{name}`", _assignments(values)] for name, values in PRESETS.items()]
    return {
        "options": (["option", "default", "values", "meaning"], option_rows),
        "tasks": (["task", "its own defaults"], _own_defaults()),
        "presets": (["preset", "stands for"], presets),
        "infos": (["`info…`", "returned by", "meaning"], keys),
    }


def _own_defaults() -> list[list[str]]:
    """The settings of each task that are not the options' own defaults."""
    from unlearn_gym.settings import RunSettings
    from unlearn_gym.tasks import get_task
    from unlearn_gym.tasks.registry import SHELL_TASKS

    usual, rows = RunSettings().model_dump(mode="json"), []
    for name in sorted(SHELL_TASKS):
        own = get_task(name).settings.model_dump(mode="json")
        changed = {option: value for option, value in own.items() if value != usual[option]}
        rows.append([f"`{name}`", _assignments(changed) or "–"])
    return rows


def _assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"`{option}={_text(value)}`" for option, value in values.items())


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _values(schema: dict[str, Any]) -> str:
    """What a JSON schema admits, in words."""
    if "anyOf" in schema:
        return ", or ".join(_values(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "null":
        return "`null`"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in BOUNDS.items() if name in schema]
    return " ".join([KINDS[schema["type"]], ", ".join(bounds)]).strip()


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {"number": "number", "integer": "whole number", "boolean": "`true`, `false`", "string": "text", "array": "list"}
PAGE = """# Options and infos

Made by `unlearn-gym options`.

## Options of a run

On the command line `--option NAME=VALUE`, repeated, with values as below; in Python arguments of `gym.make` and
`gym.make_vec`, where `null` is `None`. They are the fields of [RunSettings](environment.md#settings), which explains
some in more detail. A task's own defaults, below, override these.

{options}

## Defaults of tasks

{tasks}

## Presets

`preset=NAME` stands for several options at once, to make updates as public code does ([objectives](objectives.md)).
Options given alongside a preset override it.

{presets}

## Keys of info

Of `reset` and `step` of the [environment](environment.md). The infos of a vector environment are gymnasium's: arrays of
one value for each environment, and under each key with `_` before it the mask of those that have one.

{infos}
"""

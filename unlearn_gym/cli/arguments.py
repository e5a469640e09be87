"""What the commands share: arguments, bars and the line that goes into manifests."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unlearn_gym.comparison.engines import Engine

if TYPE_CHECKING:
    from unlearn_gym.comparison.comparison import CellProgress

Threads = Annotated[int | None, tyro.conf.arg(help="torch threads; default: torch's own choice")]
EngineName = Annotated[
    Engine,
    tyro.conf.arg(help="ray: on the cluster of $RAY_ADDRESS, else a local one (needs the extra 'distributed')"),
]
OptionTexts = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help="a run setting, e.g. horizon=100; repeatable")
]
Trust = Annotated[
    bool, tyro.conf.arg(help="open pickles in agents' files, which can run any code: for files of known origin alone")
]
DataRoot = Annotated[
    Path | None,
    tyro.conf.arg(help="folder with torchvision's data; default: $UNLEARN_GYM_DATA_ROOT, else the shipped part"),
]


MOST_THREADS = 1024
"""More than any machine has use for, and no more than systems start."""


def invocation() -> str:
    """This invocation, as it goes into a manifest."""
    return shlex.join(["unlearn-gym", *sys.argv[1:]])


def training_bar(description: str) -> Callable[[int, int, float], None]:
    """A bar for trainings: call it with (done, total, loss)."""
    from tqdm import tqdm

    bar: Any = None

    def update(done: int, total: int, loss: float) -> None:
        nonlocal bar
        bar = bar or tqdm(desc=description, total=total, unit="update")
        bar.n = done
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.refresh()

    return update


def set_threads(threads: int | None) -> None:
    """Give torch so many threads; None leaves its choice."""
    from unlearn_gym.errors import SettingsError, shown

    if threads is not None:
        import torch

        if not 1 <= threads <= MOST_THREADS:
            raise SettingsError(f"threads={shown(threads)} must lie in 1..{MOST_THREADS}")

        torch.set_num_threads(threads)


def required_root(data_root: Path | None) -> Path:
    """The data root, for commands that cannot do with the shipped part; raises ``DataError`` without one."""
    from unlearn_gym.errors import DataError
    from unlearn_gym.tasks import DATA_ROOT_VARIABLE, resolve_data_root

    root = resolve_data_root(data_root)
    if root is None:
        raise DataError(f"this command needs the full data: give --data-root or set {DATA_ROOT_VARIABLE}")
    return root


WORDS = {"True": True, "False": False, "None": None}
"""What options may be in Python's words."""


def parse_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """``name=value`` each, the value as JSON or one of :data:`WORDS`, else as text; raises ``SettingsError``."""
    from unlearn_gym.errors import SettingsError, shown
    from unlearn_gym.files import FormatError, parse_json
    from unlearn_gym.settings import RunSettings

    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise SettingsError(f"option {shown(text)} must be name=value, as in horizon=100, each name once")
        try:
            options[name] = WORDS[value] if value in WORDS else parse_json(value)
        except FormatError:
            options[name] = value
        if name not in RunSettings.model_fields:
            RunSettings().override(**{name: options[name]})  # raises with the nearest name
    return options


SHOWN = ("forget_rate", "forget_loss", "retain_loss", "feature_kid")


def cell_bar(title: str = "comparison") -> CellProgress:
    """A bar over the cells of a comparison, with a line for each finished one."""
    from tqdm import tqdm

    bar: Any = None

    def update(cell: dict[str, Any] | None, done: int, total: int) -> None:
        nonlocal bar
        bar = bar or tqdm(desc=title, total=total, unit="run", smoothing=0)
        if cell is not None:
            shown = {k: cell["metrics"][k] for k in SHOWN if k in cell["metrics"]}
            figures = "  ".join(f"{k} {v:.4g}" for k, v in shown.items()) or "diverged"
            bar.write(f"{cell['policy']:28s} seed {cell['seed']}  {figures}")
            sys.stdout.flush()
        bar.n = done
        bar.refresh()

    return update

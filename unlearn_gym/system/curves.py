"""TensorBoard's curves on a disk that takes no more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unlearn_gym.errors import FileError


@contextlib.contextmanager
def curve_errors(folder: Path) -> Iterator[None]:
    """Raise :class:`FileError` where TensorBoard cannot write its curves to ``folder`` within the block.

    It writes in a thread, which would print a traceback before the block gets the same error.
    """
    before, met = threading.excepthook, list[BaseException | None]()

    def hook(failure: Any) -> None:
        if type(failure.thread).__module__.startswith("tensorboard.") and issubclass(failure.exc_type, OSError):
            met.append(failure.exc_value)
        else:
            before(failure)

    threading.excepthook = hook
    try:
        yield
    except OSError as error:
        if error not in met:
            raise
        raise FileError(
            f"cannot write curves to {folder} ({error.strerror or error}); make room or choose another place: "
            "checkpoints stay as they were"
        ) from None
    finally:
        threading.excepthook = before

"""Finished cells as files, found again by all that they depend on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlearn_gym.comparison.records import fault, with_checksum
from unlearn_gym.files import read_json, write_bytes, write_json

Cell = dict[str, Any]
LONGEST_SLUG = 80


class CellStore:
    """Cells in ``folder``, each a file named after its policy, key and seed, written when the cell is done.

    ``known`` are sound cells from elsewhere, such as those of a ``results.json``. Different settings have different
    keys, so comparisons can share a folder and what one of them has measured the others need not. ``faults`` says of
    each file that was asked for and not believed what is wrong with it.
    """

    def __init__(self, folder: Path, known: Iterable[Cell] = ()) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self._known = {(c["policy"], c["seed"], c["key"]): c for c in known if c.get("key") is not None}

    def path(self, policy: str, seed: int, key: str) -> Path:
        """Where the cell is or will be."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", policy).strip("-")[:LONGEST_SLUG]
        digest = hashlib.sha256(f"{policy} {key}".encode()).hexdigest()[:8]
        return self.folder / f"{slug}-{digest}-seed{seed}.json"

    def model_path(self, policy: str, seed: int, key: str) -> Path:
        """Where the cell's model is or will be: in ``models``, beside the cells' folder."""
        return self.folder.with_name("models") / f"{self.path(policy, seed, key).stem}.safetensors"

    def read(self, policy: str, seed: int, key: str) -> Cell | None:
        """The cell, if it is there, fits its schema and its checksum, and is the one that was asked for."""
        if (policy, seed, key) in self._known:
            return self._known[policy, seed, key]
        path = self.path(policy, seed, key)
        try:
            cell: Cell = read_json(path)
            wrong = fault(cell)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            wrong = f"it cannot be read: {error}"
        if wrong is None and (cell["policy"], cell["seed"], cell["key"]) != (policy, seed, key):
            wrong = f"it is of {cell['policy']} at seed {cell['seed']}, or was measured otherwise"
        if wrong is not None:
            self.faults.append(f"{path} ({wrong})")
            return None
        return cell

    def write_model(self, cell: Cell, content: bytes) -> None:
        """Keep the safetensors file of a finished cell's model."""
        write_bytes(self.model_path(cell["policy"], cell["seed"], cell["key"]), content)

    def write(self, cell: Cell) -> None:
        """Keep a finished cell, with its checksum."""
        write_json(self.path(cell["policy"], cell["seed"], cell["key"]), with_checksum(cell), indent=None)

"""Files that a reader never sees half-written, and the package's one reader of JSON and one of YAML."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Hashable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from unlearn_gym.errors import FileError, UnlearnGymError, describe_validation_error, error_line, shown

Schema = TypeVar("Schema", bound=BaseModel)
MAX_NAME_BYTES = 100
"""Bytes of a file's name that its temporary name keeps: file systems allow 255 in all."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BufferedWriter]:
    """A new binary file, seekable, that takes the place of ``path`` when the block ends without an exception.

    The temporary file has a random name in the same folder and is opened exclusively: concurrent writers do not
    collide, and no symbolic link is followed. A link at ``path`` itself is replaced by the file.
    After an exception ``path`` is unchanged and the temporary file is gone; folders that were made stay. Raises
    :class:`FileError` for what the operating system refuses, such as a full disk, and where ``path`` is a folder or a
    device.
    """
    try:
        if b"\0" in os.fsencode(path):
            raise FileError(f"cannot write {shown(str(path))}: a name holds no null character; name another one")
        if path.exists() and not path.is_file():
            raise FileError(f"cannot write {path}: it is no regular file; name another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _new_file(path)
        temporary = Path(file.name)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"cannot write {path} ({error.strerror or error}); mend that or choose another path: what was "
            "there before is unchanged"
        ) from None


def _new_file(path: Path) -> BufferedWriter:
    start = os.fsencode(path.name)[:MAX_NAME_BYTES].decode(errors="ignore")
    while True:
        temporary = path.with_name(f".{start}.{secrets.token_hex(8)}.partial")
        with contextlib.suppress(FileExistsError):
            return temporary.open("xb")


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` by way of :func:`replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` as UTF-8 by way of :func:`replacing`."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write ``value`` as JSON by way of :func:`replacing`; floats that JSON does not know raise ValueError."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def copy_file(source: Path, path: Path) -> None:
    """Copy the content of ``source`` by way of :func:`replacing`."""
    write_bytes(path, source.read_bytes())


def read_json_as(path: Path, schema: type[Schema], error: type[UnlearnGymError], remedy: str) -> Schema:
    """The content of a JSON file as ``schema`` has it.

    Raises ``error``, in one line that ends with ``remedy``, for a file that cannot be read, is not JSON or does not fit
    the schema; a file that is not there raises FileNotFoundError.
    """
    try:
        content = _read_bytes(path, LARGEST_JSON)
        parse_json(content)  # finds a key that is there twice, and too many levels, where pydantic finds neither
        return schema.model_validate_json(content)
    except FileNotFoundError:
        raise
    except ValidationError as reason:
        raise error(f"{path} is damaged ({describe_validation_error(reason)}); {remedy}") from None
    except FormatError as reason:
        raise error(f"{path} is damaged ({reason}); {remedy}") from None
    except OSError as reason:
        raise error(f"cannot read {path} ({reason.strerror or reason}); {remedy}") from None


def checksum(value: Any) -> str:
    """SHA-256 of ``value`` as JSON, the same before it was written and after it was read, whatever order its keys have.

    Raises ValueError and TypeError for what JSON does not know.
    """
    plain = json.loads(json.dumps(value, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FormatError(UnlearnGymError, ValueError):
    """Text that is not the JSON or YAML that it should be."""


LARGEST_JSON = 2**30
"""Bytes; the largest files, results.json of thousands of cells, have some ten million."""
LARGEST_YAML = 2**20
"""Bytes; YAML files here are written by hand and have a few thousand."""
MOST_NODES = 100_000
"""Values that a YAML file may hold once its aliases are written out."""
DEEPEST = 64
"""Levels that a YAML file may nest. The limit for JSON is Python's own and differs between its versions."""


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises :class:`FormatError`, which is a ``ValueError``, or ``OSError``."""
    return parse_json(_read_bytes(path, LARGEST_JSON))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in which no key of an object is there twice, and no number is NaN or infinite.

    Raises :class:`FormatError`.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
    except FormatError:
        raise
    except RecursionError:
        raise FormatError("it is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"it is not JSON: {error_line(error)}") from None


def read_yaml(path: Path, loader: type[CheckedLoader] | None = None) -> Any:
    """The value in a YAML file, made of plain values alone; ``loader`` may know more tags.

    Raises ``OSError``, or :class:`FormatError` for what is no YAML, for a key that is twice in a mapping, and for a
    file above :data:`LARGEST_YAML`, :data:`MOST_NODES` or :data:`DEEPEST`. Unlike PyYAML, it reads 1e-4 as a number;
    all other numbers follow YAML 1.1.
    """
    try:
        return yaml.load(_read_bytes(path, LARGEST_YAML).decode("utf-8"), loader or CheckedLoader)
    except FormatError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"it is not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML's constructors raise these for dates, numbers and tags that there are not, as in 2025-13-01
        raise FormatError(f"it holds a value that YAML does not know: {error_line(error)}") from None


def _read_bytes(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FormatError(
            f"it has more than {limit:,} bytes, the largest size that is read; check that it is the right file"
        )
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"the key {shown(twice)} is there twice; leave one of them")
    return found


def _refuse_constant(name: str) -> Any:
    raise FormatError(f"{name} is not valid JSON; give a finite number, or null")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise FormatError(f"the number {shown(text)} is too large; give a finite number below 1.8e308, or null")
    return value


class CheckedLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and counts what aliases stand for before anything is built."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._count, self._depth = 0, 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, counted; of an alias all that it stands for."""
        alias, before = self.check_event(yaml.AliasEvent), self._count
        self._depth += 1
        if self._depth > DEEPEST:
            raise FormatError(f"it nests more than {DEEPEST} levels deep; no file here needs so many")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and alias and id(node) not in self._sizes:
            raise FormatError(f"line {node.start_mark.line + 1} holds an alias of a value within itself; write it out")
        self._count += self._sizes[id(node)] if alias else 1
        if self._count > MOST_NODES:
            raise FormatError(
                f"it holds more than {MOST_NODES:,} values, aliases written out; no file here needs so many"
            )
        if not alias:
            self._sizes[id(node)] = self._count - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key)
            if name in seen:
                raise FormatError(f"line {key.start_mark.line + 1}: the key {shown(name)} is there twice; leave one")
            seen.add(name)
        return node


CheckedLoader.add_implicit_resolver(  # YAML 1.1, PyYAML's, takes 1e-4 for a text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)

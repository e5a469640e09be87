"""Files: never torn, never through a link, never by two commands at once; what is read is checked; quiet interrupts."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from unlearn_gym import files
from unlearn_gym.errors import FileError, LockError, PolicyError, WeightsError
from unlearn_gym.files import checksum, replacing, write_json, write_text
from unlearn_gym.models.weights import read_checkpoint, save_checkpoint, save_weights
from unlearn_gym.policies.manifest import read_manifest
from unlearn_gym.report.pictures import save
from unlearn_gym.system import locks
from unlearn_gym.system.interrupts import command_name
from unlearn_gym.system.locks import LOCK, folder_lock

from .conftest import label

ROOT = Path(__file__).resolve().parent.parent
WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "weights": lambda path: save_weights(path, {"w": torch.zeros(3)}),
    "picture": lambda path: save(Figure(), path),
}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_reader_sees_one_of_the_writers_whole(tmp_path):
    path, stop, wrong = tmp_path / "results.json", threading.Event(), []
    write_json(path, [0] * 20_000)

    def keep_writing(number):
        try:
            while not stop.is_set():
                write_json(path, [number] * 20_000)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=keep_writing, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            assert len(set(json.loads(path.read_text()))) == 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert names(tmp_path) == ["results.json"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_links_in_the_way_are_not_followed(write, tmp_path, monkeypatch):
    victim, path, tokens = tmp_path / "victim", tmp_path / "file", itertools.count()
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: str(next(tokens)))
    for number in range(3):
        (tmp_path / f".file.{number}.partial").symlink_to(victim)
    path.with_suffix(".partial").symlink_to(victim)  # the name that older versions took
    path.symlink_to(victim)
    write(path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert path.stat().st_size > 0
    assert next(tokens) == 4  # the names with a link were tried, and passed over


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("refused", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_the_system_refuses_is_one_line_and_leaves_what_was_there(write, refused, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("before")

    def full(descriptor):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=re.escape(f"cannot write {path} ({os.strerror(refused)})")) as caught:
        write(path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["file"]


def test_an_exception_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert names(tmp_path) == ["file"]


def test_only_regular_files_are_replaced_and_only_in_folders(tmp_path):
    (tmp_path / "file").touch()
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    for path in (tmp_path, device, tmp_path / "file" / "below"):
        with pytest.raises(FileError, match=re.escape(str(path))):
            write_text(path, "")
    assert device.is_symlink()


@pytest.mark.parametrize("letter", ["n", "ü", "忘"])
def test_a_name_as_long_as_the_file_system_allows_can_be_written(letter, tmp_path):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    write_text(path, "new")
    assert path.read_text() == "new"


def test_files_have_the_permissions_of_the_umask(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


PLAIN_WRITING = re.compile(
    r"\.write_text\(|\.write_bytes\(|save_file\(|shutil\.copy|\bopen\([^)]*[\"'][wax]b?[\"']|os\.replace|"
    r"savefig\((path|out)|\.save\((path|out|folder|checkpoint)\b|savez\w*\((path|out|folder|archive|checkpoint)\b"
)


@pytest.mark.parametrize("folder", ["unlearn_gym", "agents"])
def test_nothing_is_written_but_by_the_one_writer(folder):
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "unlearn_gym" / "files.py"
        for line in path.read_text().splitlines()
        if PLAIN_WRITING.search(line)
    ]
    harmless = (
        r"(training|distillation)\.save\(checkpoint\)|(data|env)\.save\("  # by way of the one writer
        r"|\"safetensors\.torch\.save_file"  # a message
        r"|open\(descriptor"  # a new log in the temporary folder
    )
    assert [line for line in lines if not re.search(harmless, line)] == []


def test_a_checksum_is_of_values_and_of_no_way_to_write_them():
    value = {"a": (1, 2.5), "b": {"2": None, "10": [True]}}
    again = json.loads(json.dumps(dict(reversed(value.items())), indent=1))
    assert checksum(value) == checksum(again)
    for other in ({**value, "a": [1, 2.25]}, {**value, "c": 0}, {"a": [1, 2.5]}):
        assert checksum(other) != checksum(value)


HOLDER = """
import sys, time
from pathlib import Path
from unlearn_gym.system.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("taken", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_another_process_names_it_and_ends_with_it(tmp_path):
    held = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(held, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(LockError, match=rf"process {holder.pid} on \S+ .* since \d{{4}}-") as caught:
            with folder_lock(tmp_path):
                pytest.fail("two writers")
        assert "\n" not in str(caught.value)
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()  # what is left of it is in nobody's way
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_thread_may_lock_twice_and_another_one_not(locked):
    with pytest.raises(LockError, match=f"process {os.getpid()}"):
        with folder_lock(locked):
            pytest.fail("two writers")
    assert names(locked) == [LOCK]


def test_a_lock_inside_a_lock_of_the_same_folder(tmp_path):
    folder = tmp_path / "new"
    with folder_lock(folder):
        with folder_lock(tmp_path / "." / "new"):
            pass
        assert names(folder) == [LOCK]
    assert not folder.exists()  # it stayed empty


def test_a_lock_follows_no_link_and_names_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "victim")
    for folder in (tmp_path / "out", tmp_path / "victim" / "below"):
        with pytest.raises(FileError, match=re.escape(str(folder))):
            with folder_lock(folder):
                pytest.fail("no lock")
    assert (tmp_path / "victim").read_text() == "precious"


def test_many_threads_hold_a_lock_one_at_a_time(tmp_path):
    inside, most, won = [], [], []

    def try_often():
        for _ in range(100):
            try:
                with folder_lock(tmp_path / "out"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    won.append(1)
            except LockError:
                pass

    threads = [threading.Thread(target=try_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert won


def test_a_folder_that_vanishes_while_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, vanished = os.open, []

    def open_(path, *arguments):
        if not vanished:
            vanished.append(path)
            Path(path).parent.rmdir()
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", open_)
    with folder_lock(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).exists()
    assert vanished


def test_a_lock_whose_file_its_last_holder_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    real, removed = locks._lock, []

    def lock(descriptor, folder):
        real(descriptor, folder)
        if not removed:
            removed.append(descriptor)
            (folder / LOCK).unlink()

    monkeypatch.setattr(locks, "_lock", lock)
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK).exists()  # who comes next sees it
    assert removed


def test_no_changed_bit_of_a_checkpoint_is_believed(tmp_path):
    path = tmp_path / "c.safetensors"
    tensors = {"vector": torch.arange(5.0), "done": torch.tensor(3), "rng": torch.zeros(4, dtype=torch.uint8)}
    save_checkpoint(path, tensors)
    assert all(torch.equal(v, tensors[k]) for k, v in read_checkpoint(path).items())
    whole = path.read_bytes()
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(WeightsError):
            found = read_checkpoint(path)  # where the bit was in the header's blanks
            assert all(torch.equal(v, tensors[k]) for k, v in found.items())
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match="do not match its checksum"):
        read_checkpoint(path)
    save_weights(path, tensors)
    with pytest.raises(WeightsError, match="older version"):
        read_checkpoint(path)


def test_a_manifest_that_is_not_there_knows_nothing_and_a_damaged_one_is_named(tmp_path):
    assert read_manifest(tmp_path / "agent.zip").task is None
    for content in (
        b"[]",
        b"\xff",
        b'{"tasks": "mnist"}',
        b'{"options": []}',
        b'{"validation": [{}]}',
        b'{"seed": 1.5}',
    ):
        (tmp_path / "agent.json").write_bytes(content)
        with pytest.raises(PolicyError, match=r"agent\.json is damaged") as caught:
            read_manifest(tmp_path / "agent.zip")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [*(["-m", f"agents.{name}"] for name in ("train", "enjoy", "tune", "transfer")), ["-m", "unlearn_gym.cli"]],
    ids=lambda command: command[-1],
)
def test_ctrl_c_while_a_command_imports_is_one_line(command, tmp_path):
    stub = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    (tmp_path / "numpy.py").write_text(stub)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 130
    (line,) = done.stderr.splitlines()
    assert "interrupted" in line


def test_only_the_packages_own_commands_are_quiet():
    assert command_name("-m", ["python", "-m", "agents.tune", "--trials", "3"]) == "agents.tune"
    assert command_name("-m", ["python", "-W", "error", "-m", "unlearn_gym.cli"]) == "unlearn-gym"
    assert command_name("/bin/unlearn-gym", ["python", "/bin/unlearn-gym", "compare"]) == "unlearn-gym"
    assert command_name("-m", ["python", "-m", "pytest"]) is None
    assert command_name("script.py", ["python", "script.py", "-m", "agents.tune"]) is None
    assert command_name("/bin/unlearn-gym", ["python", "-c", "from multiprocessing ..."]) is None  # a worker of ours
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("place", ["dangling", "dangling/sub", "loop", "x" * 300, "file/sub"])
def test_a_folder_that_cannot_be_is_one_line_and_no_endless_loop(tmp_path, place):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").write_text("")
    with pytest.raises(FileError, match="folder"), folder_lock(tmp_path / place):
        pass


def test_all_folders_that_a_lock_made_and_that_stayed_empty_are_removed(tmp_path):
    with folder_lock(tmp_path / "one" / "two" / "three"):
        assert (tmp_path / "one" / "two" / "three" / LOCK).exists()
    assert names(tmp_path) == []


def test_a_name_with_a_null_character_is_one_line(tmp_path):
    with pytest.raises(FileError, match="null character"):
        write_text(tmp_path / "a\0b", "x")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"], ids=["null", "surrogate"])
def test_a_folder_whose_name_no_file_system_takes_is_one_line(name, tmp_path):
    for folder in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(FileError, match=r"cannot make the folder .* choose another --out") as caught:
            with folder_lock(folder):
                pytest.fail("no lock")
        assert "\n" not in str(caught.value)
        str(caught.value).encode()  # it can be printed
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"secret=1\n", b'{"pid": 1}', b"\xff", b"{}" * 5000], ids=label)
def test_a_file_of_the_users_own_in_the_locks_place_is_left_as_it_is(content, tmp_path):
    path = tmp_path / LOCK
    path.write_bytes(content)
    with pytest.raises(FileError, match=re.escape(f"{path} is in the way")) as caught, folder_lock(tmp_path):
        pytest.fail("no lock")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_pipe_in_the_locks_place_is_left_as_it_is(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(FileError, match="in the way"), folder_lock(tmp_path):
        pytest.fail("no lock")
    assert names(tmp_path) == [LOCK]


LONGER = locks.Holder(pid=1, host="h" * 300, since="long ago").model_dump_json()


@pytest.mark.parametrize("left", ["", LONGER], ids=["nothing", "more"])
def test_what_a_killed_process_left_is_overwritten_as_a_whole(left, tmp_path):
    (tmp_path / LOCK).write_text(left)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def in_another_thread(function):
    """What the function returns or raises in a thread that has locked nothing."""
    found = []

    def call():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def try_to_lock(folder):
    with folder_lock(folder):
        return "taken"


def test_a_lock_that_was_removed_under_its_holder_does_not_end_the_next_ones(tmp_path):
    first, second = folder_lock(tmp_path), folder_lock(tmp_path)
    first.__enter__()
    (tmp_path / LOCK).unlink()
    contextvars.Context().run(second.__enter__)
    first.__exit__(None, None, None)
    assert isinstance(in_another_thread(lambda: try_to_lock(tmp_path)), LockError)  # the second one's stands
    second.__exit__(None, None, None)
    assert try_to_lock(tmp_path) == "taken"


def in_a_forked_process(function):
    """What the function prints, in a forked process that then leaves the blocks it is in."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, function().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_is_not_the_holder_and_does_not_end_the_lock(tmp_path):
    lock = folder_lock(tmp_path / "new")

    def child():
        try:
            return try_to_lock(tmp_path / "new")
        except LockError as error:
            return str(error)
        finally:
            lock.__exit__(None, None, None)

    with lock:
        assert f"process {os.getpid()}" in in_a_forked_process(child)
        assert names(tmp_path / "new") == [LOCK]
        assert isinstance(in_another_thread(lambda: try_to_lock(tmp_path / "new")), LockError)
    assert names(tmp_path) == []


def test_a_lock_ends_in_the_folder_that_it_was_taken_in(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "out").mkdir(parents=True)
    (tmp_path / "elsewhere" / "out" / LOCK).write_text("of another one")
    monkeypatch.chdir(tmp_path)
    with folder_lock(Path("out")):
        monkeypatch.chdir("elsewhere")
        with folder_lock(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "out" / LOCK).read_text() == "of another one"


def test_a_message_shows_the_folder_as_the_user_gave_it(locked, monkeypatch):
    monkeypatch.chdir(locked.parent)
    with pytest.raises(LockError, match=rf"^{locked.name} is in use"), folder_lock(Path(locked.name)):
        pytest.fail("two writers")


@pytest.mark.parametrize("outcome", [None, KeyError("the block's own")], ids=["success", "error"])
def test_a_folder_that_a_file_replaces_does_not_hide_the_outcome_of_the_block(outcome, tmp_path):
    folder, before = tmp_path / "out", len(os.listdir("/proc/self/fd"))
    with contextlib.nullcontext() if outcome is None else pytest.raises(KeyError, match="the block's own"):
        with folder_lock(folder):
            folder.rename(tmp_path / "moved")
            folder.write_text("")
            if outcome is not None:
                raise outcome
    assert len(os.listdir("/proc/self/fd")) == before
    assert names(tmp_path) == ["moved", "out"]
    assert try_to_lock(tmp_path / "moved") == "taken"


def test_a_lock_may_end_in_another_context_and_is_then_nobodys(tmp_path):
    lock, context = folder_lock(tmp_path), contextvars.copy_context()
    context.run(lock.__enter__)
    lock.__exit__(None, None, None)
    assert names(tmp_path) == []
    with folder_lock(tmp_path):
        pass

    def again():  # the context in which it was taken does not go on holding it
        with folder_lock(tmp_path):
            return names(tmp_path)

    assert context.run(again) == [LOCK]


def test_a_task_that_outlives_the_block_does_not_hold_the_lock(tmp_path):
    async def main():
        async def late(ended):
            await ended.wait()
            with folder_lock(tmp_path):
                return names(tmp_path)

        ended = asyncio.Event()
        with folder_lock(tmp_path):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    assert asyncio.run(main()) == [LOCK]


def test_a_lock_of_a_second_folder_keeps_the_first(tmp_path):
    with folder_lock(tmp_path / "a"), folder_lock(tmp_path / "b"):
        for name in ("a", "b"):
            assert try_to_lock(tmp_path / name) == "taken"
    assert names(tmp_path) == []


def test_a_folder_that_is_in_the_way_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """As where its last holder removes it after mkdir has found it and before it is seen to be a folder."""
    real, refused = Path.mkdir, []

    def mkdir(path, *arguments, **options):
        if not refused:
            refused.append(path)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert try_to_lock(tmp_path / "out") == "taken"
    assert refused

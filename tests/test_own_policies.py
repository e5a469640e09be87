"""Policies of users: whatever their code does is one line that says where, and what they name is what they get."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from unlearn_gym.cli import main
from unlearn_gym.comparison.comparison import run_comparison
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import ActionError, PolicyError
from unlearn_gym.policies import make_policy, policy_sources
from unlearn_gym.policies.episode import policy_context, run_episode

from .test_comparison import small

POLICY = """
class Mine:
    def __init__(self):
        self.steps = 0
        {init}
    def reset(self, seed):
        {reset}
    def act(self, obs, info):
        self.steps += 1
        if self.steps == 3:
            {act}
        return 0.3
    def update(self, transition):
        if self.steps == 2:
            {update}
"""
PLACES = ("init", "reset", "act", "update")
HOSTILE = "type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})"


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Write a module into the working folder, which is on the path of none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    known = set(sys.modules)

    def write(source: str, name: str = "my_policy") -> str:
        Path(f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    yield write
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def policy_failing(place: str, how: str) -> str:
    return POLICY.format(**{name: how if name == place else "pass" for name in PLACES})


def play(spec: str):
    env = SISSUnlearnEnv("gaussians-2d", horizon=4)
    return run_episode(env, make_policy(spec, policy_context(env)), 5, name=spec)


@pytest.mark.parametrize(
    "how", ["raise SystemExit(0)", "raise RuntimeError('boom\\nand more')", "import sys; sys.exit(0)"]
)
@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("init", r"constructing Mine\(\) raised"),
        ("reset", r"reset\(seed=5\) raised"),
        ("act", "act at step 3 of seed 5 raised"),
        ("update", "update at step 2 of seed 5 raised"),
    ],
)
def test_what_a_policy_raises_is_one_line_that_says_where(place, where, how, write_module):
    module = write_module(policy_failing(place, how))
    what = "RuntimeError: boom" if "boom" in how else "SystemExit: 0"
    with pytest.raises(PolicyError, match=f"^policy 'my_policy:Mine': {where} {what}$") as caught:
        play(f"{module}:Mine")
    assert how in caught.value.details


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("raise SystemExit(0)", "importing 'my_policy' raised SystemExit: 0"),
        ("1 / 0", "importing 'my_policy' raised ZeroDivisionError: division by zero"),
        ("None.nothing", "importing 'my_policy' raised AttributeError: 'NoneType' object has no attribute 'nothing'"),
        ("import no_such_module", "importing 'my_policy' raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("def broken(:", "importing 'my_policy' raised SyntaxError: "),
        (f"raise {HOSTILE}()", "importing 'my_policy' raised Mute: its message cannot be shown"),
        ("def __getattr__(name): raise OSError('gone')", "looking up 'Mine' raised OSError: gone"),
        ("def Min(): pass", "'my_policy' has no 'Mine'; did you mean 'Min'?"),
    ],
)
def test_what_a_module_raises_is_one_line(source, what, write_module):
    with pytest.raises(PolicyError) as caught:
        play(f"{write_module(source)}:Mine")
    assert str(caught.value).startswith(f"policy 'my_policy:Mine': {what}")
    assert "\n" not in str(caught.value)
    assert "my_policy" not in sys.modules or "def" in source


def test_an_interrupt_of_a_policy_is_an_interrupt(write_module):
    with pytest.raises(KeyboardInterrupt):
        play(f"{write_module(policy_failing('act', 'raise KeyboardInterrupt'))}:Mine")


def test_a_lambda_out_of_range_names_policy_and_step(write_module):
    with pytest.raises(PolicyError, match=r"^policy 'my_policy:Mine': act at step 3 of seed 5: λ=2.0 must lie in"):
        play(f"{write_module(policy_failing('act', 'return 2.0'))}:Mine")


def test_the_command_names_a_log_with_the_traceback_and_keeps_other_cells(write_module, monkeypatch, tmp_path, capsys):
    module = write_module(policy_failing("act", "raise RuntimeError('boom')"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sizes = ["--forget-samples", "200", "--quality-samples", "200", "--seeds", "1", "--out", "out"]
    arguments = ["compare", "--task", "gaussians-2d", "--policies", "static:0.3", f"{module}:Mine"]
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", *arguments, "--option", "horizon=4", *sizes])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    (log,) = tmp_path.glob("unlearn_gym-*.log")
    assert line.endswith(
        f"policy 'my_policy:Mine': act at step 3 of seed 0 raised RuntimeError: boom; traceback: {log}"
    )
    assert "my_policy.py" in log.read_text()
    assert log.read_text().rstrip().endswith("RuntimeError: boom")
    assert list(Path("out/cells").glob("static-0.3-*.json"))


def test_a_policy_that_is_killed_with_its_process_has_its_cell_run_again(write_module, tmp_path, monkeypatch):
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    once = "import os, pathlib; mark = pathlib.Path('killed'); first = not mark.exists(); mark.touch()"
    kill = f"os.environ['DRIVER'] != str(os.getpid()) and os.kill(os.getpid(), {int(signal.SIGKILL)})"
    module = write_module(policy_failing("act", f"{once}; first and {kill}"))
    with pytest.warns(RuntimeWarning, match=r"policy 'my_policy:Mine', seed 0 died \(SIGKILL\(-9\)\); it is run again"):
        results = run_comparison(small((f"{module}:Mine",), (0,)), tmp_path / "out", jobs=2)
    (cell,) = results.of(f"{module}:Mine")
    assert Path("killed").exists()
    assert len(cell["trace"]["lambda_"]) == 6


def test_the_working_folder_shadows_no_package_but_holds_the_named_module(write_module, tmp_path):
    write_module("raise RuntimeError('a stray file')", "torch_fidelity")
    write_module("def value(): return 0.4", "a_helper")
    write_module("raise RuntimeError('a stray file')", "colorsys")
    sys.modules.pop("colorsys", None)
    module = write_module("import a_helper, colorsys\ndef choose(obs): return a_helper.value()", "this")
    sys.modules.pop("this", None)  # of Python's own, which is not the one that is named
    assert play(f"{module}:choose").trace["lambda_"] == [0.4] * 4
    assert policy_sources(f"{module}:choose", "gaussians-2d") == [tmp_path / "this.py"]
    assert not PathFinder.find_spec("torch_fidelity").origin.startswith(str(tmp_path))


def test_a_module_of_a_package_is_found_without_running_the_package(write_module, tmp_path):
    (tmp_path / "a_package").mkdir()
    write_module("raise SystemExit(0)", "a_package/__init__")
    write_module("def choose(obs): return 0.4", "a_package/inner")
    assert policy_sources("a_package.inner:choose", "gaussians-2d") == [tmp_path / "a_package" / "inner.py"]
    with pytest.raises(PolicyError, match=r"importing 'a_package\.inner' raised SystemExit: 0"):
        play("a_package.inner:choose")
    write_module("", "a_package/__init__")
    assert play("a_package.inner:choose").trace["lambda_"] == [0.4] * 4


def test_a_named_module_that_cannot_have_its_name_says_so(write_module, tmp_path):
    module = write_module("def choose(obs): return 0.4", "json")
    with pytest.raises(PolicyError, match=r"json\.py cannot be imported, as its name is taken by .*json.*; rename it"):
        play(f"{module}:choose")


class Leaving:
    """Asked for its value, it ends the program."""

    def __array__(self, *arguments, **more):
        raise SystemExit(0)


def test_an_action_may_not_end_the_program():
    env = SISSUnlearnEnv("gaussians-2d", horizon=2)
    env.reset(seed=0)
    with pytest.raises(ActionError, match="not a number"):
        env.step(Leaving())

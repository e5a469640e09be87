"""The command line as a user meets it: bad input, and the whole way on the small task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unlearn_gym.cli", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--task", "mnist-trouser"], "did you mean 'mnist-trousers'"),
        (["compare", "--policies", "statik:0.5"], "did you mean 'static'"),
        (["compare", "--option", "horizont=3"], "did you mean 'horizon'"),
        (["compare", "--option", "horizon"], "must be name=value"),
        (["compare", "--option", "horizon=3", "--option", "horizon=4"], "each name once"),
        (["compare", "--option", "task=x"], "'task' is no run setting"),
        (["compare", "--first-seed", "-1"], "seed -1 is negative"),
        (["bench", "--items", "0"], "unknown item '0'"),
        (["bench", "--device", "gpu"], "device='gpu'"),
        (["calibrate", "--threads", "0"], "threads=0"),
        (["compare", "--seeds", "0"], "seeds is empty"),
        (["compare", "--jobs", "0"], "jobs=0"),
        (["compare", "--quality-samples", "20", "--task", "gaussians-2d"], "KID"),
        (["compare", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["pretrain", "--task", "nothing"], "unknown task 'nothing'"),
        (["pretrain", "--task", "gaussians-2d", "--updates", "0"], "updates=0"),
        (["train-classifier"], "give --data-root"),
        (["report", "nowhere"], "no results.json in nowhere"),
    ],
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing_behind(arguments, message, tmp_path, monkeypatch):
    monkeypatch.delenv("UNLEARN_GYM_DATA_ROOT", raising=False)
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("unlearn-gym: ")
    assert message in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_compare_and_report_from_the_command_line(tmp_path):
    arguments = [
        "--task",
        "gaussians-2d",
        "--policies",
        "static:0.2",
        "prior",
        "--seeds",
        "2",
        "--option",
        "horizon=5",
        "--option",
        "batch_size=8",
    ]
    sizes = ["--forget-samples", "200", "--quality-samples", "200", "--out", "out"]
    done = cli("compare", *arguments, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("static:0.2", "prior", "untouched", "oracle", "report: out/report.md", "Forgot most"):
        assert text in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["cells"]) == 6
    assert (results["settings"]["horizon"], results["settings"]["batch_size"]) == (5, 8)
    before = (tmp_path / "out" / "report.md").read_text()
    assert cli("report", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "report.md").read_text() == before


def test_help_lists_every_command(tmp_path):
    text = cli("--help", cwd=tmp_path).stdout
    for command in ("compare", "report", "pretrain", "calibrate", "train-classifier", "networks", "bench"):
        assert command in text

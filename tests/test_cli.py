"""The command line as a user meets it: bad input, and the whole way on the small task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn_gym.cli import COMMANDS, main


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
        (["compare", "--seeds", "0"], "seeds=0"),
        (["compare", "--jobs", "0"], "jobs=0"),
        (["compare", "--quality-samples", "20", "--task", "gaussians-2d"], "KID"),
        (["compare", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["pretrain", "--task", "nothing"], "unknown task 'nothing'"),
        (["pretrain", "--task", "gaussians-2d", "--updates", "0"], "updates=0"),
        (["train-classifier"], "give --data-root"),
        (["report", "nowhere"], "no results.json in nowhere"),
        (["report"], "name at least one folder"),
        (["report", "a", "b"], "merging 2 folders needs --out"),
        (["experiment", "no-such-thing"], "no experiment 'no-such-thing'"),
        (["evaluate", "no-such-model"], "weights 'no-such-model' must be"),
        (["evaluate", "oracle", "--task", "gaussians-2d:2,5"], "has no retrained oracle"),
        (["evaluate", "missing.safetensors", "--task", "gaussians-2d"], "no weights at missing.safetensors"),
        (["evaluate", "oracle", "--task", "gaussians-2d", "--quality-samples", "9"], "too few for KID"),
        (["evaluate", "oracle", "--task", "mnist-tshirt", "--inception-weights", "x.pth"], "is not torch-fidelity's"),
    ],
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing_behind(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("UNLEARN_GYM_DATA_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2, printed
    line = printed.strip().splitlines()[-1]
    assert line.startswith("unlearn-gym: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_bad_input_of_the_installed_command(tmp_path):
    done = cli("compare", "--jobs", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].startswith("unlearn-gym: jobs=0")
    assert "Traceback" not in done.stderr


SIZES = ["--task", "gaussians-2d", "--forget-samples", "200", "--quality-samples", "200"]


def test_compare_and_report_from_the_command_line(tmp_path, monkeypatch):
    """The installed command once, and then its function, which is what it calls."""
    arguments = [
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
    done = cli("compare", *SIZES, *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("static:0.2", "prior", "untouched", "oracle", "report: out/report.md", "Forgot most"):
        assert text in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["cells"]) == 6
    assert (results["settings"]["horizon"], results["settings"]["batch_size"]) == (5, 8)
    before = (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "report.md").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", "report", "out"])
    main()
    assert (tmp_path / "out" / "report.md").read_text() == before


def test_a_model_is_evaluated_from_its_file(tmp_path, monkeypatch, capsys):
    from unlearn_gym.tasks import get_task

    monkeypatch.chdir(tmp_path)
    for weights, out in ((str(get_task("gaussians-2d").oracle_path), "a.json"), ("oracle", "b.json")):
        arguments = ["evaluate", weights, *SIZES, "--likelihood-samples", "2", "--out", out]
        monkeypatch.setattr(sys, "argv", ["unlearn-gym", *arguments])
        main()
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["metrics"] == b["metrics"]
    assert {"forget_loss", "feature_kid", "nll_bound_retain", "nll_ode_forget"} <= a["metrics"].keys()
    assert a["absent"]["inception_fid"] == "Inception features are of images"
    assert "inception_fid not measured: Inception features are of images" in capsys.readouterr().out


def test_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", "--help"])
    with pytest.raises(SystemExit):
        main()
    text = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in text] == []

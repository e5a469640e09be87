"""The command line as a user meets it: bad input, and the whole way on the small task."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from unlearn_gym.cli import COMMANDS, main
from unlearn_gym.cli.arguments import parse_options
from unlearn_gym.cli.evidence import _task_of, print_tables
from unlearn_gym.cli.terminal import show
from unlearn_gym.comparison.records import REFERENCES
from unlearn_gym.comparison.results import Results, load_results
from unlearn_gym.envs.infos import INFO_KEYS, VECTOR_KEYS
from unlearn_gym.errors import TaskError, WeightsError
from unlearn_gym.models.weights import save_weights
from unlearn_gym.report.tables import terminal
from unlearn_gym.settings import PRESETS, RunSettings
from unlearn_gym.tasks import get_task, register_task, registry
from unlearn_gym.tasks.saving import save_model

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
        (["compare", "--seeds", "0"], "seeds=0"),
        (["compare", "--jobs", "0"], "jobs=0"),
        (["compare", "--quality-samples", "20", "--task", "gaussians-2d"], "KID"),
        (["compare", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["pretrain", "--task", "nothing"], "unknown task 'nothing'"),
        (["pretrain", "--task", "gaussians-2d", "--updates", "0"], "updates=0"),
        (
            ["pretrain", "--task", "gaussians-2d", "--seed", str(2**32)],
            "seed=4294967296: Input should be less than",
        ),
        (["train-classifier", "--data-root", ".", "--seed", "-1"], "seed=-1 must lie in 0..4294967295"),
        (["train-classifier"], "give --data-root"),
        (["report", "nowhere"], "no results.json in nowhere"),
        (["report"], "name at least one folder"),
        (["report", "a", "b"], "merging 2 folders needs --out"),
        (["experiment", "beta"], "no experiment 'beta': run this in the root of a checkout"),
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


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "unlearn_gym.cli", "metrics"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


SIZES = ["--task", "gaussians-2d", "--forget-samples", "200", "--quality-samples", "200"]


def test_compare_and_report_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--option", "horizon=5", "--option", "batch_size=8")
    arguments = ("compare", *SIZES, "--policies", "static:0.2", "prior", "--seeds", "2", *options, "--out", "out")
    text = printed(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    for part in ("static:0.2", "prior", "untouched", "oracle", "report: out/report.md", "Forgot most"):
        assert part in text
    results = json.loads(Path("out/results.json").read_text())
    assert len(results["cells"]) == 6
    assert (results["settings"]["horizon"], results["settings"]["batch_size"]) == (5, 8)
    before = Path("out/report.md").read_text()
    Path("out/report.md").unlink()
    printed("report", "out", monkeypatch=monkeypatch, capsys=capsys)
    assert Path("out/report.md").read_text() == before


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


def printed(*arguments: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", *arguments])
    main()
    return capsys.readouterr().out


def test_an_unknown_experiment_in_a_checkout_is_named_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        printed("experiment", "bet", monkeypatch=monkeypatch, capsys=capsys)
    assert "no experiment 'bet'; did you mean 'beta'?" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert printed("--version", monkeypatch=monkeypatch, capsys=capsys) == f"unlearn-gym {version('unlearn_gym')}\n"


def test_every_task_is_listed_with_what_is_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    whole = get_task("gaussians-2d")
    bare = replace(whole, name="bare-of-all", description="points: forget the bare", assets=tmp_path)
    register_task(bare)
    monkeypatch.setattr(registry, "SHELL_TASKS", {*registry.SHELL_TASKS, "bare-of-all"})
    text = printed("tasks", monkeypatch=monkeypatch, capsys=capsys)
    rows = {row.split()[0]: row.splitlines() for row in re.split(r"\n(?=\S)", text)}
    assert set(rows) >= registry.SHELL_TASKS
    assert [line.split()[-1] for line in rows["gaussians-2d"]] == ["weights", "constants", "oracle"]
    assert " ".join(rows["bare-of-all"][0].split()) == "bare-of-all points: forget the bare none"
    for name in registry.SHELL_TASKS:
        row = " ".join(line[: text.splitlines()[0].index("present")] for line in rows[name])
        assert row.split()[1:] == get_task(name).description.split()


def test_a_file_of_weights_is_evaluated_on_its_own_task_or_on_a_given_one(tmp_path):
    """Weights that do not say what they are of are not taken for those of the default task."""
    task = get_task("gaussians-2d")
    model, saved, bare = task.pretrained_model(), tmp_path / "saved.safetensors", tmp_path / "bare.safetensors"
    save_model(model, task, saved)
    save_weights(bare, model.state_dict())
    assert _task_of(str(saved), None) == "gaussians-2d"
    assert _task_of(str(saved), "gaussians-2d:0,4") == "gaussians-2d:0,4"
    assert _task_of(str(bare), "gaussians-2d") == "gaussians-2d"
    assert _task_of("oracle", None) == "mnist-trousers"
    with pytest.raises(WeightsError, match="give --task"):
        _task_of(str(bare), None)
    with pytest.raises(WeightsError, match="another noise schedule than task 'mnist-trousers' has"):
        _task_of(str(saved), "mnist-trousers")
    for weights in (str(saved), str(bare), "oracle"):
        with pytest.raises(TaskError, match="unknown task ''"):
            get_task(_task_of(weights, ""))


def test_a_file_of_a_task_by_another_name_is_evaluated_with_one_line_of_warning(tmp_path, monkeypatch, capsys):
    task, path = get_task("gaussians-2d"), tmp_path / "saved.safetensors"
    save_model(task.pretrained_model(), task, path)
    register_task(replace(task, name="points-of-mine"))
    for given in ("points-of-mine", "gaussians-2d:0,4"):
        monkeypatch.setattr(sys, "argv", ["unlearn-gym", "evaluate", str(path), *SIZES, "--task", given])
        main()
        captured = capsys.readouterr()
        assert f"of {given}" in captured.out
        lines = captured.err.splitlines()
        if given == "points-of-mine":
            (line,) = lines
            assert line.startswith(f"unlearn-gym: {path} says that it is of task 'gaussians-2d'; it is taken as one of")
        else:
            assert lines == []


def test_options_fit_a_terminal_and_are_markdown_in_a_pipe(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = re.sub(r"\x1b\[\d*m", "", printed("options", monkeypatch=monkeypatch, capsys=capsys))
    assert max(map(len, text.splitlines())) <= 80
    assert "|" not in text
    for name in RunSettings.model_fields:
        assert re.search(rf"^{name} ", text, re.MULTILINE), name


def test_the_page_of_options_is_that_of_the_code(monkeypatch, capsys):
    page = printed("options", monkeypatch=monkeypatch, capsys=capsys)
    assert (ROOT / "docs" / "options.md").read_text() == page
    for name, field in RunSettings.model_fields.items():
        assert field.description, f"{name} has no description"
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.endswith(f"| {field.description} |")
        shown = row.split(" | ")[1].strip("`")
        assert RunSettings().override(**parse_options((f"{name}={shown}",))) == RunSettings()
    assert all(f"| `{name}` | `" in page for name in PRESETS)
    for key in (*INFO_KEYS, *VECTOR_KEYS):
        assert f"| `{'.'.join(key.path)}` |" in page


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("count", [2, 12])
def test_a_table_fits_the_terminal_and_nothing_is_cut(columns, count, monkeypatch, capsys):
    """Every cell stands whole in its column, in one of the tables that the columns are spread over."""
    monkeypatch.setenv("COLUMNS", str(columns))
    header = ["policy", "forget rate", "forget loss", "retain loss", "score", "KID (features)", "class accuracy"]
    rows = [
        [f"variational:kl_only:{i}", *(f"{i}.{column}77 … 1{i}.{column}88" for column in range(6))]
        for i in range(count)
    ]
    show(header, rows, "a title [of two words]")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    assert "a title [of two words]" in text
    for row in rows:
        for cell in row[1:]:
            (line,) = (line for line in lines if re.search(rf"(^|\s){re.escape(cell)}(\s|$)", line))
            assert line.startswith(row[0]) or columns == 60
    assert sum(line.startswith("policy") for line in lines) == {60: 3, 80: 2, 200: 1}[columns]


@pytest.mark.parametrize("columns", [None, 60, 80, 140])
@pytest.mark.parametrize("count", [2, 12])
def test_what_compare_prints_fits_the_terminal_and_nothing_is_cut(columns, count, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    whole = load_results(ROOT / "docs" / "experiments" / "rl-against-vi" / "gaussians-2d")
    policies = [p for p in whole.policies if p not in REFERENCES]
    kept = [*REFERENCES, *(p for p in policies if p.startswith("static"))][: 2 + count // 3] + policies[-count:]
    results = Results({**whole.raw, "cells": [cell for cell in whole.cells if cell["policy"] in kept]})
    print_tables(results)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= (columns or 80)
    assert "…" not in text
    header, rows = terminal(results, intervals=columns == 140)
    folded = "".join(line[:24].split("  ")[0].strip() for line in text.splitlines())
    for row in rows:
        assert row[0] in folded
        assert all(line in text for cell in row[1:] for line in cell.splitlines())
    assert all(word in text for title in header for word in title.split())


def test_a_long_name_is_folded_and_markup_in_a_cell_is_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    name = "agents/of/mine/[bold]/" + "x" * 70
    show(["policy", "score"], [[name, "[red]"]])
    text = capsys.readouterr().out
    assert "".join(line.split("  ")[0].strip() for line in text.splitlines()[2:]) == name
    assert "[red]" in text
    show(["metric", "value", "what it is"], [["reconstruction_distance", "0.1", "word " * 30 + "y" * 70]], prose=2)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    assert (text.count("word"), text.count("y")) == (30, 70)

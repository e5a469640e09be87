"""Experiments: files, sizes, shared cells, merging, and bad input."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from unlearn_gym.comparison.results import load_results
from unlearn_gym.errors import LockError, ResultsError
from unlearn_gym.making.experiment import load_experiment, run_experiment
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import get_task

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))

ONE = """
question: Which?
seeds: 1
num_samples: 200
arms:
  - {name: short, task: gaussians-2d, policies: ["static:0.3", prior], options: {horizon: 3}}
  - {name: long, task: gaussians-2d, policies: ["static:0.3"], options: {horizon: 4}}
quick: {seeds: 1, num_samples: 200, options: {horizon: 2}, arms: [short]}
"""
TWO = ONE.replace("prior", "random")


def write_experiments(folder):
    experiments = folder / "configs" / "experiments"
    experiments.mkdir(parents=True)
    (experiments / "one.yaml").write_text(ONE)
    (experiments / "two.yaml").write_text(TWO)
    (experiments / "both.yaml").write_text("question: All?\nmerge: [one, two]\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiments(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which both experiments have run, and the cells that there were after the first of them."""
    folder = tmp_path_factory.mktemp("finished")
    write_experiments(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("one")
        cells = {p.name for p in Path("out/cells").iterdir()}
        run("two")
    return folder, cells


@pytest.fixture
def after(finished, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run(name, quick=False, ran=None):
    def progress(arm):
        return lambda cell, done, total: None if ran is None or cell is None else ran.append((arm, cell["policy"]))

    out = Path("out") / name
    return run_experiment(name, out, quick=quick, jobs=1, data_root=None, command="test", progress=progress)


def test_an_experiment_runs_all_arms_and_shares_cells_with_the_next(finished):
    folder, cells = finished
    page = (folder / "out" / "one" / "experiment.md").read_text()
    assert "| short | prior |" in page
    assert "| long | static:0.3 |" in page
    assert "[short](short/report.md)" in page
    assert len({p.name for p in (folder / "out" / "cells").iterdir()} - cells) == 1  # random of the short arm alone


def test_the_quick_size_runs_its_arms_alone(folder):
    page = run("one", quick=True).read_text()
    assert "| long |" not in page
    assert load_results(Path("out/one/short")).settings["horizon"] == 2


@pytest.mark.usefixtures("after")
def test_a_merging_experiment_brings_runs_of_equal_settings_together():
    page = run("both").read_text()
    first, _, second = page.split("\n## ")
    rows = [line.split("|")[2].strip() for line in first.splitlines() if line.startswith("| gaussians-2d-horizon-3 |")]
    assert rows == ["untouched", "oracle", "static:0.3", "prior", "random"]
    assert "| gaussians-2d-horizon-3 | " in second
    assert "gaussians-2d-horizon-4" in page
    assert Path("out/both/gaussians-2d-horizon-3/returns.png").is_file()


def test_merging_what_has_not_run_names_the_command(folder):
    with pytest.raises(ResultsError, match="run 'unlearn-gym experiment one --out out/one' first"):
        run("both")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_experiments_are_sound(path):
    experiment = load_experiment(str(path))
    for quick in (False, True):
        for comparison in experiment.comparisons(None, quick=quick).values():
            assert comparison.seeds
            comparison.evaluation.validate()
            task = get_task(comparison.task)
            assert task.oracle_path.is_file() or comparison.task == "sfd-mnist-digits:3,7"  # forgetting, not scored
    assert set(experiment.merge) <= {p.stem for p in SHIPPED}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("question: What?\n", "give arms, or merge"),
        (ONE.replace("arms: [short]", "arms: [shrot]"), r"\['shrot'\] must be among them"),
        (ONE.replace("name: long", "name: short"), "must have different names"),
        (ONE + "sedes: 3\n", "there is no field 'sedes'; did you mean 'seeds'"),
        (ONE.replace("seeds: 1\n", "seeds: 0\n"), "seeds=0"),
        ("question: [", "is not YAML"),
        ("question: \udcff\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_one_clear_line(folder, text, match):
    (folder / "bad.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ResultsError, match=match) as caught:
        load_experiment("bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_bad_policy_names_its_arm(folder):
    (folder / "bad.yaml").write_text(ONE.replace("prior", "untouched"))
    with pytest.raises(ResultsError, match=r"experiment 'bad.yaml', arm 'short': 'untouched' is in every comparison"):
        run("bad.yaml")


@pytest.mark.usefixtures("after")
def test_a_damaged_result_is_made_again():
    Path("out/one/short/results.json").write_text("{")
    ran = []
    run("one", ran=ran)
    assert load_results(Path("out/one/short")).policies == ["untouched", "oracle", "static:0.3", "prior"]


def test_an_unknown_name_gets_the_nearest(folder):
    with pytest.raises(ResultsError, match="did you mean 'one'"):
        load_experiment("oen")


def test_an_experiment_in_use_is_left_alone_and_so_is_one_whose_arm_is(folder):
    hold = threading.Event(), threading.Event()

    def holder(path):
        with folder_lock(path):
            hold[0].set()
            hold[1].wait()

    for path in (Path("out/one"), Path("out/one/short")):
        for event in hold:
            event.clear()
        thread = threading.Thread(target=holder, args=(path,))
        thread.start()
        assert hold[0].wait(10)
        with pytest.raises(LockError, match=f"{path} is in use"):
            run("one")
        hold[1].set()
        thread.join()

"""The comparison: resume, parallel cells, report, and bad input."""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from unlearn_gym.comparison.comparison import Comparison, default_policies, run_comparison
from unlearn_gym.comparison.records import (
    FINETUNE,
    NEEDED_COLUMNS,
    ORACLE,
    UNTOUCHED,
    Pictures,
    ResultsRecord,
    Samples,
    fault,
    pack_samples,
    read_cells,
    unpack_samples,
    with_checksum,
    write_results,
)
from unlearn_gym.comparison.results import CELL_FORMAT, Results, load_results, merge_results
from unlearn_gym.comparison.store import CellStore
from unlearn_gym.errors import LockError, PolicyError, ResultsError, SettingsError
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.policies.registry import SHIPPED_AGENTS
from unlearn_gym.report import tables
from unlearn_gym.report.report import verdict, write_report
from unlearn_gym.tasks import get_task, load_data, register_task

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("env_seconds", "policy_seconds", "evaluation_seconds", "checksum")


def small(policies=("static:0.3", "prior", FINETUNE), seeds=(0, 1), **options) -> Comparison:
    return Comparison("gaussians-2d", policies, seeds, {"horizon": 6, **options}, EvaluationSettings(250, 250))


def without_times(results):
    cells = [{k: v for k, v in cell.items() if k not in TIMES} for cell in results.cells]
    for cell in cells:
        if "probe" in cell:
            cell["probe"] = {k: v for k, v in cell["probe"].items() if k != "seconds"}
    return cells


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return run_comparison(small(), out, command="test"), out


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path):
    def interrupt(cell, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(small(), tmp_path, progress=interrupt)
    assert not (tmp_path / "results.json").exists()
    again = []
    results = run_comparison(small(), tmp_path, progress=lambda cell, done, total: again.append(done))
    assert again == list(range(9))
    assert without_times(results) == without_times(finished[0])


def test_two_processes_give_the_cells_of_one_for_a_task_of_ones_own_too(finished, tmp_path):
    register_task(dataclasses.replace(get_task("gaussians-2d"), name="my-gaussians"))
    results = run_comparison(dataclasses.replace(small(), task="my-gaussians"), tmp_path, jobs=2)
    for cell, same in zip(without_times(results), without_times(finished[0]), strict=True):
        assert cell.pop("key") != same.pop("key")
        assert cell == same


def test_cells_of_other_settings_are_run_again_and_those_before_are_kept_with_a_word(finished, tmp_path, capsys):
    first = run_comparison(small(seeds=(0,)), tmp_path)
    run_comparison(small(seeds=(0,)), tmp_path)
    assert not capsys.readouterr().err
    second = run_comparison(small(seeds=(0,), learning_rate=1e-3), tmp_path)
    keys = [{cell["key"] for cell in results.cells} for results in (first, second)]
    assert not keys[0] & keys[1]
    assert f"{tmp_path} has 5 runs of other settings" in capsys.readouterr().err
    assert len(list((tmp_path / "cells").iterdir())) == 10  # and the first ones are kept beside them


def test_a_damaged_cell_is_run_again(finished, tmp_path):
    run_comparison(small(seeds=(0,)), tmp_path)
    (tmp_path / "results.json").unlink()
    next((tmp_path / "cells").iterdir()).write_text("{")
    assert len(run_comparison(small(seeds=(0,)), tmp_path).cells) == 5


def other(value):
    """Another value of the same type, as a flipped bit or a changed digit leaves it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "a" if isinstance(value, str) else value[:-1] if isinstance(value, list) else {}


def written_cell(out):
    path = next(p for p in sorted((out / "cells").iterdir()) if p.name.startswith("prior"))
    return path, json.loads(path.read_bytes())


@pytest.fixture
def unfinished(finished, tmp_path):
    """All cells of ``finished`` as files, without a ``results.json``."""
    store = CellStore(tmp_path / "cells")
    for cell in finished[0].cells:
        store.write(cell)
    return tmp_path


def test_no_changed_value_of_a_cell_is_believed(unfinished):
    path, whole = written_cell(unfinished)
    assert {"policy", "seed", "key", "diverged", "metrics", "trace", "probe", "checksum"} <= whole.keys()
    changed = [{**whole, name: other(value)} for name, value in whole.items()]
    changed += [{k: v for k, v in whole.items() if k != name} for name in whole]
    changed += [{**whole, "metrics": {**whole["metrics"], name: other(v)}} for name, v in whole["metrics"].items()]
    asked = (whole["policy"], whole["seed"], whole["key"])
    for cell in [*changed, [], 3, None, {}, {"key": whole["key"]}]:
        path.write_text(json.dumps(cell))
        store = CellStore(unfinished / "cells")
        assert store.read(*asked) is None, cell
        assert path.name in store.faults[0]
    path.write_text(json.dumps(dict(reversed(whole.items())), indent=3))  # the same values, otherwise written
    assert CellStore(unfinished / "cells").read(*asked) == whole


def test_a_cell_of_another_run_in_its_place_is_not_believed(unfinished):
    path, whole = written_cell(unfinished)
    signed_anew = with_checksum({k: v for k, v in whole.items() if k != "checksum"} | {"seed": 7})
    path.write_text(json.dumps(signed_anew))
    store = CellStore(unfinished / "cells")
    assert store.read(whole["policy"], whole["seed"], whole["key"]) is None
    assert "seed 7" in store.faults[0]


def test_a_cell_that_is_not_believed_is_run_again_with_one_line(finished, unfinished, capsys):
    path, whole = written_cell(unfinished)
    path.write_text(path.read_text().replace('"diverged": false', '"diverged": true'))
    ran = []
    results = run_comparison(small(), unfinished, progress=lambda *a: ran.append(a))
    assert without_times(results) == without_times(finished[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 stored runs are not believed and run again" in line
    assert path.name in line
    assert json.loads(path.read_bytes()).keys() == whole.keys()


@pytest.mark.parametrize("content", ["[]", "3", '{"format": 2, "cells": {"a": 1}}', '{"format": 2, "cells": [1]}', "{"])
def test_results_of_the_wrong_shape_do_not_block_the_rerun(unfinished, content, finished, capsys):
    (unfinished / "results.json").write_text(content)
    with pytest.raises(ResultsError, match="run the comparison again"):
        load_results(unfinished)
    results = run_comparison(small(), unfinished)
    assert results.cells == finished[0].cells
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert load_results(unfinished).cells == finished[0].cells


def test_one_damaged_run_of_a_results_file_costs_that_run_alone(finished, tmp_path, capsys):
    raw = json.loads((finished[1] / "results.json").read_bytes())
    raw["cells"][-1]["metrics"]["forget_loss"] += 1
    (tmp_path / "results.json").write_text(json.dumps(raw))
    with pytest.raises(ResultsError, match=rf"{raw['cells'][-1]['policy']} at seed 1 does not match its checksum"):
        load_results(tmp_path)
    results = run_comparison(small(), tmp_path)
    assert results.cells[:-1] == finished[0].cells[:-1]
    assert without_times(results) == without_times(finished[0])
    assert len(capsys.readouterr().err.splitlines()) == 1


def places(value, path=()):
    """The path of every value inside ``value``; of long lists the first two."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


def damaged(raw, path, new):
    """A copy of ``raw`` whose value at ``path`` is ``new``, or gone for None."""
    copy_ = copy.deepcopy(raw)
    holder = copy_
    for key in path[:-1]:
        holder = holder[key]
    if new is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return copy_


GONE = object()


def test_results_of_the_wrong_shape_are_refused_in_one_line_or_harmless(finished, tmp_path):
    """Of an older version's file, which has no checksums: the schema alone stands between damage and the tables."""
    raw = json.loads((finished[1] / "results.json").read_bytes())
    del raw["checksum"]
    for cell in raw["cells"]:
        del cell["checksum"]
        cell.pop("pictures", None)
    rng = random.Random(0)
    found = [path for path in places(raw) if path]
    refused = 0
    for path in rng.sample(found, 150):
        new = rng.choice([GONE, None, [], {}, "x", -1, True, 1e300, [None], {"a": []}])
        (tmp_path / "results.json").write_text(json.dumps(damaged(raw, path, new)))
        try:
            results = load_results(tmp_path)
        except ResultsError as error:
            refused += "\n" not in str(error)
            continue
        verdict(results)
        for table in (tables.summary, tables.against_best_static, tables.paired, tables.efforts, tables.remaining):
            table(results)
    assert refused > 75


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("metrics", "retain_loss"), 0), (("profile", 0), GONE), (("pictures",), {"a": []}), (("pictures",), None),
        (("pictures", "forget", "shape", 0), 10**12), (("pictures", "forget", "data"), "x"),
        (("pictures", "forget_hits"), [10**6]), (("metrics", "forget_loss"), GONE), (("seed",), -1),
    ],
)  # fmt: skip
def test_what_would_break_a_report_is_refused(path, new, finished, tmp_path):
    raw = json.loads((finished[1] / "results.json").read_bytes())
    del raw["checksum"]
    for cell in raw["cells"]:
        del cell["checksum"]
    (tmp_path / "results.json").write_text(json.dumps(damaged(raw, ("cells", 0, *path), new)))
    with pytest.raises(ResultsError, match="is damaged"):
        load_results(tmp_path)


def test_a_picture_beyond_the_last_one_is_refused(finished):
    pictures = next(cell["pictures"] for cell in finished[0].cells if cell.get("pictures"))
    count = pictures["forget"]["shape"][0]
    assert Pictures.model_validate(pictures | {"forget_hits": [0, count - 1]})
    for hit in (-1, count):
        with pytest.raises(ValidationError, match="out of range"):
            Pictures.model_validate(pictures | {"forget_hits": [hit]})


def test_no_changed_value_of_a_results_file_is_believed(finished, tmp_path):
    raw = json.loads((finished[1] / "results.json").read_bytes())
    for path in random.Random(1).sample([p for p in places(raw) if len(p) > 1], 40):
        value = raw
        for key in path:
            value = value[key]
        new = other(value) if value is not None else 1
        if new == value:  # nothing to take away from an empty one
            continue
        (tmp_path / "results.json").write_text(json.dumps(damaged(raw, path, new)))
        with pytest.raises(ResultsError, match="run the comparison again"):
            load_results(tmp_path)


def test_a_comparison_into_a_folder_in_use_is_refused(finished, locked):
    with pytest.raises(LockError, match=f"process {os.getpid()}"):
        run_comparison(small(), locked)
    with pytest.raises(LockError, match="in use"):
        write_report(finished[0], locked)


def test_a_damaged_manifest_of_an_agent_fails_before_anything_runs(tmp_path):
    agent = tmp_path / "agent.zip"
    shutil.copy(SHIPPED_AGENTS / "gaussians-2d" / "ppo.zip", agent)
    for content in ("[]", '{"seconds": "long"}', '{"timesteps": [1]}', "{", "[" * 100_000):
        agent.with_suffix(".json").write_text(content)
        with pytest.raises(PolicyError, match=r"agent\.json is damaged") as caught:
            run_comparison(small((str(agent),)), tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_finished_comparison_resumes_from_its_results_alone(finished, tmp_path):
    (tmp_path / "results.json").write_bytes((finished[1] / "results.json").read_bytes())
    again = run_comparison(small(), tmp_path)
    assert again.cells == finished[0].cells
    assert not (tmp_path / "cells").exists()


def test_another_comparison_in_the_same_folder_loses_no_cell(finished, tmp_path):
    (tmp_path / "results.json").write_bytes((finished[1] / "results.json").read_bytes())
    run_comparison(small(("prior",), (0,)), tmp_path)
    again = run_comparison(small(), tmp_path)
    assert again.cells == finished[0].cells


def test_comparisons_that_share_a_store_run_no_cell_twice(tmp_path):
    store, ran = CellStore(tmp_path / "cells"), []
    run_comparison(small(("prior",), (0,)), tmp_path / "a", store=store)
    before = {p.name for p in store.folder.iterdir()}
    run_comparison(small(("prior", "random"), (0,)), tmp_path / "b", store=store, progress=lambda *a: ran.append(a))
    assert len({p.name for p in store.folder.iterdir()} - before) == 1


def test_cells_of_a_changed_module_are_run_again(tmp_path, monkeypatch):
    """In a process of its own, which has not the module's folder on its path: an installed script has not either."""
    monkeypatch.chdir(tmp_path)
    script = (
        "import json, pathlib, sys; sys.path[:] = [p for p in sys.path if p]\n"
        "from unlearn_gym.comparison.comparison import Comparison\n"
        "for value in (0.2, 0.3):\n"
        "    pathlib.Path('a_policy.py').write_text(f'def choose(obs):\\n    return {value}\\n')\n"
        "    print(json.dumps(Comparison('gaussians-2d', ('a_policy:choose', 'prior'), (0,)).cell_keys()))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    keys = [json.loads(line) for line in done.stdout.splitlines()]
    assert keys[0]["a_policy:choose"] != keys[1]["a_policy:choose"]
    assert keys[0]["prior"] == keys[1]["prior"]


def test_a_comparison_without_a_static_lambda_does_not_speak_of_the_best_one(tmp_path):
    results = run_comparison(small(("prior",), (0,)), tmp_path)
    assert not [line for line in verdict(results) if "None" in line]


def test_packed_samples_come_back():
    images = torch.rand((50, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(torch.from_numpy(unpack_samples(pack_samples(images))), images, atol=0.005, rtol=0)
    points = torch.randn((50, 2), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.from_numpy(unpack_samples(pack_samples(points))), points, atol=0.002, rtol=0)


def test_report_holds_every_policy_and_rebuilds_from_the_file(finished, tmp_path):
    results, out = finished
    path = write_report(load_results(out), tmp_path)
    text = path.read_text()
    for policy in (UNTOUCHED, ORACLE, FINETUNE, "static:0.3", "prior"):
        assert f"| {policy} |" in text
    for picture in ("front", "lambdas", "profile", "returns", "samples"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
    assert any("Forgot most" in line for line in verdict(results))


def test_curves_are_written_for_every_run(finished):
    _, out = finished
    assert len(list((out / "tensorboard").glob("*/events.out.tfevents.*"))) >= 6


def test_finetuning_draws_no_forget_data(finished):
    results, _ = finished
    (cell, _) = results.of(FINETUNE)
    assert set(cell["trace"]["lambda_"]) == {0.0}
    assert set(cell["trace"]["forget_multiplier"]) == {0.0}


def test_a_diverged_run_is_reported_without_figures(tmp_path):
    comparison = small(("static:0.3",), (0,), optimizer="sgd", learning_rate=1e30, max_grad_norm=None)
    results = run_comparison(comparison, tmp_path)
    (cell,) = results.of("static:0.3")
    assert cell["diverged"]
    assert results.values("static:0.3", "retain_loss") == {}
    assert "| static:0.3 | 1 | – |" in write_report(results, tmp_path).read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policies": ()}, ResultsError, "policies is empty"),
        ({"seeds": ()}, ResultsError, "seeds is empty"),
        ({"seeds": (1, 1)}, ResultsError, "seeds names 1 twice"),
        ({"policies": ("statik:0.1",)}, PolicyError, "did you mean 'static'"),
        ({"policies": ("untouched",)}, PolicyError, "'untouched' is in every comparison"),
        ({"policies": ("math:sqrt",)}, PolicyError, "'math:sqrt': act at step 1 of seed 0 raised TypeError: "),
        ({"seeds": (-1,)}, ResultsError, "seed -1 is negative"),
        ({"horizont": 3}, SettingsError, "did you mean 'horizon'"),
    ],
)
def test_bad_input_fails_before_anything_runs(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run_comparison(small(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match=r"no results\.json"):
        load_results(tmp_path)
    whole = {k: {} for k in ResultsRecord.model_fields} | {"cells": [], "format": CELL_FORMAT}
    for raw, message in (
        ("{", "damaged"), ("{}", "has format None"), ("[]", "no JSON object"), ("[" * 100_000, "damaged"),
        (json.dumps({**whole, "format": 1}), "has format 1, this version"),
        (json.dumps({k: v for k, v in whole.items() if k != "calibration"}), "lacks 'calibration'"),
        (json.dumps(whole), "holds no runs"), (json.dumps({**whole, "cells": [1]}), "damaged"),
    ):  # fmt: skip
        (tmp_path / "results.json").write_text(raw)
        with pytest.raises(ResultsError, match=message):
            load_results(tmp_path)


def test_a_cell_knows_its_data_and_the_optional_packages(monkeypatch):
    key = small(("prior",)).cell_keys()["prior"]
    data = load_data(get_task("gaussians-2d"))
    with monkeypatch.context() as patch:
        changed = dataclasses.replace(data, heldout=data.heldout + 1)
        patch.setattr("unlearn_gym.comparison.comparison.load_data", lambda *a: changed)
        assert small(("prior",)).cell_keys()["prior"] != key
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert small(("prior",)).cell_keys()["prior"] != key
    assert small(("prior",)).cell_keys()["prior"] == key


def test_another_spelling_of_a_member_is_the_same_comparison():
    one, other = (dataclasses.replace(small(), task=f"gaussians-2d:{name}") for name in ("0,4", "4,0"))
    assert one == other
    assert dataclasses.replace(small(), task="gaussians-2d:0").cell_keys() == small().cell_keys()


def test_few_forget_samples_still_make_a_picture(tmp_path):
    task, data = get_task("vae-mnist-trousers"), load_data(get_task("vae-mnist-trousers"))
    few = dataclasses.replace(
        data, **{name: getattr(data, name)[:210] for name in ("heldout", "heldout_labels")},
        **{name: getattr(data, name)[:20] for name in ("forget", "forget_labels", "unseen", "unseen_labels")},
    )  # fmt: skip
    register_task(dataclasses.replace(task, name="few-vae", load_data=lambda root, download: few))
    comparison = Comparison("few-vae", ("static:0.5",), (0,), {"horizon": 1}, EvaluationSettings(10, 200))
    write_report(run_comparison(comparison, tmp_path), tmp_path)
    assert (tmp_path / "samples.png").exists()


def test_a_model_that_the_last_update_blew_up_counts_as_diverged_and_does_not_rank(tmp_path):
    comparison = small(("static:0.3",), (0,), horizon=1, optimizer="sgd", learning_rate=1e12, max_grad_norm=None)
    for _ in range(2):  # and the second time is read from the cells
        results = run_comparison(comparison, tmp_path)
    (cell,) = results.of("static:0.3")
    assert (cell["diverged"], cell["metrics"]) == (True, {})
    assert verdict(results) == ["No policy finished all its runs."]
    write_report(results, tmp_path)


def test_another_first_seed_still_makes_a_report(finished, tmp_path):
    write_report(run_comparison(small(("static:0.3",), (1,)), tmp_path), tmp_path)
    assert (tmp_path / "samples.png").exists()


def test_default_policies_leave_out_agents_that_do_not_ship():
    assert {"ppo", FINETUNE} <= set(default_policies("mnist-trousers"))
    assert not {"ppo", "ppo-potential"} & set(default_policies("no-such-task"))


def test_probing_a_run_changes_nothing():
    from unlearn_gym.envs import SISSUnlearnEnv
    from unlearn_gym.policies.episode import run_episode
    from unlearn_gym.policies.open_loop import StaticPolicy

    env = SISSUnlearnEnv("gaussians-2d", horizon=7)
    plain = run_episode(env, StaticPolicy(0.3), 5)
    probed = run_episode(env, StaticPolicy(0.3), 5, probe_every=3)
    assert plain.trace == probed.trace
    assert plain.probe["updates"] == []
    assert probed.probe["updates"] == [0, 3, 6, 7]
    assert {len(column) for column in probed.probe.values()} == {4}


def part(results, keep, **changes):
    """The cells of ``results`` that ``keep`` names, with other values at the top."""
    return Results({**results.raw, "cells": [c for c in results.cells if keep(c)], **changes})


def test_merged_parts_are_the_whole(finished):
    results, _ = finished
    parts = [part(results, lambda c, s=seed: c["seed"] == s or c["policy"] in (UNTOUCHED, ORACLE)) for seed in (0, 1)]
    merged = merge_results(parts, ["a", "b"])
    assert merged.cells == results.cells
    assert merged.estimate("prior", "score") == results.estimate("prior", "score")


def test_results_that_do_not_belong_together_are_not_merged(finished):
    results, _ = finished
    everything = part(results, lambda c: True)
    comparison = results.raw["comparison"]
    others = {
        "task": {"comparison": {**comparison, "task": "mnist-tshirt"}},
        "settings horizon": {"settings": {**results.settings, "horizon": 7}},
        "versions torch": {"versions": {**results.raw["versions"], "torch": "0.1"}},
        "evaluation num_forget_samples": {
            "comparison": {**comparison, "evaluation": {**comparison["evaluation"], "num_forget_samples": 1}}
        },
        "otherwise": {"cells": [{**cell, "key": "another"} for cell in results.cells]},
    }
    for what, changes in others.items():
        with pytest.raises(ResultsError, match=what):
            merge_results([everything, Results({**results.raw, **changes})], ["here", "there"])


def test_a_results_file_without_its_own_checksum_is_held_against_those_of_its_runs(finished, tmp_path):
    path = tmp_path / "results.json"
    raw = json.loads((finished[1] / "results.json").read_text())
    del raw["checksum"]
    changed = copy.deepcopy(raw)
    changed["cells"][-1]["metrics"]["forget_loss"] = 99.0
    doubled = {**raw, "cells": [*raw["cells"], raw["cells"][-1]]}
    settings = {**raw, "settings": {**raw["settings"], "potential_retain_coef": 0.0}}
    partly = copy.deepcopy(raw)
    del partly["cells"][0]["checksum"]
    for bad, message in (
        (changed, "does not match its checksum"), (doubled, "a run twice"), (raw, "it has none itself"),
        (settings, "it has none itself"), (partly, "does not match its checksum"),
    ):  # fmt: skip
        path.write_text(json.dumps(bad))
        with pytest.raises(ResultsError, match=message):
            load_results(tmp_path)


def test_no_cell_among_ones_with_checksums_is_believed_without(finished, tmp_path):
    raw = json.loads((finished[1] / "results.json").read_text())
    del raw["checksum"], raw["cells"][0]["checksum"]
    (tmp_path / "results.json").write_text(json.dumps(raw))
    sound, wrong = read_cells(tmp_path / "results.json", CELL_FORMAT)
    assert sound == raw["cells"][1:]
    assert "1 runs" in wrong
    for cell in raw["cells"]:
        cell.pop("checksum", None)
    (tmp_path / "results.json").write_text(json.dumps(raw))
    assert read_cells(tmp_path / "results.json", CELL_FORMAT) == (raw["cells"], None)  # an older version's


def written(results, folder, **changes):
    """The results as a file with sound checksums, with other values at the top."""
    write_results(folder / "results.json", {**results.raw, **changes})
    return folder


def test_results_that_were_changed_on_purpose_are_written_with_a_new_checksum(finished, tmp_path):
    first = load_results(finished[1])
    assert load_results(written(first, tmp_path, command="another")).raw["command"] == "another"


@pytest.mark.parametrize(
    "changes", [{"device": "cuda:99"}, {"device": "no-such"}, {"of_another_version": [1]}], ids=str
)
def test_results_of_another_machine_or_version_are_read(changes, finished, tmp_path):
    settings = finished[0].settings | changes
    results = load_results(written(finished[0], tmp_path, settings=settings))
    assert results.settings.items() >= changes.items()
    if "of_another_version" in changes:  # a report reads no device
        assert write_report(results, tmp_path / "report").exists()


@pytest.mark.parametrize("changes", [{"device": 3}, {"horizon": "x"}, {"lambda_min": 0.95}], ids=str)
def test_settings_that_cannot_be_are_still_damage(changes, finished, tmp_path):
    with pytest.raises(ResultsError, match=r"is damaged .*settings: "):
        load_results(written(finished[0], tmp_path, settings=finished[0].settings | changes))


@pytest.mark.parametrize("column", ["lambda_", "retain_ess", "forget_ess"])
def test_a_trace_lacks_no_column_that_a_report_reads(column, finished, tmp_path):
    cells = copy.deepcopy(finished[0].cells)
    for cell in cells:
        cell.pop("checksum", None)
        cell.get("trace", {}).pop(column, None)
    with pytest.raises(ResultsError, match=f"is damaged .*trace lacks {column}"):
        load_results(written(finished[0], tmp_path, cells=cells))


def test_a_report_reads_no_other_column_of_a_trace(finished, tmp_path):
    cells = copy.deepcopy(finished[0].cells)
    for cell in cells:
        cell.pop("checksum", None)
        if "trace" in cell:
            cell["trace"] = {name: cell["trace"][name] for name in NEEDED_COLUMNS}
    assert write_report(load_results(written(finished[0], tmp_path, cells=cells)), tmp_path / "report").exists()


def test_a_number_that_is_not_finite_is_no_measurement(finished):
    cell = {k: v for k, v in finished[0].cells[-1].items() if k != "checksum"}
    assert fault(cell, require_checksum=False) is None
    for value in (float("inf"), float("nan")):
        for bad in ({"episode_return": value}, {"metrics": cell["metrics"] | {"forget_loss": value}}):
            assert "finite" in fault(cell | bad, require_checksum=False)


@pytest.mark.parametrize(("count", "good"), [(3, False), (4, True), (5, False), (10**6, False)])
def test_samples_have_as_many_bytes_as_their_shape_says(count, good):
    packed = base64.b64encode(zlib.compress(bytes(count))).decode()
    with contextlib.nullcontext() if good else pytest.raises(ValidationError, match="no float16 array of shape"):
        Samples(shape=[1, 2], dtype="float16", data=packed)


def test_committed_results_are_all_read():
    found = [path for path in sorted((ROOT / "docs").rglob("results.json")) if path.parent.name != "transfer"]
    assert len(found) > 50
    for path in found:
        load_results(path.parent)

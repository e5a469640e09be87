"""Agents scored on instances: the table, resuming, and runs that diverge."""

from __future__ import annotations

import json

import pytest

from agents.transfer import RETAIN_COEF, Score, transfer
from unlearn_gym.errors import LockError, PolicyError, ResultsError
from unlearn_gym.files import sha256
from unlearn_gym.policies.registry import SHIPPED_AGENTS

COOL = [{"task": "gaussians-2d", "horizon": 3}, {"task": "gaussians-2d:3", "horizon": 4}]
HOT = {"task": "gaussians-2d", "horizon": 400, "learning_rate": 0.1, "forget_scale": 100}


@pytest.fixture(autouse=True)
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = [{"task": "gaussians-2d:5"}]
    for name, instances in {
        "one": COOL,
        "two": [*COOL, {"task": "gaussians-2d:6", "horizon": 3}],
        "hot": [HOT],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"test": instances, "train": other}))


def rows(page):
    return [
        line.split(" | ")[:2]
        for line in page.read_text().splitlines()
        if line.startswith("| ") and "tested" not in line
    ]


def test_every_policy_has_a_row_for_every_set_also_where_sets_share_instances(tmp_path, capsys):
    page = transfer(("prior",), on=("one.json/test", "two.json/test"), statics=("static:0.5",), out=tmp_path / "out")
    assert rows(page) == [[f"| {s}.json/test", p] for s in ("one", "two") for p in ("static:0.5", "prior")]
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert len(scores) == 2 * 3
    again = transfer(("prior",), on=("two.json/test",), statics=("static:0.5",), out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"] == scores
    assert len(rows(again)) == 2


def test_options_are_part_of_what_a_score_depends_on(tmp_path):
    arguments = {"on": ("one.json/test",), "statics": ("static:0.5",), "out": tmp_path / "out"}
    transfer(("prior",), **arguments)
    transfer(("prior",), option=("observation=extended",), **arguments)
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert len(scores) == 2 * 2 * 2


def test_an_agents_scores_are_kept_by_its_files_hash(tmp_path):
    agent = SHIPPED_AGENTS / "gaussians-2d" / "ppo.zip"
    page = transfer((str(agent),), on=("two.json/test",), statics=("static:0.1", "static:0.5"), out=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())["agents"]
    assert list(kept) == [sha256(agent)]
    found = kept[sha256(agent)]["two.json/test"]
    assert f"{found['difference'][0]:+.3f} [" in page.read_text()
    assert f"{found['score'][0]:.3f} [" in page.read_text()


def test_an_agent_that_knows_a_task_of_the_set_is_named(tmp_path):
    agent = SHIPPED_AGENTS / "gaussians-2d" / "ppo.zip"
    page = transfer((str(agent),), on=("one.json/test",), statics=("static:0.5",), out=tmp_path / "out")
    assert f"{agent} was trained on gaussians-2d, of which one.json/test has instances." in page.read_text()
    page = transfer(("prior",), on=("one.json/test",), statics=("static:0.5",), out=tmp_path / "out")
    assert "was trained on" not in page.read_text()


def test_the_score_is_forgetting_less_damage():
    assert Score(0.7, 0.02, 0.5, -1.0).score == pytest.approx(0.7 - RETAIN_COEF * 0.02)
    assert Score(0.7, -0.02, 0.5, -1.0).score == 0.7


def test_a_diverged_episode_has_no_figures_and_is_not_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.transfer._env_of", diverging(monkeypatch))
    page = transfer(("prior",), on=("one.json/test",), statics=("static:0.1", "static:0.5"), out=tmp_path / "out")
    text = page.read_text()
    assert "nan" not in text
    assert "| one.json/test | static:0.1 | – | – | – | – | – | – |" in text
    assert "best static" in next(line for line in text.splitlines() if "static:0.5" in line and "|" in line[:2])


def test_an_agent_that_diverges_has_no_score_and_the_page_is_written(tmp_path, monkeypatch):
    agent = SHIPPED_AGENTS / "gaussians-2d" / "ppo.zip"
    hot = ("optimizer=sgd", "learning_rate=1e30", "max_grad_norm=null")
    page = transfer((str(agent),), on=("one.json/test",), statics=("static:0.5",), option=hot, out=tmp_path / "out")
    assert "nan" not in page.read_text()
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())["agents"]
    assert kept[sha256(agent)]["one.json/test"] == {"score": None, "difference": None, "p_value": None}


def diverging(monkeypatch):
    """Environments of which the first whole episode, that of static:0.1 on the first instance, diverges."""
    import agents.transfer as module

    real, run = module._env_of, module.run_episode

    def run_episode(env, policy, seed, **options):
        episode = run(env, policy, seed, **options)
        episode.diverged = getattr(policy, "lambda_", None) == 0.1
        return episode

    monkeypatch.setattr(module, "run_episode", run_episode)
    return real


@pytest.mark.parametrize("content", ["{", "{}", '{"scores": []}', '{"scores": {"a": {}}}', '{"scores": {"a": [1]}}'])
def test_scores_of_the_wrong_shape_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ResultsError, match="holds no scores") as caught:
        transfer(("prior",), on=("one.json/test",), out=tmp_path)
    assert "\n" not in str(caught.value)


def test_no_changed_score_is_believed(tmp_path):
    arguments = {"on": ("one.json/test",), "statics": ("static:0.5",), "out": tmp_path / "out"}
    transfer(("prior",), **arguments)
    path = tmp_path / "out" / "results.json"
    content = json.loads(path.read_text())
    next(iter(content["scores"].values()))["forgotten"] += 1.0
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="do not match their checksum"):
        transfer(("prior",), **arguments)


def test_scores_in_a_folder_in_use_are_left_alone(locked):
    with pytest.raises(LockError, match="in use"):
        transfer(("prior",), on=("one.json/test",), out=locked)


def test_bad_input_is_named_before_anything_runs(tmp_path):
    with pytest.raises(PolicyError, match="unknown policy 'finetune'"):
        transfer(("finetune",), on=("one.json/test",), out=tmp_path / "out")
    with pytest.raises(PolicyError, match=r"there is no .*none.zip"):
        transfer(("none.zip",), on=("one.json/test",), out=tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("[]")
    with pytest.raises(ResultsError, match="holds no scores"):
        transfer(("prior",), on=("one.json/test",), out=tmp_path / "out")

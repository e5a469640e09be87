"""The README's Python blocks run, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from unlearn_gym.cli import COMMANDS
from unlearn_gym.making.shipped import SCORES, shipped_agents
from unlearn_gym.tasks.instances import shipped_sets

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "docs" / "experiments"
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), ids=lambda b: b[:30])
def test_python_blocks_run(block):
    namespace: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert "env" in namespace


@pytest.mark.parametrize(
    "page", sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem != "diffusers"), ids=lambda p: p.stem
)  # that one needs an extra and a folder: tests/test_diffusers.py
def test_python_blocks_of_the_documentation_run(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), {"__name__": "block"})


def test_the_policies_of_ones_own_in_the_documentation_stand_in_a_report(tmp_path, monkeypatch):
    from unlearn_gym.comparison.comparison import Comparison, run_comparison
    from unlearn_gym.metrics.judge import EvaluationSettings
    from unlearn_gym.report.report import write_report

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(blocks[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    policies = ("static:0.5", "mine:Follow", "mine:middle")
    comparison = Comparison("gaussians-2d", policies, (0,), {"horizon": 5}, EvaluationSettings(250, 250))
    results = run_comparison(comparison, tmp_path / "out")
    write_report(results, tmp_path / "out")
    assert all(policy in (tmp_path / "out" / "report.md").read_text() for policy in policies)
    assert results.values("mine:middle", "forget_loss") == results.values("static:0.5", "forget_loss")


def test_the_documentation_lists_the_agents_that_ship(capsys):
    COMMANDS["agents"]()
    printed = capsys.readouterr().out.rpartition("\n\nin ")[0]
    assert printed in (ROOT / "docs" / "agents.md").read_text()


def test_every_agent_that_ships_has_its_scores_on_the_test_instances():
    scores = json.loads(SCORES.read_text())
    assert scores == json.loads((ROOT / "docs" / "transfer" / "scores.json").read_text())
    for manifest in shipped_agents().values():
        assert set(scores["agents"][manifest.sha256]) == {f"{name}/test" for name in shipped_sets()}


def test_every_command_named_exists():
    named = set(re.findall(r"`unlearn-gym ([a-z-]+)", README))
    assert named
    assert named <= set(COMMANDS)


def test_every_linked_file_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_results_table_is_that_of_the_committed_results():
    from unlearn_gym.comparison.results import load_results
    from unlearn_gym.report.tables import markdown_table, summary

    results = load_results(ROOT / "docs" / "experiments" / "rl-against-vi" / "mnist-trousers")
    assert markdown_table(*summary(results)) in README
    assert results.raw["command"] in README


@pytest.mark.parametrize(("page", "tables"), [("findings.md", r"\|"), ("objectives.md", r"\| arm \|")])
def test_every_row_of_a_table_of_results_is_of_a_committed_page(page, tables):
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "experiments").rglob("*.md"))
    blocks = re.findall(rf"^{tables}.*\n(?:\|.*\n)+", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    rows = [row for block in blocks for row in block.splitlines()]
    assert len(rows) > 20
    assert [row for row in rows if row not in pages] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_every_file_that_a_page_links_exists(page):
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/*/results.json")), ids=lambda p: p.parts[-3])
def test_committed_results_are_of_this_data_these_weights_and_these_settings(path, monkeypatch):
    """With the torch that made them the command resumes from them: the keys of their cells are what is hashed here."""
    from unlearn_gym.comparison.comparison import Comparison
    from unlearn_gym.comparison.results import load_results
    from unlearn_gym.metrics.judge import EvaluationSettings

    results = load_results(path.parent)
    monkeypatch.setattr("torch.__version__", "2.14.1+cu130")
    assert results.raw["versions"]["torch"] == "2.14.1"  # the version as installed, without what it was built for
    raw = results.raw["comparison"]
    evaluation = EvaluationSettings(**raw["evaluation"])
    comparison = Comparison(raw["task"], tuple(raw["policies"]), tuple(raw["seeds"]), raw["options"], evaluation)
    keys = comparison.cell_keys()
    assert len(results.cells) == len(comparison.cells())
    assert [c["policy"] for c in results.cells if c["key"] != keys[c["policy"]]] == []


REPLAYED = {
    "static-replication/gaussians-2d": 60,
    **{f"objectives/gaussians-2d-{name}": 20 for name in ("bernoulli", "erasediff", "naive", "neggrad", "retrack")},
    **{f"objectives/{name}": 2 for name in ("sfd-hybrid", "vae-siss", "vae-siss-stopped")},
    **{f"static-replication/{name}": 2 for name in ("mnist-trousers", "mnist-tshirt")},
}


@pytest.mark.parametrize(("name", "updates"), REPLAYED.items())
def test_committed_runs_begin_as_this_code_runs_them(name, updates):
    """What each update measured of a run at a static λ, within 0.2 % whatever torch and processor.

    Rounding differs by 3e-5 between the machines that we tried; weights that are a millionth off make up to 3e-4.
    """
    from unlearn_gym.comparison.results import load_results
    from unlearn_gym.envs import SISSUnlearnEnv

    results = load_results(EXPERIMENTS / name)
    cell = next(c for c in results.cells if c["policy"].startswith("static:") and c["seed"] == 0)
    env = SISSUnlearnEnv(results.task, **results.raw["comparison"]["options"])
    env.reset(seed=0)
    terms = [env.step(float(cell["policy"].partition(":")[2]))[4]["terms"] for _ in range(updates)]
    assert {"siss_loss", "update_norm", "forget_fraction"} <= cell["trace"].keys()
    for quantity, expected in cell["trace"].items():
        found = [term[quantity] for term in terms]
        assert found == pytest.approx(expected[:updates], rel=2e-3, abs=1e-6), quantity


def test_the_performance_table_is_that_of_the_committed_benchmark():
    from unlearn_gym.benchmark.suite import ITEMS, goals_table, load, report

    result = load(ROOT / "docs" / "benchmark")
    assert goals_table(result) in README
    assert set(result["items"]) == set(ITEMS)
    assert not result["quick"]
    assert (ROOT / "docs" / "benchmark" / "bench.md").read_text() == report(result) + "\n"


def test_the_costs_in_the_table_of_objectives_are_those_of_the_committed_benchmark():
    from unlearn_gym.benchmark.suite import figures_of, load
    from unlearn_gym.run.objectives.epsilon import EPSILON_OBJECTIVES

    measured = {figure.name: figure.value for figure in figures_of(load(ROOT / "docs" / "benchmark"))}
    lines = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    for name in EPSILON_OBJECTIVES:
        own, siss = (
            ", ".join(
                f"{measured[f'{task}, {name}: update / {of}']:.2f}" for task in ("mnist-trousers", "gaussians-2d")
            )
            for of in (
                "its passes and optimizer step alone, all samples in all passes",
                "update of siss, both as shipped",
            )
        )
        assert [line for line in lines if line.startswith(f"| `{name}` |") and line.endswith(f"| {own} | {siss} |")]


def test_the_network_table_names_the_shipped_network_as_chosen():
    import json

    from unlearn_gym.benchmark.network_table import CANDIDATES
    from unlearn_gym.tasks import get_task

    rows = json.loads((ROOT / "docs" / "networks.json").read_text())["rows"]
    assert [row["network"] for row in rows] == list(CANDIDATES)
    assert get_task("mnist-trousers").network in CANDIDATES.values()

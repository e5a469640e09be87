"""JSON and YAML: read by one reader each, which refuses what no file here can mean."""

from __future__ import annotations

import json

import pytest

from unlearn_gym.errors import (
    PolicyError,
    ResultsError,
    SettingsError,
    shown,
)
from unlearn_gym.files import FormatError, parse_json, read_json, read_yaml
from unlearn_gym.making.experiment import load_experiment
from unlearn_gym.tasks.instances import build_instances, load_instances

from .conftest import fails, label


def yaml_of(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return path


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = [
    ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"), ("a: {b: 1, b: 1}", "twice"),
    ("- {1: a, 0x1: b}", "twice"), (BOMB, "more than 100,000 values"), ("a: &a [*a]", "within itself"),
    ("[" * 1000 + "]" * 1000, "levels deep"), ("a: 2025-13-01", "month"), ('a: !!int ""', "does not know"),
    ("a: !!timestamp x", "does not know"), ("a: !!bool maybe", "does not know"), ("a: " + "9" * 5000, "does not know"),
    ("a: !!python/name:os.system ", "not YAML"), ("? [1]\n: 2", "unhashable"), ("a: *b", "undefined alias"),
    ("a: 1\n---\nb: 2", "single document"), ("# " + "x" * 2**20, "bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_YAML, ids=[shown(text)[:30] for text, _ in BAD_YAML])
def test_bad_yaml_is_one_line_in_whatever_reads_it(tmp_path, text, message):
    from agents.config import load_config

    path = yaml_of(tmp_path, text)
    assert message in fails(FormatError, read_yaml, path)
    assert message in fails(ResultsError, load_experiment, str(path))
    assert message in fails(SettingsError, build_instances, path, tmp_path / "out.json", "")
    assert message in fails(SettingsError, load_config, "ppo", "gaussians-2d", path)


def test_good_yaml_is_read_as_yaml_1_2_has_it(tmp_path):
    text = "a: &a {x: 1, y: 1e-4}\nb: {<<: *a, x: 2}\nc: {<<: *a}\nd: [1E5, .5e1, -2e+1, 1e, e5, 0.5]\n"
    assert read_yaml(yaml_of(tmp_path, text)) == {
        "a": {"x": 1, "y": 1e-4}, "b": {"x": 2, "y": 1e-4}, "c": {"x": 1, "y": 1e-4},
        "d": [1e5, 5.0, -20.0, "1e", "e5", 0.5],
    }  # fmt: skip


def test_an_experiment_of_a_billion_seeds_or_a_text_for_a_number_is_refused(tmp_path):
    arm = "arms: [{name: a, task: gaussians-2d, policies: ['static:0.5']}]\nquestion: x\n"
    for field in ("seeds: 1000000000", "seeds: '3'", "seeds: true", "num_samples: yes"):
        path = yaml_of(tmp_path, arm + field)
        assert field.split(":")[0] in fails(ResultsError, load_experiment, str(path))


DEEP = "[" * 100_000 + "]" * 100_000
BAD_JSON = [
    DEEP,
    '{"a":' * 100_000,
    '{"a": 1, "a": 2}',
    '{"a": NaN}',
    "[-Infinity]",
    '{"note": 1e999}',
    "[-1e400]",
    "1" * 5000,
    "{",
    "",
]


@pytest.mark.parametrize("text", BAD_JSON, ids=label)
def test_bad_json_is_one_line_in_whatever_reads_it(tmp_path, text):
    from unlearn_gym.comparison.results import load_results
    from unlearn_gym.comparison.store import CellStore
    from unlearn_gym.policies.manifest import read_manifest

    fails(FormatError, parse_json, text)
    for name in ("results.json", "set.json", "agent.json"):
        (tmp_path / name).write_text(text)
    fails(FormatError, read_json, tmp_path / "results.json")
    fails(ResultsError, load_results, tmp_path)
    fails(SettingsError, load_instances, f"{tmp_path}/set.json/train")
    fails(PolicyError, read_manifest, tmp_path / "agent.zip")
    store = CellStore(tmp_path)
    store.path("static:0.5", 0, "key").write_text(text)
    assert store.read("static:0.5", 0, "key") is None


def test_shipped_json_is_json_without_duplicates():
    from importlib.resources import files
    from pathlib import Path

    found = list(Path(str(files("unlearn_gym"))).rglob("*.json"))
    assert found
    for path in found:
        assert read_json(path) == json.loads(path.read_text())


def test_a_number_too_large_is_named_and_the_largest_one_is_read():
    assert "1e999" in fails(FormatError, parse_json, '{"note": 1e999}')
    assert "too large" in fails(FormatError, parse_json, "9" * 400 + ".0")
    assert parse_json("[1.7976931348623157e308, -1.5e308, 1e-999]") == [1.7976931348623157e308, -1.5e308, 0.0]

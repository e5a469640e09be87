"""CIFAR-10: torchvision's own path on small files in its format, and the way from no weights to a running task."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from unlearn_gym.benchmark.networks import CANDIDATES, network_costs
from unlearn_gym.cli import main
from unlearn_gym.comparison.comparison import Comparison, run_comparison
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import DataError, TaskError, WeightsError
from unlearn_gym.metrics import inception
from unlearn_gym.metrics.evaluator import Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.metrics.quality import class_score, fid, kid
from unlearn_gym.models import UNetConfig, build_network
from unlearn_gym.report.report import write_report
from unlearn_gym.tasks import (
    HOME_VARIABLE,
    TaskFamily,
    get_task,
    load_data,
    make_cifar10,
    register_family,
    registry,
    task_names,
    to_model_range,
    user_folder,
)
from unlearn_gym.tasks.cifar import CLASSES, NETWORK

from .conftest import TASKS

TINY = UNetConfig(image_channels=3, image_size=32, channels=(8, 8), num_blocks=1, embedding_dim=16, num_classes=10)
NUM_BATCH, NUM_TEST = 40, 250


def write_batches(root: Path) -> dict[str, str]:
    """CIFAR-10's files with few images in them, every class equally often; returns their MD5 sums."""
    rng, folder = np.random.default_rng(0), root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    sizes = {**{f"data_batch_{i}": NUM_BATCH for i in range(1, 6)}, "test_batch": NUM_TEST}
    contents: dict[str, dict] = {
        name: {
            "data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
            "labels": rng.permutation(np.arange(n) % 10).tolist(),
        }
        for name, n in sizes.items()
    }
    contents["batches.meta"] = {"label_names": list(CLASSES)}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    """A data root whose files torchvision takes for the published ones."""
    folder = tmp_path_factory.mktemp("cifar")
    sums = write_batches(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_list", "test_list"):
            patch.setattr(CIFAR10, name, [[file, sums[file]] for file, _ in getattr(CIFAR10, name)])
        patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
        yield folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The name of a family that is ``cifar10`` but for a network that trains in a second, in an empty home."""

    def make(classes: tuple[int, ...], name: str):
        full = make_cifar10(classes, name.replace("cifar10-tiny", "cifar10"))
        return dataclasses.replace(full, name=name, network=TINY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
        register_family(TaskFamily("cifar10-tiny", num_classes=10, default=(0,), make=make))
        shell_tasks = {*registry.SHELL_TASKS, "cifar10-tiny"}  # run_commands stays in this process
        patch.setattr(registry, "SHELL_TASKS", shell_tasks)
        yield "cifar10-tiny"


def run_commands(message: str, root: Path) -> None:
    """Run all commands that ``message`` names, at a small size."""
    small = {"pretrain": "--updates 2 --batch-size 8", "calibrate": "--num-batches 64"}
    commands = [shlex.split(command) for command in re.findall(r"'unlearn-gym ([^']+)'", message)]
    assert [command[0] for command in commands] == ["pretrain", "pretrain", "calibrate"]
    for command in commands:
        words = [str(root) if word == "DIR" else word for word in command]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["unlearn-gym", *words, *small[command[0]].split()])
            main()


@pytest.fixture(scope="module")
def trained(tiny, root):
    """:func:`tiny`, after the commands that its own refusal names."""
    with pytest.raises(WeightsError) as caught:
        SISSUnlearnEnv(tiny)
    run_commands(str(caught.value), root)
    return tiny


def test_what_is_loaded_is_what_torchvision_reads(root):
    data = load_data(get_task("cifar10:3,5"), root)
    for train, kept, forgotten in ((True, "retain", "forget"), (False, "heldout", "unseen")):
        published = CIFAR10(str(root), train=train)
        labels = np.array(published.targets)
        for name, chosen in ((kept, ~np.isin(labels, [3, 5])), (forgotten, np.isin(labels, [3, 5]))):
            images = getattr(data, name)
            assert images.dtype == torch.uint8
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), published.data[chosen])
            assert getattr(data, f"{name}_labels").tolist() == labels[chosen].tolist()


@pytest.mark.parametrize("classes", [(0,), (3, 5), (1, 2, 4, 6, 7, 8, 9)])
def test_classes_part_the_train_and_the_test_split(classes, root):
    data = load_data(get_task(f"cifar10:{','.join(map(str, classes))}"), root)
    assert set(data.forget_labels.tolist()) == set(data.unseen_labels.tolist()) == set(classes)
    assert set(data.retain_labels.tolist()) == set(data.heldout_labels.tolist()) == set(range(10)) - set(classes)
    assert len(data.retain) + len(data.forget) == 5 * NUM_BATCH
    assert len(data.heldout) + len(data.unseen) == NUM_TEST


def test_members_have_one_name_each_and_share_the_pretrained_weights():
    task = get_task("cifar10:5,3")
    assert task is get_task("cifar10:3,5")
    assert get_task("cifar10:0") is get_task("cifar10")
    assert task.pretrained_path == get_task("cifar10").pretrained_path
    assert task.oracle_path.parent.name == "3-5"
    assert (task.forget_classes, task.probe_labels) == ((3, 5), (3, 5))
    assert "3 (cat), 5 (dog)" in task.description
    assert {*TASKS, "cifar10"} <= set(task_names())
    assert pickle.loads(pickle.dumps(task)) == task
    for name in ("cifar10:10", "cifar10:cat", "cifar10:"):
        with pytest.raises(TaskError, match=r"different classes in 0\.\.9"):
            get_task(name)


def test_without_a_data_root_one_line_says_what_to_give(monkeypatch):
    monkeypatch.delenv("UNLEARN_GYM_DATA_ROOT", raising=False)
    with pytest.raises(DataError, match=r"'cifar10' ships no data: .*--data-root .*UNLEARN_GYM_DATA_ROOT") as caught:
        load_data(get_task("cifar10"))
    assert "\n" not in str(caught.value)


class Trap:
    """A pickle that leaves a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["no folder", "empty", "missing", "truncated", "other pickle", "no names"])
def test_files_that_are_not_the_published_ones_are_refused_unread(damage, tmp_path):
    if damage not in ("no folder", "empty"):
        write_batches(tmp_path / "data")
    elif damage == "empty":
        (tmp_path / "data").mkdir()
    folder = tmp_path / "data" / CIFAR10.base_folder
    if damage == "missing":
        (folder / "test_batch").unlink()
    elif damage == "truncated":
        (folder / "data_batch_2").write_bytes((folder / "data_batch_2").read_bytes()[:-9])
    elif damage == "other pickle":
        (folder / "data_batch_1").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    elif damage == "no names":
        (folder / "batches.meta").write_bytes(b"")
    message = "is not a folder" if damage == "no folder" else "no usable CIFAR10 under"
    with pytest.raises(DataError, match=message) as caught:
        load_data(get_task("cifar10"), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_the_task_refuses_in_one_line_until_its_weights_are_made(tmp_path):
    code = (
        "import gymnasium as gym, unlearn_gym\n"
        "one, several = {'task': 'cifar10', 'reward': 'potential'}, {'instances': ['gaussians-2d', 'cifar10:3,5']}\n"
        "for make, options in ((gym.make, one), (gym.make, several), (gym.make_vec, {**one, 'num_envs': 2})):\n"
        "    try: make('SISSUnlearn-v0', **options)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {"PATH": "", HOME_VARIABLE: str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    pretrain = "'unlearn-gym pretrain --task cifar10 --data-root DIR --download'"
    for line, member in zip(lines, ("cifar10", "cifar10:3,5", "cifar10"), strict=True):
        assert line.startswith(f"WeightsError task '{member}' ships no weights, and there is no {tmp_path}/cifar10/")
        retain_only = f"'unlearn-gym pretrain --task {member} --data-root DIR --retain-only'"
        calibrate = f"'unlearn-gym calibrate --task {member} --data-root DIR'"
        assert line.index(pretrain) < line.index(retain_only) < line.index(calibrate)
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_a_folder_is_named_before_any_training(tmp_path, monkeypatch, capsys, root, tiny):
    (tmp_path / "file").touch()
    arguments = ["pretrain", "--task", tiny, "--data-root", str(root), "--out", str(tmp_path / "file" / "cifar10")]
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_the_folder_of_the_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    default, beside = tmp_path / ".local/share/unlearn_gym", Path.cwd() / "beside"
    for value, folder in (("", default), ("~/mine", tmp_path / "mine"), ("/a", Path("/a")), ("beside", beside)):
        monkeypatch.setenv(HOME_VARIABLE, value)
        assert user_folder() == folder


def test_after_the_commands_of_the_refusal_the_task_runs(trained, root):
    task = get_task(trained)
    assert {path.name for path in task.assets.glob("*.json")} == {"pretrained.json", "oracle.json", "constants.json"}
    assert task.unseen_forget_loss > 0  # measured on the oracle
    assert task.oracle_model().config == task.pretrained_model().config == TINY
    for options in ({}, {"reward": "potential", "potential_cap": 10.0}, {"observation": "extended"}):
        env = SISSUnlearnEnv(trained, data_root=root, horizon=2, batch_size=4, render_mode="rgb_array", **options)
        obs, _ = env.reset(seed=0)
        assert obs.shape == ((12,) if "observation" in options else (6,))
        obs, reward, terminated, _, info = env.step(np.array([0.5], dtype=np.float32))
        assert np.isfinite([*obs, reward]).all()
        assert not terminated
        assert not info["diverged"]
    assert env.render().shape == (540, 960, 3)


def test_members_of_a_trained_family_run_on_its_weights_and_say_how_to_make_an_oracle(trained, root):
    member = f"{trained}:3,5"
    env = SISSUnlearnEnv(member, data_root=root, horizon=2, batch_size=4)
    env.reset(seed=0)
    env.step(np.array([0.5], dtype=np.float32))
    task = get_task(member)
    assert task.constants.retain_loss == get_task(trained).constants.retain_loss
    with pytest.raises(TaskError, match=r"pretrain --task cifar10-tiny:3,5 --data-root DIR --retain-only --out \S+3-5"):
        task.oracle_model()


def test_a_comparison_without_a_classifier_reports_what_there_is(trained, root, tmp_path):
    evaluation = EvaluationSettings(20, 200, num_inference_steps=2)
    comparison = Comparison(trained, ("static:0.5",), (0,), {"horizon": 2, "batch_size": 4}, evaluation, str(root))
    results = run_comparison(comparison, tmp_path)
    report = write_report(results, tmp_path).read_text()
    assert {cell["policy"] for cell in results.cells} == {"untouched", "oracle", "static:0.5"}
    metrics = results.cells[0]["metrics"]
    assert {"forget_loss", "retain_loss", "membership_auc", "oracle_error"} <= set(metrics)
    assert "the task has no classifier" in report
    assert "inception_fid" not in metrics
    assert results.cells[0]["absent"]["inception_fid"] == "no Inception weights were given"


def test_a_finished_trainings_checkpoint_is_no_part_of_a_comparison(trained, root):
    comparison = Comparison(trained, ("static:0.5",), (0,), {}, EvaluationSettings(200, 200), str(root))
    keys, checkpoint = comparison.cell_keys(), get_task(trained).assets / "pretrained.checkpoint.safetensors"
    content = checkpoint.read_bytes()
    checkpoint.unlink()
    assert comparison.cell_keys() == keys
    checkpoint.write_bytes(content)


class Pools(torch.nn.Module):
    """A stand-in for Inception on what it takes: uint8 images of three channels."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        features = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255
        return features, 10 * features


def test_inception_judges_where_no_classifier_does(trained, root, monkeypatch):
    monkeypatch.setattr(inception, "_extractor", lambda path: Pools())
    task = get_task(trained)
    data = load_data(task, root)
    settings = EvaluationSettings(200, 200, num_inference_steps=2, inception_weights="weights.pth")
    result = Evaluator(task, data, settings).evaluate(task.pretrained_model())
    (drawn, logits), (real, _) = (
        inception.inception_features(images, Path("weights.pth"))
        for images in (result.quality_samples, to_model_range(data.heldout))
    )
    assert result.quality_samples.shape == (200, 3, 32, 32)
    assert result.forget_samples is None
    assert result.metrics["inception_fid"] == pytest.approx(fid(drawn, real))
    assert result.metrics["inception_kid"] == pytest.approx(kid(drawn, real))
    assert result.metrics["inception_score"] == pytest.approx(class_score(logits))
    assert result.absent["forget_rate"] == result.absent["feature_fid"] == "the task has no classifier"


def test_grey_and_colour_images_are_one_to_inception(monkeypatch):
    monkeypatch.setattr(inception, "_extractor", lambda path: Pools())
    grey = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = zip(*(inception.inception_features(x, Path("w")) for x in (grey, grey.repeat(1, 3, 1, 1))), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_the_network_is_one_of_the_candidates_and_takes_the_images():
    assert NETWORK in CANDIDATES.values()
    model = build_network(NETWORK)
    labels = torch.tensor([0, 9])
    assert model(torch.zeros(2, 3, 32, 32), torch.tensor([0, 999]), labels).shape == (2, 3, 32, 32)
    header, _, row = network_costs({"tiny": TINY}, rounds=1).splitlines()
    assert header.startswith("| network | parameters |")
    assert row.startswith(f"| tiny | {sum(p.numel() for p in build_network(TINY).parameters()):,} | ")

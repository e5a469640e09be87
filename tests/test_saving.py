"""Unlearned models outlive their run: copies that others can save, files that say what they are."""

from __future__ import annotations

import copy
import dataclasses
import json

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch.utils._python_dispatch import TorchDispatchMode

import unlearn_gym  # noqa: F401
from unlearn_gym.cli import COMMANDS
from unlearn_gym.comparison.cell import final_model
from unlearn_gym.comparison.comparison import Comparison, run_comparison
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import SettingsError, TaskError, WeightsError
from unlearn_gym.math.diffusion import ScheduleConfig
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.models import MLPConfig, UNetConfig, build_network
from unlearn_gym.models.weights import save_weights
from unlearn_gym.tasks import get_task
from unlearn_gym.tasks.saving import Header, load_model, read_header, save_model

from .conftest import TASKS

KINDS = ("gaussians-2d", "mnist-digits", "sfd-mnist-digits", "vae-mnist-trousers")


def after_a_step(task="gaussians-2d", **options) -> SISSUnlearnEnv:
    env = SISSUnlearnEnv(task, horizon=4, **options)
    env.reset(seed=0)
    env.step(0.5)
    return env


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("task", KINDS)
def test_every_library_saves_an_export_and_reads_it_back_to_the_bit(task, tmp_path):
    run = after_a_step(task).run
    exported = run.export()
    assert type(exported) is type(run.model)
    assert equal(exported, run.model)
    save_safetensors(exported, str(tmp_path / "a.safetensors"))
    save_file(exported.state_dict(), tmp_path / "b.safetensors")
    (tmp_path / "c").mkdir()
    pytest.importorskip("huggingface_hub").save_torch_model(exported, tmp_path / "c")
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c" / "model.safetensors"):
        other = get_task(task).build_model()
        load_safetensors(other, path)
        assert equal(other, run.model)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_an_export_and_its_run_are_two(mode):
    run = after_a_step().run
    with mode():
        exported = run.export()
    before = copy.deepcopy(exported.state_dict())
    storages = {tensor.untyped_storage().data_ptr() for tensor in exported.parameters()}
    assert len(storages) == len(list(exported.parameters()))
    assert all(
        tensor.is_contiguous() and tensor.requires_grad and tensor.grad is None for tensor in exported.parameters()
    )
    run.update(0.5)
    assert all(torch.equal(exported.state_dict()[name], value) for name, value in before.items())
    vector = run.flat.vector.detach().clone()
    exported(torch.zeros(3, 2), torch.tensor([0, 1, 2])).sum().backward()
    torch.optim.SGD(exported.parameters(), lr=1.0).step()
    assert not torch.equal(next(iter(exported.parameters())), next(iter(before.values())))
    assert torch.equal(run.flat.vector, vector)


@pytest.mark.parametrize("task", KINDS)
def test_a_saved_model_is_read_back_to_the_bit_by_its_file_alone(task, tmp_path):
    env = after_a_step(task)
    path = env.save(tmp_path / "new" / "model.safetensors")
    assert path == tmp_path / "new" / "model.safetensors"
    assert [found.name for found in path.parent.iterdir()] == ["model.safetensors"]
    for model in (load_model(path), load_model(path, task), load_model(str(path), get_task(task))):
        assert equal(model, env.run.model)
    assert equal(final_model(get_task(task), str(path)), env.run.model)
    header = read_header(path)
    assert header.task == task
    assert header.schedule == get_task(task).schedule


def test_saving_does_not_disturb_the_run(tmp_path):
    vectors = []
    for save in (True, False):
        env = SISSUnlearnEnv("gaussians-2d", horizon=4)
        env.reset(seed=0)
        for _ in range(4):
            env.step(0.5)
            if save:
                env.save(tmp_path / "model.safetensors")
                env.run.export()
        vectors.append(env.run.flat.vector.detach().clone())
    assert torch.equal(*vectors)


def test_a_model_of_a_task_that_is_gone_is_read_by_its_config(tmp_path, monkeypatch):
    from unlearn_gym.tasks import registry

    task = get_task("gaussians-2d")
    path = save_model(task.pretrained_model(), task, tmp_path / "model.safetensors")
    monkeypatch.setattr(registry, "_TASKS", {})
    monkeypatch.setattr(registry, "_FAMILIES", {})
    assert read_header(path).network == MLPConfig()
    assert equal(load_model(path), task.pretrained_model())


def test_a_model_of_a_network_without_a_config_needs_its_task(tmp_path):
    task = get_task("gaussians-2d")
    own = dataclasses.replace(task, name="of-my-own", network=task.build_model)
    path = save_model(own.pretrained_model(), own, tmp_path / "model.safetensors")
    assert read_header(path).network is None
    with pytest.raises(TaskError, match="unknown task 'of-my-own'"):
        load_model(path)
    assert equal(load_model(path, own), task.pretrained_model())


def test_files_that_are_no_saved_models_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(WeightsError, match=r"no weights at .*make them with save\(path\)"):
        load_model(path)
    path.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="does not say what network it is of; give task="):
        load_model(path)
    for text in ("{", '{"task": "gaussians-2d"}', "[1]", '{"task": "a", "schedule": {}, "more": 1}'):
        save_file({"a": torch.zeros(1)}, path, metadata={"unlearn_gym": text})
        with pytest.raises(WeightsError, match="save the model again") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
    after_a_step().save(path)
    with pytest.raises(WeightsError, match="another noise schedule than task 'mnist-digits' has; give the task"):
        load_model(path, "mnist-digits")
    save_file(get_task("gaussians-2d").pretrained_model().state_dict(), path)
    with pytest.raises(WeightsError, match="made for another network"):
        load_model(path, "mnist-digits")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model", "must end with .safetensors"),
        ("model.bin", "must end with .safetensors"),
        (3, "path=3 must be a path"),
    ],
)
def test_paths_that_nothing_can_be_written_to_are_named(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        after_a_step().save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["serial", "stacked", "processes"])
def test_the_models_of_a_vector_environment_are_those_of_single_ones(backend, tmp_path):
    vector = gym.make_vec("SISSUnlearn-v0", num_envs=2, task="gaussians-2d", horizon=4, backend=backend)
    vector.reset(seed=0)
    vector.step([[0.5], [0.3]])
    paths = vector.save(tmp_path)
    vector.close()
    assert [path.name for path in paths] == ["env-0.safetensors", "env-1.safetensors"]
    single = after_a_step().run.model.state_dict()
    for name, value in load_model(paths[0]).state_dict().items():
        torch.testing.assert_close(value, single[name])
    assert not equal(load_model(paths[0]), load_model(paths[1]))


def small(policies=("static:0.5",), **options) -> Comparison:
    return Comparison("gaussians-2d", policies, (0, 1), {"horizon": 3, **options}, EvaluationSettings(200, 200))


def test_a_comparison_keeps_one_model_a_cell(tmp_path):
    results = run_comparison(small(), tmp_path, save_models=True)
    paths = sorted((tmp_path / "models").iterdir())
    assert {path.suffix for path in paths} == {".safetensors"}
    assert [path.stem for path in paths] == sorted(path.stem for path in (tmp_path / "cells").iterdir())
    assert all("model" not in cell for cell in results.cells)
    env = SISSUnlearnEnv("gaussians-2d", horizon=3)
    env.reset(seed=1)
    for _ in range(3):
        env.step(0.5)
    static = next(path for path in paths if path.name.startswith("static") and "seed1" in path.name)
    assert equal(load_model(static), env.run.model)
    assert equal(load_model(next(path for path in paths if path.stem.startswith("oracle"))), env.task.oracle_model())

    written = {path: path.stat().st_mtime_ns for path in paths}
    lost = paths[-1]
    lost.unlink()
    run_comparison(small(), tmp_path, save_models=True)
    assert lost.is_file()
    assert all(path.stat().st_mtime_ns == when for path, when in written.items() if path != lost)


def test_a_run_that_diverged_keeps_no_model_and_is_not_run_again_for_it(tmp_path):
    diverging = small(learning_rate=1e30, max_grad_norm=None)
    results = run_comparison(diverging, tmp_path, save_models=True)
    assert all(cell["diverged"] for cell in results.cells if cell["policy"] == "static:0.5")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*")}
    assert run_comparison(diverging, tmp_path, save_models=True).cells == results.cells
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*")}
    assert not list((tmp_path / "models").glob("static*"))
    assert list((tmp_path / "models").glob("untouched*"))


def test_the_command_evaluates_a_saved_model_on_its_own_task(tmp_path, capsys):
    path = after_a_step("gaussians-2d:2,5", normalize_features=False).save(tmp_path / "model.safetensors")
    COMMANDS["evaluate"](str(path), forget_samples=200, quality_samples=200, out=tmp_path / "figures.json")
    assert "gaussians-2d:2,5" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["metrics"]["forget_loss"] > 0
    assert set(load_file(path)) == set(get_task("gaussians-2d").build_model().state_dict())


def test_a_file_is_the_same_whenever_it_is_written(tmp_path):
    task = get_task("gaussians-2d")
    model = task.pretrained_model()
    contents = {save_model(model, task, tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}
    assert len(contents) == 1


@pytest.mark.parametrize(
    "network",
    [{"hidden": [200_000, 200_000]}, {"hidden": [-3, 0]}, {"dim": 10**12}, {"hidden": [1] * 200_000}, {"hidden": [8]}],
    ids=["wide", "negative", "dim", "deep", "other"],
)
def test_a_header_that_lies_about_its_network_builds_none(network, tmp_path, monkeypatch):
    task, path = get_task("gaussians-2d"), tmp_path / "model.safetensors"
    header = json.loads(Header.of(task).model_dump_json())
    header["network"] |= network
    save_weights(path, task.pretrained_model().state_dict(), {"unlearn_gym": json.dumps(header)})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: pytest.fail("it was built"))
    with pytest.raises(WeightsError):
        load_model(path)


def test_a_header_that_contradicts_the_task_is_refused(tmp_path):
    task, path = get_task("gaussians-2d"), tmp_path / "model.safetensors"
    model = task.pretrained_model()
    save_model(model, task, path)
    with pytest.raises(WeightsError, match="give the task that it was trained for, which it calls 'gaussians-2d'"):
        load_model(path, "mnist-trousers")
    other = Header.of(task).model_copy(update={"schedule": ScheduleConfig(num_train_timesteps=7)})
    save_weights(path, model.state_dict(), other.as_metadata())
    with pytest.raises(WeightsError, match="another noise schedule"):
        load_model(path, task)
    for value in (None, 5, b"x"):
        with pytest.raises(WeightsError, match="must be the path"):
            load_model(value)


def with_header(path, task, network=None, **changes):
    """A file of ``task``'s pretrained weights, whose header says something else."""
    header = json.loads(Header.of(task).model_dump_json()) | changes
    header["network"] = header["network"] if network is None else network
    save_weights(path, task.pretrained_model().state_dict(), {"unlearn_gym": json.dumps(header)})
    return path


@pytest.mark.parametrize("own_code", [False, True])
def test_a_model_of_a_task_by_another_name_is_loaded_with_one_line_of_warning(own_code, tmp_path):
    task = get_task("gaussians-2d")
    first = dataclasses.replace(task, name="renamed-a", network=task.build_model if own_code else task.network)
    second = dataclasses.replace(first, name="renamed-b")
    path = save_model(task.pretrained_model(), first, tmp_path / "new\nline.safetensors")
    with pytest.warns(UserWarning, match="says that it is of task 'renamed-a'; it is taken as one of") as caught:
        model = load_model(path, second)
    assert equal(model, task.pretrained_model())
    (told,) = caught
    assert told.filename == __file__
    assert "\n" not in str(told.message)
    with pytest.warns(UserWarning, match="'renamed-a'"):
        load_model(path, "gaussians-2d")
    if own_code:
        with pytest.raises(TaskError, match=r"unknown task 'renamed-a'.*or give a task whose network"):
            load_model(path)
    other = dataclasses.replace(second, schedule=ScheduleConfig(num_train_timesteps=7))
    with pytest.raises(WeightsError, match="another noise schedule than task 'renamed-b' has"):
        load_model(path, other)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("gaussians-2d:2,5", "gaussians-2d"),
        ("gaussians-2d", "gaussians-2d:2,5"),
        ("gaussians-2d:0,4", "gaussians-2d:1"),
    ],
)
def test_a_model_of_one_member_of_a_family_is_loaded_for_another_without_a_word(name, given, tmp_path):
    path = save_model(get_task(name).pretrained_model(), get_task(name), tmp_path / "model.safetensors")
    assert equal(load_model(path, given), get_task(name).pretrained_model())
    assert equal(load_model(path, name), get_task(name).pretrained_model())


@pytest.mark.parametrize("name", TASKS)
def test_every_shipped_task_takes_the_files_of_its_own_models(name, tmp_path):
    task = get_task(name)
    path = save_model(task.build_model(), task, tmp_path / "model.safetensors")
    assert load_model(path, task).state_dict().keys() == load_model(path).state_dict().keys()


def test_a_task_without_a_name_is_no_missing_task(tmp_path):
    path = after_a_step().save(tmp_path / "model.safetensors")
    with pytest.raises(TaskError, match="unknown task ''"):
        load_model(path, task="")


def test_a_network_that_differs_in_what_no_shape_shows_is_another(tmp_path):
    task = get_task("vae-mnist-trousers")
    path = with_header(tmp_path / "model.safetensors", task, task.network.model_dump(mode="json") | {"std": 0.5})
    assert load_model(path).config.std == 0.5
    with pytest.raises(WeightsError, match="than task 'mnist-trousers' has, kind='vae' and not 'unet'; give the task"):
        load_model(path, dataclasses.replace(get_task("mnist-trousers"), schedule=task.schedule))
    with pytest.raises(WeightsError, match=r"than task 'vae-mnist-trousers' has, std=0\.5 and not 1\.0"):
        load_model(path, task)


@pytest.mark.parametrize(
    ("network", "field"),
    [
        ({"kind": "unet", "num_blocks": 20_000}, "network.unet.num_blocks=20000"),
        ({"kind": "unet", "image_size": 2**20, "channels": [8] * 17}, r"network.unet.channels=\(8, .*at most 16"),
        ({"kind": "mlp", "hidden": [8] * 20_000}, r"network.mlp.hidden=\(8, .*at most 64"),
        ({"kind": "cnn"}, "network={'kind': 'cnn'}: kind must be 'unet', 'mlp', 'vae' or 'diffusers'"),
        ({}, "network={}: kind must be"),
        (3, "network=3: kind must be"),
    ],
    ids=["blocks", "resolutions", "layers", "unknown", "none", "number"],
)
def test_a_header_of_more_layers_than_a_network_has_is_named_by_its_field(network, field, tmp_path, monkeypatch):
    path = with_header(tmp_path / "model.safetensors", get_task("gaussians-2d"), network)
    monkeypatch.setattr("unlearn_gym.tasks.saving.build_network", lambda config: pytest.fail("it was built"))
    with pytest.raises(WeightsError, match=f"{field}.*; save the model again"):
        load_model(path)


def test_the_bounds_of_networks_leave_room():
    for config in (UNetConfig(channels=(8,) * 2, num_blocks=64), MLPConfig(hidden=(8,) * 64)):
        with torch.device("meta"):
            build_network(config)


def test_a_header_longer_than_any_is_not_parsed(tmp_path):
    task, path = get_task("gaussians-2d"), tmp_path / "model.safetensors"
    text = Header.of(task).model_dump_json()
    for length, refused in ((2**16, False), (2**16 + 1, True)):
        save_weights(path, task.pretrained_model().state_dict(), {"unlearn_gym": text.ljust(length)})
        if not refused:
            assert equal(load_model(path), task.pretrained_model())
            continue
        with pytest.raises(WeightsError, match="has a header of 65,537 characters; save the model again"):
            load_model(path)


class Allocations(TorchDispatchMode):
    """Notes the largest tensor outside ``meta`` that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "mlp", "hidden": [1500, 1500]},
        {"kind": "unet", "channels": [8, 512]},
        {"kind": "vae", "hidden_dim": 4000},
        {"kind": "mlp", "dim": 10**7},
    ],
    ids=["mlp", "unet", "vae", "dim"],
)
def test_nothing_of_the_size_that_a_lying_header_claims_is_allocated(network, tmp_path):
    task = get_task("gaussians-2d")
    path = with_header(tmp_path / "model.safetensors", task, network)
    held = max(value.numel() for value in task.pretrained_model().state_dict().values())
    with Allocations() as seen, pytest.raises(WeightsError, match="holds other tensors than the network of its header"):
        load_model(path)
    assert seen.largest <= held
    with Allocations() as seen:
        load_model(save_model(task.pretrained_model(), task, path))
    assert seen.largest >= held  # so the above would have been seen

"""Models of the diffusers library: what they predict, how they are read, and that everything runs on them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
import shutil
import socket
import sys
from pathlib import Path

import cloudpickle
import gymnasium as gym
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import unlearn_gym  # noqa: F401
from unlearn_gym.cli import COMMANDS
from unlearn_gym.errors import DataError, SettingsError, TaskError, WeightsError
from unlearn_gym.math.diffusion import ScheduleConfig, q_sample
from unlearn_gym.metrics.likelihood import ode_nll
from unlearn_gym.models.diffusers_folder import SCHEDULES, WEIGHTS, read_folder
from unlearn_gym.models.diffusers_unet import (
    PREDICTION_TYPES,
    DiffusersConfig,
    excess,
    published_siss_network,
)
from unlearn_gym.models.weights import read_tensors, save_weights
from unlearn_gym.run import UnlearningRun
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import Task, TaskData, get_task, load_data, register_task
from unlearn_gym.tasks.diffusers_pipeline import diffusers_task
from unlearn_gym.tasks.saving import Header, load_model, save_model

from .test_run import plain_update

diffusers = pytest.importorskip("diffusers")

TINY = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "layers_per_block": 1, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
ATTENDING = TINY | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
}  # fmt: skip
T = 50


def images(count, bright, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 100, (count, 1, 8, 8), generator=generator)
    return (noise + 150 * bright).to(torch.uint8)


def load_unlabelled(data_root, download):
    return TaskData(images(64, 0, 0), images(16, 1, 1), images(64, 0, 2))


def load_labelled(data_root, download):
    zeros, ones = torch.zeros(64, dtype=torch.long), torch.ones(16, dtype=torch.long)
    return TaskData(images(64, 0, 0), images(16, 1, 1), images(64, 0, 2), zeros, ones, zeros)


def save_pipeline(folder, arguments=TINY, kind="UNet2DModel", seed=0, **scheduler) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = getattr(diffusers, kind)(**arguments)
    noise = diffusers.DDPMScheduler(**{"num_train_timesteps": T, **scheduler})
    diffusers.DDPMPipeline(unet, noise).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def pipeline(saved, tmp_path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Direct(nn.Module):
    """The library's model as a plain training loop calls it, its output solved for the noise."""

    def __init__(self, folder, kind):
        super().__init__()
        self.unet = getattr(diffusers, kind).from_pretrained(folder / "unet", use_safetensors=True)
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        self.table = None

    def forward(self, x_t, timesteps, labels=None):
        if self.table is not None:
            out = self.unet(x_t, timesteps, encoder_hidden_states=self.table(labels)[:, None]).sample
        else:
            out = self.unet(x_t, timesteps, class_labels=labels).sample
        a = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        match self.scheduler.config.prediction_type:
            case "v_prediction":
                return a.sqrt() * out + (1 - a).sqrt() * x_t
            case "sample":
                return (x_t - a.sqrt() * out) / (1 - a).sqrt()
            case _:
                return out


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [T, 1000])
def test_schedules_are_those_of_the_library(name, steps):
    ends = {} if name == "squaredcos_cap_v2" else {"beta_start": 0.00085, "beta_end": 0.012}
    ours = ScheduleConfig(kind=SCHEDULES[name], num_train_timesteps=steps, **ends).alphas_cumprod()
    theirs = diffusers.DDPMScheduler(steps, beta_schedule=name, **ends).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=0)  # theirs is accumulated in float32
    torch.testing.assert_close(1 - ours, 1 - theirs, rtol=1e-3, atol=0)


def test_a_linear_schedule_is_written_as_before_there_were_others():
    assert ScheduleConfig().model_dump() == {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    for kind in SCHEDULES.values():
        config = ScheduleConfig(kind=kind)
        assert ScheduleConfig.model_validate_json(config.model_dump_json()) == config


def output_of(prediction_type, x_0, noise, alpha_bars):
    a = alpha_bars.view(-1, 1, 1, 1)
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    return {"epsilon": noise, "v_prediction": v, "sample": x_0}[prediction_type]


@pytest.mark.parametrize("kind", SCHEDULES.values())
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_denoiser_predicts_the_same_noise_in_every_parametrisation(kind, prediction_type):
    generator = torch.Generator().manual_seed(0)
    schedule = ScheduleConfig(kind=kind)
    alphas_cumprod, timesteps = schedule.alphas_cumprod(), torch.tensor([0, 1, 20, 500, 998, 999])
    x_0, noise = (torch.randn((6, 1, 8, 8), generator=generator) for _ in range(2))
    x_t = q_sample(x_0, noise, timesteps, alphas_cumprod)
    config = DiffusersConfig(unet=TINY, prediction_type=prediction_type, schedule=schedule)
    network = config()
    network.unet.forward = lambda x, t, **_: (output_of(prediction_type, x_0, noise, alphas_cumprod[t]),)
    found = network(x_t, timesteps)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("labels", ["none", "class_labels", "cross-attention"])
def test_an_update_equals_a_plain_loop_over_the_library_s_own_model(tmp_path, prediction_type, labels):
    kind = "UNet2DConditionModel" if labels == "cross-attention" else "UNet2DModel"
    arguments = ATTENDING if labels == "cross-attention" else TINY
    if labels == "class_labels":
        arguments = arguments | {"num_class_embeds": 2}
    folder = save_pipeline(tmp_path / "pipeline", arguments, kind, prediction_type=prediction_type)
    direct, embedding = Direct(folder, kind), None
    if labels == "cross-attention":
        direct.table, embedding = nn.Embedding(2, 8), tmp_path / "table.safetensors"
        save_file(direct.table.state_dict(), embedding)
    load = load_unlabelled if labels == "none" else load_labelled
    task = diffusers_task("plain", folder, load, tmp_path / "assets", class_embedding=embedding)
    settings = RunSettings(optimizer="sgd", learning_rate=0.01, batch_size=16)
    run = UnlearningRun(task.pretrained_model(), load_data(task), task.schedule.alphas_cumprod(), settings, seed=3)
    optimizer, generator = torch.optim.SGD(direct.parameters(), lr=0.01), torch.Generator().manual_seed(3)
    before = run.flat.vector.detach().clone()
    for lambda_ in (0.4, 0.6):
        plain_update(direct, optimizer, run, generator, lambda_, settings)
        run.update(lambda_)
    assert not torch.equal(run.flat.vector, before)
    found = dict(run.model.named_parameters())
    for name, expected in direct.unet.named_parameters():
        torch.testing.assert_close(found[f"unet.{name}"], expected, rtol=1e-3, atol=2e-5)
    if direct.table is not None:
        torch.testing.assert_close(found["class_embedding.weight"], direct.table.weight, rtol=1e-3, atol=2e-5)


def test_a_call_without_labels_attends_to_zeros_and_one_with_labels_to_their_rows():
    network = DiffusersConfig(architecture="UNet2DConditionModel", unet=ATTENDING, num_classes=3)().eval()
    x, t = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    plain = network(x, t)
    assert not torch.allclose(plain, network(x, t, torch.tensor([0, 2])))
    with torch.no_grad():
        network.class_embedding.weight.zero_()
    assert torch.equal(plain, network(x, t, torch.tensor([0, 2])))


@pytest.mark.parametrize("arguments", [TINY | {"out_channels": 2}, TINY | {"out_channels": 2, "dropout": 0.5}])
def test_variances_are_cut_off_and_dropout_draws_nothing(arguments):
    network = DiffusersConfig(unet=arguments, learned_variance=True)().train()
    x, t = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    assert torch.equal(network(x, t), network.unet(x, t).sample[:, :1])


@pytest.mark.parametrize("num_class_embeds", [None, 11])
def test_the_published_network_takes_a_step(num_class_embeds):
    config = published_siss_network(num_class_embeds)
    labels = None if num_class_embeds is None else torch.zeros(4, dtype=torch.long)
    sets = [torch.full((4, 1, 28, 28), value, dtype=torch.uint8) for value in (0, 255, 10)]
    data = TaskData(*sets, *[labels] * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config()
    run = UnlearningRun(
        model, data, config.schedule.alphas_cumprod(), RunSettings(batch_size=2, forget_grad_rule="loss")
    )
    assert len(run.flat.vector) == sum(p.numel() for p in model.parameters()) > 14e6
    before = run.flat.vector.detach().clone()
    terms = run.update(0.5)
    assert not terms.diverged
    assert torch.isfinite(run.flat.vector).all()
    assert not torch.equal(run.flat.vector, before)


def test_configs_and_tasks_are_values(saved, tmp_path):
    config = read_folder(saved).config
    assert pickle.loads(pickle.dumps(config)) == config == DiffusersConfig.model_validate(config.model_dump())
    assert hash(config) == hash(config.model_copy())
    assert config != config.model_copy(update={"prediction_type": "sample"})
    task = diffusers_task("value", saved, load_unlabelled, tmp_path)
    assert (
        cloudpickle.loads(cloudpickle.dumps(task)) == task == diffusers_task("value", saved, load_unlabelled, tmp_path)
    )


@pytest.fixture(scope="module")
def task(saved, tmp_path_factory) -> Task:
    """Registered, with its oracle and constants made by the commands."""
    assets = tmp_path_factory.mktemp("assets")
    register_task(diffusers_task("tiny-diffusers", saved, load_unlabelled, assets, settings=RunSettings(batch_size=4)))
    COMMANDS["pretrain"]("tiny-diffusers", retain_only=True, updates=2, batch_size=4, out=assets)
    COMMANDS["calibrate"]("tiny-diffusers", num_batches=64)
    return get_task("tiny-diffusers")


def test_an_environment_steps_and_comes_back_to_a_snapshot(task):
    env = gym.make("SISSUnlearn-v0", task=task.name, horizon=4).unwrapped
    assert env.observation_space.contains(env.reset(seed=0)[0])
    env.step([0.5])
    snapshot = env.run.snapshot()
    terms, vector = env.run.update(0.3), env.run.flat.vector.detach().clone()
    env.run.restore(snapshot)
    assert env.run.update(0.3).as_dict()["siss_loss"] == terms.siss_loss
    assert torch.equal(env.run.flat.vector, vector)
    copied = copy.deepcopy(env.run)
    assert copied.update(0.5).siss_loss == env.run.update(0.5).siss_loss
    assert task.constants.unseen_forget_loss > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_runs_of_it_can_be_stacked(task):
    vector = gym.make_vec("SISSUnlearn-v0", num_envs=2, task=task.name, horizon=4, backend="stacked")
    env = gym.make("SISSUnlearn-v0", task=task.name, horizon=4)
    vector.reset(seed=0), env.reset(seed=0)
    rewards, reward = vector.step([[0.5], [0.2]])[1], env.step([0.5])[1]
    assert rewards[0] == pytest.approx(reward, rel=1e-3)
    vector.close()


def test_a_comparison_runs_on_it(task, tmp_path):
    from unlearn_gym.comparison.comparison import Comparison, run_comparison
    from unlearn_gym.metrics.judge import EvaluationSettings

    comparison = Comparison(task.name, ("static:0.5",), (0,), {"horizon": 3}, EvaluationSettings(16, 200))
    results = run_comparison(comparison, tmp_path)
    assert {cell["policy"] for cell in results.cells} == {"untouched", "oracle", "static:0.5"}
    assert results.values("static:0.5", "forget_loss")[0] > 0


def unlearned(folder, assets, load=load_unlabelled, **options):
    """An environment after a step on a task of ``folder``."""
    task = diffusers_task(f"saved-{assets.name}-{assets.parent.name}", folder, load, assets, **options)
    register_task(task)
    env = gym.make("SISSUnlearn-v0", task=task.name, horizon=4, normalize_features=False, batch_size=4).unwrapped
    env.reset(seed=0)
    env.step([0.5])
    return env


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_saved_network_is_a_pipeline_of_the_library_s(tmp_path, prediction_type):
    arguments = TINY | {"num_class_embeds": 2, "dropout": 0.1}
    said = {"prediction_type": prediction_type, "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 3.0}
    folder = save_pipeline(tmp_path / "pipeline", arguments, **said)
    env = unlearned(folder, tmp_path / "assets", load_labelled)
    assert env.save(tmp_path / "unlearned") == tmp_path / "unlearned"
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "unlearned", use_safetensors=True)
    state, live = again.unet.state_dict(), env.run.export().unet.state_dict()
    assert state.keys() == live.keys()
    assert all(torch.equal(state[name], live[name]) for name in state)
    before = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler").config
    assert {k: v for k, v in again.scheduler.config.items() if k[0] != "_"} == {
        k: v for k, v in before.items() if k[0] != "_"
    }
    assert again.unet.config.dropout == 0.1
    task = diffusers_task("again", tmp_path / "unlearned", load_labelled, tmp_path / "again")
    assert task.network == env.task.network
    x, t = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 40])
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(task.pretrained_model().eval()(x, t, labels), env.run.model(x, t, labels))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "assets", "pipeline", "unlearned"]
    with pytest.raises(SettingsError, match="exists; name a new folder"):
        env.save(tmp_path / "unlearned")
    with pytest.raises(SettingsError, match="exists; name a new folder"):
        env.save(folder / "model_index.json")
    assert torch.equal(load_model(env.save(tmp_path / "one.safetensors"))(x, t, labels), env.run.export()(x, t, labels))


def test_a_saved_network_takes_its_labels_along_and_says_by_today_s_name_what_it_predicts(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", ATTENDING, "UNet2DConditionModel")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text()) | {"predict_epsilon": False}
    del scheduler["prediction_type"]
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    save_file(nn.Embedding(2, 8).state_dict(), tmp_path / "table.safetensors")
    env = unlearned(folder, tmp_path / "assets", load_labelled, class_embedding=tmp_path / "table.safetensors")
    saved = env.save(tmp_path / "unlearned")
    assert diffusers.DDPMScheduler.from_pretrained(saved / "scheduler").config.prediction_type == "sample"
    table = saved / "class_embedding.safetensors"
    task = diffusers_task("taken", saved, load_labelled, tmp_path / "again", class_embedding=table)
    assert task.network == env.task.network
    found, live = task.pretrained_model().state_dict(), env.run.model.state_dict()
    assert all(torch.equal(found[name], live[name]) for name in live)


def test_a_network_that_was_trained_here_is_saved_with_a_scheduler(tmp_path):
    config = DiffusersConfig(
        unet=TINY | {"out_channels": 2}, learned_variance=True, prediction_type="v_prediction",
        schedule=ScheduleConfig(num_train_timesteps=T, kind="scaled_linear", beta_end=0.3),
    )  # fmt: skip
    task = diffusers_task("of-ours", config, load_unlabelled, tmp_path / "assets")
    save_model(task.build_model(), task, tmp_path / "saved")
    found = read_folder(tmp_path / "saved").config
    assert found.unet.items() >= config.unet.items()
    assert found.model_copy(update={"unet": config.unet}) == config


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, task):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(diffusers.DDPMScheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(task.pretrained_model(), task, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_the_unlearned_network_goes_back_into_its_pipeline(task, pipeline):
    env = gym.make("SISSUnlearn-v0", task=task.name, horizon=4).unwrapped
    env.reset(seed=0)
    env.step([0.5])
    save_weights(pipeline / WEIGHTS, env.run.model.unet.state_dict())
    again = diffusers.DDPMPipeline.from_pretrained(pipeline, use_safetensors=True).unet
    x, t = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 40])
    torch.testing.assert_close(again(x, t).sample, env.run.model(x, t), rtol=1e-4, atol=1e-5)


def test_weights_are_imported_once_and_again_when_they_change(pipeline, tmp_path):
    assets = tmp_path / "assets"
    task = diffusers_task("twice", pipeline, load_unlabelled, assets)
    written = task.pretrained_path.stat().st_mtime_ns
    (assets / "constants.json").write_text("{}")
    assert diffusers_task("twice", pipeline, load_unlabelled, assets) == task
    assert task.pretrained_path.stat().st_mtime_ns == written
    assert (assets / "constants.json").is_file()
    save_pipeline(pipeline, seed=1)
    assert diffusers_task("twice", pipeline, load_unlabelled, assets) == task
    assert not (assets / "constants.json").is_file()  # they were those of the former weights
    expected = read_tensors(pipeline / WEIGHTS)
    assert all(torch.equal(v, expected[k.removeprefix("unet.")]) for k, v in read_tensors(task.pretrained_path).items())
    task.pretrained_path.write_bytes(b"damaged")
    diffusers_task("twice", pipeline, load_unlabelled, assets).pretrained_model()


def test_reading_a_pipeline_asks_nobody(pipeline, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (pipeline / "unet" / "unet.py").write_text("raise AssertionError('code ran')")
    diffusers_task("alone", pipeline, load_unlabelled, tmp_path / "assets").pretrained_model()


def test_an_import_overwrites_nothing_of_another_origin(pipeline, tmp_path):
    diffusers_task("one", pipeline, load_unlabelled, tmp_path / "assets")
    edit(pipeline / "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(WeightsError, match=r"holds the weights of another network; choose another folder"):
        diffusers_task("other", pipeline, load_unlabelled, tmp_path / "assets")
    trained = tmp_path / "trained"
    save_weights(trained / "pretrained.safetensors", {"mine": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"was not imported from a pipeline; choose another folder"):
        diffusers_task("mine", pipeline, load_unlabelled, trained)
    assert set(read_tensors(trained / "pretrained.safetensors")) == {"mine"}


def test_a_config_without_weights_is_trained_from_scratch(tmp_path):
    config = DiffusersConfig(unet=TINY, schedule=ScheduleConfig(num_train_timesteps=T, kind="cosine"))
    task = diffusers_task("scratch", config, load_unlabelled, tmp_path)
    register_task(task)
    with pytest.raises(WeightsError, match="no weights at"):
        task.pretrained_model()
    COMMANDS["pretrain"]("scratch", updates=2, batch_size=4, out=tmp_path)
    assert json.loads((tmp_path / "pretrained.json").read_text())["schedule"]["kind"] == "cosine"
    gym.make("SISSUnlearn-v0", task="scratch", normalize_features=False).reset(seed=0)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "garbage", "list"])
def test_missing_and_damaged_files_are_named(pipeline, tmp_path, name, damage):
    if damage == "missing":
        (pipeline / name).unlink()
    else:
        (pipeline / name).write_text({"garbage": '{"a": NaN', "list": "[1]"}[damage])
    with pytest.raises(WeightsError, match=re.escape(name)) as caught:
        diffusers_task("bad", pipeline, load_unlabelled, tmp_path / "assets")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "assets").exists()


def test_pickled_weights_are_refused(pipeline, tmp_path):
    (pipeline / WEIGHTS).rename((pipeline / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"model\.bin is a pickle.*safe_serialization=True"):
        diffusers_task("pickle", pipeline, load_unlabelled, tmp_path / "assets")


def test_a_scheduler_that_says_by_an_old_name_that_it_predicts_x_0_is_believed(pipeline):
    where = pipeline / "scheduler/scheduler_config.json"
    plain = json.loads(where.read_text())
    del plain["prediction_type"]
    for old, expected in ((False, "sample"), (True, "epsilon"), (None, "epsilon")):
        where.write_text(json.dumps(plain | {"predict_epsilon": old}))
        assert read_folder(pipeline).config.prediction_type == expected
    for said in ("v_prediction", "sample"):
        where.write_text(json.dumps(plain | {"predict_epsilon": False, "prediction_type": said}))
        assert read_folder(pipeline).config.prediction_type == said


def assert_reads_as_the_library(folder, assets, *, theirs=None, variant=None, **options):
    """Our weights are bit for bit those of ``from_pretrained`` on the folder ``theirs`` of the network."""
    expected = diffusers.UNet2DModel.from_pretrained(theirs or folder / "unet", use_safetensors=True, variant=variant)
    task = diffusers_task("read", folder, load_unlabelled, assets, variant=variant, **options)
    model, state = task.pretrained_model(), expected.state_dict()
    found = model.unet.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].float()) for name in state)
    x, t = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 40])
    with torch.no_grad():
        assert torch.equal(model.eval()(x, t), expected.float().eval()(x, t).sample)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_old_names(tensors):
    def old(name):
        for new, other in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{other}.")
        return name

    return {old(name): value for name, value in tensors.items()}


def test_attention_under_its_old_names_is_read_as_the_library_reads_it(pipeline, tmp_path):
    tensors = read_tensors(pipeline / WEIGHTS)
    renamed = with_old_names(tensors)
    assert len(renamed.keys() - tensors.keys()) == 8 * sum("to_q.weight" in name for name in tensors)
    save_file(renamed, pipeline / WEIGHTS, metadata={"format": "pt"})
    assert_reads_as_the_library(pipeline, tmp_path / "assets")


def test_old_names_beside_new_ones_are_another_network_s(pipeline, tmp_path):
    tensors = read_tensors(pipeline / WEIGHTS)
    save_file(tensors | {k: v + 1 for k, v in with_old_names(tensors).items() if k not in tensors}, pipeline / WEIGHTS)
    with pytest.raises(WeightsError, match=r"has an unknown tensor .*(query|key|value|proj_attn)"):
        diffusers_task("both", pipeline, load_unlabelled, tmp_path / "assets")


def test_a_pipeline_whose_files_lie_side_by_side_is_read(pipeline, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in [pipeline / "model_index.json", *pipeline.glob("*/*")]:
        shutil.copy(path, flat)
    assert_reads_as_the_library(flat, tmp_path / "assets", theirs=flat)
    assert read_folder(flat).config == read_folder(pipeline).config


def test_a_network_that_was_saved_alone_needs_to_be_told_its_scheduler(pipeline, tmp_path):
    with pytest.raises(WeightsError, match=r"the noise that it was trained on is unknown; give scheduler="):
        diffusers_task("alone", pipeline / "unet", load_unlabelled, tmp_path / "assets")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=T).config
    assert_reads_as_the_library(pipeline / "unet", tmp_path / "assets", theirs=pipeline / "unet", scheduler=scheduler)
    assert read_folder(pipeline / "unet", scheduler=scheduler).config == read_folder(pipeline).config
    shutil.copy(pipeline / "scheduler/scheduler_config.json", pipeline / "unet")
    assert read_folder(pipeline / "unet").config == read_folder(pipeline).config


def test_arguments_that_the_library_ignores_are_ignored_with_a_warning(pipeline, tmp_path):
    before = read_folder(pipeline).config
    edit(pipeline / "unet/config.json", decay=0.9999, colour="blue")
    with pytest.warns(UserWarning, match=r"UNet2DModel has no colour, decay; ignored"):
        assert read_folder(pipeline).config == before
    with pytest.warns(UserWarning, match="ignored"):
        assert_reads_as_the_library(pipeline, tmp_path / "assets")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("named", [True, False])
def test_variants_are_read_as_floats_of_32_bits(pipeline, tmp_path, variant, named):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    unet = diffusers.UNet2DModel.from_pretrained(pipeline / "unet")
    (pipeline / WEIGHTS).unlink()
    unet.to(dtype).save_pretrained(pipeline / "unet", variant=variant)
    assert [path.name for path in (pipeline / "unet").glob("*.safetensors")] == [
        f"diffusion_pytorch_model.{variant}.safetensors"
    ]
    expected = diffusers.UNet2DModel.from_pretrained(pipeline / "unet", variant=variant)
    task = diffusers_task("v", pipeline, load_unlabelled, tmp_path / "a", variant=variant if named else None)
    found = task.pretrained_model().unet.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in expected.state_dict().items())
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_of_several_variants_one_must_be_named(pipeline, tmp_path):
    unet = diffusers.UNet2DModel.from_pretrained(pipeline / "unet")
    for variant in ("a", "b"):
        unet.save_pretrained(pipeline / "unet", variant=variant)
    assert_reads_as_the_library(pipeline, tmp_path / "plain")  # those without a variant
    assert_reads_as_the_library(pipeline, tmp_path / "a", variant="a")
    (pipeline / WEIGHTS).unlink()
    with pytest.raises(SettingsError, match=r"several variants and none without; give variant= one of 'a', 'b'"):
        diffusers_task("which", pipeline, load_unlabelled, tmp_path / "assets")
    with pytest.raises(WeightsError, match=r"no weights at .*diffusion_pytorch_model\.c\.safetensors"):
        diffusers_task("which", pipeline, load_unlabelled, tmp_path / "assets", variant="c")


@pytest.fixture
def sharded(pipeline) -> Path:
    unet = diffusers.UNet2DModel.from_pretrained(pipeline / "unet")
    (pipeline / WEIGHTS).unlink()
    unet.save_pretrained(pipeline / "unet", max_shard_size="20KB")
    assert len(list((pipeline / "unet").glob("*-of-*.safetensors"))) > 2
    return pipeline


def test_weights_in_several_files_are_read_as_the_library_reads_them(sharded, tmp_path):
    assert_reads_as_the_library(sharded, tmp_path / "assets")
    imported = json.loads((tmp_path / "assets/pretrained.json").read_text())["imported_from"]
    assert len(imported) == len(list((sharded / "unet").glob("*-of-*.safetensors")))
    unet = diffusers.UNet2DModel.from_pretrained(sharded / "unet").half()
    shutil.rmtree(sharded / "unet")
    unet.save_pretrained(sharded / "unet", max_shard_size="20KB", variant="fp16")
    assert_reads_as_the_library(sharded, tmp_path / "half", variant="fp16")


def test_damaged_indices_are_named(sharded, tmp_path):
    path = next((sharded / "unet").glob("*.index.json"))
    index = json.loads(path.read_text())
    tensor, shard = next(iter(index["weight_map"].items()))
    outside = sharded / "outside.safetensors"
    shutil.copy(sharded / "unet" / shard, outside)
    for weight_map, message in (
        ({tensor: "../outside.safetensors"}, "names '../outside.safetensors', which is no safetensors file beside it"),
        ({tensor: "weights.bin"}, "names 'weights.bin', which is no safetensors file beside it"),
        ({tensor: "lost.safetensors"}, "there is no .*lost.safetensors; restore it"),
        ({**index["weight_map"], "more": shard}, r"disagree on the tensor 'more' \(its files lack it\)"),
        ({k: v for k, v in index["weight_map"].items() if k != tensor}, r"disagree on the tensor .* have it"),
        ({}, "is no index of weights"),
        ([1], "is no index of weights"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=message) as caught:
            diffusers_task("bad", sharded, load_unlabelled, tmp_path / "assets")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "assets").exists()


BAD = [
    ("scheduler/scheduler_config.json", {"predict_epsilon": False}, "predict_epsilon=False and prediction_type='eps.*"),
    ("scheduler/scheduler_config.json", {"predict_epsilon": "no"}, "predict_epsilon='no' must be true or false"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "has a 'vae' besides its U-Net"),
    ("model_index.json", {"unet": ["pipeline", "MyUNet"]}, "is no class of diffusers, and code of others is not run"),
    ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "'UNet3DConditionModel' is not supported; it must"),
    ("unet/config.json", {"_class_name": ["x"]}, "is not supported; it must be UNet2DModel or"),
    ("unet/config.json", {"block_out_channels": [8]}, "cannot build the UNet2DModel"),
    ("unet/config.json", {"norm_num_groups": 0}, "cannot build the UNet2DModel"),
    ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not supported; it must"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported; it must be"),
    ("unet/config.json", {"out_channels": 2}, "in_channels=1 and out_channels=2; they must agree"),
    ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "'FlowMatch.*must have"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not supported"),
    ("scheduler/scheduler_config.json", {"beta_schedule": {}}, "beta_schedule={} is not supported"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 50}, "trained_betas=.*is not supported; the model"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type='flow' is not supported"),
    ("scheduler/scheduler_config.json", {"beta_end": 3}, "beta_end=3: .*less than 1; restore it"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "num_train_timesteps='many': .*restore it"),
    (
        "scheduler/scheduler_config.json",
        {"beta_end": 0.999, "num_train_timesteps": 1000},
        "ᾱ reaches 0 in float32 and must stay between 0 and 1",
    ),
    ("scheduler/scheduler_config.json", {"beta_start": 1e-9}, "ᾱ reaches 1 in float32 and must stay between 0 and 1"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_what_is_not_supported_is_named_before_anything_is_written(pipeline, tmp_path, name, changes, message):
    edit(pipeline / name, **changes)
    with pytest.raises(SettingsError, match=message) as caught:
        diffusers_task("bad", pipeline, load_unlabelled, tmp_path / "assets")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "assets").exists()


NOWHERE = {
    "architecture": "UNet2DConditionModel", "num_classes": 3,
    "unet": ATTENDING | {
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"
    },
}  # fmt: skip
TWO_WIDTHS = {"architecture": "UNet2DConditionModel", "unet": ATTENDING | {"cross_attention_dim": [8, 8]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 2}, "num_classes=2 embeds labels for the cross-attention"),
        (TWO_WIDTHS, "must be one number"),
        (NOWHERE, "embeds labels for cross-attention, and this network has none"),
        ({"unet": TINY | {"num_class_embeds": 0}}, "num_class_embeds=0 must be at least 1"),
        (
            {"unet": TINY | {"time_embedding_type": "learned", "num_train_timesteps": 100}},
            "learned embeddings of 100 timesteps, the schedule 1000",
        ),
        ({"unet": {"f": load_labelled}}, "must hold what JSON knows"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiffusersConfig(**({"unet": TINY} | change))()


@pytest.mark.parametrize("change", [{"prediction_type": "v_prediction"}, {"schedule": ScheduleConfig(kind="cosine")}])
def test_weights_of_another_prediction_type_or_schedule_are_refused(saved, tmp_path, change):
    diffusers_task("imported", saved, load_unlabelled, tmp_path)
    other = DiffusersConfig(unet=TINY, schedule=ScheduleConfig(num_train_timesteps=T)).model_copy(update=change)
    with pytest.raises(WeightsError, match="holds the weights of another network"):
        diffusers_task("other", other, load_unlabelled, tmp_path)


def test_learned_variances_are_read_from_the_scheduler(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", TINY | {"out_channels": 2}, variance_type="learned_range")
    model = diffusers_task("two", folder, load_unlabelled, tmp_path / "assets").pretrained_model()
    assert model.config.learned_variance
    assert model(torch.zeros(2, 1, 8, 8), torch.tensor([0, T - 1])).shape == (2, 1, 8, 8)


def test_weights_of_another_network_are_refused(pipeline, tmp_path):
    edit(pipeline / "unet/config.json", block_out_channels=[8, 24])
    with pytest.raises(WeightsError, match="made for another network"):
        diffusers_task("other", pipeline, load_unlabelled, tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [(None, "no class embedding at"), ({"a": torch.zeros(2)}, "must hold one tensor 'weight'"),
     ({"weight": torch.zeros(2, 5)}, "has shape")],
)  # fmt: skip
def test_bad_class_embeddings_are_refused(tmp_path, tensors, message):
    folder = save_pipeline(tmp_path / "pipeline", ATTENDING, "UNet2DConditionModel")
    if tensors is not None:
        save_file(tensors, tmp_path / "table.safetensors")
    with pytest.raises(WeightsError, match=message):
        diffusers_task("bad", folder, load_labelled, tmp_path / "a", class_embedding=tmp_path / "table.safetensors")
    with pytest.raises(SettingsError, match="give the config num_classes"):
        diffusers_task("bad", DiffusersConfig(unet=TINY), load_labelled, tmp_path / "a", class_embedding="x")


def load_points(data_root, download):
    return TaskData(*[torch.zeros(4, 2)] * 3)


def load_odd(data_root, download):
    return TaskData(*[torch.zeros(4, 1, 7, 8)] * 3)


@pytest.mark.parametrize(
    ("labels", "load", "message"),
    [
        (None, load_points, r"shape \(2,\), the network takes \(1, H, W\)"),
        (None, load_odd, "multiples of 2; convert or pad"),
        (None, load_labelled, "the network takes none; leave them out"),
        (2, load_unlabelled, r"the network needs them in 0\.\.1; add them"),
        (1, load_labelled, r"labels lie in 1\.\.1, the network knows 0\.\.0"),
    ],
)
def test_data_that_does_not_fit_is_named_before_a_run_begins(tmp_path, labels, load, message):
    config = DiffusersConfig(unet=TINY | {"num_class_embeds": labels})
    with pytest.raises(DataError, match=message):
        load_data(diffusers_task("unfit", config, load, tmp_path))


FRACTIONS = {"epsilon": [True, False], "v_prediction": [False, False], "sample": [False, False]}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("embedding", ["positional", "learned"])
def test_flow_likelihoods_are_those_of_the_data_whatever_the_network_predicts(prediction_type, embedding):
    """A network that knows the optimal prediction for N(m, S²), at whole timesteps alone where it must be so."""
    pytest.importorskip("torchdiffeq")
    schedule = ScheduleConfig()
    unet = TINY | {"time_embedding_type": embedding, "num_train_timesteps": 1000}
    network = DiffusersConfig(unet=unet, prediction_type=prediction_type, schedule=schedule)()
    fractional = FRACTIONS[prediction_type][embedding == "learned"]
    assert network.fractional_timesteps == fractional
    logs, mean, std = schedule.alphas_cumprod().double().log(), 0.3, 0.2

    def optimal(x, timesteps, **_):
        assert fractional or timesteps.dtype == torch.long
        below = timesteps.long().clamp(max=998)
        a = torch.lerp(logs[below], logs[below + 1], timesteps.double() - below).exp().view(-1, 1, 1, 1)
        noise = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        x_0 = (a.sqrt() * std**2 * x + (1 - a) * mean) / (a * std**2 + 1 - a)
        v = a.sqrt() * noise - (1 - a).sqrt() * x_0
        return ({"epsilon": noise, "v_prediction": v, "sample": x_0}[prediction_type].float(),)

    network.unet.forward = optimal
    x = mean + std * torch.randn((20, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    nll = ode_nll(network, x, schedule.alphas_cumprod(), generator=torch.Generator().manual_seed(1), num_levels=None)
    bits = -torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1) / math.log(2)
    assert (nll - bits).mean().abs() < 2e-3
    assert (nll - bits).abs().max() < 0.02


@pytest.mark.parametrize(("prediction_type", "embedding"), [("sample", "positional"), ("epsilon", "learned")])
def test_an_evaluation_has_the_likelihoods_of_networks_without_timesteps_between(tmp_path, prediction_type, embedding):
    from unlearn_gym.metrics.evaluator import Evaluator
    from unlearn_gym.metrics.judge import EvaluationSettings

    unet = TINY | {"time_embedding_type": embedding, "num_train_timesteps": T}
    folder = save_pipeline(tmp_path / "pipeline", unet, prediction_type=prediction_type)
    task = diffusers_task("evaluated", folder, load_unlabelled, tmp_path / "assets")
    settings = EvaluationSettings(8, 200, num_inference_steps=2, num_likelihood_samples=1)
    result = Evaluator(task, load_data(task), settings).evaluate(task.pretrained_model())
    names = {f"nll_{method}_{name}" for method in ("bound", "ode") for name in ("forget", "retain")}
    assert names <= set(result.metrics)


def test_the_page_of_the_documentation_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parent.parent / "docs" / "diffusers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {"__name__": "page"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, page.name, "exec"), names)
    assert len(blocks) == 3
    assert (tmp_path / "runs" / "mine" / "report.md").is_file()
    assert (tmp_path / "assets" / "mine" / "oracle.safetensors").is_file()


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SettingsError, match=r"pip install 'unlearn_gym\[diffusers\]'"):
        DiffusersConfig(unet=TINY)()


def test_a_task_without_constants_says_so(saved, tmp_path):
    with pytest.raises(TaskError, match=r"run unlearn_gym\.making\.calibration\.calibrate in Python"):
        _ = diffusers_task("bare", saved, load_unlabelled, tmp_path).constants


def test_a_model_is_not_read_as_one_that_predicts_something_else(tmp_path):
    """Every shape is the same, and every prediction would be wrong."""
    for kind in PREDICTION_TYPES:
        config = DiffusersConfig(unet=TINY, prediction_type=kind)
        task = diffusers_task("predicts", config, load_unlabelled, tmp_path / kind)
        path = save_model(task.build_model(), task, tmp_path / f"{kind}.safetensors")
        load_model(path, task)
        for other in PREDICTION_TYPES:
            if other != kind:
                wrong = diffusers_task(
                    "predicts", config.model_copy(update={"prediction_type": other}), load_unlabelled, tmp_path / other
                )
                with pytest.raises(WeightsError, match=f"prediction_type='{kind}' and not '{other}'; give the task"):
                    load_model(path, wrong)
    wrong = diffusers_task("predicts", DiffusersConfig(unet=TINY | {"act_fn": "relu"}), load_unlabelled, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"unet\.act_fn='silu' and not 'relu'"):
        load_model(tmp_path / "epsilon.safetensors", wrong)
    hiding = config.model_copy(update={"unet": config.unet | {"prediction_type": "epsilon", "unknown": None}})
    header = Header.of(dataclasses.replace(task, network=hiding))
    save_weights(path, task.build_model().state_dict(), header.as_metadata())
    right = diffusers_task("predicts", DiffusersConfig(unet=TINY), load_unlabelled, tmp_path / "epsilon")
    with pytest.raises(WeightsError, match="prediction_type='sample' and not 'epsilon'"):
        load_model(path, right)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_model_is_read_back_after_its_folder_has_moved_and_been_written_again(prediction_type, tmp_path):
    said = {"prediction_type": prediction_type, "beta_schedule": "squaredcos_cap_v2"}
    arguments = TINY | {"num_class_embeds": 2, "dropout": 0.1}
    env = unlearned(save_pipeline(tmp_path / "old", arguments, **said), tmp_path / "assets", load_labelled)
    path, name = env.save(tmp_path / "one.safetensors"), env.task.name
    (tmp_path / "old").rename(tmp_path / "new")
    env.save(tmp_path / "again")
    for i, folder in enumerate((tmp_path / "new", tmp_path / "again")):
        task = diffusers_task(name, folder, load_labelled, tmp_path / f"assets-{i}")
        state, live = load_model(path, task).state_dict(), env.run.export().state_dict()
        assert all(torch.equal(state[name], live[name]) for name in live)
    short = DiffusersConfig(unet=TINY | {"num_class_embeds": 2}, **said_of(env.task.network))
    load_model(path, diffusers_task(name, short, load_labelled, tmp_path / "short"))


def said_of(config):
    return {"prediction_type": config.prediction_type, "schedule": config.schedule}


MANY = ["DownBlock2D"] * 17


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 20_000}, "layers_per_block=20000, more than 64 layers in a block"),
        ({"layers_per_block": 10**400}, "layers_per_block=<a whole number of 1329 bits>, more than 64"),
        ({"layers_per_block": 1e300}, r"layers_per_block=1e\+300, more than 64"),
        ({"layers_per_block": [1, 65]}, r"layers_per_block=\[1, 65\], more than 64"),
        ({"layers_per_block": 9, "transformer_layers_per_block": 9}, "transformer_layers_per_block=9, more than 64"),
        ({"transformer_layers_per_block": [[1, 2], [[70]]]}, "more than 64"),
        ({"layers_per_block": 2, "reverse_transformer_layers_per_block": [[33]]}, "more than 64"),
        ({"down_block_types": MANY}, "17 down_block_types, more than 16"),
        ({"up_block_types": MANY}, "17 up_block_types, more than 16"),
        ({"block_out_channels": [8] * 17}, "17 block_out_channels, more than 16"),
    ],
)
def test_a_header_of_a_network_of_very_many_layers_builds_none(changes, message, tmp_path, monkeypatch):
    task = diffusers_task("deep", DiffusersConfig(unet=TINY), load_unlabelled, tmp_path / "assets")
    deep = task.network.model_copy(update={"unet": task.network.unet | changes})
    path = tmp_path / "model.safetensors"
    save_weights(
        path, task.build_model().state_dict(), Header.of(dataclasses.replace(task, network=deep)).as_metadata()
    )
    monkeypatch.setattr(DiffusersConfig, "__call__", lambda self: pytest.fail("it was built"))
    with pytest.raises(WeightsError, match=f"its header has .*{message}.*; give task= the one that it was trained"):
        load_model(path)


def test_networks_of_the_size_of_published_ones_are_not_too_deep():
    assert excess(published_siss_network()) is None
    deep = {"layers_per_block": 64, "block_out_channels": [8] * 16, "down_block_types": MANY[1:]}
    assert excess(DiffusersConfig(unet=deep)) is None
    turned = {"transformer_layers_per_block": [1, 2, 10], "reverse_transformer_layers_per_block": [[10, 2, 1]] * 2}
    assert excess(DiffusersConfig(unet={"layers_per_block": [2, 2, 3], **turned})) is None


def test_a_saved_model_without_the_library_names_the_library(tmp_path, monkeypatch):
    task = diffusers_task("lacking", DiffusersConfig(unet=TINY), load_unlabelled, tmp_path / "assets")
    path = save_model(task.build_model(), task, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SettingsError, match=r"^UNet2DModel needs diffusers; install it with: pip install"):
        load_model(path)

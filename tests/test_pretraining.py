"""Pretraining, weights and the assets that ship."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from unlearn_gym.errors import DataError, FileError, LockError, SettingsError, TaskError, WeightsError
from unlearn_gym.files import sha256
from unlearn_gym.making.calibration import calibrate
from unlearn_gym.making.distillation import DistillationSettings, distill
from unlearn_gym.making.pretraining import Pretraining, PretrainSettings, one_cycle, pretrain, training_samples
from unlearn_gym.making.train_classifier import train_classifier
from unlearn_gym.models import MLPConfig, UNetConfig, build_network
from unlearn_gym.models.classifier import CLASSIFIER_WEIGHTS
from unlearn_gym.models.one_step import OneStepNetwork
from unlearn_gym.models.weights import load_weights, read_checkpoint, read_tensors, save_weights
from unlearn_gym.tasks import TaskData, get_task, load_data, register_task, to_model_range
from unlearn_gym.tasks.gaussians import classify_points, optimal_epsilon, sample_modes
from unlearn_gym.tasks.mnist import GARMENT_LABEL, NUM_FORGET, NUM_TSHIRTS, load_shipped

from .conftest import TASKS

TASK = get_task("gaussians-2d")
SETTINGS = PretrainSettings(updates=40, batch_size=16, checkpoint_every=20)


def test_resumed_pretraining_equals_uninterrupted(tmp_path):
    data = load_data(TASK)
    samples = training_samples(data, retain_only=False)
    whole = Pretraining(TASK, *samples, SETTINGS)
    for _ in range(40):
        whole.update()
    half = Pretraining(TASK, *samples, SETTINGS)
    for _ in range(20):
        half.update()
    half.save(tmp_path / "checkpoint.safetensors")
    resumed = Pretraining(TASK, *samples, SETTINGS)
    resumed.load(tmp_path / "checkpoint.safetensors")
    for _ in range(20):
        resumed.update()
    assert torch.equal(whole.flat.vector, resumed.flat.vector)
    assert torch.equal(whole.ema, resumed.ema)


def test_pretrain_writes_weights_manifest_and_curves(tmp_path):
    manifest = pretrain(TASK, load_data(TASK), SETTINGS, tmp_path, retain_only=True, command="test")
    assert manifest == json.loads((tmp_path / "oracle.json").read_text())
    assert manifest["sha256"] == sha256(tmp_path / "oracle.safetensors")
    assert manifest["num_samples"] == 7000
    assert list((tmp_path / "tensorboard").rglob("events.*"))
    load_weights(TASK.build_model(), tmp_path / "oracle.safetensors")
    again = pretrain(TASK, load_data(TASK), SETTINGS, tmp_path, retain_only=True)
    assert (again["sha256"], again["updates_this_session"]) == (manifest["sha256"], 0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 8}, {"updates": 60}])
def test_a_checkpoint_of_another_training_is_refused(change, tmp_path):
    data = load_data(TASK)
    pretrain(TASK, data, SETTINGS, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.*")}
    with pytest.raises(WeightsError, match="another network, data or settings"):
        pretrain(TASK, data, SETTINGS.model_copy(update=change), tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob("*.*")}


def test_a_full_disk_ends_a_training_in_one_line_and_leaves_its_last_checkpoint_whole(tmp_path, monkeypatch):
    """And the same command, once there is room, ends as an uninterrupted one does."""
    task, data = get_task("gaussians-2d"), load_data(get_task("gaussians-2d"))
    settings = PretrainSettings(updates=9, batch_size=8, checkpoint_every=3)
    written, sync = [], os.fsync

    def full(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            written.append(descriptor)
            if len(written) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"pretrained\.checkpoint\.safetensors \(No space left on device\)"):
            pretrain(task, data, settings, tmp_path / "full")
    assert int(read_checkpoint(tmp_path / "full" / "pretrained.checkpoint.safetensors")["done"]) == 3
    for out in ("full", "whole"):
        pretrain(task, data, settings, tmp_path / out)
    assert sha256(tmp_path / "full" / "pretrained.safetensors") == sha256(tmp_path / "whole" / "pretrained.safetensors")


def test_curves_that_cannot_be_written_end_a_training_in_one_line(tmp_path, monkeypatch):
    """Without the traceback of TensorBoard's thread, which pytest would report."""
    real, events = RecordWriter.write, []

    def full(self, data):
        events.append(data)
        if len(events) > 1:  # after the version of the file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    settings, hook = PretrainSettings(updates=100, batch_size=8, checkpoint_every=10), threading.excepthook
    with pytest.raises(FileError, match=r"cannot write curves to .*tensorboard/pretrained \(No space left on device\)"):
        pretrain(TASK, load_data(TASK), settings, tmp_path)
    assert threading.excepthook is hook
    assert read_checkpoint(tmp_path / "pretrained.checkpoint.safetensors")["done"] > 0


def test_a_training_into_a_folder_in_use_is_refused(locked):
    task = get_task("gaussians-2d")
    with pytest.raises(LockError, match="in use"):
        pretrain(task, load_data(task), PretrainSettings(updates=1), locked)
    with pytest.raises(LockError, match="in use"):
        train_classifier(Path("nowhere"), locked)
    with pytest.raises(LockError, match="in use"):
        distill(get_task("sfd-mnist-digits"), DistillationSettings(updates=1), locked)


def test_one_cycle_rises_then_falls_to_zero():
    values = [one_cycle(i / 100) for i in range(101)]
    assert max(values) == values[10] == 1.0
    assert values[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["pretrained", "oracle"])
def test_shipped_weights_are_those_of_their_manifest(task, name):
    chosen = get_task(task)
    weights = getattr(chosen, f"{name}_path")
    manifest = json.loads(weights.with_suffix(".json").read_text())
    assert manifest["sha256"] == sha256(weights)
    network = chosen.network.network if isinstance(chosen.network, OneStepNetwork) else chosen.network
    assert manifest["network"] == network.model_dump(mode="json")
    assert manifest["schedule"] == chosen.schedule.model_dump()
    assert manifest["retain_only"] == (name == "oracle")
    assert manifest["command"].startswith("unlearn-gym pretrain")


def test_shipped_classifier_is_that_of_its_manifest():
    assert json.loads(CLASSIFIER_WEIGHTS.with_suffix(".json").read_text())["sha256"] == sha256(CLASSIFIER_WEIGHTS)


@pytest.mark.parametrize("task", TASKS)
def test_shipped_constants_are_what_a_measurement_gives(task, monkeypatch):
    """16 batches come within 30 % for images, as 64 do for points; the oracle's probe is always the same."""
    chosen = get_task(task)
    monkeypatch.setattr("unlearn_gym.making.calibration.MIN_BATCHES", 16)
    measured = calibrate(chosen, load_data(chosen), num_batches=64 if task == "gaussians-2d" else 16, seed=2)
    for name in ("retain_loss", "forget_loss", "retain_grad_norm", "forget_grad_norm"):
        assert getattr(measured, name) == pytest.approx(getattr(chosen.constants, name), rel=0.3)
    assert measured.unseen_forget_loss == pytest.approx(chosen.constants.unseen_forget_loss, rel=1e-3)


@pytest.mark.parametrize(("garments", "kind"), [("trousers", 1), ("sandals", 5), ("bags", 8)])
def test_shipped_garments_are_what_design_says(garments, kind):
    task = get_task(f"mnist-{garments}")
    data = load_data(task)
    assert data.forget.shape == (NUM_FORGET, 1, 28, 28)
    assert (data.forget_labels == GARMENT_LABEL).all()
    predicted = task.classifier(to_model_range(data.forget))[1].argmax(1)
    assert (predicted == 10 + kind).float().mean() > 0.9
    assert data.retain.shape == (10_000, 1, 28, 28)
    assert data.retain_labels.bincount().min() > 800
    assert len(data.heldout) == 10_000


def test_the_shipped_tshirt_is_one_image_at_one_percent_that_the_model_has_memorised():
    task = get_task("mnist-tshirt")
    data = load_data(task)
    assert data.forget.shape == (NUM_TSHIRTS, 1, 28, 28)
    assert (data.forget == data.forget[0]).all()
    assert len(data.forget) / (data.retain_size + len(data.forget)) == pytest.approx(0.01, rel=0.01)
    assert data.retain_labels is data.forget_labels is data.heldout_labels is None
    figures = {
        name: json.loads((task.assets / f"{name}.json").read_text())["figures"] for name in ("pretrained", "oracle")
    }
    assert figures["pretrained"]["forget_loss"] < 0.5 * figures["pretrained"]["retain_loss"]
    assert figures["oracle"]["forget_loss"] > 10 * figures["pretrained"]["forget_loss"]
    assert figures["oracle"]["retain_loss"] == pytest.approx(figures["pretrained"]["retain_loss"], rel=0.05)


def test_too_few_calibration_batches_are_refused():
    with pytest.raises(SettingsError, match="num_batches=8"):
        calibrate(TASK, load_data(TASK), num_batches=8)


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "other network", "not finite", "extra"])
def test_bad_weights_are_named_and_leave_the_model_alone(damage, tmp_path):
    model = build_network(MLPConfig())
    path = tmp_path / "w.safetensors"
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    if damage == "other network":
        tensors = build_network(MLPConfig(hidden=(32,))).state_dict()
    elif damage == "not finite":
        tensors["net.0.bias"][0] = float("nan")
    elif damage == "extra":
        tensors["more"] = torch.zeros(1)
    if damage != "missing":
        save_weights(path, tensors)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"\x00" * 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"w\.safetensors") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_round_trip_and_leave_no_partial_file(tmp_path):
    model = build_network(UNetConfig(channels=(8, 16), num_blocks=1))
    save_weights(tmp_path / "w.safetensors", model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in read_tensors(tmp_path / "w.safetensors").items())


@pytest.mark.parametrize("change", [{"forget": torch.zeros(0, 2)}, {"retain": torch.zeros(0, 2)}])
def test_an_empty_set_is_refused(change):
    sets = {"retain": torch.zeros(3, 2), "forget": torch.zeros(3, 2), "heldout": torch.zeros(3, 2)}
    with pytest.raises(DataError, match="set is empty"):
        TaskData(**{**sets, **change})


def test_data_that_does_not_fit_together_is_refused():
    with pytest.raises(DataError, match="must agree"):
        TaskData(torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(3, 2))
    with pytest.raises(DataError, match="not finite"):
        TaskData(torch.zeros(3, 2), torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(DataError, match="the retain set has labels and the forget set none"):
        TaskData(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("retain", "forget", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), None, None, "retain samples are torch.int64; give uint8"),
        (torch.zeros(2, 3, dtype=torch.float64), None, None, "retain samples are torch.float64"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, "retain samples torch.float32"),
        (torch.full((2, 1, 4, 4), 255.0), None, None, "values up to 255 and must lie in"),
        (torch.zeros(2, 3), None, torch.zeros(2), "retain_labels is torch.float32; give the numbers of classes"),
    ],
)
def test_data_that_a_network_would_misread_is_refused(retain, forget, labels, message):
    with pytest.raises(DataError, match=message):
        TaskData(retain, retain if forget is None else forget, retain, labels, labels, labels)


def test_labels_of_any_integers_are_kept_as_int64():
    points, labels = torch.full((2, 3), 9.0), torch.tensor([0, 7], dtype=torch.uint8)
    data = TaskData(points, points, points, labels, labels, labels)
    assert all(found.dtype == torch.int64 for found in (data.retain_labels, data.forget_labels, data.heldout_labels))
    assert data.retain_labels.tolist() == [0, 7]


def test_a_missing_data_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data root .* is not a folder"):
        load_data(get_task("mnist-trousers"), tmp_path / "nothing")
    with pytest.raises(DataError, match="no usable MNIST under"):
        load_data(get_task("mnist-trousers"), tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 garbage", None])
def test_a_damaged_archive_is_named(damage, tmp_path):
    whole = (get_task("mnist-trousers").assets / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(DataError, match="missing or damaged"):
        load_shipped(tmp_path / "data.npz")


def test_gaussians_are_shuffled_so_that_any_part_holds_every_kept_mode():
    data = load_data(TASK)
    for samples in (data.retain[:300], data.heldout[:300]):
        assert set(classify_points(samples)[1].argmax(1).tolist()) - {8} == set(range(1, 8))


def test_a_point_far_from_every_mode_is_of_none_of_them():
    classes = classify_points(torch.tensor([[2.0, 0.0], [2.0, 0.59], [2.0, 0.61], [0.0, 0.0]]))[1].argmax(1)
    assert classes.tolist() == [0, 0, 8, 8]  # within and beyond 4 standard deviations of 0.15


def test_no_noise_prediction_beats_the_optimal_one_and_its_error_is_orthogonal_to_any_function_of_x_t():
    """The conditional mean: E[(noise - E[noise | x_t]) h(x_t)] = 0."""
    generator = torch.Generator().manual_seed(0)
    x = sample_modes([1, 2, 5], 20_000, generator)
    noise = torch.randn(x.shape, generator=generator)
    alpha_bars = torch.full((len(x),), 0.7)
    x_t = 0.7**0.5 * x + 0.3**0.5 * noise
    best = optimal_epsilon((1, 2, 5), x_t, alpha_bars)
    for h in (x_t, x_t.sin(), best):
        assert ((noise - best) * h).mean().abs() < 0.01
    worse = optimal_epsilon((1, 2, 6), x_t, alpha_bars)
    assert (noise - best).square().mean() < (noise - worse).square().mean() - 0.1


def test_members_of_a_family_forget_what_their_name_says_and_share_the_pretrained_weights():
    task, default = get_task("mnist-digits:7,3"), get_task("mnist-digits")
    assert task is get_task("mnist-digits:3,7")
    assert get_task("mnist-digits:3") is default
    data = load_data(task)
    assert set(data.forget_labels.tolist()) == set(data.unseen_labels.tolist()) == {3, 7}
    assert not {3, 7} & set(data.retain_labels.tolist()) | {3, 7} & set(data.heldout_labels.tolist())
    assert (data.retain_size, data.forget_size) == (60_000 - 6131 - 6265, 6131 + 6265)
    assert len(data.retain) + len(data.forget) == 10_000
    weights = (t.pretrained_model().state_dict() for t in (task, default))
    assert all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))
    modes = load_data(get_task("gaussians-2d:2,5"))
    assert set(classify_points(modes.forget)[1].argmax(1).tolist()) - {8} == {2, 5}


def test_members_part_the_same_points_so_that_each_forgets_what_the_model_has_learned():
    def pool(data, *names):
        return sorted(tuple(x) for name in names for x in getattr(data, name).tolist())

    default = load_data(get_task("gaussians-2d"))
    for name in ("gaussians-2d:0,4", "gaussians-2d:2,5"):
        data = load_data(get_task(name))
        assert pool(data, "retain", "forget") == pool(default, "retain", "forget")
        assert not set(pool(data, "heldout", "unseen")) & set(pool(data, "retain", "forget"))


def test_tasks_stay_equal_through_a_pickle():
    import pickle

    for name in ("gaussians-2d", "gaussians-2d:2,5", "mnist-digits", "mnist-digits:1,3", "mnist-trousers"):
        task = get_task(name)
        assert pickle.loads(pickle.dumps(task)) == task
        register_task(pickle.loads(pickle.dumps(task)))


def test_a_member_without_an_oracle_runs_and_says_what_is_missing():
    task = get_task("gaussians-2d:2,5")
    assert task.constants.retain_loss == TASK.constants.retain_loss
    for missing in (task.oracle_model, lambda: task.unseen_forget_loss):
        with pytest.raises(TaskError, match=r"pretrain --task gaussians-2d:2,5 --retain-only --out \S+/2-5'"):
            missing()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mnist-digits:10", r"different classes in 0\.\.9, as in 'mnist-digits:1,3'"),
        ("mnist-digits:1,1", "different classes"),
        ("mnist-digits:", "different classes"),
        ("mnist-digits:one", "different classes"),
        ("gaussians-2d:0,1,2,3,4,5,6,7", "leave at least one class to retain"),
        ("mnist-digit:3", "did you mean 'mnist-digits"),
    ],
)
def test_a_bad_member_is_named(name, match):
    with pytest.raises(TaskError, match=match):
        get_task(name)


def test_unseen_data_is_no_forget_data():
    for name in TASKS:
        data = load_data(get_task(name))
        forget = {bytes(x.numpy().tobytes()) for x in data.forget}
        assert not forget & {bytes(x.numpy().tobytes()) for x in data.unseen}, name


def test_the_full_data_is_read_through_torchvision(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, n in (("train", 50), ("t10k", 20)):
        images = torch.arange(n * 784, dtype=torch.int64).remainder(256).to(torch.uint8)
        header = (2051).to_bytes(4, "big") + b"".join(v.to_bytes(4, "big") for v in (n, 28, 28))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = bytes(i % 10 for i in range(n))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes((2049).to_bytes(4, "big") + n.to_bytes(4, "big") + labels)
    data = load_data(get_task("mnist-trousers"), tmp_path)
    assert (len(data.retain), len(data.heldout), len(data.forget)) == (50, 20, NUM_FORGET)
    assert data.retain[1, 0, 0, 0] == 784 % 256


def test_a_task_of_ones_own_runs_and_a_name_is_taken_once(tmp_path):
    from unlearn_gym.envs import SISSUnlearnEnv

    mine = dataclasses.replace(TASK, name="alone", network=lambda: build_network(MLPConfig()))
    register_task(mine)
    register_task(mine)
    with pytest.raises(TaskError, match="'alone' is registered"):
        register_task(dataclasses.replace(mine, description="another"))
    env = SISSUnlearnEnv("alone", horizon=2)
    env.reset(seed=0)
    assert env.step(0.5)[0].shape == (6,)
    bare = dataclasses.replace(mine, name="bare", assets=tmp_path)
    with pytest.raises(WeightsError, match="task 'bare': no weights at"):
        bare.pretrained_model()
    with pytest.raises(TaskError, match=r"run unlearn_gym\.making\.calibration\.calibrate in Python"):
        _ = bare.constants
    (tmp_path / "constants.json").write_text('{"retain_loss": -1}')
    with pytest.raises(TaskError, match="measure it again"):
        _ = dataclasses.replace(bare).constants

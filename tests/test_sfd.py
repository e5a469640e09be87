"""Score forgetting distillation: identities, updates against a plain loop, what it refuses, its first stage."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import unlearn_gym  # noqa: F401 - registers the environment
from unlearn_gym.comparison.comparison import default_policies
from unlearn_gym.errors import SettingsError, TaskError, WeightsError
from unlearn_gym.making.distillation import Distillation, DistillationSettings, distill
from unlearn_gym.math import sfd
from unlearn_gym.math.diffusion import q_sample
from unlearn_gym.models import CompactUNet, UNetConfig
from unlearn_gym.models.families import FAMILIES, family_of
from unlearn_gym.models.one_step import OneStepModel, OneStepNetwork
from unlearn_gym.models.weights import save_weights
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.objectives.base import Learner
from unlearn_gym.run.objectives.score_forgetting import override_pairs
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import TaskData, get_task, load_data

TINY = UNetConfig(image_size=8, channels=(8, 8), num_blocks=1, embedding_dim=16, num_classes=4)
ALPHAS = torch.linspace(0.999, 0.01, 1000)
PLAIN = {
    "objective": "sfd", "forget_grad_rule": "loss", "dataset_factors": "none", "optimizer": "sgd",
    "learning_rate": 0.01, "max_grad_norm": None, "batch_size": 4,
}  # fmt: skip


def tiny_teacher(seed: int = 1) -> CompactUNet:
    torch.manual_seed(seed)
    network = CompactUNet(TINY)
    with torch.no_grad():  # its head starts at zero: away from there
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network.eval()


def tiny_data(forgotten=(1, 3)) -> TaskData:
    g = torch.Generator().manual_seed(0)
    kept = [c for c in range(4) if c not in forgotten]
    sets = {name: torch.rand(24, 1, 8, 8, generator=g) * 2 - 1 for name in ("retain", "forget", "heldout")}
    labels = {"retain": kept, "forget": list(forgotten), "heldout": kept}
    return TaskData(**sets, **{f"{name}_labels": torch.tensor(c).repeat(24)[:24] for name, c in labels.items()})


def tiny_model(teacher_seed: int = 1) -> OneStepModel:
    model = OneStepModel(tiny_teacher(teacher_seed))
    with torch.no_grad():  # three different networks
        for p in [*model.fake.parameters(), *model.generator.parameters()]:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def tiny_run(seed: int = 0, forgotten=(1, 3), **options) -> UnlearningRun:
    return UnlearningRun(tiny_model(), tiny_data(forgotten), ALPHAS, RunSettings(**{**PLAIN, **options}), seed)


def test_a_generator_that_denoises_nothing_gives_what_the_network_sees_in_noise():
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    perfect = lambda x_t, t, labels: x_t / (1 - ALPHAS[440]).sqrt()  # noqa: E731 - ε of x_0 = 0
    torch.testing.assert_close(sfd.generate(perfect, noise, None, ALPHAS, 440), torch.zeros_like(noise))


def test_equal_scores_have_no_divergence_and_no_gradient():
    teacher, g = tiny_teacher(), torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=g).requires_grad_()
    labels, t = torch.tensor([0, 1, 2, 3]), torch.tensor([40, 300, 500, 700])
    terms = sfd.score_terms(
        x, torch.randn(x.shape, generator=g), t, ALPHAS, teacher=teacher, fake=teacher, teacher_labels=labels,
        fake_labels=labels, alpha=1.2,
    )  # fmt: skip
    assert not terms.divergence.any()
    (gradient,) = torch.autograd.grad(terms.surrogate.mean(), x)
    assert gradient.abs().max() < 1e-6
    other = sfd.score_terms(
        x, torch.randn(x.shape, generator=g), t, ALPHAS, teacher=teacher, fake=teacher,
        teacher_labels=labels.roll(1), fake_labels=labels, alpha=1.2,
    )  # fmt: skip
    assert (other.divergence > 0).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_in_expectation_the_surrogate_is_one_minus_alpha_of_the_divergence_where_the_fake_score_is_exact(alpha):
    """For x ~ N(0, s²) scores are linear; E Δ·(f_ψ - x) = 0, as f_ψ is the mean of x given x_t (SiD, theorem 3)."""
    g, s, m = torch.Generator().manual_seed(0), 0.7, 0.4
    x = s * torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    alphas = ALPHAS.double()
    t = torch.full((len(x),), 300)
    ab = alphas[300]

    def posterior_noise(mean, std):
        def predict(x_t, timesteps, labels):
            start = mean + std**2 * ab.sqrt() / (ab * std**2 + 1 - ab) * (x_t - ab.sqrt() * mean)
            return (x_t - ab.sqrt() * start) / (1 - ab).sqrt()

        return predict

    noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
    labels = torch.zeros(len(x)).long()
    terms = sfd.score_terms(
        x, noise, t, alphas, teacher=posterior_noise(m, s), fake=posterior_noise(0.0, s),
        teacher_labels=labels, fake_labels=labels, alpha=alpha,
    )  # fmt: skip
    x_t = q_sample(x, noise, t, alphas)
    real = sfd.predict_start(posterior_noise(m, s)(x_t, t, labels), x_t, ab)
    scale = (x - real).abs().flatten(1).mean(1).clamp_min(1e-5)
    expected = (1 - alpha) * (terms.divergence * scale).mean()
    assert (terms.surrogate * scale).mean().item() == pytest.approx(expected.item(), abs=3e-3)


def plain_update(model, batch, lambda_, s, fake_lr):
    """One alternating update, written from the papers, on the draws of ``batch``; returns the generator's gradient."""
    start = model.start

    def x0(network, x_t, t, y):
        ab = ALPHAS[t].view(-1, 1, 1, 1)
        return (x_t - (1 - ab).sqrt() * network(x_t, t, y)) / ab.sqrt()

    def make(draw):
        t = torch.full((len(draw.labels),), start)
        return x0(model.generator, (1 - ALPHAS[start]).sqrt() * draw.noise, t, draw.labels)

    drawn = [make(draw).detach() for draw in batch.extra]
    x, y = torch.cat(drawn), torch.cat([d.labels for d in batch.extra])
    t = (torch.cat([d.fake_timesteps for d in batch.extra]) * 1000).long()
    noise = torch.cat([d.fake_noise for d in batch.extra])
    loss = (model.fake(q_sample(x, noise, t, ALPHAS), t, y) - noise).square().mean()
    optimizer = torch.optim.Adam(model.fake.parameters(), lr=fake_lr)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    total = 0.0
    for draw, weight in zip(batch.extra, (1 - lambda_, lambda_ * s.forget_scale), strict=True):
        x, t = make(draw), (38 + draw.timesteps * (712 - 38)).long()
        x_t = q_sample(x, draw.score_noise, t, ALPHAS)
        real, fake = x0(model.teacher, x_t, t, draw.teacher_labels), x0(model.fake, x_t, t, draw.labels)
        w = (x - real).detach().abs().mean((1, 2, 3), keepdim=True)
        total = total + weight * ((real - fake) * ((real - x) - s.score_alpha * (real - fake)) / w).mean()
    gradients = torch.autograd.grad(total, list(model.generator.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.8])
def test_an_update_is_that_of_a_plain_loop(lambda_):
    run = tiny_run(seed=3, forget_scale=0.7, fake_learning_rate=1e-3)
    model = copy.deepcopy(run.model)
    batch = run.draw(torch.Generator().manual_seed(3))
    gradient = plain_update(model, batch, lambda_, run.settings, 1e-3)
    before = run.flat.vector.detach().clone()
    terms = run.update(lambda_)
    assert terms.update_norm == pytest.approx(gradient.norm().item(), rel=1e-3)
    found = torch.cat([p.detach().flatten() for p in run.model.generator.parameters()])
    expected = torch.cat([p.detach().flatten() for p in model.generator.parameters()]) - 0.01 * gradient
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(before, run.flat.vector)
    for a, b in zip(run.model.fake.parameters(), model.fake.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bound", [None, 0.05])
def test_the_learner_is_adam_without_momentum_clipped_and_comes_back_to_a_state(bound):
    network, inputs = torch.nn.Linear(3, 2), torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(network)
    learner, optimizer = Learner(network, 0.01), torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.0, 0.999))

    def learn(x):
        learner.step(network(x).square().mean(), bound)
        return learner.flat.vector.detach().clone()

    for x in inputs[:3]:
        learn(x)
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        if bound is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), bound)
        optimizer.step()
        for found, expected in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    state = learner.state()
    first = [learn(x) for x in inputs[3:]]
    learner.restore(*state)
    assert all(map(torch.equal, first, [learn(x) for x in inputs[3:]]))


def test_lambda_is_a_weight_and_its_gradient_the_derivative():
    losses = {x: tiny_run().measure(x) for x in (0.25, 0.5, 0.75)}
    slope = (losses[0.75].siss_loss - losses[0.25].siss_loss) / 0.5
    assert losses[0.5].lambda_gradients["pathwise"] == pytest.approx(slope, rel=1e-3)
    assert losses[0.25].retain_loss / losses[0.75].retain_loss == pytest.approx(3.0, rel=1e-4)
    assert losses[0.75].forget_loss / losses[0.25].forget_loss == pytest.approx(3.0, rel=1e-4)
    assert all(t.retain_loss > 0 and t.forget_loss > 0 for t in losses.values())


def test_measuring_teaches_nothing_and_the_teacher_never_changes():
    run = tiny_run()
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    teacher = [p.clone() for p in run.model.teacher.parameters()]
    run.measure(0.5)
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    for _ in range(3):
        run.update(0.5)
    changed = {k.split(".")[0] for k, v in run.model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"generator", "fake"}
    assert all(torch.equal(a, b) for a, b in zip(teacher, run.model.teacher.parameters(), strict=True))


def test_nothing_is_drawn_from_the_data_but_its_classes():
    data = tiny_data()
    other = replace(data, retain=-data.retain, forget=0 * data.forget)
    runs = [UnlearningRun(tiny_model(), d, ALPHAS, RunSettings(**PLAIN), 0) for d in (data, other)]
    for run in runs:
        for lambda_ in (0.2, 0.7):
            run.update(lambda_)
    assert torch.equal(runs[0].flat.vector, runs[1].flat.vector)


def test_many_classes_are_forgotten_at_once_each_with_its_override():
    run = tiny_run(batch_size=200, override_classes={1: 2, 3: 0})
    kept, forgotten = run.draw(run.generator).extra
    assert set(kept.labels.tolist()) == {0, 2}
    assert torch.equal(kept.labels, kept.teacher_labels)
    pairs = set(zip(forgotten.labels.tolist(), forgotten.teacher_labels.tolist(), strict=True))
    assert pairs == {(1, 2), (3, 0)}


def test_overrides_are_the_next_kept_class_unless_chosen():
    assert override_pairs([0, 2, 5], [1, 3, 6], None) == [2, 5, 0]
    assert override_pairs([0, 2, 5], [1, 3, 6], ((3, 0),)) == [2, 0, 0]
    with pytest.raises(SettingsError, match="needs a class to keep"):
        override_pairs([], [1, 3], None)


@pytest.mark.parametrize("given", [{1: 2, 3: 0}, {"3": "0", "1": "2"}, [[3, 0], [1, 2]], ((1, 2), (3, 0))])
def test_overrides_may_be_given_as_python_or_json_has_them(given):
    settings = RunSettings().override(override_classes=given)
    assert settings.override_classes == ((1, 2), (3, 0))
    assert hash(settings) == hash(RunSettings().override(**settings.model_dump(mode="json")))


@pytest.mark.parametrize("given", ["{3: 8}", {3: "x"}, [3, 8], 3])
def test_overrides_that_are_none_say_how_to_write_them(given):
    with pytest.raises(SettingsError, match="on the command line --option"):
        RunSettings().override(override_classes=given)


def test_a_schedule_that_ends_before_the_generator_starts_is_refused():
    with pytest.raises(SettingsError, match="starts at t=440, its schedule ends at 199"):
        UnlearningRun(tiny_model(), tiny_data(), ALPHAS[:200], RunSettings(**PLAIN), 0).measure(0.5)


def test_cells_depend_on_the_teacher():
    task = get_task("sfd-mnist-digits")
    assert task.weights_within == [get_task("mnist-digits").pretrained_path]
    assert "variational:variance" not in default_policies(task.name, "sfd")
    assert "variational:variance" in default_policies("vae-mnist-trousers", "siss")


def test_the_remedy_for_a_missing_oracle_begins_with_its_teachers():
    remedy = get_task("sfd-mnist-digits:5").oracle_remedy
    assert "pretrain --task mnist-digits:5 --retain-only" in remedy
    assert "pretrain --task sfd-mnist-digits:5 --retain-only" in remedy


@pytest.mark.parametrize(
    ("chosen", "message"),
    [({1: 3}, "3, to override 1, is itself forgotten"), ({1: 9}, "9, to override 1, is no kept class"),
     ({0: 2}, "0 is not forgotten here")],
)  # fmt: skip
def test_overrides_that_cannot_be_are_refused_in_one_line(chosen, message):
    with pytest.raises(SettingsError, match=message) as caught:
        tiny_run(override_classes=chosen)
    assert "\n" not in str(caught.value)


def test_a_restored_run_continues_exactly_and_so_does_a_copied_one():
    run = tiny_run(optimizer="adamw")
    run.update(0.3)
    snapshot, twins = run.snapshot(), [pickle.loads(pickle.dumps(run)), copy.deepcopy(run)]
    results = [[run.update(x).siss_loss for x in (0.2, 0.8, 0.5)]]
    run.restore(snapshot)
    results += [[each.update(x).siss_loss for x in (0.2, 0.8, 0.5)] for each in (run, *twins)]
    assert results.count(results[0]) == 4


def test_norms_measured_seldom_change_no_update():
    runs = [tiny_run(grad_norms=value, hybrid_coef=0.5) for value in ("exact", "every:3")]
    for lambda_ in (0.2, 0.5, 0.8, 0.3):
        for run in runs:
            run.update(lambda_)
        norms = [run.measure(0.5).direct_grad_norm for run in runs]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    torch.testing.assert_close(runs[0].flat.vector, runs[1].flat.vector, rtol=1e-4, atol=1e-6)


def test_between_measurements_all_three_norms_are_those_last_measured():
    run = tiny_run(grad_norms="every:3", hybrid_coef=0.5)
    terms = [run.update(0.4) for _ in range(4)]
    for name in ("retain_grad_norm", "forget_grad_norm", "direct_grad_norm"):
        first, second, third, fourth = (getattr(t, name) for t in terms)
        assert first == second == third != fourth


def test_the_slope_of_a_hybrid_is_that_of_its_loss_where_the_mask_stays():
    run = tiny_run(hybrid_coef=0.6)
    state, losses = run.measure_generator.get_state(), {}
    for x in (0.4, 0.401):  # no uniform lies between them
        run.measure_generator.set_state(state)
        losses[x] = run.measure(x)
    slope = (losses[0.401].siss_loss - losses[0.4].siss_loss) / 0.001
    assert losses[0.4].lambda_gradients["pathwise"] == pytest.approx(slope, rel=0.02)
    assert losses[0.4].lambda_gradients["score_function"] != losses[0.4].lambda_gradients["pathwise"]


def test_the_hybrid_adds_the_gradient_of_siss_on_real_pairs():
    plain, hybrid = tiny_run(seed=2), tiny_run(seed=2, hybrid_coef=0.6)
    pair = [copy.deepcopy(run.flat.vector.detach()) for run in (plain, hybrid)]
    terms = [run.update(0.4) for run in (plain, hybrid)]
    assert terms[0].direct_grad_norm == 0.0
    moved = [(run.flat.vector.detach() - start) / -0.01 for run, start in zip((plain, hybrid), pair, strict=True)]
    direct = moved[1] - moved[0]
    assert direct.norm().item() == pytest.approx(terms[1].direct_grad_norm, rel=2e-2)
    assert terms[1].update_norm == pytest.approx(moved[1].norm().item(), rel=1e-2)
    assert terms[1].update_norm != pytest.approx(moved[0].norm().item(), rel=5e-2)
    batch = hybrid.draw(torch.Generator().manual_seed(2))
    assert terms[1].forget_fraction == (batch.uniforms < 0.4).float().mean()
    model = tiny_model()
    k, ab = batch.uniforms < 0.4, ALPHAS[440]
    labels = torch.where(k, batch.forget_labels, batch.retain_labels)
    x = torch.where(k.view(-1, 1, 1, 1), batch.forget, batch.retain)
    x_t = ab.sqrt() * x + (1 - ab).sqrt() * batch.noise
    error = (model.generator(x_t, torch.full((4,), 440), labels) - batch.noise).square().flatten(1).mean(1)
    loss = 0.6 * torch.where(k, -error / 0.4, error / 0.6).mean()  # labels never agree: weights are 1/λ or 1/(1-λ)
    expected = torch.autograd.grad(loss, list(model.generator.parameters()))
    for found, wanted in zip(hybrid.flat.gradient_views(direct), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=5e-2, atol=2e-3)


def test_the_environment_shows_the_direct_norm_of_a_hybrid_and_only_then():
    for coef, size in ((0.0, 6), (0.5, 7)):
        env = gym.make("SISSUnlearn-v0", task="sfd-mnist-digits", horizon=2, batch_size=4, hybrid_coef=coef)
        obs, _ = env.reset(seed=0)
        assert obs.shape == (size,) == env.observation_space.shape
        obs, _, _, _, info = env.step(np.array([0.3], dtype=np.float32))
        assert env.observation_space.contains(obs)
        if coef:
            ratio = math.log(info["terms"]["direct_grad_norm"] / info["terms"]["retain_grad_norm"])
            assert obs[6] == pytest.approx(ratio, abs=1e-5)


def test_sfd_on_a_diffusion_model_and_siss_on_a_generator_are_refused():
    with pytest.raises(SettingsError, match="objective='sfd' is for models of the family generator"):
        gym.make("SISSUnlearn-v0", task="mnist-digits", objective="sfd")
    with pytest.raises(SettingsError, match="objective='siss' is for models of the family diffusion or vae"):
        gym.make("SISSUnlearn-v0", task="sfd-mnist-digits", objective="siss")


def test_the_family_draws_in_one_step_and_the_fake_network_in_many():
    model = tiny_model()
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
    one = family_of(model).sample(model, noise, ALPHAS, labels=labels, clip=None)
    torch.testing.assert_close(one, sfd.generate(model.generator, noise, labels, ALPHAS, model.start))
    many = FAMILIES["diffusion"].sample(model, noise, ALPHAS, labels=labels, num_inference_steps=5)
    same = FAMILIES["diffusion"].sample(model.fake, noise, ALPHAS, labels=labels, num_inference_steps=5)
    torch.testing.assert_close(many, same)


@pytest.fixture
def tiny_task(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_weights(path, tiny_teacher().state_dict())
    network = OneStepNetwork(TINY, path, retrained=path)
    return replace(get_task("sfd-mnist-digits"), name="tiny", network=network, assets=tmp_path / "assets")


def test_a_resumed_distillation_is_an_uninterrupted_one(tiny_task, tmp_path):
    settings = DistillationSettings(updates=6, batch_size=4)
    ac = tiny_task.schedule.alphas_cumprod()
    whole, first, second = (Distillation(tiny_task.network, ac, settings) for _ in range(3))
    for _ in range(6):
        whole.update()
    for _ in range(3):
        first.update()
    first.save(tmp_path / "checkpoint.safetensors")
    second.load(tmp_path / "checkpoint.safetensors")
    for _ in range(3):
        second.update()
    for name, network in whole.networks.items():
        assert torch.equal(network.average, second.networks[name].average)
    other = Distillation(tiny_task.network, ac, settings.model_copy(update={"seed": 1}))
    with pytest.raises(WeightsError, match="another teacher or with other settings"):
        other.load(tmp_path / "checkpoint.safetensors")


def test_distilled_weights_load_and_a_task_without_a_generator_is_refused(tiny_task):
    distill(tiny_task, DistillationSettings(updates=2, batch_size=2), tiny_task.assets)
    distill(tiny_task, DistillationSettings(updates=2, batch_size=2), tiny_task.assets, retain_only=True)
    assert isinstance(tiny_task.pretrained_model(), OneStepModel)
    assert isinstance(tiny_task.oracle_model(), OneStepModel)
    with pytest.raises(TaskError, match="no one-step generator"):
        distill(get_task("gaussians-2d"), DistillationSettings(updates=1), tiny_task.assets)
    with pytest.raises(WeightsError, match="no retrained teacher"):
        replace(tiny_task.network, retrained=None).of_retrained_teacher()


def test_a_shipped_family_has_members_with_their_own_classes():
    task = get_task("sfd-mnist-digits:3,7")
    assert task.forget_classes == (3, 7)
    assert task.pretrained_path == get_task("sfd-mnist-digits").pretrained_path
    data = load_data(task)
    assert set(data.forget_labels.unique().tolist()) == {3, 7}

"""Commands that measure and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unlearn_gym.cli.arguments import (
    DataRoot,
    EngineName,
    OptionTexts,
    Threads,
    Trust,
    cell_bar,
    invocation,
    parse_options,
    set_threads,
)
from unlearn_gym.cli.terminal import fitted, show

if TYPE_CHECKING:
    from unlearn_gym.comparison.results import Results
    from unlearn_gym.metrics.judge import EvaluationSettings

ForgetSamples = Annotated[int, tyro.conf.arg(help="samples of the forget data's labels")]
QualitySamples = Annotated[int, tyro.conf.arg(help="samples for KID, FID and the other quality metrics")]
LikelihoodSamples = Annotated[int, tyro.conf.arg(help="samples of each set for likelihoods, a second each")]
InceptionWeights = Annotated[Path | None, tyro.conf.arg(help="torch-fidelity's Inception weights")]


def compare(
    task: str = "mnist-trousers",
    policies: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="as in the README, also mine=path/to/agent.zip; left out: finetune, static:0.1, :0.5 and :0.9, prior, "
            "random, cosine, the four variational estimators, and ppo and ppo-potential where they ship for the task",
            help_behavior_hint="",
        ),
    ] = (),
    seeds: Annotated[int, tyro.conf.arg(help="runs of every policy")] = 3,
    first_seed: Annotated[int, tyro.conf.arg(help="seeds are FIRST_SEED, FIRST_SEED + 1, …")] = 0,
    jobs: Annotated[int, tyro.conf.arg(help="processes; the cores are shared among them")] = 1,
    engine: EngineName = "joblib",
    out: Annotated[Path, tyro.conf.arg(help="folder of the results; the same folder resumes")] = Path("runs/compare"),
    forget_samples: ForgetSamples = 1000,
    quality_samples: QualitySamples = 1000,
    likelihood_samples: LikelihoodSamples = 0,
    inception_weights: InceptionWeights = None,
    option: OptionTexts = (),
    save_models: Annotated[bool, tyro.conf.arg(help="keep every run's model as OUT/models/*.safetensors")] = False,
    data_root: DataRoot = None,
    download: bool = False,
    trust: Trust = False,
) -> None:
    """Run every policy on the same seeds and batches, evaluate the final models, write a report; resumes."""
    from unlearn_gym.comparison.comparison import Comparison, default_policies, run_comparison, seed_range
    from unlearn_gym.report.report import write_report
    from unlearn_gym.tasks import get_task, load_data, resolve_data_root

    root = resolve_data_root(data_root)
    load_data(get_task(task), root, download=download)
    options = parse_options(option)
    objective = get_task(task).settings.override(**options).objective
    comparison = Comparison(
        task=task,
        policies=policies or default_policies(task, objective),
        seeds=seed_range(first_seed, seeds),
        options=options,
        evaluation=_evaluation(forget_samples, quality_samples, likelihood_samples, inception_weights),
        data_root=None if root is None else str(root.resolve()),
        trust=trust,
    )
    results = run_comparison(
        comparison, out, jobs=jobs, engine=engine, command=invocation(), progress=cell_bar(), save_models=save_models
    )
    path = write_report(results, out)
    print_tables(results)
    print(f"report: {path}\npictures: {out}/*.png\nraw values: {out}/results.json\ncurves: tensorboard --logdir {out}")
    if save_models:
        print(f"models: {out}/models/*.safetensors")


def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Annotated[Path | None, tyro.conf.arg(help="default: the one folder; needed for several")] = None,
) -> None:
    """Write tables and pictures again from results.json; several folders of one task are merged."""
    from unlearn_gym.comparison.records import write_results
    from unlearn_gym.comparison.results import load_results, merge_results
    from unlearn_gym.errors import ResultsError
    from unlearn_gym.report.report import write_report

    if not folders:
        raise ResultsError("name at least one folder with a results.json")
    if len(folders) > 1 and (out is None or out.resolve() in [folder.resolve() for folder in folders]):
        raise ResultsError(f"merging {len(folders)} folders needs --out, another folder for what comes of it")
    results = load_results(folders[0])
    if len(folders) > 1:
        results = merge_results([load_results(folder) for folder in folders], [str(folder) for folder in folders])
    target = out or folders[0]
    path = write_report(results, target)
    if target != folders[0]:
        write_results(target / "results.json", results.raw)
    print(path)
    print_tables(results)


def experiment(
    name: Annotated[str, tyro.conf.Positional],
    quick: Annotated[bool, tyro.conf.arg(help="the small size, in minutes")] = False,
    jobs: Annotated[int, tyro.conf.arg(help="processes; the cores are shared among them")] = 1,
    engine: EngineName = "joblib",
    out: Annotated[
        Path | None, tyro.conf.arg(help="default: runs/experiments/NAME (runs/quick/NAME); the same folder resumes")
    ] = None,
    data_root: DataRoot = None,
    trust: Trust = False,
) -> None:
    """Run an experiment of configs/experiments (or a .yaml file) and write its tables and pictures; resumes."""
    from unlearn_gym.making.experiment import run_experiment
    from unlearn_gym.tasks import resolve_data_root

    root = resolve_data_root(data_root)
    folder = out or Path("runs") / ("quick" if quick else "experiments") / Path(name).stem
    page = run_experiment(
        name, folder, quick=quick, jobs=jobs, engine=engine, command=invocation(), progress=cell_bar,
        data_root=None if root is None else str(root.resolve()), trust=trust,
    )  # fmt: skip
    print(page.read_text(), page, sep="\n")


def evaluate(
    weights: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help="'untouched', 'oracle' or a .safetensors file of weights")
    ],
    task: Annotated[
        str | None,
        tyro.conf.arg(help="needed for a file that no save() wrote; else that of the file, or mnist-trousers"),
    ] = None,
    forget_samples: ForgetSamples = 1000,
    quality_samples: QualitySamples = 1000,
    likelihood_samples: LikelihoodSamples = 0,
    inception_weights: InceptionWeights = None,
    out: Annotated[Path | None, tyro.conf.arg(help="a JSON file for the figures")] = None,
    data_root: DataRoot = None,
    threads: Threads = None,
) -> None:
    """Every metric of one model of a task: 'untouched', 'oracle', or a .safetensors file of its weights."""
    from unlearn_gym.comparison.cell import final_model
    from unlearn_gym.files import write_json
    from unlearn_gym.metrics.catalogue import METRICS
    from unlearn_gym.metrics.evaluator import Evaluator
    from unlearn_gym.tasks import get_task, load_data

    set_threads(threads)
    chosen = get_task(_task_of(weights, task))
    settings = _evaluation(forget_samples, quality_samples, likelihood_samples, inception_weights)
    settings.validate()
    model = final_model(chosen, weights)
    result = Evaluator(chosen, load_data(chosen, data_root), settings).evaluate(model)
    measured = [m for m in METRICS if m.name in result.metrics]
    rows = [[m.name, m.form(result.metrics[m.name]), m.better, m.meaning] for m in measured]
    show(["metric", "value", "better", "what it is"], rows, f"{weights} of {chosen.name}", prose=3)
    for name, reason in result.absent.items():
        print(f"{name} not measured: {reason}")
    if out is not None:
        write_json(out, {"command": invocation(), "metrics": result.metrics, "absent": result.absent})


def _task_of(weights: str, task: str | None) -> str:
    """The task to evaluate ``weights`` on; :class:`WeightsError` where the file does not fit it or says nothing."""
    from unlearn_gym.comparison.comparison import tell
    from unlearn_gym.envs.siss_unlearn import DEFAULT_TASK
    from unlearn_gym.errors import WeightsError
    from unlearn_gym.tasks.saving import fitting_task, other_task, read_header

    if not weights.endswith(".safetensors"):
        return DEFAULT_TASK if task is None else task
    header = read_header(weights)
    if task is None and header is None:
        raise WeightsError(f"{weights} does not say which task it is of; give --task")
    chosen = fitting_task(header, task, weights)
    note = other_task(header, chosen, weights)
    if note is not None:
        tell(note)
    return chosen.name


def metrics() -> None:
    """Print what every metric means, as in docs/metrics.md."""
    from unlearn_gym.metrics.catalogue import metrics_page

    print(metrics_page(), end="")


def _evaluation(forget: int, quality: int, likelihood: int, inception_weights: Path | None) -> EvaluationSettings:
    from unlearn_gym.metrics.judge import EvaluationSettings

    weights = None if inception_weights is None else str(inception_weights.resolve())
    return EvaluationSettings(forget, quality, num_likelihood_samples=likelihood, inception_weights=weights)


def print_tables(results: Results) -> None:
    """The main figures, with intervals where these do not make two tables of one; then verdict and warnings."""
    from rich.console import Console

    from unlearn_gym.report.report import verdict
    from unlearn_gym.report.signatures import warnings
    from unlearn_gym.report.tables import terminal

    console = Console()
    table, title = terminal(results, intervals=True), "means over seeds, with 95 % intervals"
    if len({cell["seed"] for cell in results.cells}) < 2:
        title = "one seed, so no intervals"
    elif len(fitted(console, *table)) > 1:
        table, title = terminal(results, intervals=False), "means over seeds; report.md has intervals and more metrics"
    show(*table, f"{results.task}: {title}")
    for line in [*verdict(results), *(f"Warning: {line}" for line in warnings(results))]:
        console.print(line.replace("**", ""), highlight=False, markup=False)


def bench(
    task: str = "mnist-trousers",
    quick: Annotated[bool, tyro.conf.arg(help="items 1 to 7 at small sizes, in under three minutes")] = False,
    items: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="default all: 1 overhead of a step, 2 against the published loop, 3 distance to the machine, 4 many "
            "environments, 5 training overhead, 6 evaluation, 7 reset and memory, 8 growth, 9 what was tried, "
            "10 objectives, 11 groups of the extended observation"
        ),
    ] = (),
    device: str = "cpu",
    out: Path = Path("runs/bench"),
) -> None:
    """Measure what steps, many environments, training and evaluation cost; prints goals and verdicts, writes JSON."""
    from unlearn_gym.benchmark.figures import HEADER
    from unlearn_gym.benchmark.suite import run_suite

    figures = run_suite(task, out, items=items, device=device, quick=quick, command=invocation())
    show(HEADER, [figure.cells() for figure in figures], f"{task} on {device}", prose=1)
    print(f"raw values: {out}/bench.json\ntable: {out}/bench.md")


def agents() -> None:
    """List the agents that ship: what each was trained on, how long, what came of it, and how to use it."""
    from unlearn_gym.making.shipped import score_table, training_table
    from unlearn_gym.policies.registry import SHIPPED_AGENTS

    scores = "On test instances (docs/transfer/transfer.md says where an agent knows a task of them):"
    print(f"{training_table()}\n\n{scores}\n\n{score_table()}\n\nin {SHIPPED_AGENTS}")

"""``unlearn-gym``: the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from unlearn_gym.evaluation.comparison import CellProgress
    from unlearn_gym.evaluation.results import Results

Threads = Annotated[int | None, tyro.conf.arg(help="torch threads; default: torch's own choice")]
DataRoot = Annotated[
    Path | None,
    tyro.conf.arg(help="folder with torchvision's data; default: $UNLEARN_GYM_DATA_ROOT, else the shipped part"),
]


def _command() -> str:
    """This invocation, as it goes into a manifest."""
    return shlex.join(["unlearn-gym", *sys.argv[1:]])


def _progress(description: str) -> Callable[[int, int, float], None]:
    """A bar for trainings: call it with (done, total, loss)."""
    from tqdm import tqdm

    bar: Any = None

    def update(done: int, total: int, loss: float) -> None:
        nonlocal bar
        bar = bar or tqdm(desc=description, total=total, unit="update")
        bar.n = done
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.refresh()

    return update


def _set_threads(threads: int | None) -> None:
    from unlearn_gym.errors import SettingsError

    if threads is not None:
        import torch

        if threads < 1:
            raise SettingsError(f"threads={threads} must be at least 1")

        torch.set_num_threads(threads)


def _required_root(data_root: Path | None) -> Path:
    from unlearn_gym.errors import DataError
    from unlearn_gym.tasks import DATA_ROOT_VARIABLE, resolve_data_root

    root = resolve_data_root(data_root)
    if root is None:
        raise DataError(f"this command needs the full data: give --data-root or set {DATA_ROOT_VARIABLE}")
    return root


def pretrain(
    task: str = "mnist-trousers",
    retain_only: bool = False,
    updates: int = 6000,
    batch_size: int = 128,
    seed: int = 0,
    data_root: DataRoot = None,
    download: bool = False,
    out: Path | None = None,
    threads: Threads = None,
) -> None:
    """Train a task's model on R ∪ F, or with --retain-only its oracle on R; resumes in the same --out."""
    from unlearn_gym.pretraining import PretrainSettings
    from unlearn_gym.pretraining import pretrain as train
    from unlearn_gym.tasks import get_task, load_data

    _set_threads(threads)
    chosen = get_task(task)
    settings = PretrainSettings(updates=updates, batch_size=batch_size, seed=seed)
    data = load_data(chosen, data_root, download=download)
    name = "oracle" if retain_only else "pretrained"
    folder = out or Path("runs/pretrain") / task
    manifest = train(
        chosen, data, settings, folder, retain_only=retain_only, command=_command(),
        progress=_progress(f"{task} {name}"),
    )  # fmt: skip
    figures = ", ".join(f"{k} {v:.4f}" for k, v in manifest["figures"].items())
    print(f"\n{folder / name}.safetensors: {figures}")


def train_classifier(
    data_root: DataRoot = None,
    out: Path = Path("runs/classifier"),
    updates: int = 2000,
    seed: int = 0,
    download: bool = False,
    threads: Threads = None,
) -> None:
    """Train the digit-and-garment classifier that judges samples."""
    from unlearn_gym.train_classifier import train_classifier as train

    _set_threads(threads)
    manifest = train(
        _required_root(data_root), out, updates=updates, seed=seed, download=download,
        command=_command(), progress=_progress("classifier"),
    )  # fmt: skip
    print()
    for key, value in manifest["figures"].items():
        print(f"{key:28s} {value:.4f}")


def build_data(
    task: Literal["mnist-trousers", "mnist-tshirt"] = "mnist-trousers",
    data_root: DataRoot = None,
    out: Path = Path("runs/data.npz"),
    download: bool = False,
) -> None:
    """Choose the images that ship with a task from the full data sets (seeded)."""
    from unlearn_gym.tasks.mnist import build_archive, build_tshirt

    build = build_archive if task == "mnist-trousers" else build_tshirt
    print(f"{out}: sha256 {build(out, _required_root(data_root), download=download)}")


def calibrate(
    task: str = "mnist-trousers",
    num_batches: int = 256,
    data_root: DataRoot = None,
    out: Path | None = None,
    threads: Threads = None,
) -> None:
    """Measure the feature constants of a task; writes constants.json beside the task's weights."""
    from unlearn_gym.calibration import calibrate as measure
    from unlearn_gym.files import write_json
    from unlearn_gym.tasks import get_task, load_data

    _set_threads(threads)
    chosen = get_task(task)
    constants = measure(chosen, load_data(chosen, data_root), num_batches=num_batches, command=_command())
    path = (out or chosen.assets) / "constants.json"
    write_json(path, constants.model_dump())
    print(f"{path}: {constants.model_dump_json()}")


def networks(data_root: DataRoot = None, out: Path = Path("runs/networks"), threads: Threads = None) -> None:
    """Train a few candidate networks briefly and print sample quality against step cost; resumes."""
    from unlearn_gym.network_table import network_table
    from unlearn_gym.tasks import get_task, load_data

    _set_threads(threads)
    data = load_data(get_task("mnist-trousers"), data_root)
    path = network_table(data, out, command=_command())
    print(path.read_text())


def compare(
    task: str = "mnist-trousers",
    policies: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="names as in the README; default: all that ship"),
    ] = (),
    seeds: Annotated[int, tyro.conf.arg(help="runs of every policy")] = 3,
    first_seed: Annotated[int, tyro.conf.arg(help="seeds are FIRST_SEED, FIRST_SEED + 1, …")] = 0,
    jobs: Annotated[int, tyro.conf.arg(help="processes; the cores are shared among them")] = 1,
    out: Annotated[Path, tyro.conf.arg(help="folder of the results; the same folder resumes")] = Path("runs/compare"),
    forget_samples: Annotated[int, tyro.conf.arg(help="samples for the forget rate")] = 1000,
    quality_samples: Annotated[int, tyro.conf.arg(help="samples for KID, FID and the other quality metrics")] = 1000,
    likelihood_samples: Annotated[int, tyro.conf.arg(help="samples of each set for likelihoods, seconds each")] = 0,
    inception_weights: Annotated[Path | None, tyro.conf.arg(help="torch-fidelity's Inception weights")] = None,
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help="a run setting, e.g. horizon=100; repeatable")
    ] = (),
    data_root: DataRoot = None,
    download: bool = False,
) -> None:
    """Run every policy on the same seeds and batches, evaluate the final models, write a report; resumes."""
    from unlearn_gym.evaluation.comparison import Comparison, default_policies, run_comparison
    from unlearn_gym.evaluation.judge import EvaluationSettings
    from unlearn_gym.evaluation.report import write_report
    from unlearn_gym.tasks import get_task, load_data, resolve_data_root

    root = resolve_data_root(data_root)
    load_data(get_task(task), root, download=download)
    comparison = Comparison(
        task=task,
        policies=policies or default_policies(task),
        seeds=tuple(range(first_seed, first_seed + seeds)),
        options=_parse_options(option),
        evaluation=EvaluationSettings(
            forget_samples,
            quality_samples,
            num_likelihood_samples=likelihood_samples,
            inception_weights=None if inception_weights is None else str(inception_weights.resolve()),
        ),
        data_root=None if root is None else str(root.resolve()),
    )
    results = run_comparison(comparison, out, jobs=jobs, command=_command(), progress=_cell_progress())
    path = write_report(results, out)
    _print_tables(results)
    print(f"report: {path}\npictures: {out}/*.png\nraw values: {out}/results.json\ncurves: tensorboard --logdir {out}")


def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Annotated[Path | None, tyro.conf.arg(help="default: the one folder; needed for several")] = None,
) -> None:
    """Write tables and pictures again from results.json; several folders of one task are merged."""
    from unlearn_gym.errors import ResultsError
    from unlearn_gym.evaluation.report import write_report
    from unlearn_gym.evaluation.results import load_results, merge_results
    from unlearn_gym.files import write_json

    if not folders:
        raise ResultsError("name at least one folder with a results.json")
    if len(folders) > 1 and out is None:
        raise ResultsError(f"merging {len(folders)} folders needs --out, a folder for what comes of it")
    results = load_results(folders[0])
    if len(folders) > 1:
        results = merge_results([load_results(folder) for folder in folders], [str(folder) for folder in folders])
    target = out or folders[0]
    path = write_report(results, target)
    if target != folders[0]:
        write_json(target / "results.json", results.raw, indent=None)
    print(path)
    _print_tables(results)


def experiment(
    name: Annotated[str, tyro.conf.Positional],
    quick: Annotated[bool, tyro.conf.arg(help="the small size, in minutes")] = False,
    jobs: Annotated[int, tyro.conf.arg(help="processes; the cores are shared among them")] = 1,
    out: Annotated[
        Path | None, tyro.conf.arg(help="default: runs/experiments/NAME (runs/quick/NAME); the same folder resumes")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Run an experiment of configs/experiments (or a .yaml file) and write its tables and pictures; resumes."""
    from unlearn_gym.evaluation.experiment import run_experiment
    from unlearn_gym.tasks import resolve_data_root

    root = resolve_data_root(data_root)
    folder = out or Path("runs") / ("quick" if quick else "experiments") / Path(name).stem
    page = run_experiment(
        name, folder, quick=quick, jobs=jobs, command=_command(), progress=_cell_progress,
        data_root=None if root is None else str(root.resolve()),
    )  # fmt: skip
    print(page.read_text(), page, sep="\n")


def metrics() -> None:
    """Print what every metric means, as in docs/metrics.md."""
    from unlearn_gym.evaluation.catalogue import metrics_page

    print(metrics_page(), end="")


def _parse_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """``name=value`` each, with the value as JSON where it is JSON."""
    import json

    from unlearn_gym.errors import SettingsError

    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise SettingsError(f"option {text!r} must be name=value, as in horizon=100, each name once")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


SHOWN = ("forget_rate", "forget_loss", "retain_loss", "feature_kid")


def _cell_progress(title: str = "comparison") -> CellProgress:
    """A bar over the cells of a comparison, with a line for each finished one."""
    from tqdm import tqdm

    bar: Any = None

    def update(cell: dict[str, Any] | None, done: int, total: int) -> None:
        nonlocal bar
        bar = bar or tqdm(desc=title, total=total, unit="run", smoothing=0)
        if cell is not None:
            shown = {k: cell["metrics"][k] for k in SHOWN if k in cell["metrics"]}
            figures = "  ".join(f"{k} {v:.4g}" for k, v in shown.items()) or "diverged"
            bar.write(f"{cell['policy']:28s} seed {cell['seed']}  {figures}")
            sys.stdout.flush()
        bar.n = done
        bar.refresh()

    return update


def _print_tables(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    from unlearn_gym.evaluation.report import verdict
    from unlearn_gym.evaluation.signatures import warnings
    from unlearn_gym.evaluation.tables import terminal

    console = Console(width=None if sys.stdout.isatty() else 120)
    header, rows = terminal(results, intervals=console.width >= 100)
    table = Table(title=f"{results.task}: means over seeds", show_lines=console.width >= 100)
    for title in header:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in [*verdict(results), *(f"Warning: {line}" for line in warnings(results))]:
        console.print(line.replace("**", ""), highlight=False)


def bench(
    task: str = "mnist-trousers",
    quick: Annotated[bool, tyro.conf.arg(help="items 1 to 7 at small sizes, in under three minutes")] = False,
    items: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="default all: 1 overhead of a step, 2 against the published loop, 3 distance to the machine, 4 many "
            "environments, 5 training overhead, 6 evaluation, 7 reset and memory, 8 growth, 9 what was tried"
        ),
    ] = (),
    device: str = "cpu",
    out: Path = Path("runs/bench"),
) -> None:
    """Measure what steps, many environments, training and evaluation cost; prints goals and verdicts, writes JSON."""
    from rich.console import Console
    from rich.table import Table

    from unlearn_gym.benchmark.figures import HEADER
    from unlearn_gym.benchmark.suite import run_suite

    figures = run_suite(task, out, items=items, device=device, quick=quick, command=_command())
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(*HEADER, title=f"{task} on {device}")
    for figure in figures:
        table.add_row(*figure.cells())
    console.print(table)
    print(f"raw values: {out}/bench.json\ntable: {out}/bench.md")


COMMANDS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "report": report,
    "experiment": experiment,
    "metrics": metrics,
    "pretrain": pretrain,
    "train-classifier": train_classifier,
    "build-data": build_data,
    "calibrate": calibrate,
    "networks": networks,
    "bench": bench,
}


def main() -> None:
    """Entry point: a known error becomes one line on stderr and exit status 2."""
    from pydantic import ValidationError

    from unlearn_gym.errors import UnlearnGymError
    from unlearn_gym.settings import describe_validation_error

    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="unlearn-gym")
    except UnlearnGymError as error:
        sys.exit(_fail(str(error)))
    except ValidationError as error:
        sys.exit(_fail(describe_validation_error(error)))
    except OSError as error:
        sys.exit(_fail(f"{error}; check the path and its permissions"))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; the same command resumes", status=130))


def _fail(message: str, status: int = 2) -> int:
    print(f"unlearn-gym: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

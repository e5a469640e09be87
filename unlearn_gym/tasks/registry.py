"""Tasks by name: which model, what to retain, what to forget, and with which defaults."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn_gym.errors import DataError, TaskError, WeightsError, shown
from unlearn_gym.files import read_json_as
from unlearn_gym.math.diffusion import ScheduleConfig
from unlearn_gym.models import MLPConfig, UNetConfig, VAEConfig, build_network
from unlearn_gym.models.families import Family, family_of
from unlearn_gym.models.one_step import OneStepNetwork
from unlearn_gym.models.weights import load_weights
from unlearn_gym.settings import RunSettings
from unlearn_gym.system.torch_state import initial_weights_from, insulated
from unlearn_gym.system.values import Checked
from unlearn_gym.tasks.data import TaskData

DATA_ROOT_VARIABLE = "UNLEARN_GYM_DATA_ROOT"
HOME_VARIABLE = "UNLEARN_GYM_HOME"


class FeatureConstants(Checked):
    """Measured scales of a task: x0 of each feature at λ = 0.5 with factors (1, 1), and the forget
    loss of a model that never saw the forget set (the oracle's; None where there is no oracle).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    retain_loss: float = Field(gt=0)
    forget_loss: float = Field(gt=0)
    retain_grad_norm: float = Field(gt=0)
    forget_grad_norm: float = Field(gt=0)
    unseen_forget_loss: float | None = Field(None, gt=0)
    num_batches: int = Field(ge=1)
    command: str = ""


@dataclass(frozen=True)
class Task:
    """Everything an unlearning run and its evaluation need, as plain data and functions.

    ``network`` is a config, or a function that returns an ε-network
    ``(x_t, timesteps, labels or None) -> epsilon_pred`` of your own; one whose attribute ``family`` says so returns a
    model of another kind (:mod:`unlearn_gym.models.families`). ``load_data(data_root, download)``
    returns the sets. ``assets`` is the folder with ``pretrained.safetensors``, ``oracle.safetensors``
    and ``constants.json``; ``pretrained_assets`` and ``oracle_assets`` are those of the weights that tasks share.
    ``classify(samples) -> (features (N, F), logits (N, C))`` judges generated samples; those whose most likely
    class is in ``forget_classes`` count as forget data. ``probe_labels`` are the labels under which the forget
    data was learned (none for an unconditional model), ``clip`` the range of the data (None for unbounded).
    ``optimum`` is the noise prediction of least expected error on the retain data, where it is known in closed
    form: ``(x_t, alpha_bars (B,)) -> epsilon``. Of a ``user_made`` task nothing is in the package: its data come
    from a data root alone, and the user trains its weights, which the commands put into ``assets`` by default.
    """

    name: str
    description: str
    network: UNetConfig | MLPConfig | VAEConfig | Callable[[], nn.Module]
    load_data: Callable[[Path | None, bool], TaskData]
    assets: Path
    pretrained_assets: Path | None = None
    oracle_assets: Path | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    settings: RunSettings = field(default_factory=RunSettings)
    classify: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    forget_classes: tuple[int, ...] = ()
    probe_labels: tuple[int, ...] = ()
    optimum: Callable[[Tensor, Tensor], Tensor] | None = None
    clip: float | None = 1.0
    num_inference_steps: int = 20
    user_made: bool = False

    def __post_init__(self) -> None:
        steps = min(self.num_inference_steps, self.schedule.num_train_timesteps)  # a short schedule has no more
        object.__setattr__(self, "num_inference_steps", steps)

    def build_model(self) -> nn.Module:
        """The network, with weights that are not the pretrained ones yet."""
        if isinstance(self.network, UNetConfig | MLPConfig | VAEConfig):
            return build_network(self.network)
        return self.network()

    @property
    def family(self) -> Family:
        """The kind of its model."""
        return family_of(self.network)

    @insulated
    def pretrained_model(self) -> nn.Module:
        """The model that has learned D = R ∪ F; raises :class:`WeightsError` when there is none that fits."""
        self.check_pretrained()
        return self._load(self.pretrained_path)

    @insulated
    def oracle_model(self) -> nn.Module:
        """The same network trained on R alone; raises :class:`TaskError` when there is none."""
        if not self.oracle_path.is_file():
            raise TaskError(f"task {self.name!r} has no retrained oracle; {self.oracle_remedy}")
        return self._load(self.oracle_path)

    @property
    def pretrained_path(self) -> Path:
        """The file of the weights that runs start from."""
        return (self.pretrained_assets or self.assets) / "pretrained.safetensors"

    @property
    def oracle_path(self) -> Path:
        """The file of the retrained oracle's weights; tasks of a family may lack it."""
        return (self.oracle_assets or self.assets) / "oracle.safetensors"

    @property
    def constants_path(self) -> Path:
        """The file of its constants; of a member of a family that has none of its own, the family's."""
        own, shared = (folder / "constants.json" for folder in (self.assets, self.pretrained_path.parent))
        return shared if shared.is_file() and not own.is_file() else own

    @property
    def weights_within(self) -> list[Path]:
        """Files of weights that the network is built around: a one-step generator's teacher."""
        return [self.network.teacher] if isinstance(self.network, OneStepNetwork) else []

    @property
    def oracle_remedy(self) -> str:
        """How to get an oracle, in words."""
        network, first = self.network, ""
        if isinstance(network, OneStepNetwork) and network.retrained and not network.retrained.is_file():
            folder = network.retrained.parent
            teacher = f"unlearn-gym pretrain --task {network.teacher_task} --retain-only --out {folder}"
            first = f"its teacher with '{teacher}', then "
        own = self._command("pretrain", "--retain-only", "--out", str(self.oracle_path.parent))
        return f"train {first}it with {own}"

    def check_pretrained(self) -> None:
        """Raise :class:`WeightsError`, with what is to be run, where the weights that runs start from are missing."""
        if self.pretrained_path.is_file():
            return
        if not self.user_made:
            remedy = self._command("pretrain")
            raise WeightsError(f"task {self.name!r}: no weights at {self.pretrained_path}; make them with {remedy}")
        family = replace(self, name=self.name.partition(":")[0])  # whose weights all members share
        raise WeightsError(
            f"task {self.name!r} ships no weights, and there is no {self.pretrained_path}; make them with "
            f"{family._command('pretrain', '--download')}, for an oracle (which reward='potential' needs) "
            f"{self._command('pretrain', '--retain-only')}, and then {self._command('calibrate')}: DIR is the folder "
            f"of torchvision's data, and {HOME_VARIABLE} names another one for weights"
        )

    def _command(self, name: str, *options: str) -> str:
        """What to run for this task: a command of the shell in quotes, or a function where the shell cannot know it."""
        if self.name.partition(":")[0] not in SHELL_TASKS:
            return f"{PYTHON_FUNCTIONS[name]} in Python (docs/diffusers.md shows how)"
        data = ("--data-root", "DIR") if self.user_made else ()
        return f"'unlearn-gym {' '.join((name, '--task', self.name, *data, *options))}'"

    def _load(self, path: Path) -> nn.Module:
        with initial_weights_from(None):
            model = self.build_model()
        try:
            load_weights(model, path)
        except WeightsError as error:
            raise WeightsError(f"task {self.name!r}: {error}") from None
        return model

    @property
    def classifier(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """``classify``; raises :class:`TaskError` when the task has none."""
        if self.classify is None:
            raise TaskError(f"task {self.name!r} has no classifier; give it classify= to judge samples")
        return self.classify

    @property
    def unseen_forget_loss(self) -> float:
        """The forget loss, on a run's probe, of a model that never saw the forget set; raises :class:`TaskError`
        when there was no oracle to measure it on.
        """
        loss = self.constants.unseen_forget_loss
        if loss is None:
            raise TaskError(
                f"task {self.name!r} has no oracle, so what a model that never saw the data would lose is unknown; "
                f"give potential_cap, or {self.oracle_remedy} and calibrate"
            )
        return loss

    @cached_property
    def constants(self) -> FeatureConstants:
        """Measured feature scales; raises :class:`TaskError` when they were never measured.

        A member of a family without its own has those of the family's default, but for the forget loss of a model
        that never saw the data.
        """
        path = self.constants_path
        try:
            constants = read_json_as(path, FeatureConstants, TaskError, "measure it again")
            borrowed = path.parent != self.assets
            return constants.model_copy(update={"unseen_forget_loss": None}) if borrowed else constants
        except FileNotFoundError:
            raise TaskError(
                f"task {self.name!r} has no {path.name}; run {self._command('calibrate')} "
                "or pass normalize_features=False"
            ) from None


@dataclass(frozen=True)
class TaskFamily:
    """Tasks ``name:c,c…`` of one data set, each with the set of its classes 0..num_classes-1 to be forgotten;
    ``name`` alone forgets ``default``. ``make(classes, name)`` builds the one for a sorted set.
    """

    name: str
    num_classes: int
    default: tuple[int, ...]
    make: Callable[[tuple[int, ...], str], Task]

    def member(self, text: str) -> Task:
        """The task that forgets the classes in ``text``, as in ``"1,3"``; raises :class:`TaskError`."""
        given = shown(f"{self.name}:{text}")
        try:
            classes = tuple(sorted(int(part) for part in text.split(",")))
        except ValueError:
            classes = ()
        if not classes or len(set(classes)) < len(classes) or not 0 <= classes[0] <= classes[-1] < self.num_classes:
            raise TaskError(
                f"task {given}: after the colon name different classes in 0..{self.num_classes - 1}, "
                f"as in '{self.name}:1,3'"
            )
        if len(classes) == self.num_classes:
            raise TaskError(f"task {given} forgets everything; leave at least one class to retain")
        name = self.name if classes == self.default else f"{self.name}:{','.join(map(str, classes))}"
        if name not in _TASKS:
            register_task(self.make(classes, name))
        return _TASKS[name]


SHELL_TASKS: set[str] = set()
"""Names of the tasks that commands of the shell know: the package's own, which :mod:`unlearn_gym.tasks` registers."""
PYTHON_FUNCTIONS = {
    "pretrain": "unlearn_gym.making.pretraining.pretrain",
    "calibrate": "unlearn_gym.making.calibration.calibrate",
}
"""What those commands call."""
_TASKS: dict[str, Task] = {}
_FAMILIES: dict[str, TaskFamily] = {}


def register_task(task: Task) -> None:
    """Make ``task`` available by its name; a name can be registered again only with the same task."""
    if _TASKS.get(task.name, task) != task:
        raise TaskError(f"a different task named {task.name!r} is registered; choose another name")
    _TASKS[task.name] = task


def register_family(family: TaskFamily) -> None:
    """Make all tasks of ``family`` available, each under its name."""
    _FAMILIES[family.name] = family
    register_task(family.make(family.default, family.name))


def task_names() -> list[str]:
    """Names of all registered tasks."""
    return sorted(_TASKS)


def family_names() -> list[str]:
    """Names of the tasks that may be given other classes to forget."""
    return sorted(_FAMILIES)


def get_task(name: str) -> Task:
    """The task registered as ``name``, or a member of a family as ``"mnist-digits:1,3"``; raises
    :class:`TaskError` with the closest name.
    """
    if not isinstance(name, str):
        raise TaskError(f"task {shown(name)} is no task's name; known: {', '.join(task_names())}")
    if name in _TASKS:
        return _TASKS[name]
    family, colon, classes = name.partition(":")
    if colon and family in _FAMILIES:
        return _FAMILIES[family].member(classes)
    close = difflib.get_close_matches(name[:100], _TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(task_names())}"
    raise TaskError(f"unknown task {shown(name)}; {hint}")


def resolve_data_root(data_root: str | os.PathLike[str] | None) -> Path | None:
    """``data_root``, else the environment variable ``UNLEARN_GYM_DATA_ROOT``, else None (shipped data)."""
    chosen = data_root if data_root is not None else os.environ.get(DATA_ROOT_VARIABLE) or None
    if chosen is not None and (not isinstance(chosen, str | os.PathLike) or "\0" in os.fspath(chosen)):
        raise DataError(f"data_root={shown(chosen)} must be the path of a folder, or None")
    return None if chosen is None else Path(chosen)


def user_folder() -> Path:
    """Where weights go that the user trains: the environment variable ``UNLEARN_GYM_HOME``, else
    ``~/.local/share/unlearn_gym``. Read when the tasks are imported.
    """
    chosen = os.environ.get(HOME_VARIABLE) or "~/.local/share/unlearn_gym"
    return Path(os.path.expanduser(chosen)).absolute()  # Path.expanduser raises where there is no home


_DATA: dict[tuple[Task, Path | None], TaskData] = {}


@insulated
def load_data(task: Task, data_root: str | os.PathLike[str] | None = None, *, download: bool = False) -> TaskData:
    """The task's sets, read once per process; raises ``DataError`` with the remedy."""
    root = resolve_data_root(data_root)
    if (task, root) not in _DATA:
        if task.user_made and root is None:
            raise DataError(
                f"task {task.name!r} ships no data: name the folder that holds it with --data-root (data_root=) or "
                f"{DATA_ROOT_VARIABLE}, and let torchvision fill it with --download (download=True)"
            )
        _DATA[task, root] = task.load_data(root, download)
    return _DATA[task, root]


def provide_data(task: Task, data_root: str | os.PathLike[str] | None, data: TaskData) -> None:
    """Let :func:`load_data` of this process return ``data``, which another process has read."""
    _DATA[task, resolve_data_root(data_root)] = data

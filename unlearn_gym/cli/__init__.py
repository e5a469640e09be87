"""``unlearn-gym``: the command line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from unlearn_gym import __version__
from unlearn_gym.cli import assets, evidence, reference
from unlearn_gym.system.interrupts import INTERRUPTED, restore_interrupts
from unlearn_gym.system.processes import Terminated, signals_as_interrupts

COMMANDS: dict[str, Callable[..., Any]] = {
    "compare": evidence.compare,
    "report": evidence.report,
    "experiment": evidence.experiment,
    "agents": evidence.agents,
    "evaluate": evidence.evaluate,
    "metrics": evidence.metrics,
    "options": reference.options,
    "tasks": reference.tasks,
    "bench": evidence.bench,
    "pretrain": assets.pretrain,
    "train-classifier": assets.train_classifier,
    "build-data": assets.build_data,
    "build-instances": assets.build_instances,
    "calibrate": assets.calibrate,
    "networks": assets.networks,
    "network-costs": assets.network_costs,
}
DESCRIPTION = "unlearn-gym COMMAND --help explains each; --version is known, too."


def main() -> None:
    """Entry point: a known error becomes one line on stderr and exit status 2."""
    from pydantic import ValidationError

    from unlearn_gym.errors import UnlearnGymError, check_texts, describe_validation_error, line_with_log

    if sys.argv[1:] == ["--version"]:
        print(f"unlearn-gym {__version__}")
        return
    try:
        restore_interrupts()
        check_texts(sys.argv)
        with signals_as_interrupts():
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="unlearn-gym", description=DESCRIPTION)
        sys.stdout.flush()
    except UnlearnGymError as error:
        sys.exit(_fail(line_with_log(error)))
    except ValidationError as error:
        sys.exit(_fail(describe_validation_error(error)))
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be written at exit
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        sys.exit(_fail(f"{error}; check the path and its permissions"))
    except Terminated as ended:
        sys.exit(_fail(f"{ended}; the same command resumes", status=ended.status))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; the same command resumes", status=INTERRUPTED))


def _fail(message: str, status: int = 2) -> int:
    from unlearn_gym.errors import one_line

    print(f"unlearn-gym: {one_line(message)}", file=sys.stderr)
    return status

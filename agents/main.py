"""What the commands share: an error that a user can mend is one line and exit status 2."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import tyro
from pydantic import ValidationError

from unlearn_gym.errors import UnlearnGymError, check_texts, describe_validation_error, line_with_log, one_line
from unlearn_gym.system.interrupts import INTERRUPTED, restore_interrupts
from unlearn_gym.system.processes import Terminated, signals_as_interrupts


def run_command(name: str, function: Callable[..., Any]) -> None:
    """Run ``function`` with the arguments of the command line."""
    try:
        restore_interrupts()
        check_texts(sys.argv)
        with signals_as_interrupts():
            tyro.cli(function, description=function.__doc__)
        return
    except ValidationError as error:
        message = describe_validation_error(error)
    except (UnlearnGymError, gym.error.Error) as error:
        message = line_with_log(error)
    except OSError as error:
        message = f"{error}; check the path and its permissions"
    except Terminated as ended:
        print(f"agents.{name}: {ended}; the same command goes on", file=sys.stderr)
        sys.exit(ended.status)
    except KeyboardInterrupt:
        print(f"agents.{name}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(f"agents.{name}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def invocation(name: str) -> str:
    """This invocation, as it goes into a manifest."""
    return shlex.join(["python", "-m", f"agents.{name}", *sys.argv[1:]])

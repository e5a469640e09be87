"""Item 11: what each group of the extended observation adds to the time of a step."""

from __future__ import annotations

from functools import partial

from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.step import make_env, stepping
from unlearn_gym.benchmark.timing import own_clock, take_turns, threads
from unlearn_gym.envs.features import GROUPS, ExtendedFeatures


def groups(task: str, device: str, rounds: int) -> list[Figure]:
    """A step with each group, and with all of them, over one without, as shipped, in seconds of one thread."""
    with threads(1):
        paper, extended = make_env(task, device), make_env(task, device, observation="extended")
        functions = {"paper": stepping(paper), "extended": stepping(extended)}
        for name, group in ExtendedFeatures(paper.task, paper.run).groups.items():
            functions[name] = partial(group.measure, paper.run, paper.start_vector)
        turns = take_turns(functions, rounds, device=device, clock=own_clock(device))
    titles = {name: 1.0 + turns.ratio(name, "paper") for name in GROUPS}
    figures = [Figure("11", f"{task}, step and {name} / step", value, "×") for name, value in titles.items()]
    title = f'{task}, step with observation="extended" / step'
    return [*figures, Figure("11", title, turns.ratio("extended", "paper"), "×")]

"""Learning agents for SISSUnlearn-v0: ``python -m agents.train``."""

import unlearn_gym  # noqa: F401  before all that takes time: it makes Ctrl-C quiet until a command begins

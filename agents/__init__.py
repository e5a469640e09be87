"""Learning agents for SISSUnlearn-v0: ``python -m agents.train``."""

"""Files, processes and torch as the operating system and the caller leave them."""

"""How shipped weights, constants and results were made."""

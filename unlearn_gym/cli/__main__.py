"""``python -m unlearn_gym.cli``."""

from unlearn_gym.cli import main

main()

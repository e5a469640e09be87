"""``unlearn-gym bench``: what a step, many environments, training and evaluation cost, as ratios in one run."""

"""Training rules: what one stage does with a training packet."""

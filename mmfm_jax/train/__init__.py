"""From an experiment to a trained run, and on from where it stopped."""

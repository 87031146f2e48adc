"""What is measured on held-out patients, and how: statistics, their intervals, baselines and figures.

In come what tasks and baselines predict of a split, in plain arrays; out come measures with intervals over patients.
"""

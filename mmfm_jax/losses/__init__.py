"""Losses that need more than a line: over devices, or a piece at a time.

In come features and targets; out come losses of each study or token, never averaged.
"""

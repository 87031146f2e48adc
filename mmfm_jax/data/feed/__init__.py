"""From a store to the model.

In come a store, the inputs and (seed, step); out come batches of raw arrays on the host (`pipeline.py`), and on the
device, inside the step, what the model takes (`transforms.py`).
"""

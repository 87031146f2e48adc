"""Studies: read, de-identified, stored, and fed to a model.

In come exports of a hospital or any iterator of `Study`; out go batches of raw arrays (`feed/`). What the rooms share
stands beside them: studies and schemas, batches, affines, times, splits, reasons of refusal.
"""

"""From raw exports to a store.

In comes a description (`dataset.yaml`) of folders of images, tables and texts; out comes a store, with an account of
every input that was taken or refused.
"""

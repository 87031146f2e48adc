"""Real data inside packages, ingested as any other.

In comes the name of a sample; out comes its store.
"""

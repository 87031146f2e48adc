"""A StudyStore on disk or in a bucket.

In comes an iterator of `Study` (`writer.py`); out come rows, boxes of volumes and places of classes, each by itself
(`study_store.py`), of several stores as of one (`mix.py`).
"""

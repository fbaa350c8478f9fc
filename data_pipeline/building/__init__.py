"""From sources to a published dataset, by any number of processes or tasks, the same bytes.

It imports sampling and what that may.
"""

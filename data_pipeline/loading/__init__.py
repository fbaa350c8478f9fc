"""Batches of tokens, read ahead, and the labels of each objective.

It imports sampling and what that may.
"""

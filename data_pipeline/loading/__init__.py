"""Batches of tokens, read ahead, and the labels of each objective.

May import: data_pipeline.errors, data_pipeline.sampling, data_pipeline.tokenize.
"""

"""The samples of each step, read ahead.

May import: data_pipeline.errors, data_pipeline.sampling.
"""

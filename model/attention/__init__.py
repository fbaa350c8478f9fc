"""Attention, what may be seen in it, and the cache of keys and values.

May import: data_pipeline.errors, model.batch, model.config, model.layers.
"""

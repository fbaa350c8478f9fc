"""The architectures, and what they share.

May import: data_pipeline.errors, model.attention, model.batch, model.config, model.costs, model.layers,
model.masks.
"""

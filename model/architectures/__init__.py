"""The architectures, what they share, and the objective they are trained for.

May import: data_pipeline.errors, model.attention, model.batch, model.config, model.costs, model.layers,
model.masks.
"""

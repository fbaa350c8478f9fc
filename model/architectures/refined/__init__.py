"""One architecture: its options and costs (spec.py, free of torch) and its layers (model.py and the parts beside it).

May import: data_pipeline.may_change, model.attention, model.batch, model.config, model.costs, model.layers,
model.masks.
"""

"""One architecture: its options and costs (spec.py, free of torch) and its layers (model.py).

May import: data_pipeline.errors, model.attention, model.batch, model.config, model.costs, model.layers, model.masks.
"""

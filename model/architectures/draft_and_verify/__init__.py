"""One architecture: its options and costs (spec.py, free of torch), its layers (model.py) and how they learn and write.

May import: data_pipeline.errors, model.attention, model.batch, model.config, model.costs, model.layers, model.masks.
"""

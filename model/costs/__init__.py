"""What a model costs: parameters, FLOPs, bytes kept for the backward pass. Free of torch but for `parameters`.

May import: data_pipeline.errors, model.config, model.gpus, model.layers.
"""

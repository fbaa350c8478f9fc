"""What a run will take: memory, time, checkpoints. Free of torch.

May import: data_pipeline.errors, model.config, model.costs, model.gpus, model.layers, pretrain.config.
"""

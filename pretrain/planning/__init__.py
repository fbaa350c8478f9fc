"""What a run will take: memory, time, checkpoints. Free of torch.

May import: data_pipeline.errors, model.costs, model.gpus, pretrain.config.
"""

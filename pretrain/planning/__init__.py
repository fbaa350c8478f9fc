"""What a run will take: memory, time, checkpoints. Free of torch, but where adapters are trained.

May import: data_pipeline.errors, model.architectures, model.config, model.costs, model.gpus, model.layers,
pretrain.config, pretrain.finetune.
"""

"""One optimizer step on all ranks: DeepSpeed, its fragments, optimizers, random states.

It imports config.
"""

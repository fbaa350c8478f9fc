"""What a dataset holds, how its tokenizer does, and which documents a step read.

It imports building and what that may.
"""

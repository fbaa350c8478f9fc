"""Text to ids and back: SentencePiece and imported tokenizers.

It imports ingest and what that may.
"""

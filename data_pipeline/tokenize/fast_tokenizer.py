"""A tokenizer.json for a tokenizer of Duet, where one gives the same ids: nothing but transformers reads texts then.

`tokenizers` has no SentencePiece; its unigram and byte-pair models are given the same pieces and scores. Whether they
give the same ids, the text decides on which they are compared.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from data_pipeline.tokenize.encoders import SPACE_MARK
from data_pipeline.tokenize.tokenizer import JSON, Tokenizer, model_name

_WORD = f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+"
"""No piece reaches from one word into the next: spaces stand at the front of pieces."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE, _WORDS, _CHARACTERS = 1, 2, 3, 4
_NEVER = -1e6
"""Score of a piece that no text gives."""


def fast_tokenizer(model: bytes, tokenizer: Tokenizer, texts: Iterable[str]) -> bytes | None:
    """A tokenizer.json that gives the ids of `tokenizer` on all of `texts`, and no others; None if there is none.

    Raises:
        ImportError: the library tokenizers is missing.
    """
    from tokenizers import Tokenizer as Fast

    given = model_name(model) == JSON
    made = Fast.from_str(model.decode()) if given else _of_sentencepiece(model)
    if made is None:
        return None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    spelled = map(tokenizer.piece, {tokenizer.unk_id, tokenizer.eos_id, *tokenizer.sentinel_ids} - {-1})
    for text in chain(spelled, texts):
        ours = tokenizer.encode([text])[0].tolist()
        if made.encode(text).ids != ours:
            return None
        if tokenizer.unk_id not in ours and made.decode(ours) != tokenizer.decode(ours):
            return None
    found: bytes = model if given else made.to_str(pretty=True).encode()
    return found


def without_surroundings(model: bytes) -> bytes:
    """A tokenizer.json that puts nothing around a text, such as a BOS, as ours reads any; another file as it is."""
    if model_name(model) != JSON:
        return model
    from tokenizers import Tokenizer as Fast

    if not Fast.from_str(model.decode()).num_special_tokens_to_add(False):
        return model
    return json.dumps(json.loads(model) | {"post_processor": None}, ensure_ascii=False).encode()


def _of_sentencepiece(model: bytes) -> Any:
    """None where the model changes texts before it cuts them, or is of words."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    parsed = _parsed(model)
    rules, kind = parsed.normalizer_spec, parsed.trainer_spec.model_type
    if rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces or kind == _WORDS:
        return None
    pieces = [(piece.piece, piece.score, piece.type) for piece in parsed.pieces]
    unknown = next(number for number, (_, _, of) in enumerate(pieces) if of == _UNKNOWN)
    has_bytes = any(of == _BYTE for _, _, of in pieces)
    if kind == _UNIGRAM:
        scored = [(piece, score if of in (_NORMAL, _USER_DEFINED) else _NEVER) for piece, score, of in pieces]
        cut: Any = models.Unigram(scored, unknown, has_bytes)
    else:
        vocabulary = {piece: number for number, (piece, _, _) in enumerate(pieces)}
        merges = [*_merges(pieces)] if kind == _BPE else []
        cut = models.BPE(vocabulary, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=has_bytes)
    made = Fast(cut)
    made.normalizer = normalizers.Replace(" ", SPACE_MARK)
    # A unigram model would find the pieces that no text gives, too, where they are spelled.
    never = [piece for piece, _, of in pieces if of in (_CONTROL, _UNKNOWN)]
    first = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in never)
    words = [pre_tokenizers.Split(Regex(found), "isolated") for found in (first, _WORD)]
    made.pre_tokenizer = pre_tokenizers.Sequence(words)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(piece, special=True, normalized=False) for piece, _, of in pieces if of == _CONTROL]
    own = [AddedToken(piece, normalized=True) for piece, _, of in pieces if of == _USER_DEFINED]
    made.add_special_tokens(special)
    made.add_tokens(own)
    return made


def _merges(pieces: list[tuple[str, float, int]]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make another, the best of these first."""
    normal = {piece: score for piece, score, of in pieces if of == _NORMAL}
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        for place in range(1, len(piece)):
            if piece[:place] in normal and piece[place:] in normal:
                yield piece[:place], piece[place:]


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    parsed: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    parsed.ParseFromString(model)
    return parsed

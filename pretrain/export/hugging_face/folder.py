"""The files that an export has for transformers, beside weights and `config.json`'s facts for Duet."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import write_atomic, write_json
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.token_stream import TokenStream
from data_pipeline.tokenize.fast_tokenizer import fast_tokenizer
from data_pipeline.tokenize.tokenizer import JSON, Tokenizer, model_name
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config
from pretrain.export.hugging_face.card import LOSSES, CardFacts, card, told_of_data, told_of_training
from pretrain.export.hugging_face.chat import chat_settings
from pretrain.export.hugging_face.sources import ENTRY, LABELS, TOKENIZATION, sources
from pretrain.objectives.registry import objective_of

COMPARED = 2**20
"""Tokens of the held-out text on which two tokenizers are compared."""


class Kind(NamedTuple):
    """A class of transformers."""

    name: str
    """Of a class in `module`."""
    auto: str
    task: str
    generates: bool = False
    module: str = ENTRY


_LABELS = {
    "sequence": ("SequenceClassification", "text-classification"),
    "token": ("TokenClassification", "token-classification"),
    "span": ("QuestionAnswering", "question-answering"),
}
"""What the classes of models of labels are called, and what they do."""


def kind_of(model: ModelConfig, objective: str) -> Kind:
    """The class of transformers that a model becomes."""
    if model.label_head is not None:
        name, task = _LABELS[model.label_head.kind]
        return Kind(f"DuetFor{name}", f"AutoModelFor{name}", task, module=LABELS)
    if model.traits.two_sequences:
        return Kind("DuetForSeq2SeqLM", "AutoModelForSeq2SeqLM", "text2text-generation")
    if not model.causal:
        return Kind("DuetForMaskedLM", "AutoModelForMaskedLM", "fill-mask")
    if objective_of(objective).continues_text:
        return Kind("DuetForCausalLM", "AutoModelForCausalLM", "text-generation", True)
    return Kind("DuetPrefixForCausalLM", "AutoModelForCausalLM", "text-generation")


def hugging_face_config(model: ModelConfig, objective: str, dtype: str, eos_id: int) -> dict[str, Any]:
    """What transformers reads of config.json."""
    kind = kind_of(model, objective)
    found: dict[str, Any] = {
        "model_type": "duet",
        "architectures": [kind.name],
        "auto_map": {"AutoConfig": f"{ENTRY}.DuetConfig", kind.auto: f"{kind.module}.{kind.name}"},
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "max_position_embeddings": model.context,
        "tie_word_embeddings": True,
        "use_cache": kind.generates and model.traits.cached,
        "is_encoder_decoder": model.traits.two_sequences,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }
    if model.label_head is not None and model.label_head.labels:
        found["id2label"] = {str(number): name for number, name in enumerate(model.label_head.labels)}
        found["label2id"] = {name: number for number, name in enumerate(model.label_head.labels)}
    if model.traits.two_sequences:
        found["decoder_start_token_id"] = eos_id
    if isinstance(model, TransformerConfig):
        found["num_attention_heads"] = model.heads
        found["num_key_value_heads"] = model.kv_heads or model.heads
        found["intermediate_size"] = model.hidden_width
    return found


class About(NamedTuple):
    """What the files of an export tell of its model."""

    model: ModelConfig
    objective: str
    run: str
    parameters: int
    rows: Mapping[str, str]
    """Of the card."""
    tokenizer: Tokenizer
    content: bytes
    """Of the tokenizer's file."""
    texts: Iterable[str] | DataError
    """On which tokenizers are compared, or why there are none."""
    chat_template: str | None = None


def write_for_transformers(new: Path, about: About) -> None:
    """Write code, tokenizer and model card into the folder of an export.

    Raises:
        CheckpointError: the code of an architecture cannot be copied.
    """
    kind = kind_of(about.model, about.objective)
    fast, why = write_tokenizer(new, about)
    code = sources(about.model, (kind.module,) if fast else (kind.module, TOKENIZATION))
    for name, text in code.files.items():
        write_atomic(new / name, text.encode())
    write_card(new, about, kind, [*_notes(code.needs, why, kind, about.model, about.chat_template is not None)])


def write_tokenizer(new: Path, about: About) -> tuple[bool, str]:
    """Write the tokenizer and what generation takes; whether there is a tokenizer.json, or why not."""
    kind, tokenizer = kind_of(about.model, about.objective), about.tokenizer
    write_atomic(new / model_name(about.content), about.content)
    fast, why = _fast(about)
    if fast and kind.task == "question-answering" and model_name(about.content) != JSON:
        fast = _ending_questions(fast, tokenizer)
    elif kind.task == "question-answering":  # a tokenizer.json is known by its bytes to those who train further
        why = f"{why} Its tokenizer puts no end-of-text between the texts of a pair: do it yourself.".lstrip()
    if fast:
        write_atomic(new / JSON, fast)
    settings, ends = _tokenizer_config(about.model, kind, tokenizer, fast is not None), [tokenizer.eos_id]
    if about.chat_template is not None:
        told = chat_settings(about.chat_template, tokenizer, fast, about.texts)
        settings, why = settings | told.settings, " ".join(filter(None, (why, told.note)))
        ends = sorted({*ends, told.end_id})
    write_json(new / "tokenizer_config.json", settings)
    if kind.generates:
        ids = {"eos_token_id": ends if ends[1:] else ends[0], "pad_token_id": tokenizer.eos_id}
        write_json(new / "generation_config.json", ids | {"use_cache": about.model.traits.cached})
    return fast is not None, why


def _ending_questions(fast: bytes, tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that puts end-of-text between the texts of a pair."""
    end, number = tokenizer.piece(tokenizer.eos_id), tokenizer.eos_id
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    post = {
        "type": "TemplateProcessing",
        "single": [first],
        "pair": [first, {"SpecialToken": {"id": end, "type_id": 0}}, second],
        "special_tokens": {end: {"id": end, "ids": [number], "tokens": [end]}},
    }
    return json.dumps(json.loads(fast) | {"post_processor": post}, ensure_ascii=False, indent=2).encode()


def write_card(new: Path, about: About, kind: Kind, notes: Sequence[str], *, standard: bool = False) -> None:
    """Write the model card. `standard`: in a layout that transformers knows, whose code it has."""
    facts = CardFacts(
        run=about.run,
        architecture=about.model.architecture.partition("@")[0],
        parameters=about.parameters,
        objective=f"`{about.objective}`",
        task=kind.task,
        auto=kind.auto,
        generates=kind.generates,
        cached=about.model.traits.cached,
        standard=standard,
        rows=about.rows,
        notes=notes,
    )
    write_atomic(new / "README.md", card(facts).encode())


def _tokenizer_config(model: ModelConfig, kind: Kind, tokenizer: Tokenizer, fast: bool) -> dict[str, Any]:
    end = tokenizer.piece(tokenizer.eos_id)
    about = {
        "model_max_length": model.context,
        "padding_side": "left" if kind.generates else "right",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    if fast:
        return about | {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    own = {"auto_map": {"AutoTokenizer": [f"{TOKENIZATION}.DuetTokenizer", None]}}
    return about | {"tokenizer_class": "DuetTokenizer"} | own


def rows_of(
    checkpoint: Checkpoint, config: Config, dataset: Dataset | DataError, measured: float | None = None
) -> dict[str, str]:
    """What the card tells of training and data.

    `measured`: the loss over all held-out text, if it is not the checkpoint's.
    """
    state, loss = checkpoint.manifest.state, checkpoint.manifest.validation_loss if measured is None else measured
    left_out = config.data.mask_boundaries or config.model.document_mask or config.data.packing != "plain"
    whole = loss if config.data.objective == "causal" and not left_out else None
    rows = {
        "run": config.run.name,
        **told_of_training(state, checkpoint.manifest.step, loss),
        **told_of_data(dataset, state.get("data", {}).get("fingerprint"), whole),
    }
    if measured is None and _validates_part(config, dataset):
        rows |= {name: f"{rows[name]}, from a part of it" for name in LOSSES if name in rows}
    return rows


def _validates_part(config: Config, dataset: Dataset | DataError) -> bool:
    """Whether a checkpoint's loss is of some of the held-out windows only (`train.eval_tokens`)."""
    if config.eval_windows is None or isinstance(dataset, DataError):
        return False
    return config.eval_windows * config.model.context < dataset.manifest.splits["validation"].tokens - 1


def _notes(needs: tuple[str, ...], why: str, kind: Kind, model: ModelConfig, chat: bool) -> Iterator[str]:
    """What a user of the model has to know; of a `chat` it says in `why` what special tokens are."""
    yield f"A text has {model.context} tokens at most, what is generated included."
    yield "Nothing is put before or behind a text" + ("." if chat else ", and no text gives a special token.")
    if kind.task == "question-answering":
        yield "It reads a question, the end-of-text token, and the text in which the answer stands."
    if not kind.generates:
        yield "The model does not continue texts: it has no `generate`."
    if why:
        yield why
    if needs:
        yield f"It needs these packages beside torch and transformers: {', '.join(needs)}."
    use = "classify FOLDER --text TEXT" if model.label_head else f"generate FOLDER{' --chat TEXT' if chat else ''}"
    yield f"Duet reads this folder itself, too: `duet {use}`."


def dataset_of(checkpoint: Checkpoint, config: Config) -> Dataset | DataError:
    """The one that a run was trained on, or why it is not there."""
    fingerprint = checkpoint.manifest.state.get("data", {}).get("fingerprint")
    try:
        dataset = Dataset.of(config.data, check=False)
    except DataError as error:
        return error
    if fingerprint not in (None, dataset.manifest.fingerprint):
        return DataError(f"{config.data.path} is another dataset now")
    return dataset


def texts_of(dataset: Dataset | DataError, tokenizer: Tokenizer) -> Iterable[str] | DataError:
    """Documents of the held-out text, of `COMPARED` tokens or a few more."""
    return dataset if isinstance(dataset, DataError) else [*_texts(dataset, tokenizer)]  # read more than once


def _texts(dataset: Dataset, tokenizer: Tokenizer) -> Iterator[str]:
    stream, left = TokenStream(dataset, "validation"), COMPARED
    for number in range(stream.num_batches):
        tokens = dataset.manifest.plain(stream.batch(number))
        for document in np.split(tokens, (tokens == tokenizer.eos_id).nonzero()[0] + 1):
            yield tokenizer.decode(document)
        left -= len(tokens)
        if left <= 0:
            return


def _fast(about: About) -> tuple[bytes | None, str]:
    """A tokenizer.json, or why there is none."""
    without = (
        f"Its tokenizer needs the package {'tokenizers' if model_name(about.content) == JSON else 'sentencepiece'}"
    )
    if isinstance(about.texts, DataError):
        return None, f"{without}: without the held-out text no `{JSON}` was compared with it."
    try:
        found = fast_tokenizer(about.content, about.tokenizer, about.texts)
    except ImportError:
        return None, f"{without}: the library tokenizers was not there to make a `{JSON}`."
    return found, "" if found else f"{without}: no `{JSON}` gives its tokens on the held-out text."

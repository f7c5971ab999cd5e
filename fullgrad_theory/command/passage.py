"""A text, and the model of a transformers folder that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bars import progress
from ..errors import InputError, unknown_name
from ..extras import require
from .making import Wanted, loaded

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Reader:
    """A model of text with its tokenizer. `untrained`: the weights are random."""

    model: Any
    tokenizer: Any
    untrained: bool


@dataclass(frozen=True)
class Piece:
    """What is shown as one: a word with all its tokens, or a special token. `places`: of tokens."""

    text: str
    places: tuple[int, ...]
    special: bool


@dataclass(frozen=True)
class Passage:
    """A text as a model takes it. `given`: what the tokenizer returns, (1, T), without padding."""

    given: dict[str, Tensor]
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        return int(self.given["input_ids"].shape[1])

    def without_special(self) -> Passage:
        """The same text, words alone."""
        return replace(self, pieces=tuple(piece for piece in self.pieces if not piece.special))

    @property
    def held(self) -> tuple[str, ...]:
        """The inputs that say nothing of words: masks, and which text a token is of."""
        return tuple(name for name in self.given if name != "input_ids")


def reader(folder: Path) -> Reader:
    """The model that a folder's config.json names, in eval mode; nothing is downloaded.

    Without weights in the folder they are random, and seeded. Code in the folder is not run.
    """
    hub = require("transformers", "text")
    hub.utils.logging.disable_progress_bar()  # ours is shown
    with progress(f"loading {folder}"):
        config = loaded(hub.AutoConfig.from_pretrained, str(folder), local_files_only=True)
        named = (config.architectures or [None])[0]
        kind = getattr(hub, named or "", None)
        if kind is None:
            raise InputError(
                f"{folder / 'config.json'} names no architecture that transformers has: "
                f"{named!r}; write it there, as BertForSequenceClassification"
            )
        torch.manual_seed(0)
        trained = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
        make = kind.from_pretrained if trained else lambda _, **__: kind(config)
        model = loaded(make, str(folder), local_files_only=True)
        tokenizer = loaded(hub.AutoTokenizer.from_pretrained, str(folder), local_files_only=True)
    return Reader(model.eval(), tokenizer, not trained)


def tokenised(text: str, tokenizer: Any) -> Passage:
    """The tokens of a text, and which of them are one word; raises `InputError` for none."""
    encoded = tokenizer(text, return_tensors="pt")
    given = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    kept = given.get("attention_mask", torch.ones_like(given["input_ids"]))[0] != 0
    given = {name: value[:, kept] for name, value in given.items()}
    ids = given["input_ids"][0].tolist()
    if not ids:
        raise InputError(f"the tokenizer makes no token of {text!r}")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    special = [number in set(tokenizer.all_special_ids) for number in ids]
    words: Sequence[int | None] = [None] * len(ids)
    spans: Sequence[tuple[int, int]] | None = None
    if tokenizer.is_fast:
        places = torch.nonzero(kept).flatten().tolist()
        words = [encoded.word_ids(0)[place] for place in places]
        spans = [tuple(encoded.encodings[0].offsets[place]) for place in places]
    return Passage(given, tuple(_pieces(text, tokens, special, words, spans)))


def _pieces(
    text: str,
    tokens: Sequence[str],
    special: Sequence[bool],
    words: Sequence[int | None],
    spans: Sequence[tuple[int, int]] | None,
) -> list[Piece]:
    """Neighbours of one word together, written as in the text; a special token alone."""
    alone = ((w, -1) if w is not None else (None, place) for place, w in enumerate(words))
    found = []
    for _, group in groupby(enumerate(alone), lambda pair: pair[1]):
        places = tuple(place for place, _ in group)
        written = ""
        if spans is not None and not special[places[0]]:
            written = text[spans[places[0]][0] : spans[places[-1]][1]].strip()
        shown = written or "".join(tokens[place] for place in places)
        found.append(Piece(shown, places, special[places[0]]))
    return found


# --------------------------------------------------------------------------- what is explained


@dataclass(frozen=True)
class Entry:
    """One entry of the output `name`, the one it is compared with, and both in words."""

    name: str
    index: tuple[int, ...]
    against: tuple[int, ...] | None
    words: str


def entry(wanted: Wanted, read: Reader, text: Passage) -> Entry:
    """Which entry of the model's output is meant; raises `InputError` with what there is."""
    with torch.no_grad():
        made = dict(read.model(**text.given).items())
    scores = {name: value[0] for name, value in made.items() if "logits" in name}
    name = wanted.output or next(iter(scores), "")
    if name not in scores:
        raise InputError(
            f"{name!r} is no output with scores; there is {', '.join(scores) or 'none'}"
        )
    row, said = _row(wanted, read, text, scores[name])
    named = _Names.of(name, scores[name], read, text)
    of, against = named.index(wanted.target), named.index(wanted.against)
    if of is None:
        of = int(scores[name][row].argmax())
    words, rather = named.called(of), None
    if against is not None:
        words, rather = f"{words} rather than {named.called(against)}", (*row, against)
    return Entry(name, (*row, of), rather, f"{name.replace('_', ' ')}: {words}{said}")


def _row(
    wanted: Wanted, read: Reader, text: Passage, scores: Tensor
) -> tuple[tuple[int, ...], str]:
    """Where each token has scores: those at the position, at a mask, or at the last token."""
    if scores.dim() == 1:
        if wanted.position is not None:
            raise InputError("--position is for models that score each token; this one does not")
        return (), ""
    ids, mask = text.given["input_ids"][0].tolist(), read.tokenizer.mask_token_id
    position = wanted.position
    if position is None:
        position = ids.index(mask) if mask in ids else len(ids) - 1
    if not -len(ids) <= position < len(ids):
        raise InputError(f"there is no position {position} among {len(ids)} tokens")
    position %= len(ids)
    token = read.tokenizer.convert_ids_to_tokens(ids[position])
    return (position,), f", at token {position} ({token})"


@dataclass(frozen=True)
class _Names:
    """What entries are called: `labels` of classes; tokens of the `vocabulary`; or `own`, the
    text's tokens, where an answer begins or ends."""

    count: int
    labels: dict[str, int]
    vocabulary: Any = None
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, scores: Tensor, read: Reader, text: Passage) -> _Names:
        count, config = scores.shape[-1], read.model.config
        if scores.dim() == 2 and count == config.vocab_size:
            return cls(count, {}, vocabulary=read.tokenizer)
        if scores.dim() == 1 and name != "logits" and count == text.length:
            tokens = read.tokenizer.convert_ids_to_tokens(text.given["input_ids"][0].tolist())
            return cls(count, {}, own=tuple(tokens))
        known = config.id2label or {}
        return cls(count, {str(known[i]): i for i in range(count) if i in known})

    def index(self, said: str | None) -> int | None:
        """An entry by its number, its label, or its token."""
        if said is None:
            return None
        if said.isdecimal():
            if int(said) >= self.count:
                raise InputError(f"there is no entry {said} among {self.count}")
            return int(said)
        if self.vocabulary is not None:
            ids = self.vocabulary(said, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                tokens = self.vocabulary.convert_ids_to_tokens(ids)
                raise InputError(f"{said!r} is {len(ids)} tokens, {tokens}; name one of them")
            return int(ids[0])
        if self.own:
            raise InputError(f"name a token of the text by its place, 0 to {self.count - 1}")
        if said not in self.labels:
            raise unknown_name("class", said, self.labels)
        return self.labels[said]

    def called(self, place: int) -> str:
        """An entry in words."""
        if self.vocabulary is not None:
            token = self.vocabulary.convert_ids_to_tokens(place)
            return f"entry {place}" if token is None else f"{token!r} ({place})"  # rows to spare
        if self.own:
            return f"{self.own[place]!r} (token {place})"
        names = {index: name for name, index in self.labels.items()}
        return names.get(place, f"entry {place}")

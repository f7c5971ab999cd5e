"""transformers' architectures, from small configurations of their own classes, and their inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError
from ..extras import require
from .rows import Architecture

_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM MASKED_LM CAUSAL_LM IMAGE_CLASSIFICATION AUDIO_CLASSIFICATION "
    "SPEECH_SEQ_2_SEQ TIME_SERIES_PREDICTION ZERO_SHOT_IMAGE_CLASSIFICATION OBJECT_DETECTION "
    "SEMANTIC_SEGMENTATION VIDEO_CLASSIFICATION IMAGE_TEXT_TO_TEXT SEQUENCE_CLASSIFICATION"
).split()
"""what heads are looked for, the first that a family has being the one that stands for it"""
_WORDS = 99
_LENGTH = 8
_SIZES = {
    "vocab_size": _WORDS,
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "encoder_layers",
            "decoder_layers",
            "num_layers",
            "num_decoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"),
        4,
    ),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
"""what attributes of the usual names are, where a configuration has them as numbers"""

_DEPTHS = {name: size for name, size in _SIZES.items() if "layers" in name}
"""the same where the rest has to stay as it is"""


def listed() -> Iterator[Architecture]:
    """The classes with a head, by model type; for a type without any its base model."""
    hub = require("transformers", "text")
    auto = require("transformers.models.auto.modeling_auto", "text")
    names = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _TASKS]
    seen: dict[str, str] = {}
    for mapping in (*(getattr(auto, n, {}) for n in names), auto.MODEL_MAPPING_NAMES):
        with_head = set(seen.values())
        for family, classes in mapping.items():
            if mapping is auto.MODEL_MAPPING_NAMES and family in with_head:
                continue
            for name in classes if isinstance(classes, (tuple, list)) else (classes,):
                if name not in seen or _is_named_after(name, family):
                    seen[name] = family
    version = f"transformers {hub.__version__}"
    return (Architecture("transformers", n, f, version, n) for n, f in seen.items())


def _is_named_after(name: str, family: str) -> bool:
    """Of the model types that share a class, the one it is called by."""
    return name.lower().startswith(re.sub("[-_]", "", family))


def built(name: str) -> tuple[Any, Any]:
    """A small model with random weights on the cpu, and inputs: token ids, an image, a sound."""
    import torch

    hub = require("transformers", "text")
    kind = getattr(hub, name)
    torch.manual_seed(0)
    try:
        model = kind(small(kind.config_class, _SIZES))
    except Exception:  # noqa: BLE001  other sizes of the class do not fit these
        model = kind(small(kind.config_class, _DEPTHS))
    return model.eval(), dict(_inputs(model, model.config))


def small(kind: Any, sizes: Mapping[str, int]) -> Any:
    """A configuration of a class with these sizes, those that it has; its parts likewise."""
    usual = kind()
    named = {kind.attribute_map.get(name, name): value for name, value in sizes.items()}
    given = {n: v for n, v in named.items() if type(getattr(usual, n, None)) is int}
    for part in kind.sub_configs:
        own = getattr(usual, part, None)
        if own is not None:
            given[part] = small(type(own), sizes)
    return kind(**given)


def _inputs(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    import torch

    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    both = {"input_ids", "pixel_values"} if "vision_config" in type(config).sub_configs else set()
    for name in [main, *sorted(n for n in both - {main} if n in takes)]:
        yield name, _input(name, config)
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        yield "decoder_input_ids", torch.randint(3, _WORDS, (1, _LENGTH))


def _input(name: str, config: Any) -> Any:
    import torch

    def of(attribute: str, otherwise: int) -> int:
        for part in (config, *(getattr(config, p, None) for p in type(config).sub_configs)):
            found = getattr(part, attribute, None)
            if isinstance(found, (int, list, tuple)):
                return found if isinstance(found, int) else found[0]
        return otherwise

    if name == "input_ids":
        return torch.randint(3, min(_WORDS, of("vocab_size", _WORDS)), (1, _LENGTH))
    if name == "pixel_values":
        side, frames = of("image_size", 224), of("num_frames", 0)
        image = (of("num_channels", 3), side, side)
        return torch.randn(1, frames, *image) if frames else torch.randn(1, *image)
    if name == "input_features":
        bins = of("num_mel_bins", 80)
        long = of("max_source_positions", 0)
        return torch.randn(1, bins, 2 * long) if long else torch.randn(1, 64, bins)
    if name == "input_values":
        return torch.randn(1, 4000)
    raise InputError(f"what {type(config).__name__}'s model takes as {name!r} is not known here")

"""transformers' models, small and random, called with what their processors return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt

tf = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

LM = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
}


def text(batch: int = 1, padded: int = 0) -> dict[str, Tensor]:
    """As a tokenizer returns it."""
    ids = torch.randint(3, 50, (batch, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 6 - padded :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def image(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LM)), text()


def qwen3() -> Any:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**LM, head_dim=8)), text()


def gemma() -> Any:
    return tf.GemmaForCausalLM(tf.GemmaConfig(**LM, head_dim=8)), text()


def mixtral() -> Any:
    config = tf.MixtralConfig(**LM, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config), text()


def gpt2() -> Any:
    config = tf.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPT2LMHeadModel(config), text()


def mamba() -> Any:
    config = tf.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)
    return tf.MambaForCausalLM(config), text()


def bert() -> Any:
    config = tf.BertConfig(**{n: v for n, v in LM.items() if n != "num_key_value_heads"})
    given = text(padded=2)
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    return tf.BertForSequenceClassification(config), given


def t5() -> Any:
    config = tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tf.T5ForConditionalGeneration(config), {**text(), **decoder(0)}


def decoder(start: int) -> dict[str, Tensor]:
    return {"decoder_input_ids": torch.tensor([[start, 5, 6]])}


def bart() -> Any:
    config = tf.BartConfig(**SEQ2SEQ, max_position_embeddings=32)
    return tf.BartForConditionalGeneration(config), text()


def whisper() -> Any:
    config = tf.WhisperConfig(
        **SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        decoder_start_token_id=1,
    )
    sound = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    return tf.WhisperForConditionalGeneration(config), {"input_features": sound, **decoder(1)}


def clip() -> Any:
    config = tf.CLIPConfig(
        text_config={**TOWER, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2,
                     "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    return tf.CLIPModel(config), {**text(), "pixel_values": image(1, 16)}


def detr() -> Any:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    own = {n: v for n, v in SEQ2SEQ.items() if n.startswith(("encoder", "decoder", "d_"))}
    config = tf.DetrConfig(
        **own, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, num_queries=5, num_labels=4,
    )  # fmt: skip
    given = {"pixel_values": image(1, 32), "pixel_mask": torch.ones(1, 32, 32, dtype=torch.long)}
    return tf.DetrForObjectDetection(config), given


Made = Callable[[], tuple[nn.Module, Mapping[str, Tensor]]]
MODELS: dict[str, tuple[Made, str, Any]] = {
    made.__name__: (made, output, target)
    for made, output, target in (
        (llama, "logits", (-1, 3)),
        (qwen3, "logits", (-1, 3)),
        (gemma, "logits", (-1, 3)),
        (gpt2, "logits", (-1, 3)),
        (mixtral, "logits", (-1, 3)),
        (mamba, "logits", (-1, 3)),
        (bert, "logits", 1),
        (t5, "logits", (-1, 3)),
        (bart, "logits", (-1, 3)),
        (whisper, "logits", (-1, 3)),
        (clip, "logits_per_image", 0),
        (detr, "logits", (0, 1)),
    )
}


def made(name: str) -> tuple[nn.Module, Mapping[str, Tensor]]:
    torch.manual_seed(0)
    model, given = MODELS[name][0]()
    return model.eval(), given


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_checked_balanced_and_explained(name: str) -> None:
    (model, given), (_, key, target) = made(name), MODELS[name]
    given = tf.BatchEncoding(given) if "input_ids" in given else tf.BatchFeature(given)
    report = fgt.check_completeness(model, given, policy="libra", beside=())
    assert report.complete is True, str(report)
    balanced = fgt.balance(model, given, policy=report.plan)
    ours, theirs = balanced(**given), model(**given)
    assert type(ours) is type(theirs)
    for field, value in theirs.items():
        if isinstance(value, Tensor):
            assert torch.equal(ours[field], value), field
    parts = fgt.fullgrad(balanced, given, target=target)
    logits = theirs[key].detach()
    chosen = logits[(0, *target) if isinstance(target, tuple) else (0, target)]
    torch.testing.assert_close(parts.output.reshape(()), chosen)
    torch.testing.assert_close(parts.total, parts.output, atol=1e-5, rtol=1e-4)
    inputs = parts.input if isinstance(parts.input, tuple) else (parts.input,)
    assert all(bool(part.any()) for part in inputs), "an input is explained by nothing"


def test_a_tower_is_chosen() -> None:
    model, given = made("clip")
    for name, shape in (("pixel_values", (1, 3, 16, 16)), ("input_ids", (1, 6, 16))):
        parts = fgt.fullgrad(fgt.balance(model, given, explain=name), given, target=0)
        assert isinstance(parts.input, Tensor) and tuple(parts.input.shape) == shape
        torch.testing.assert_close(parts.total, parts.output)


def test_boxes_fail_where_they_are_asked_for() -> None:
    model, given = made("detr")
    report = fgt.check_completeness(model, given, policy="libra", output="pred_boxes", beside=())
    assert report.complete is False
    assert any("probability" in problem for problem in report.problems)


def test_the_last_token_is_selected() -> None:
    model, given = made("gpt2")
    balanced = fgt.balance(model, given, output=lambda o: o.logits[:, -1])
    assert torch.equal(balanced(**given), model(**given).logits[:, -1])


def test_grouped_experts_are_the_product_that_their_record_says() -> None:
    """The registry's one operation of transformers, beside a loop over the groups."""
    import transformers.integrations.moe  # noqa: F401

    operation = torch.ops.transformers.grouped_mm_fallback
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 5])
    value = operation(x, weight, offsets)
    torch.testing.assert_close(value, torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]]))
    c = torch.randn_like(value)
    by_x, by_weight = torch.autograd.grad(value, (x, weight), c)
    for part in ((by_x * x).sum(), (by_weight * weight).sum()):  # of degree 1 in each
        torch.testing.assert_close(part, (c * value).sum())

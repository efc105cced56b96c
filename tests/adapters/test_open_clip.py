"""open_clip's models: both towers, its precisions, and what its blocks have that the operators lack."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvit
from fastvit._compat import import_library
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import reasons, run
from tests.tolerances import FLOAT32, assert_close, relative_l2

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32, "mlp_ratio": 2.125}
TEXT = {"context_length": 9, "vocab_size": 120, "width": 64, "heads": 2, "layers": 2}
IDS = torch.randint(1, 119, (2, 9), generator=nasty.generator())


def build(kind: str, *configs: dict, **options) -> nn.Module:
    torch.manual_seed(0)
    return nasty.randomize(getattr(import_library("open_clip"), kind)(64, *configs, **options)).eval()


def agrees(model: nn.Module) -> None:
    """Features of images and texts, before and after."""
    x = zoo.image(model)
    truth = run(copy.deepcopy(model).double(), x.double(), text=IDS)
    fastvit.optimize(model, strict=True)
    actual = run(model, x, text=IDS)
    assert actual.keys() == truth.keys() and len(truth) >= 3
    for key, out in actual.items():
        assert relative_l2(out, truth[key]) < FLOAT32, key


def details(model: nn.Module, path: str) -> set[str]:
    """The status of the rows under a path, or why they were left."""
    rows = [r for r in fastvit.report(model).rows if r.path.startswith(path)]
    return {r.detail if r.status == "left" else r.status for r in rows}


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_both_towers(quick_gelu):
    model = build("CLIP", VISION, TEXT, quick_gelu=quick_gelu)
    agrees(model)
    assert details(model, "visual.") == {"fused"}
    assert details(model, "transformer.") == {"CLIP calls it with a causal mask"}


def test_a_text_tower_without_a_mask():
    model = build("CustomTextCLIP", VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"})
    agrees(model)
    assert details(model, "text.") == {"fused"}


def test_another_mask_is_not_what_strict_overlooks():
    model = build("CLIP", VISION, TEXT)
    model.attn_mask[0, -1] = 0.0
    with pytest.raises(fastvit.UnsupportedModelError, match="CLIP calls it with attn_mask"):
        fastvit.optimize(model, strict=True)


def test_a_decoder_reads_the_image_tower():
    """CoCa's cross attention takes keys from elsewhere, and its attentional pool reads all tokens."""
    pool = {"attentional_pool": True, "attn_pooler_queries": 7, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = build("CoCa", {**TEXT, "attn_pooler_heads": 2}, text, {**VISION, **pool})
    agrees(model)
    assert details(model, "visual.") == {"fused"}
    assert details(model, "text_decoder.") == {"MultimodalTransformer calls it with a causal mask"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_norms_in_float32(dtype):
    """As `open_clip.create_model(precision="bf16")` does: LayerNormFp32 runs in no other dtype."""
    open_clip = import_library("open_clip")
    model = build("CLIP", VISION, TEXT, cast_dtype=dtype)
    open_clip.convert_weights_to_lp(model, dtype)
    visual = model.visual
    assert type(visual.ln_post).__name__ == "LayerNormFp32" and visual.ln_post.weight.dtype == torch.float32
    x = zoo.image(visual).to(dtype)
    plain = build("CLIP", VISION, TEXT).visual
    plain.load_state_dict(visual.state_dict())
    truth, eager = run(plain.double(), x.double())["output"], run(visual, x)["output"]
    fastvit.optimize(visual, strict=True)
    for _ in range(2):
        assert_close(run(visual, x)["output"], truth, eager=eager)
    assert not reasons(visual)
    compared = fastvit.compare(visual, x.float()).outputs  # converted to what the convolution has
    assert 0 < compared[0].relative_l2 < 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scaled_cosine_attn": True}, "attention has logit_scale"),
        ({"scale_heads": True}, "attention has head_scale"),
        ({"scale_attn": True}, "block has ln_attn"),
    ],
)
def test_what_the_operators_lack_is_left(options, reason):
    model = nasty.randomize(zoo.open_clip(**options)()).eval()
    with pytest.raises(fastvit.UnsupportedModelError, match=reason):
        fastvit.optimize(model, strict=True)


def test_tokens_first():
    """The order of the original CLIP code."""
    model = zoo.make("open_clip clip")
    for module in (model.transformer, *(block.attn for block in model.transformer.resblocks)):
        module.batch_first = False
    x = zoo.image(model)
    expected = run(model, x)["output"]
    with pytest.raises(fastvit.UnsupportedModelError, match="batch_first=False"):
        fastvit.optimize(model, strict=True)
    assert relative_l2(run(fastvit.optimize(model), x)["output"], expected) < FLOAT32


def test_a_pool_of_somebody_else_reads_all_tokens(monkeypatch):
    model = zoo.make("open_clip clip")
    x = zoo.image(model)

    def average(self, x):
        return x.mean(dim=1), x

    monkeypatch.setattr(type(model), "_global_pool", average)
    expected = run(model, x)["output"]
    assert relative_l2(run(fastvit.optimize(model), x)["output"], expected) < FLOAT32


def test_intermediate_features_are_whole():
    model = zoo.make("open_clip clip")
    x = zoo.image(model)
    with torch.no_grad():
        expected = model.forward_intermediates(x)["image_intermediates"]
        actual = fastvit.optimize(model).forward_intermediates(x)["image_intermediates"]
    assert [a.shape for a in actual] == [(2, 64, 4, 4)] * 2
    assert all(relative_l2(a, e) < FLOAT32 for a, e in zip(actual, expected, strict=True))

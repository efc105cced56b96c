"""BEiT's biases of the scores: one for each pair of positions, of the image size that the model has now."""

from __future__ import annotations

import copy

import pytest
import torch

import fastvit
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import reasons, run
from tests.tolerances import FLOAT32, relative_l2


@pytest.fixture
def beit():
    model = zoo.make("timm beit")
    return model, zoo.image(model)


def test_biases_matter_and_changes_are_seen(beit):
    """What the other tests compare would differ without them."""
    model, x = beit
    fastvit.optimize(model)
    before = run(model, x)["output"]
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.zero_()
    after = run(model, x)["output"]
    assert relative_l2(after, before) > 1e-2
    assert relative_l2(after, run(fastvit.restore(model), x)["output"]) < FLOAT32


def test_another_image_size(beit):
    model, _ = beit
    original = copy.deepcopy(model)
    fastvit.optimize(model)
    for m in (model, original):
        m.set_input_size((48, 40))
    x = torch.randn(2, 3, 48, 40)
    assert relative_l2(run(model, x)["output"], run(original, x)["output"]) < FLOAT32
    assert not reasons(model)


def test_other_tokens_than_the_model_has_biases_for(beit):
    model, _ = beit
    fastvit.optimize(model)
    with pytest.raises(RuntimeError):  # as the original does
        model.blocks[0](torch.randn(1, 5, 64))
    assert reasons(model) == {"blocks.0": "original forward: position biases for 17 tokens, not 5"}


def test_a_bias_that_all_blocks_share():
    make = zoo.timm_named("beit_base_patch16_224", patch_size=8, use_shared_rel_pos_bias=True, **zoo.EVA)
    model = nasty.randomize(make()).eval()
    x = zoo.image(model)
    expected = run(copy.deepcopy(model), x)["output"]
    assert relative_l2(run(fastvit.optimize(model), x)["output"], expected) < FLOAT32
    assert set(reasons(model).values()) == {"original forward: called with shared_rel_pos_bias"}

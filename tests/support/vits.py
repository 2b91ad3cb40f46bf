"""Plain vision transformers of timm by their real names, with bodies small enough for tests."""

from functools import partial

from timm.models import _registry, model_entrypoint

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
# Patches of 14, 16 and 8 pixels; class and register tokens, or none; learned positions and
# rotations; a last norm before or behind the mean.
VITS = {
    "vit_small_patch14_dinov2": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_small_patch8_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    # Rotations that are learned, for each block its own.
    "vit_small_patch16_rope_mixed_224": SMALL,
    # Queries and keys are normalised, and some keys shared by heads.
    "vit_base_patch16_sapiens2": SMALL | {"num_kv_heads": (2, 1, 1, 2)},
    # Two attentions in a block.
    "vit_small_patch16_18x2_224": SMALL,
    # timm's own small ones; the second pools by the mean.
    "test_vit": {},
    "test_vit2": {},
}


def shrink(monkeypatch):
    """Let timm build the models of `VITS` small, until the test is over."""
    for name, changes in VITS.items():
        small = partial(model_entrypoint(name), **changes)
        monkeypatch.setitem(_registry._model_entrypoints, name, small)

"""Checkpoints that are none, and what all networks are tried out with."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from support.networks import config_of, module_of

from isim.errors import UserError
from isim.models import common

KINDS = {"cam": "train-cam", "deeplabv2": "train-segmenter", "affinity": "train-affinity"}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_checkpoint_is_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"

    def check():
        with pytest.raises(UserError, match=f"{path} is .* run `isim {KINDS[name]}` first"):
            module_of(config_of(name)).load(path)

    check()
    path.write_bytes(b"nothing")
    check()
    save_file({"weight": torch.zeros(1)}, path)
    check()
    for other in KINDS.keys() - {name}:
        common.save(path, torch.nn.Linear(1, 1), config_of(other))
        check()


def test_weights_of_another_kind_are_refused(tmp_path):
    path, config = tmp_path / "model.safetensors", config_of("cam")
    network = module_of(config).build(config)
    tensors = {k: v.long() if v.ndim > 1 else v for k, v in network.state_dict().items()}
    save_file(tensors, path, {config.key: json.dumps(asdict(config))})
    with pytest.raises(UserError, match=r"is damaged, or .*int64, not torch\.float32"):
        module_of(config).load(path)


@pytest.mark.parametrize("scales", [[], [1.0, -0.5]])
def test_a_header_of_impossible_scales_is_damaged(scales, tmp_path):
    path, config = tmp_path / "model.safetensors", config_of("frozen")
    weights = module_of(config).build(config).state_dict()
    header = asdict(config) | {"feature_scales": scales}
    save_file(weights, path, {config.key: json.dumps(header)})
    with pytest.raises(UserError, match=r"feature_scales is \("):
        module_of(config).load(path)


def test_normalize():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    found = common.normalize(images, (0.0, 0.5, 0.1), (1.0, 0.25, 0.5))
    assert found.flatten().tolist() == pytest.approx([0, 2, 0.2])


def test_a_reason_is_one_line():
    assert common.reason(ValueError("first\nsecond")) == "first"
    assert common.reason(AssertionError()) == "AssertionError"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_full_precision_is_kept_under_autocast(device):
    ones = torch.ones(2, 2, device=device)
    with torch.autocast("cpu", torch.bfloat16), common.full_precision(ones.device):
        assert (ones @ ones).dtype == torch.float32

"""Small networks of every kind with random weights, by name: their method, or `affinity`.

Method frozen has two: `frozen` of the loop and `frozen_segmenter`.
"""

import sys

import torch

from isim.models import affinity, cam, segmenter

CLASSES = ("bird", "cat", "dog")
# Bottlenecks, inverted residuals with a dropped head, and no batch normalisation at all.
ENCODERS = ("resnet10t", "mobilenetv2_100", "convnext_atto")
UNETS = ("unetcam_learnable", "unetcam_bilinear")
# Of the library's, one that pools a dilated encoder's maps and one that does not.
CAM_METHODS = ("cam", "deeplabcam", *UNETS, "smp:Linknet", "smp:DeepLabV3Plus")
SEGMENTERS = ("deeplabv2", "deeplabv3")
NAMES = (*CAM_METHODS, *SEGMENTERS, "affinity")


def config_of(name, **changes):
    """Configuration of a network on resnet10t at output stride 16, but for `changes`."""
    if name.startswith("frozen"):
        return _frozen_config(name, **changes)
    values = {"encoder": "resnet10t", "output_stride": 16}
    values |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    if name == "affinity":
        return affinity.AffinityConfig(**values | {"map_stride": 8, "radius": 5} | changes)
    values |= {"method": name, "encoder_norm": "batch", "classes": CLASSES}
    values["decoder_channels"] = 64 if name.startswith("smp:") else 16
    if name in SEGMENTERS:
        return segmenter.SegmenterConfig(**values | changes)
    return cam.CamConfig(**values | {"atrous_rates": (1, 2, 3)} | changes)


def _frozen_config(name, **changes):
    values = {"method": "frozen", "encoder": "test_efficientnet", "output_stride": 16}
    values |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "encoder_norm": "frozen"}
    values |= {"classes": CLASSES, "decoder_channels": 1, "sides": (64,), "stages": 2}
    values |= {"head_kind": "mlp", "head_width": 8} | changes
    if name == "frozen_segmenter":
        return segmenter.SegmenterConfig(**values)
    return cam.CamConfig(**{"atrous_rates": (1, 2, 3)} | values)


def module_of(config):
    """Module that builds and loads networks of a configuration."""
    return sys.modules[type(config).__module__]


def network_of(name, seed=0, **changes):
    """Network of `config_of`, its weights drawn from a seed; in training mode."""
    torch.manual_seed(seed)
    config = config_of(name, **changes)
    return module_of(config).build(config)


def frozen_network_of(name="frozen", **changes):
    """Network of method frozen as if trained: features of any scale, scores of both signs."""
    network = network_of(name, **changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    network.centre.normal_(std=0.02, generator=generator)
    network.spread.uniform_(0.03, 0.06, generator=generator)
    for part in (network.classifier, network.head):
        for weight in () if part is None else part.parameters():
            weight.normal_(std=0.3, generator=generator)
    return network


def images(*size, count=2):
    """Normalised images (count, 3, *size)."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


def outputs(network, pixels):
    """Return all that a network makes of images: name -> tensor."""
    if isinstance(network, affinity.AffinityNet):
        return {"features": network.features(pixels), "affinities": network(pixels)}
    if isinstance(network, segmenter.Segmenter):
        return {"segmentation": network(pixels)}
    logits, segmentation = network(pixels, True)
    cams = network.cam(pixels, torch.arange(1, 4, device=pixels.device))
    found = {"logits": logits, "cam": cams}
    return found if segmentation is None else found | {"segmentation": segmentation}


def touched(module):
    """Tell whether any parameter has a gradient that is not zero."""
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


def copied(module):
    """Return the weights and statistics of a module as they are now."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, state):
    """Tell whether a module has exactly the weights and statistics of a state."""
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)

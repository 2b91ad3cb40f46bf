"""Folded networks compute what the networks do."""

import pytest
import torch
from support.networks import copied, images, network_of, same
from timm.layers import BatchNormAct2d
from torch import nn

from isim.models.folding import FusedConv, for_inference
from isim.runtime import devices

CPU = torch.device("cpu")
PIXELS = images(61, 83).contiguous(memory_format=torch.channels_last)


def randomise(network):
    """Statistics, weights and biases that matter."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def norms(network):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def build(encoder):
    network = randomise(network_of("cam", encoder=encoder))
    nn.init.normal_(network.classifier.weight)
    return network


def every(network, pixels):
    return network.cam(pixels, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("encoder", ["resnet10t", "mobilenetv2_100", "efficientnet_b0"])
def test_every_normalisation_of_an_encoder_is_folded(encoder):
    network = build(encoder)
    devices.place(network, CPU)
    before = copied(network)
    folded = for_inference(network, every, CPU, torch.float32)
    assert norms(network) > 10 and norms(folded) == 0
    with torch.inference_mode():
        expected, found = every(network, PIXELS), every(folded, PIXELS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert same(network, before)


def test_reduced_precision_is_no_less_exact_than_autocast():
    network = build("resnet10t")
    folded = for_inference(network, every, CPU, torch.bfloat16)
    convolutions = [m for m in folded.encoder.modules() if isinstance(m, (nn.Conv2d, FusedConv))]
    assert {m.weight.dtype for m in convolutions} == {torch.bfloat16}
    assert folded.classifier.weight.dtype == torch.float32, "it runs in full precision"
    with torch.inference_mode():
        exact = every(network, PIXELS)
        with devices.autocast("bf16", CPU):
            plain, found = every(network, PIXELS), every(folded, PIXELS)
    assert found.dtype == torch.float32
    error = (found - exact).abs().mean()
    assert 0 < error < 1.2 * (plain - exact).abs().mean()


@pytest.mark.parametrize(
    ("method", "encoder", "composed"),
    [
        ("cam", "mobilenetv2_100", True),
        ("cam", "resnet10t", False),  # a ReLU lies between
        ("deeplabcam", "mobilenetv2_100", False),  # the decoder reads the map, too
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_convolution_and_the_classifier_become_one(method, encoder, composed, dtype):
    network = randomise(network_of(method, encoder=encoder))
    nn.init.normal_(network.classifier.weight)
    folded = for_inference(network, every, CPU, dtype)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    with torch.inference_mode():
        exact = every(network, PIXELS)
        with devices.autocast(precision, CPU):
            plain, found = every(network, PIXELS), every(folded, PIXELS)
            last = folded.encoder(PIXELS)[-1]
    assert (last.shape[1] == len(network.classifier.weight)) == composed
    error = float((found - exact).abs().mean())
    if dtype == torch.float32:
        assert error < 1e-5 * float(exact.abs().max())
    else:
        assert 0 < error < 1.2 * (plain - exact).abs().mean()


class Chain(nn.Module):
    """A convolution, what follows it, and how its result is used."""

    def __init__(self, norm, activation=None, *, shortcut=False, twice=False, **options):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, **{"padding": 1} | options)
        self.norm = norm
        self.activation = activation or nn.Identity()
        self.last = nn.Conv2d(4, 4, 1)
        self.shortcut, self.twice = shortcut, twice

    def forward(self, pixels):
        made = self.first(pixels)
        normalised = self.norm(made)
        if self.shortcut:
            normalised += pixels[:, :1]
        result = self.last(self.activation(normalised))
        return result + made if self.twice else result


def fold(chain):
    chain = randomise(chain)
    folded = for_inference(chain, nn.Module.__call__, CPU, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(folded(PIXELS), chain(PIXELS), rtol=1e-4, atol=1e-4)
    return folded


@pytest.mark.parametrize(
    ("activation", "fused"),
    [(nn.ReLU(True), True), (nn.ReLU6(), True), (nn.SiLU(True), True), (nn.ELU(), False)],
)
def test_activations_are_computed_with_the_convolution_where_that_can_be(activation, fused):
    folded = fold(Chain(nn.BatchNorm2d(4), activation))
    assert isinstance(folded.first, FusedConv)
    assert (type(folded.activation) is nn.Identity) == fused


@pytest.mark.parametrize("inner", [nn.ReLU, nn.ReLU6, nn.ELU])
def test_an_activation_inside_the_normalisation_is_kept(inner):
    for outer in (None, nn.Sigmoid(), nn.ReLU6()):
        folded = fold(Chain(BatchNormAct2d(4, act_layer=inner), outer))
        assert norms(folded) == 0


def test_an_activation_after_a_sum_in_place_stays_where_it_is():
    folded = fold(Chain(nn.BatchNorm2d(4), nn.ReLU(), shortcut=True))
    assert norms(folded) == 0 and type(folded.activation) is nn.ReLU


@pytest.mark.parametrize("change", [{"padding_mode": "reflect"}, {"padding": "same"}])
def test_other_paddings_keep_torch_s_convolution(change):
    folded = fold(Chain(nn.BatchNorm2d(4), nn.ReLU(), **change))
    assert norms(folded) == 0 and type(folded.first) is nn.Conv2d


class Twice(Chain):
    def forward(self, pixels):
        return super().forward(pixels) + self.norm(self.first(pixels + 1))


class Shared(Chain):
    def forward(self, pixels):
        return super().forward(pixels) + self.activation(pixels.sum())


def test_what_is_used_or_run_twice_is_left_alone():
    for chain in (Chain(nn.BatchNorm2d(4), nn.ReLU(), twice=True), Twice(nn.BatchNorm2d(4))):
        folded = fold(chain)
        assert norms(folded) == 1 and type(folded.first) is nn.Conv2d
    folded = fold(Shared(nn.BatchNorm2d(4), nn.ReLU()))
    assert norms(folded) == 0 and type(folded.activation) is nn.ReLU


def test_a_network_that_makes_no_numbers_is_left_alone():
    chain = randomise(Chain(nn.BatchNorm2d(4)))
    chain.last.weight.data.fill_(float("nan"))
    assert norms(for_inference(chain, nn.Module.__call__, CPU, torch.float32)) == 1

"""Based's gated short convolution against its definition."""

import torch
import torch.nn.functional as F

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixers import ShortConv
from longscan.models.parameters import init_parameters


def test_block_is_the_released_one(make_config):
    """PyTorch's own padded convolution, SiLU, gate and projections, document by document."""
    config = make_config(pattern=["short_conv"])
    mixer = ShortConv(config, LocalBackend())
    init_parameters(mixer, seed=0)
    mixer.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    lengths = [2, 1, 8]
    x = torch.randn(11, 32, generator=generator).double().requires_grad_()
    rows = []
    for document in x.split(lengths):
        left = (document @ mixer.input_x.weight.T + mixer.input_x.bias).T[None]
        right = document @ mixer.input_y.weight.T + mixer.input_y.bias
        channels, taps = mixer.conv_weight.shape
        assert (channels, taps) == (64, 3)
        mixed = F.conv1d(left, mixer.conv_weight[:, None], padding=taps - 1, groups=channels)[0, :, : len(document)].T
        rows.append((F.silu(mixed) * right) @ mixer.output.weight.T + mixer.output.bias)
    by_hand = torch.cat(rows)
    ours = mixer(x[None], LocalContext(Segments.from_lengths([lengths])))[0]
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    wanted = [x, *mixer.parameters()]
    expected, actual = (torch.autograd.grad(y.square().sum(), wanted) for y in (by_hand, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)

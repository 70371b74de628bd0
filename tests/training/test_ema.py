import torch
from torch import nn

from vae_dist.training.ema import Ema


def test_the_average_follows_its_recurrence():
    layer = nn.Linear(3, 2)
    ema = Ema(layer, decay=0.9)
    expected = layer.weight.detach().double().clone()
    for step in range(50):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        ema.update(step, found_inf=torch.tensor(0.0))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    torch.testing.assert_close(ema.module.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_moves_nothing():
    layer = nn.Linear(3, 2)
    ema = Ema(layer, decay=0.9)
    before = ema.module.weight.clone()
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(3, found_inf=torch.tensor(1.0))
    assert torch.equal(ema.module.weight, before)
    assert not any(p.requires_grad for p in ema.module.parameters())

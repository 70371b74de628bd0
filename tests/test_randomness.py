import torch

from vae_dist.randomness import derive_seed, numpy_generator, torch_generator


def test_a_draw_is_a_function_of_seed_purpose_and_every_part_of_the_position():
    assert derive_seed(3, "posterior", 10, 2) == 538446661412445819  # of every run so far
    one, two = (torch.randn(4, generator=torch_generator(3, "posterior", 10, 2)) for _ in range(2))
    assert torch.equal(one, two)
    one, two = (numpy_generator(3, "order", 1).integers(1 << 60) for _ in range(2))
    assert one == two
    seeds = {
        derive_seed(seed, purpose, *position)
        for seed in range(4)
        for purpose in ("posterior", "levels")
        for position in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**40, 1)]
    }
    assert len(seeds) == 4 * 2 * 7 and all(0 <= seed < 2**63 for seed in seeds)

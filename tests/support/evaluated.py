"""Evaluations of tiny models on few images, on as many ranks as there are."""

import torch
from torch.distributions import Normal

from tests.support.tiny_run import tiny_config
from vae_dist.config.schema import RuntimeConfig
from vae_dist.data.loader import EvaluationBatch
from vae_dist.distributed import Runtime
from vae_dist.evaluation.frechet import FrechetMetric
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.evaluation.metrics import Comparison, ReconstructionMetric, psnr_db
from vae_dist.evaluation.run import evaluate
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.models.build import build_vae
from vae_dist.randomness import torch_generator

CPU = torch.device("cpu")
NUM_IMAGES, SIZE = 13, (6, 5)
IMAGES = torch.randint(
    0, 256, (NUM_IMAGES, 1, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)
HALVES, SIDES = torch.full((2,), 0.5).double().log(), torch.tensor([[-2.0], [2.0]]).expand(2, 3)
TWO_GAUSSIANS = GaussianMixture(HALVES, SIDES.double(), torch.ones(2, 3).double())


def start():
    return Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")


def tiny_model(**keys):
    model = build_vae(tiny_config(**keys), SIZE)
    with torch.no_grad():  # leave the symmetric start, so that every term counts
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch_generator(number, ""))
            parameter.add_(0.1 * noise)
    return model


def drawn(model, sample, seed=3):
    """An image as an evaluation with this seed shows it, q(z|x) and the draw of z, float64."""
    uniform = torch.rand(1, 1, *SIZE, generator=torch_generator(seed, "eval-levels", sample))
    ink = (uniform < IMAGES[[sample]] / 255).double()
    with torch.no_grad():
        mean, log_variance = model.encode(2 * ink.float() - 1)
    posterior = Normal(mean.double(), (log_variance / 2).exp().double())
    noise = torch.randn(3, generator=torch_generator(seed, "eval-posterior", sample))
    return ink, posterior, posterior.mean + posterior.stddev * noise


def batches(batch_size, images=IMAGES, *, rank=0, world=1):
    """Rank's share, padded with images that would ruin any mean that they entered."""
    for low in range(0, len(images), batch_size * world):
        samples = torch.arange(low + rank * batch_size, low + (rank + 1) * batch_size)
        counts = samples < len(images)
        shown = images[samples.clamp(max=len(images) - 1)].clone()
        shown[~counts] = 255
        yield batch_of(shown, torch.where(counts, samples, -1), weights=counts.float())


def batch_of(images, samples, **more):
    labels, weights = torch.full((len(images),), -1), torch.ones(len(images))
    numbers = torch.as_tensor(samples)
    return EvaluationBatch(images, labels, numbers, **{"weights": weights, "skipped": ()} | more)


def result_of(
    model, *metrics, batch_size=NUM_IMAGES, images=IMAGES, change=lambda batch: batch, **options
):
    runtime = start()
    shares = batches(batch_size, images, rank=runtime.rank, world=runtime.world)
    options = {"seed": 3, "runtime": runtime, "metrics": metrics} | options
    result = evaluate(model, map(change, shares), **options)
    assert result is not None
    return result


def all_metrics(model, device=CPU):
    priors = {"fid": None} | ({"fid_gmm": TWO_GAUSSIANS} if model.image_size else {})
    options = {"of_reconstructions": True, "priors": priors, "seed": 3}
    return [
        ImportanceMetric(model, device, num_samples=60, seed=3),
        ReconstructionMetric({"psnr_db": Comparison(psnr_db, 1)}, device),
        FrechetMetric(lambda x: x.flatten(1)[:, :5].double(), 5, model, device, **options),
    ]

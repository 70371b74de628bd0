"""Do samples of a conditional model show the class that was asked for? A classifier says.

    python -m benchmarks.conditional [run=runs/mnist_conditional] [num_images=1000]

In: a finished run of mnist_conditional. A small convolutional network is trained on the run's
training digits (seconds) and tested on its validation digits; then it looks at samples
E[x|z, y], z ~ N(0, I), of every class y equally often, averaged weights. Out: the part of the
samples in which it agrees with y, of each class and of all, and how often it agrees with the labels
of real digits. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.commands import SampleCommand
from vae_dist.config.load import load_command
from vae_dist.data.index import load_index
from vae_dist.inference.load import Images, first_examples, load_model, open_images
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.tracking.images import to_uint8

STEPS, BATCH_SIZE = 600, 128


def classifier(images: Tensor, labels: Tensor) -> nn.Module:
    """Trained on uint8 images (N, 1, 28, 28), each moved by up to two pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, int(labels.max()) + 1),
    )
    network(scaled(images[:2]))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH_SIZE,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        batch = torch.roll(scaled(images[chosen]), shift, (2, 3))
        loss = F.cross_entropy(network(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


@torch.inference_mode()
def agreement(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the classifier says the label, of each image."""
    return network(scaled(images)).argmax(1) == labels


def main(argv: list[str] | None = None) -> int:
    keys = sys.argv[1:] if argv is None else argv
    if not any(key.startswith("run=") for key in keys):
        keys = ["run=runs/mnist_conditional", *keys]
    if not any(key.startswith("num_images=") for key in keys):
        keys = ["num_images=1000", *keys]
    command = load_command(SampleCommand, keys)
    loaded = load_model(command)
    validation = open_images(loaded.config, "", create=True)
    train = load_index(loaded.config.data.train, key="data.train", create=True)
    digits = first_examples(Images(train, validation.settings), train.num_samples)
    began = time.perf_counter()
    network = classifier(digits.images, digits.labels)
    seconds = time.perf_counter() - began
    held_out = first_examples(validation, validation.index.num_samples)
    real = agreement(network, held_out.images, held_out.labels).float().mean().item()
    num_classes = loaded.model.num_classes
    of_each = -(-command.num_images // num_classes)
    samples = BatchedVAE(loaded.model).sample(
        of_each,
        loaded.image_size,
        classes=range(num_classes),
        seed=command.seed,
        temperature=command.temperature,
    )
    asked = torch.arange(num_classes).repeat_interleave(of_each)
    agrees = agreement(network, to_uint8(samples), asked).float()
    by_class = agrees.view(num_classes, of_each).mean(1)
    facts = f"{len(digits.images)} training digits, {seconds:.0f} s"
    print(f"classifier: {facts}, agrees with {real:.1%} of the validation labels")
    for label, part in enumerate(by_class.tolist()):
        print(f"  asked for {label}: {part:.1%}")
    figures = {
        "num_images": len(samples),
        "agreement": round(agrees.mean().item(), 4),
        "agreement_of_the_worst_class": round(by_class.min().item(), 4),
        "agreement_on_real_digits": round(real, 4),
        "temperature": command.temperature,
        "step": loaded.step,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

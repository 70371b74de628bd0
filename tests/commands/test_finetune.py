"""The commands of "Fine-tune a published autoencoder" in the documents, on a small model."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.latent_data import write_photos

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks the Hub
diffusers = pytest.importorskip("diffusers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "autoencoders.md"
SMALL = (
    *("init_from=sd-vae-ft-mse", "data.train=data/photos/train"),
    *("data.validation=data/photos/validation", "data.resolution=64", "data.workers=0"),
    *("data.slots=0", "model.channels=[8,8,8,8]", "model.blocks=1", "model.norm_groups=4"),
    *("perceptual.kind=structure", "adversarial.channels=8", "adversarial.start_step=0"),
    *("adversarial.warmup_steps=1", "adversarial.ramp_steps=1", "optimizer.warmup_steps=1"),
    *("training.steps=3", "training.batch_size=2", "training.microbatch_size=2"),
    *("training.precision=no", "runtime.threads=1", "wandb.mode=disabled"),
)


def commands():
    """Verb and arguments of each."""
    section = PAGE.read_text().partition("## Fine-tune a published autoencoder\n")[2]
    blocks = re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    words = [shlex.split(line) for line in "".join(blocks).splitlines()]
    starts = [line.index("-m") + 1 for line in words]
    return [(line[at], line[at + 1 :]) for at, line in zip(starts, words, strict=True)]


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "validation"):
        write_photos(tmp_path / "data" / "photos" / part, 4, sizes=[(64, 80)])
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    theirs.save_pretrained("sd-vae-ft-mse")
    verbs = []
    for verb, arguments in commands():
        verbs.append(verb.removeprefix("vae_dist."))
        more = SMALL if verbs[-1] == "train" else ()
        assert run_ranks(1, importlib.import_module(verb).main, [*arguments, *more]) == [0], verb
    assert verbs == ["train", "reconstruct", "export", "train"]
    ours = diffusers.AutoencoderKL.from_pretrained("exported").state_dict()
    same = {name for name, value in theirs.state_dict().items() if torch.equal(value, ours[name])}
    moved = ours.keys() - same
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert Path("reconstructions.png").exists() and Path("runs/finetuned").exists()

"""Data sets of the Hugging Face hub: `hf://datasets/OWNER/NAME`, as parquet files.

In: OWNER/NAME, then @REVISION and /FOLDER if wanted. Out: the files in the hub's own cache, each
with its path in the data set, which says its split. Only this reaches out to the network.
"""

from __future__ import annotations

import contextlib
import re

from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import SPLITS

KNOWN = {"mnist": "hf://datasets/ylecun/mnist", "cifar10": "hf://datasets/uoft-cs/cifar10"}
CONVERTED = "refs/convert/parquet"  # where the hub keeps data sets of other kinds
MAX_SHOWN = 5  # folders that a message names
ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+(?:/convert/parquet)?))?(?:/(.+))?")


def download(spec: str) -> list[tuple[str, str]]:
    """(file, its path in the data set) of the parquet files. Raises ConfigError."""
    found = ADDRESS.fullmatch(KNOWN.get(spec, spec).rstrip("/"))
    if found is None:
        raise ConfigError(f"source={spec}: write it like hf://datasets/OWNER/NAME[@REVISION]")
    name, revision, prefix = found[1], found[2], f"{found[3]}/" if found[3] else ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()

    def parquet_files(revision: str | None) -> list[str]:
        files = api.list_repo_files(name, revision=revision, repo_type="dataset")
        return sorted(f for f in files if f.endswith(".parquet") and f.startswith(prefix))

    try:
        files = parquet_files(revision)
        if not files and revision is None:
            with contextlib.suppress(HfHubHTTPError):  # not every data set is converted
                files, revision = parquet_files(CONVERTED), CONVERTED
        folders = [
            [part for part in f.split("/")[:-1] if part.lower() not in SPLITS] for f in files
        ]
        sets = sorted({"/".join(parts) for parts in folders})
        if len(sets) != 1:
            shown = ", ".join(sets[:MAX_SHOWN]) + " ..." * (len(sets) > MAX_SHOWN)
            raise ConfigError(
                f"source={spec}: holds several sets: {shown}; name one: {spec.rstrip('/')}/FOLDER"
                if sets
                else f"source={spec}: no parquet file is there; download the data set and give its "
                "folder"
            )
        return [
            (api.hf_hub_download(name, file, repo_type="dataset", revision=revision), file)
            for file in files
        ]
    except ConfigError:
        raise
    except Exception as error:  # of huggingface_hub and of the HTTP client below it
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ConfigError(
            f"source={spec}: the hub does not give it ({reason}); check name, network and, for "
            "private ones, `hf auth login`"
        ) from None

import socket

from tests.support.distributed import run_ranks
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime


def places() -> list[str]:
    return Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no").places()


def test_every_rank_knows_where_each_sits():
    line = f"on {socket.gethostname()}: rank 0 cpu, rank 1 cpu"
    assert run_ranks(2, places) == [[line], [line]]

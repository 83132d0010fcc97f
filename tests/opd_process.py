"""OPD on several processes: started by torchrun with the folder of the world, one for the runs, and the address of a server.

Runs with DDP and the engine, then with FSDP2 and the server; the teacher is sharded in both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from opd_runs import make_config
from pipo.training.opd import run_opd

if __name__ == "__main__":
    torch.set_num_threads(1)
    world, out, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    run = {"batch_size": 1, "accumulation": 2}
    run_opd(make_config(world, out / "ddp", run=run, teacher={"shard": True}))
    server = {"backend": "server", "url": url}
    run_opd(
        make_config(world, out / "fsdp2", run={**run, "strategy": "fsdp2"}, teacher={"shard": True}, rollout=server)
    )
    # Leave together: nobody goes while another may still talk to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

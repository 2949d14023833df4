"""Run by test_advice.py, where deepspeed is: two processes train a DeepViT, its weights spread as ZeRO does it.

`python -m parity_tests.support.zero FOLDER`: FOLDER/0, /2 and /3 are what deepspeed saved, by ZeRO's stage, and
FOLDER/0.pt, … what the model was then.
"""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from parity_tests.support.reference import CONFIGURATIONS, channels_first, pytorch, random_images

PROCESSES = 2


def train(rank: int, folder: Path) -> None:
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(PROCESSES)}
    store = FileStore(str(folder / 'store'), PROCESSES)
    torch.distributed.init_process_group('gloo', store=store, rank=rank, world_size=PROCESSES)
    configuration = CONFIGURATIONS['deep-plain']
    images = channels_first(random_images(configuration), torch.float32)
    for stage in (0, 2, 3):
        module = pytorch(configuration, torch.float32)
        settings = {
            'train_micro_batch_size_per_gpu': len(images),
            'zero_optimization': {'stage': stage},
            'zero_allow_untested_optimizer': True,
        }
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
        engine.backward(engine(images).square().sum())
        engine.step()
        engine.save_checkpoint(str(folder / str(stage)))
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            if rank == 0:
                torch.save(module.state_dict(), folder / f'{stage}.pt')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    deepspeed.ops.__compatible_ops__.clear()  # or it compiles one
    start_processes(train, (Path(sys.argv[1]),), PROCESSES, start_method='fork')

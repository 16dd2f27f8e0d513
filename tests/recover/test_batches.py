"""Which samples are in which batch: the order that accelerate's loaders have, and no more draws."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from fastprune.distributed import Processes
from fastprune.recover.batches import load_batches, own_batches, shuffled


@pytest.mark.parametrize("samples", [1, 3, 8, 16, 17, 23])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_order_is_that_of_accelerate(samples, batch_size, processes, epoch):
    sampler = SeedableRandomSampler(range(samples), data_seed=7)
    sampler.set_epoch(epoch)
    theirs = list(BatchSampler(sampler, batch_size, drop_last=False))
    order = shuffled(samples, 7 + epoch)
    for process in range(processes):
        expected = theirs
        if processes > 1:
            shard = BatchSamplerShard(_Batches(theirs, batch_size), processes, process)
            expected = list(shard)
        assert own_batches(order, batch_size, Processes(process, processes)) == expected


class _Batches(BatchSampler):
    """`batches` as a sampler that has drawn them already."""

    def __init__(self, batches, batch_size):
        super().__init__(range(1), batch_size, drop_last=False)
        self.batches = batches

    def __iter__(self):
        return iter([list(batch) for batch in self.batches])

    def __len__(self):
        return len(self.batches)


def test_loading_draws_once_wherever_it_begins():
    found, states = [], []
    for first in (0, 2):
        torch.manual_seed(1)
        chosen = own_batches(range(7), 2)[first:]
        batches = load_batches(range(7), chosen, lambda rows: {"rows": rows}, torch.device("cpu"))
        states.append(torch.get_rng_state())
        found.append([batch["rows"] for batch in batches])
        assert torch.equal(torch.get_rng_state(), states[0])
    assert found == [[[0, 1], [2, 3], [4, 5], [6]], [[4, 5], [6]]]
    torch.manual_seed(1)
    assert not torch.equal(torch.get_rng_state(), states[0])

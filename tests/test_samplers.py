"""Batches: complete, the same however they are divided, and exact over ranks."""

import pytest

from util.data.samplers import EvalBatchSampler, TrainBatchSampler
from util.errors import UserError
from util.layers.mixing import images_of_tuples


def batches(**kwargs) -> list[list[int]]:
    sampler = TrainBatchSampler(**kwargs)
    return [[index for _, index in batch] for batch in sampler]


def pairs(batch: list[int]) -> set[frozenset]:
    return {frozenset((batch[i], batch[-1 - i])) for i in range(len(batch) // 2)}


@pytest.mark.parametrize("world_size, accum_iter, batch_size", [(2, 1, 4), (1, 2, 4), (4, 1, 2), (2, 2, 2)])
def test_pairs_of_a_step_do_not_depend_on_ranks_and_accumulation(world_size, accum_iter, batch_size):
    whole = batches(num_samples=50, batch_size=8, seed=3)
    ranks = [
        batches(num_samples=50, batch_size=batch_size, accum_iter=accum_iter, rank=r, world_size=world_size, seed=3)
        for r in range(world_size)
    ]
    assert all(len(rank) == 6 * accum_iter for rank in ranks)
    for step, batch in enumerate(whole):
        pieces = [rank[step * accum_iter + micro] for rank in ranks for micro in range(accum_iter)]
        assert set().union(*map(pairs, pieces)) == pairs(batch)


@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("world_size, accum_iter", [(2, 1), (1, 2), (2, 2)])
def test_tuples_of_a_step_do_not_depend_on_ranks_and_accumulation(K, world_size, accum_iter):
    def tuples(batch: list[int]) -> set[frozenset]:
        return {frozenset(batch[row] for row in rows) for rows in images_of_tuples(len(batch), K)}

    [whole, *_] = batches(num_samples=100, batch_size=8 * K, seed=3, mix_images=K)
    size = 8 * K // world_size // accum_iter
    common = dict(num_samples=100, batch_size=size, accum_iter=accum_iter, world_size=world_size, seed=3, mix_images=K)
    ranks = [batches(rank=rank, **common)[:accum_iter] for rank in range(world_size)]
    assert set().union(*(tuples(piece) for rank in ranks for piece in rank)) == tuples(whole)
    assert len(tuples(whole)) == 8


def test_odd_pieces_are_complete():
    ranks = [batches(num_samples=30, batch_size=3, rank=r, world_size=3) for r in range(3)]
    for step in range(3):
        seen = [index for rank in ranks for index in rank[step]]
        assert len(set(seen)) == 9
    assert len({i for rank in ranks for batch in rank for i in batch}) == 27


def test_epochs_shuffle_differently_and_reproducibly():
    sampler = TrainBatchSampler(40, 4, seed=1)
    first = list(sampler)
    sampler.set_position(1)
    second = list(sampler)
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert [[i for _, i in b] for b in first] != [[i for _, i in b] for b in second]
    sampler.set_position(0)
    assert list(sampler) == first
    assert list(TrainBatchSampler(40, 4, seed=2)) != first


def test_a_later_first_step_skips_exactly_the_earlier_ones():
    sampler = TrainBatchSampler(40, 2, accum_iter=2, rank=1, world_size=2, seed=1)
    whole = list(sampler)
    sampler.set_position(0, first_step=3)
    assert len(sampler) == 4 and list(sampler) == whole[6:]


def test_too_few_images_for_one_batch_is_an_error():
    with pytest.raises(UserError, match=r"7 training images do not fill one effective batch of 8 .*lower --batch_size"):
        TrainBatchSampler(7, 2, accum_iter=2, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_covers_every_sample_once(world_size, batch_size):
    samplers = [EvalBatchSampler(31, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(index for s in samplers for batch in s for _, index in batch) == list(range(31))
    assert all(len(list(s)) == len(s) for s in samplers)

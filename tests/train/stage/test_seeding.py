"""Random numbers depend on (seed, layer, step, microbatch), and the user's stay the user's."""

import itertools
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from barepp.train.stage.seeding import LayerRandomness, derive_seed

GRID = list(itertools.product((0, 1, 7), ("init", "forward"), range(6), range(20), range(8)))


def draws(randomness: LayerRandomness, layer: int, step: int, microbatch: int) -> Tensor:
    with randomness:
        randomness.seed_layer(layer, step, microbatch)
        return functional.dropout(torch.ones(40), 0.5)


def test_the_low_32_bits_of_all_seeds_differ() -> None:
    # mt19937 sees these bits only. By chance two of 5760 would meet in 1 of 260 such grids.
    assert len({derive_seed(*place) & 0xFFFFFFFF for place in GRID}) == len(GRID)


def test_neighbouring_seeds_differ_in_half_their_bits() -> None:
    seeds = [derive_seed(*place) for place in GRID]
    distances = [(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]
    assert 31.5 < sum(distances) / len(distances) < 32.5
    assert min(distances) > 10


def test_seeds_are_the_same_forever() -> None:
    # Another value here would change every model that anyone has trained.
    assert derive_seed(0, "init", 0) == 0xB0AE982E690C0156
    assert derive_seed(-1, "forward", 16, 10**6, 7) == 0xC19E1F736F5ACBB


def test_draws_depend_on_each_coordinate_and_on_nothing_else() -> None:
    places = list(itertools.product(range(3), range(3), range(3)))
    first = [draws(LayerRandomness(5), *place) for place in places]
    torch.manual_seed(99)
    again = [draws(LayerRandomness(5), *place) for place in reversed(places)]
    for mask, same in zip(first, reversed(again), strict=True):
        assert torch.equal(mask, same)
    for mask, other in itertools.combinations(first, 2):
        assert not torch.equal(mask, other)
    assert not torch.equal(first[0], draws(LayerRandomness(6), *places[0]))


def test_initial_weights_do_not_share_numbers_with_forwards() -> None:
    randomness = LayerRandomness(5)
    with randomness:
        randomness.seed_initial(0)
        initial = torch.rand(8)
        randomness.seed_layer(0, 0, 0)
        assert not torch.equal(torch.rand(8), initial)


def test_the_users_sequence_is_that_of_plain_torch() -> None:
    def user_draws(between: bool) -> list[Tensor]:
        torch.manual_seed(3)
        randomness = LayerRandomness(5)
        numbers = []
        for step in range(5):
            # randn of an odd count leaves half of a pair behind in the generator: it must survive.
            numbers += [torch.randperm(10), torch.randn(1), torch.randn(3)]
            if between:
                draws(randomness, 0, step, 0)
                draws(randomness, 1, step, 0)
        return numbers

    for with_barepp, plain in zip(user_draws(True), user_draws(False), strict=True):
        assert torch.equal(with_barepp, plain)


def test_an_error_gives_generator_and_lock_back() -> None:
    lock = threading.Lock()
    before = torch.default_generator.get_state()
    randomness = LayerRandomness(5, lock)
    with pytest.raises(ZeroDivisionError), randomness:
        assert lock.locked()
        randomness.seed_layer(0, 0, 0)
        torch.rand(3)
        raise ZeroDivisionError
    assert not lock.locked()
    assert torch.equal(torch.default_generator.get_state(), before)


def test_threads_that_share_a_lock_draw_as_if_alone() -> None:
    alone = [[draws(LayerRandomness(seed), 0, step, 0) for step in range(50)] for seed in range(4)]
    before = torch.default_generator.get_state()
    lock = threading.Lock()
    together: dict[int, list[Tensor]] = {}

    def rank(seed: int) -> None:
        randomness = LayerRandomness(seed, lock)
        together[seed] = [draws(randomness, 0, step, 0) for step in range(50)]

    threads = [threading.Thread(target=rank, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(map(torch.equal, alone[seed], together[seed]))
    assert torch.equal(torch.default_generator.get_state(), before)

"""The permutations against a slow implementation in plain Python integers, written apart from the fast one."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsvlm.schedule.keys import hash64, key64
from dsvlm.schedule.permutation import EpochOrder, permutations, permute, unpermute

steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=60)
keys = st.integers(0, 2**64 - 1)

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def slow_mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def slow_hash(*words):
    state = 0
    for word in words:
        state = slow_mix((state + (word + 1) * GOLDEN) % WORD)
    return state


def slow_permute(x, n, key):
    bits = (n - 1).bit_length() // 2
    low_side, high_side = 2**bits, -(-n // 2**bits)
    while True:
        high, low = divmod(x, low_side)
        for turn in range(16):
            half = high if turn % 2 == 0 else low
            drawn = slow_mix((key + (16 * half + turn + 1) * GOLDEN) % WORD)
            if turn % 2 == 0:
                low = (low + drawn) % low_side
            else:
                high = (high + (drawn >> 32) * high_side // 2**32) % high_side
        x = high * low_side + low
        if x < n:
            return x


def slow_epoch(shard_sizes, block, group, key):
    """List the sample ids of an epoch in order, by building every block."""
    starts = [sum(shard_sizes[:shard]) for shard in range(len(shard_sizes))]
    order = [slow_permute(i, len(shard_sizes), slow_hash(key, 0)) for i in range(len(shard_sizes))]
    samples = []
    for number in range(-(-len(order) // group)):
        blocks = []
        for shard in order[number * group : (number + 1) * group]:
            ids = list(range(starts[shard], starts[shard] + shard_sizes[shard]))
            blocks += [ids[i : i + block] for i in range(0, len(ids), block)]
        for slot in range(len(blocks)):
            samples += blocks[slow_permute(slot, len(blocks), slow_hash(key, 1, number))]
    return samples


def assert_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.bincount(image, minlength=n), np.ones(n, int)), f"n={n}, key={key}"
    assert np.array_equal(unpermute(image, n, key), np.arange(n)), f"n={n}, key={key}"


def test_bijection_small():
    for n in range(1, 301):
        assert_bijection(n, n * 31)


@pytest.mark.parametrize("n", [511, 512, 513, 1000, 1023, 1025, 2047, 4095, 4096, 4097, 6561, 9999, 10000])
def test_bijection_spread(n):
    for key in range(3):
        assert_bijection(n, key)


@steady
@given(n=st.integers(1, 2**40), key=keys, data=st.data())
def test_inverse_large(n, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    image = permute(index, n, key)
    assert ((image >= 0) & (image < n)).all()
    assert np.array_equal(unpermute(image, n, key), index)
    assert np.array_equal(permute(unpermute(index, n, key), n, key), index)


@steady
@given(n=st.integers(1, 2**41), key=keys, data=st.data())
def test_equals_plain_python(n, key, data):
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    assert permute(np.array(index), n, key).tolist() == [slow_permute(i, n, key) for i in index]


def test_golden():
    assert permute(np.arange(10), 10, 1).tolist() == GOLDEN_10
    assert permute(np.array([0, 1, 2**39, 2**40 - 6]), 2**40 - 5, 2**63 + 11).tolist() == GOLDEN_LARGE
    assert hash64(7, 2**64 - 1, np.array([0, -1])).tolist() == GOLDEN_HASH
    assert [key64("task", 7, "vqa"), key64("ab", "c"), key64("a", "bc")] == GOLDEN_KEYS
    assert key64("1") != key64(1)
    assert [slow_permute(i, 10, 1) for i in range(10)] == GOLDEN_10
    assert [slow_hash(7, WORD - 1, 0), slow_hash(7, WORD - 1, WORD - 1)] == GOLDEN_HASH
    assert slow_epoch([5, 3, 0, 7, 4], 3, 2, 99) == GOLDEN_EPOCH
    assert EpochOrder(np.array([5, 3, 0, 7, 4]), 3, 2, 99).samples(np.arange(19)).tolist() == GOLDEN_EPOCH


GOLDEN_10 = [3, 8, 4, 6, 0, 5, 2, 9, 1, 7]
GOLDEN_LARGE = [849864188700, 976690098434, 76792551452, 641505912086]
GOLDEN_HASH = [10325816536137374975, 3328612897868070901]
GOLDEN_KEYS = [4064067321079681232, 8776345373173897594, 11649395489872931308]
GOLDEN_EPOCH = [0, 1, 2, 3, 4, 15, 16, 17, 18, 5, 6, 7, 14, 11, 12, 13, 8, 9, 10]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 36, 63, 64, 65, 1000])
def test_whole_permutations(n):
    """The table of a whole permutation, of many keys at once, is what its indices give one by one."""
    keys = hash64(5, np.arange(7))
    assert np.array_equal(permutations(n, keys), [permute(np.arange(n), n, key) for key in keys])


def test_long_arrays():
    """Arrays that are permuted in pieces, with a size and a key for each index."""
    index, n = np.arange(20_000).reshape(4, 5000), np.array([[5000], [8191], [20_000], [2**40]])
    key = hash64(1, np.arange(4))[:, None]
    image = permute(index % n, n, key)
    for row in range(4):
        assert np.array_equal(image[row], permute(index[row] % n[row], int(n[row, 0]), int(key[row, 0])))
    assert np.array_equal(unpermute(image, n, key), index % n)


def test_no_overflow_warning():
    with np.errstate(all="raise"):
        permute(5, 9, 2**64 - 1)
        hash64(2**64 - 1, 3)


@pytest.mark.parametrize("n", [3, 5, 6, 8, 17])
def test_even(n):
    """Over 20,000 keys, every ordered pair of places is taken equally often by two neighbours (chi-square)."""
    images = permute(np.array([0, 1]), n, hash64(n, np.arange(20_000))[:, None])
    seen = np.bincount(images[:, 0] * n + images[:, 1], minlength=n * n).reshape(n, n)
    assert np.trace(seen) == 0
    pairs = n * (n - 1)
    expected = len(images) / pairs
    chi = ((seen[~np.eye(n, dtype=bool)] - expected) ** 2 / expected).sum()
    assert chi < (pairs - 1) + 5 * (2 * (pairs - 1)) ** 0.5


@steady
@given(
    sizes=st.lists(st.integers(0, 30), max_size=9),
    last=st.integers(1, 30),
    block=st.sampled_from((1, 2, 3, 5, 8, 64)),
    group=st.integers(1, 6),
    key=keys,
)
def test_epoch_order(sizes, last, block, group, key):
    """Equal to the slow order, which covers each sample once; so is any subset of positions, in any order."""
    sizes = [*sizes, last]
    slow = slow_epoch(sizes, block, group, key)
    assert sorted(slow) == list(range(sum(sizes)))
    order = EpochOrder(np.array(sizes), block, group, key)
    assert order.samples(np.arange(sum(sizes))).tolist() == slow
    some = np.random.default_rng(0).integers(0, sum(sizes), 7)
    assert order.samples(some).tolist() == [slow[place] for place in some]


def test_blocks_are_consecutive():
    """A run of the order is broken at most once per block, and all samples of a block lie in one shard."""
    sizes, block = np.array([130, 64, 7, 200, 65]), 64
    ids = EpochOrder(sizes, block, 3, 5).samples(np.arange(sizes.sum()))
    edges = np.cumsum(sizes)
    shard = np.searchsorted(edges, ids, side="right")
    offset = ids - (edges - sizes)[shard]
    starts = np.flatnonzero((np.diff(ids, prepend=-2) != 1) | (offset % block == 0))
    assert (offset[starts] % block == 0).all()
    assert len(starts) == sum(-(-sizes // block))
    for low, high in zip(starts, [*starts[1:], len(ids)], strict=True):
        assert shard[low] == shard[high - 1] and high - low == min(block, sizes[shard[low]] - offset[low])
    assert not np.array_equal(ids, np.sort(ids))


def test_groups_are_local():
    """Positions of one group touch that group's shards only."""
    sizes = np.full(12, 50)
    ids = EpochOrder(sizes, 1, 4, 3).samples(np.arange(600)).reshape(3, 200)
    assert [len(set((part // 50).tolist())) for part in ids] == [4, 4, 4]


@steady
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    block=st.integers(1, 9),
    group=st.integers(1, 5),
    key=st.integers(0, 2**64 - 1),
)
def test_positions_invert_samples(sizes, block, group, key):
    order = EpochOrder(np.array(sizes), block, group, key)
    position = np.arange(sum(sizes))
    assert np.array_equal(order.positions(order.samples(position)), position)

"""The order of rows for whole arrays is what grain says of each index."""

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from poisonjax.data.shuffle import permuted, shuffled

SIZES = st.one_of(
    st.integers(1, 300),
    st.integers(300, 2**40),
    st.builds(lambda power, more: max(1, 2**power + more), st.integers(14, 40), st.integers(-2, 2)),
)


@given(SIZES, st.integers(0, 2**32 - 1), st.data())
def test_it_is_grains(size, seed, data):
    indices = np.array([0, size - 1, *data.draw(st.lists(st.integers(0, size - 1), max_size=20))])
    theirs = grain.MapDataset.range(size).shuffle(seed=seed)
    assert shuffled(indices, size, seed).tolist() == [theirs[int(index)] for index in indices]


@given(
    st.one_of(st.integers(1, 5000), st.sampled_from([2**16 - 1, 2**16, 2**16 + 1, 2**16 + 2, 2**17 + 1, 2**18 + 1])),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_each_stands_once(size, seed):
    size = permuted(size)
    assert sorted(shuffled(np.arange(size), size, seed).tolist()) == list(range(size))

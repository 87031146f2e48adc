"""Memory that goes round never serves two arrays at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.data.memory import Recycled

SHAPES = [(3, 4), (2, 5, 7), (12,)]


@given(st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(0, 6), st.booleans()), max_size=60))
def test_arrays_in_use_keep_what_was_written_and_blocks_are_no_more_than_were_in_use(turns):
    memory, held, most, blocks = Recycled(), [], 0, set()
    for number, (shape, dropped, by_view) in enumerate(turns):
        array = memory.empty(shape, "int16")
        assert array.shape == shape and array.dtype == np.int16 and array.flags.writeable
        blocks.add((array.ctypes.data, shape))
        array[...] = number
        held.append((number, array[1:] if by_view else array))  # a view alone keeps the block
        most = max(most, len(held))
        del array
        assert all((kept == value).all() for value, kept in held)
        if held:
            held.pop(dropped % len(held))
    assert len(blocks) <= most * len(SHAPES)


def test_a_block_is_used_again_once_its_last_view_is_gone():
    memory = Recycled()
    first = memory.empty((4, 8), "float32")
    place, view = first.ctypes.data, first[2:].T
    del first
    assert memory.empty((4, 8), "float32").ctypes.data != place
    del view
    assert memory.empty((8, 4), "int32").ctypes.data == place

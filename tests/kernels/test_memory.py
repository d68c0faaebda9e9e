"""Memory for weights: tensors lie apart, start at lines of the cache, keep the room alive."""

import gc

import pytest
import torch

from kernels.memory import HugePages, mapped


def test_tensors_lie_apart_and_begin_as_zeros():
    shapes = [(3, 5), (0, 4), (1,), (7, 11, 2), (64,)]
    dtypes = [torch.bfloat16, torch.float32, torch.uint8, torch.float16, torch.int64]
    room = HugePages(sum(HugePages.num_bytes(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))
    tensors = [room.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for tensor, shape, dtype in zip(tensors, shapes, dtypes, strict=True):
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype and not tensor.any()
        assert tensor.data_ptr() % 64 == 0
    with pytest.raises(ValueError, match="bytes asked of"):
        room.zeros((1,), torch.uint8)
    del room
    gc.collect()
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert all((tensor == number + 1).all() for number, tensor in enumerate(tensors))


def test_more_than_there_is_is_said_by_name():
    with pytest.raises(MemoryError, match="bytes for weights"):
        mapped(1 << 60, "weights")

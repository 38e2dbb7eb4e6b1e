"""Addresses of device memory, whoever allocated it."""

import dataclasses

import numpy as np
import pytest

from engines.machine.buffers import device_address
from engines.spec import EngineError, TensorSpec


class DeviceArray:
    def __init__(self, typestr="<f4", shape=(2, 4, 8, 8), strides=None, readonly=False):
        self.__cuda_array_interface__ = {"typestr": typestr, "shape": shape, "strides": strides,
                                         "data": (4096, readonly), "version": 3}


@dataclasses.dataclass
class DeviceBuffer:
    handle: int
    size: int


def test_addresses_of_device_memory():
    spec = TensorSpec("sample", "float32", (2, 4, 8, 8))
    assert [device_address(spec, b) for b in (4096, DeviceArray(), DeviceBuffer(4096, 2048))] == [4096] * 3
    for wrong in (DeviceArray("<f2"), DeviceArray(shape=(1, 4, 8, 8)), DeviceArray(strides=(4,)),
                  DeviceArray(readonly=True), DeviceBuffer(4096, 2047), np.zeros((2, 4, 8, 8), np.float32), None):
        with pytest.raises(EngineError, match=r"bind sample: got .*, expected"):
            device_address(spec, wrong)

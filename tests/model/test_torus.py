"""How a mesh is laid over a slice: every device once, and each axis with neighbours in as many
directions as it can have.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from apr_jax.model.sharding import over_torus


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]
    core_on_chip: int


def devices(*extent, cores=1):
    return [
        Device(place, core)
        for place in itertools.product(*map(range, extent))
        for core in range(cores)
    ]


def directions(group):
    """The axes of the torus on which a group's chips differ."""
    places = np.asarray([device.coords for device in group])
    return {int(axis) for axis in np.flatnonzero(np.ptp(places, axis=0))}


@pytest.mark.parametrize(
    ("extent", "cores", "shape"),
    [
        ((8, 8, 16), 1, (32, 8, 4)),
        ((4, 4, 4), 1, (8, 8, 1)),
        ((16, 16, 1), 1, (32, 8, 1)),
        ((8, 8, 1), 2, (16, 8, 1)),
        ((2, 2, 1), 1, (1, 2, 2)),
        ((4, 6, 1), 1, (2, 6, 2)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_every_device_stands_once(extent, cores, shape):
    slice_ = devices(*extent, cores=cores)
    shuffled = [slice_[k] for k in np.random.default_rng(0).permutation(len(slice_))]
    laid = over_torus(shape, shuffled)
    assert laid.shape == shape
    assert set(laid.flat) == set(slice_)
    # Whatever order they are listed in.
    np.testing.assert_array_equal(laid, over_torus(shape, slice_))


def test_a_part_of_a_slice_begins_anywhere():
    """One host of many, one of a chip's cores, or what is no box at all."""
    corner = [Device((x, y, 3), 1) for x in (2, 3) for y in (4, 5)]
    assert set(over_torus((1, 2, 2), corner).flat) == set(corner)
    bent = corner[:3]
    assert list(over_torus((3, 1, 1), bent).flat) == bent
    slices = [*corner, *corner]  # Two slices have the same coordinates.
    assert list(over_torus((2, 2, 2), slices).flat) == slices


def test_four_devices_of_the_last_axis_are_a_square():
    laid = over_torus((32, 8, 4), devices(8, 8, 16))
    for group in laid.reshape(-1, 4):
        assert sorted(np.ptp([device.coords for device in group], axis=0)) == [0, 1, 1]
    assert directions(laid[0, :, 0]) == {0, 1, 2}


def test_axis_of_eight_on_plane_goes_both_ways():
    laid = over_torus((32, 8, 1), devices(16, 16, 1))
    for group in laid[:, :, 0]:
        assert directions(group) == {0, 1}
        assert sorted(np.ptp([device.coords for device in group], axis=0)) == [0, 1, 3]


def test_the_cores_of_a_chip_come_first():
    laid = over_torus((16, 8, 1), devices(8, 8, 1, cores=2))
    for group in laid[:, :, 0]:
        assert len({device.coords for device in group}) == 4

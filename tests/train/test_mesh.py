"""The mesh that a config asks for, on the eight simulated devices of the tests."""

import pytest
from helpers.whole_runs import changed

from apr_jax.config import MeshConfig
from apr_jax.errors import UsageError
from apr_jax.train.session import build_mesh


@pytest.mark.parametrize(
    ("rows", "axes", "shape"),
    [
        ((4, 8), {}, {"data": 4, "fsdp": 1, "tensor": 1}),
        ((8, 16), {}, {"data": 8, "fsdp": 1, "tensor": 1}),
        ((8, 6), {}, {"data": 2, "fsdp": 1, "tensor": 1}),
        ((4, 8), {"fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 1}),
        ((3, 3), {"tensor": 2}, {"data": 3, "fsdp": 1, "tensor": 2}),
    ],
)
def test_one_process_takes_devices_that_divide_rows(config, capsys, rows, axes, shape):
    """On eight cores an experiment of four rows a step runs, on four of them, and says so."""
    mesh = build_mesh(
        changed(
            config,
            sft={"batch_rows": rows[0]},
            rl={"micro_batch_rows": rows[1]},
            mesh=MeshConfig(**axes),
        )
    )
    assert dict(mesh.shape) == shape
    said = capsys.readouterr().err
    assert (f"mesh: {mesh.size} of 8 devices are used: train.sft.batch_rows={rows[0]}" in said) == (
        mesh.size < 8
    )


def test_requested_number_of_devices_is_kept(config, capsys):
    few = {"sft": {"batch_rows": 4}, "rl": {"micro_batch_rows": 4}}
    # Training refuses, by name.
    assert build_mesh(changed(config, **few, mesh=MeshConfig(data=8))).size == 8
    assert dict(build_mesh(changed(config, **few, mesh=MeshConfig(tensor=0))).shape) == {
        "data": 4,
        "fsdp": 1,
        "tensor": 2,
    }
    with pytest.raises(UsageError, match="mesh data=1 x fsdp=16"):
        build_mesh(changed(config, **few, mesh=MeshConfig(data=1, fsdp=16)))
    assert not capsys.readouterr().err

"""What the tests of learning share."""

import jax
import pytest

from apr_jax.model.sharding import make_mesh


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(devices=jax.devices()[:1])

"""Options and fixtures of the whole suite."""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "cubn", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", parent=settings.get_profile("cubn"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "cubn")

BACKENDS = ["cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The backend under test: where the arrays of a test live."""
    return request.param

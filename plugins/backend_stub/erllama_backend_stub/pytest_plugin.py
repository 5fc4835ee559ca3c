"""For the tests of applications: an engine on the stub, as a pytest fixture.

Found by pytest through its entry point. It imports no more than pytest until the fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from erllama_core import Engine


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "erllama_stub(model_id='stub', **model_opts): the model that erllama_engine has loaded, "
        "for instance erllama_stub(script=['Hello!'])",
    )


@pytest.fixture
def erllama_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine with a RAM tier and one stub model, ``"stub"``, closed when the test has ended.

    ``@pytest.mark.erllama_stub(model_id="assistant", script=["Hello!"])`` names the model, and
    says how it behaves; load more with ``erllama_engine.load_model(..., backend="stub")``.
    """
    from erllama_core import Engine

    marker = request.node.get_closest_marker("erllama_stub")
    options = {} if marker is None else dict(marker.kwargs)
    model_id = options.pop("model_id", "stub")
    with Engine() as engine:
        engine.load_model(model_id, backend="stub", model_opts=options)
        yield engine

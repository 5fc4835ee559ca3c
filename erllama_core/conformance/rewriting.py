"""Has pytest rewrite the kit's assertions, so that they say what they compared.

Imported before the modules that it names.
"""

import pytest

pytest.register_assert_rewrite(
    *(
        f"erllama_core.conformance.{name}"
        for name in ("backend", "kit", "pressure", "stream", "tier")
    )
)

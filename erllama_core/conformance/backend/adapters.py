"""What a model promises whose adapters can be loaded: tests of the kit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from erllama_core.conformance.backend.driving import apart, feed
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.errors import AdapterLoadError
from erllama_core.interfaces.backend import Adapter, Adapts, ContextOptions


class AdapterPromises(BackendKit):
    """What a model promises whose adapters can be loaded."""

    def test_adapters_change_what_is_computed(
        self, subject: BackendSubject, options: ContextOptions, tmp_path: Path
    ) -> None:
        """An adapter changes logits, each scale in its way, and leaves no trace when it is gone.

        A file that is no adapter is refused; closing one twice, or after the model, is harmless.

        If this fails: requests are answered with other adapters than they were meant to, and
        their state is stored under adapters that it was not computed with.
        """
        model = subject.load(options)
        if not isinstance(model, Adapts):
            model.close()
            return
        assert subject.write_adapter is not None, "the models have adapters: say how to write one"
        path, wrong = tmp_path / "adapter", tmp_path / "wrong"
        subject.write_adapter(path)
        wrong.write_bytes(b"nothing of the kind")
        context = model.open_context()

        def logits(*adapters: tuple[Adapter, float]) -> list[float]:
            model.attach(context, adapters)
            row = feed(context, 0, subject.tokens[:40])
            context.drop(0)
            return row

        adapter, other = model.load_adapter(path), model.load_adapter(path)
        bare = logits()
        rows = [bare, logits((adapter, 1.0)), logits((adapter, 0.5))]
        rows.append(logits((adapter, 1.0), (other, 1.0)))
        for one, another in itertools.combinations(rows, 2):
            assert apart(one, another) > subject.rounding
        assert apart(logits((other, 0.5)), rows[2]) <= subject.rounding
        assert apart(logits(), bare) <= subject.rounding
        adapter.close()
        adapter.close()
        assert apart(logits(), bare) <= subject.rounding
        with pytest.raises(AdapterLoadError):
            model.load_adapter(wrong)
        context.close()
        model.close()
        other.close()

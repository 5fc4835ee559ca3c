"""What a loaded model is put together from."""

from __future__ import annotations

import functools
from collections.abc import Callable

import attrs

from erllama_core.cache.cache import Cache
from erllama_core.errors import NotSupported
from erllama_core.interfaces.backend import BackendModel, Context, Quantisation, Vocabulary
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers
from erllama_core.interfaces.stream import ProcessorRequest, RunningSignature
from erllama_core.interfaces.telemetry import RequestFinished
from erllama_core.model.footprint import Footprint
from erllama_core.model.options import RequestOptions
from erllama_core.model.worker import Worker
from erllama_core.prompt import Prompt
from erllama_core.stream.pipeline import Pipeline, Stage


@attrs.frozen(kw_only=True)
class ReplySetup:
    """What a model's replies pass on their way out."""

    stages: tuple[Stage, ...]
    thinking_markers: ThinkingMarkers | None
    tool_call_markers: ToolCallMarkers | None
    begin_signature: Callable[[], RunningSignature]

    def markers(self, options: RequestOptions) -> tuple[str, ...]:
        """The texts that mark parts of one request's reply."""
        names = {stage.provider.name for stage in self.stages}
        texts: list[str] = []
        if self.thinking_markers is not None and options.thinking and "thinking" in names:
            texts += self.thinking_markers.texts().values()
        if self.tool_call_markers is not None and "tool_calls" in names:
            texts += self.tool_call_markers.texts().values()
        return tuple(texts)

    def pipeline(
        self, model_id: str, vocabulary: Vocabulary, prompt: Prompt, options: RequestOptions
    ) -> Pipeline:
        """What one request's reply passes. Raises NotSupported, PluginFailed."""
        if options.stop_sequences and not any(
            stage.provider.name == "stop_sequences" for stage in self.stages
        ):
            raise NotSupported(
                f"model {model_id!r} does not look for stop sequences; its processors have no "
                "'stop_sequences'"
            )
        budget = options.thinking_budget_tokens
        return Pipeline(
            vocabulary,
            self.stages,
            functools.partial(
                ProcessorRequest,
                vocabulary=vocabulary,
                prompt=prompt,
                stop_sequences=options.stop_sequences,
                thinking=options.thinking,
                thinking_budget_tokens=None if budget is None or budget <= 0 else budget,
                thinking_markers=self.thinking_markers,
                tool_call_markers=self.tool_call_markers,
                begin_signature=self.begin_signature,
            ),
            may_swap=not options.is_constrained,
        )


@attrs.frozen(kw_only=True)
class ModelParts:
    """What :func:`~.loading.open_model` put together."""

    id: str
    backend_name: str
    backend: BackendModel
    worker: Worker
    context: Context
    """For its properties; only the worker calls it."""
    context_size: int
    fingerprint: bytes
    quantisation: Quantisation
    tiers: tuple[str, ...]
    chat_template: str | None
    reply: ReplySetup
    cache: Cache
    memory: Footprint | None
    """What is set aside for it; None without a budget."""
    tell_finished: Callable[[RequestFinished], None] | None
    """Told of every request that is over, on the worker's thread; None: nobody wants to know."""

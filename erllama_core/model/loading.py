"""From a model's configuration to a running worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from erllama_core.cache.anchors import Rendering
from erllama_core.cache.cache import Cache
from erllama_core.cache.gate import CostGate
from erllama_core.cache.keys import digest_fields
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace
from erllama_core.config import ModelConfig
from erllama_core.errors import ConfigError, ConfigProblem, ErllamaError, ModelLoadError
from erllama_core.interfaces.backend import (
    BackendModel,
    BackendRequest,
    Context,
    DeclaresCosts,
    Quantisation,
    Vocabulary,
)
from erllama_core.interfaces.telemetry import RequestFinished
from erllama_core.model.adapters import Adapters, LoadedAdapter, free_adapter, open_adapter
from erllama_core.model.fingerprint import (
    chunked_fingerprint,
    combined,
    file_fingerprint,
    file_identity,
    weights_files,
)
from erllama_core.model.footprint import Footprint
from erllama_core.model.parts import ModelParts, ReplySetup
from erllama_core.model.worker import Worker, WorkerOptions
from erllama_core.providers import BackendProvider, check_made

NO_FILE: Final = bytes(32)
"""Fingerprint of a model without a file; its backend's identity says what it is."""


def open_model(
    model_id: str,
    config: ModelConfig,
    provider: BackendProvider,
    options: Any,
    *,
    cache: Cache,
    tiers: Sequence[str],
    policy: SavePolicy,
    reply: ReplySetup,
    memory: Footprint | None = None,
    tell_finished: Callable[[RequestFinished], None] | None = None,
) -> ModelParts:
    """Load the weights, open the context on a worker of its own, and join it to the cache.

    Blocks until the model can take requests. ``memory`` is what was set aside for it, and is the
    worker's to release once it serves. Raises ModelLoadError, ConfigError; nothing is
    left behind then.
    """
    path = None if config.model_path is None else _model_file(config.model_path)
    before = _file_state(path)
    fingerprint = _fingerprint(config, path)
    backend = _call_factory(
        provider, BackendRequest(model_path=path, options=options, context=config.context_opts)
    )
    try:
        if _file_state(path) != before:
            raise ModelLoadError(f"the model file {path} was changed while it was loaded")
        quantisation = _quantisation(config, backend)
        rendering = _rendering(backend.vocabulary)
        adapters = _adapters(config, backend, memory)
    except BaseException:
        backend.close()
        raise

    def open_space(context: Context) -> ModelSpace:
        longest = policy.boundary_align_tokens
        if context.max_block_tokens is not None:
            longest = min(longest, context.max_block_tokens)
        namespace = digest_fields(
            "model",
            {
                **{f"backend.{name}": value for name, value in backend.identity().items()},
                "fingerprint": fingerprint,
                "fingerprint_mode": config.fingerprint_mode,
                "quant_type": quantisation.type,
                "quant_bits": quantisation.bits,
                "ctx_params_hash": config.ctx_params_hash,
                "kv_class": context.kv_class.value,
                "align_tokens": longest,
            },
        )
        return ModelSpace(
            cache,
            namespace=namespace,
            kv_class=context.kv_class,
            tiers=tiers,
            align_tokens=longest,
            rendering=rendering,
            gate=_gate(context, policy, cache),
            write=policy.write,
            promote=policy.promote,
        )

    chosen = config.context_opts
    worker = Worker(
        model_id,
        backend,
        open_space,
        WorkerOptions(
            policy=policy,
            decode_budget_ms=chosen.decode_budget_ms,
            resident_cells_max=chosen.resident_cells_max,
        ),
        adapters,
        memory,
    )
    try:
        context = _start(worker, provider)
        context_size = _context_size(config, context)
    except BaseException:
        worker.close()
        raise
    return ModelParts(
        id=model_id,
        backend_name=config.backend,
        backend=backend,
        worker=worker,
        context=context,
        context_size=context_size,
        fingerprint=fingerprint,
        quantisation=quantisation,
        tiers=tuple(tiers),
        chat_template=config.chat_template or backend.chat_template,
        reply=reply,
        cache=cache,
        memory=memory,
        tell_finished=tell_finished,
    )


def _gate(context: Context, policy: SavePolicy, cache: Cache) -> CostGate | None:
    if policy.cost_gate == "off" or not isinstance(context, DeclaresCosts):
        return None
    prior = context.cost_prior
    return None if prior is None else CostGate(prior, cache.loader_threads)


def _model_file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelLoadError(f"the model file {path} {what}; give model_path a GGUF file")
    return path


def _call_factory(provider: BackendProvider, request: BackendRequest) -> BackendModel:
    try:
        return check_made(provider.factory(request), BackendModel)
    except ErllamaError:
        raise
    except Exception as error:
        raise ModelLoadError(f"the backend {provider.name!r} failed", reason=repr(error)) from error


def _start(worker: Worker, provider: BackendProvider) -> Context:
    try:
        return worker.start()
    except ErllamaError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"the backend {provider.name!r} could not open a context", reason=repr(error)
        ) from error


def _file_state(path: Path | None) -> list[str]:
    """What changes when one of a model's files is replaced or written to."""
    if path is None:
        return []
    try:
        return [file_identity(file.stat()) for file in weights_files(path)]
    except OSError as error:
        raise ModelLoadError(f"cannot read the model file {path}", reason=str(error)) from error


def _fingerprint(config: ModelConfig, path: Path | None) -> bytes:
    given = None if config.fingerprint is None else bytes.fromhex(config.fingerprint)
    if config.fingerprint_mode == "fast_unsafe" and given is not None:
        return given
    if path is None:
        return given or NO_FILE
    if config.fingerprint_mode == "gguf_chunked":
        what, of_file = "gguf_chunked fingerprint", chunked_fingerprint
    else:
        what, of_file = "SHA-256", file_fingerprint
    computed = combined([of_file(file) for file in weights_files(path)])
    if given is not None and given != computed:
        raise _problem(
            "fingerprint", f"the {what} of {path} is {computed.hex()}, not {given.hex()}"
        )
    return computed


def _quantisation(config: ModelConfig, backend: BackendModel) -> Quantisation:
    found = backend.quantisation
    if config.quant_type is not None and config.quant_type.lower() != found.type:
        raise _problem("quant_type", f"the weights are {found.type}, not {config.quant_type}")
    if config.quant_bits is not None and config.quant_bits != found.bits:
        raise _problem("quant_bits", f"the weights have {found.bits} bits, not {config.quant_bits}")
    return found


def _adapters(config: ModelConfig, backend: BackendModel, memory: Footprint | None) -> Adapters:
    """The adapters that are loaded with the model; its worker frees them."""
    opened: list[LoadedAdapter] = []
    try:
        for one in config.adapters:
            opened.append(  # noqa: PERF401 - those before one that fails are freed
                open_adapter(
                    backend,
                    config.backend,
                    one.path,
                    name=one.name,
                    scale=one.scale,
                    memory=memory,
                )
            )
    except BaseException:
        for adapter in opened:
            free_adapter(adapter)
        raise
    return tuple(opened)


def _rendering(vocabulary: Vocabulary) -> Rendering:
    pieces = map(vocabulary.piece, range(vocabulary.n_tokens))
    return Rendering.of(pieces, vocabulary.control_tokens)


def _context_size(config: ModelConfig, context: Context) -> int:
    if config.context_size is None:
        return context.n_ctx
    if config.context_size > context.n_ctx:
        raise _problem(
            "context_size",
            f"{config.context_size} is more than the context's {context.n_ctx} tokens; "
            f"raise context_opts.n_ctx",
        )
    return config.context_size


def _problem(field: str, message: str) -> ConfigError:
    return ConfigError([ConfigProblem(field, message)])

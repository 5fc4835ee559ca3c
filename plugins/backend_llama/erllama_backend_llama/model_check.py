"""What can be said of a model's metadata and tensors before llama.cpp sees them.

llama.cpp checks most of what a file says, and refuses what does not fit. What is refused here
ends the process instead: an assertion that fails while the model is loaded, its context opened, or
in its first step; a division by zero; a loop that takes for ever. The rules were found by trying
files of five architectures with one value changed at a time (the fuzz test of this plugin), in
the build that the plugin is bound to; each names the place in llama.cpp's sources.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from erllama_backend_llama.gguf_check import check_gguf
from erllama_backend_llama.gguf_file import GgufFile, NotGguf, Tensor, Value
from erllama_core.errors import ModelLoadError

_PART: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
"""How llama.cpp names the files of a model that is split (its gguf-split tool)."""

_MOST_LAYERS: Final = 512
"""``LLAMA_MAX_LAYERS`` of llama-hparams.h."""
_MOST_EXPERTS: Final = 1024
"""``LLAMA_MAX_EXPERTS`` of llama-hparams.h."""
_SCALINGS: Final = frozenset({"none", "linear", "yarn", "longrope"})
"""``LLAMA_ROPE_SCALING_TYPES`` of llama-model.cpp."""
_MOST_WINDOW: Final = 1 << 24
"""Tokens; far more than any context. Near 2^31 the cells that are made for it overflow."""
_ALWAYS_ROTATE: Final = frozenset({"gemma3", "lfm2", "lfm2moe"})
"""Architectures that were seen to rotate whatever the file says; others may do without."""
_ALIGNMENT: Final = 32
"""``TENSOR_ALIGNMENT`` of ggml-impl.h."""
_TOKENS: Final = "tokenizer.ggml.tokens"


def check_model(path: Path) -> dict[str, Tensor]:
    """Raise ModelLoadError for a file that would end the process; the model's tensors."""
    tensors: dict[str, Tensor] = {}
    parts = _parts(path)
    for part in parts:
        check_gguf(part)
        try:
            with GgufFile(part) as file:
                if part == parts[0]:
                    _check_metadata(path, file)
                found = file.tensors()
                if found and file.data_offset % _ALIGNMENT:
                    # ggml-backend.cpp: GGML_ASSERT((uintptr_t)ptr % TENSOR_ALIGNMENT == 0)
                    raise ModelLoadError(
                        f"{part}: its tensors begin at byte {file.data_offset}, which is no "
                        f"multiple of {_ALIGNMENT} (general.alignment); llama.cpp would end the "
                        f"process on it"
                    )
                tensors.update(found)
        except NotGguf as error:
            raise ModelLoadError(
                f"{part}: llama.cpp could not read the file", reason=str(error)
            ) from error
    return tensors


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match["stem"], int(match["count"])
    names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    return [path.with_name(name) for name in names]


def _check_metadata(path: Path, file: GgufFile) -> None:
    metadata = file.metadata()
    architecture = metadata.get("general.architecture")
    if architecture is None or not isinstance(architecture.content, str):
        return  # llama.cpp says so
    said = _Said(architecture.content, metadata)
    for rule in _RULES:
        for what in rule(said):
            raise ModelLoadError(
                f"{path}: {what}; llama.cpp would end the process on it. The file is damaged, or "
                f"was converted wrongly"
            )
    texts = file.texts(_TOKENS)
    # llama.cpp sees a text as far as its first NUL, and gives empty ones a name of their own.
    seen = {text.partition(b"\0")[0] for text in texts}
    empty = sum(not text or text[0] == 0 for text in texts)
    if len(seen) - (empty > 0) + empty < len(texts):
        raise ModelLoadError(
            f"{path}: {_TOKENS} has the same text twice; llama.cpp would end the process on it"
        )


@attrs.frozen
class _Said:
    """What a file says of its model."""

    architecture: str
    metadata: Mapping[str, Value]

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def value(self, key: str) -> Value | None:
        """The value of a key of the architecture."""
        return self.metadata.get(self.name(key))

    def number(self, key: str) -> int | None:
        """That of an integer; None where there is none, or a value of another kind."""
        value = self.value(key)
        content = None if value is None else value.content
        return content if isinstance(content, int) and not isinstance(content, bool) else None

    @property
    def head_dim(self) -> int | None:
        """Width of an attention head, where it is the same for all layers."""
        given = self.number("attention.key_length")
        heads, width = self.number("attention.head_count"), self.number("embedding_length")
        if given is not None:
            return given
        return width // heads if heads and width else None


def _layers(said: _Said) -> Iterator[str]:
    # llama-model.cpp: GGML_ASSERT(hparams.n_layer_all > 0 && <= LLAMA_MAX_LAYERS)
    layers = said.number("block_count")
    if layers is not None and not 1 <= layers <= _MOST_LAYERS:
        yield f"{said.name('block_count')} is {layers}; it must be 1 to {_MOST_LAYERS}"


def _more_layers(said: _Said) -> Iterator[str]:
    # llama-model.cpp: GGML_ASSERT(hparams.n_layer_nextn <= hparams.n_layer_all)
    layers, more = said.number("block_count"), said.number("nextn_predict_layers")
    if layers is not None and more is not None and more > layers:
        yield f"{said.name('nextn_predict_layers')} is {more}; block_count is {layers}"


def _experts(said: _Said) -> Iterator[str]:
    # llama-model.cpp: eight GGML_ASSERTs on n_expert, n_expert_used_max, n_expert_groups and
    # n_group_used
    experts = said.number("expert_count") or 0
    used_value = said.value("expert_used_count")
    used = 0 if used_value is None else used_value.content
    if isinstance(used, tuple):
        used = max(used, default=0)
    if not isinstance(used, int):
        return  # of a type that llama.cpp refuses
    if experts <= 1 and said.architecture in {"hunyuan_vl", "hunyuan-dense"}:
        return
    groups = said.number("expert_group_count") or 0
    used_groups = said.number("expert_group_used_count")
    name = said.name("expert_count")
    if not 0 <= experts <= _MOST_EXPERTS:
        yield f"{name} is {experts}; {_MOST_EXPERTS} is the most"
    if not (0 < used <= experts if experts else used == 0):
        yield f"{said.name('expert_used_count')} is {used}; {name} is {experts}"
    if not (0 <= groups < experts if experts else groups == 0):
        yield f"{said.name('expert_group_count')} is {groups}; {name} is {experts}"
    if groups > 1 and (experts % groups or not 0 < (used_groups or 0) < groups):
        yield (
            f"{said.name('expert_group_count')} is {groups}, of which {used_groups} are used; it "
            f"must be more, and divide {name}, {experts}"
        )


def _scaling(said: _Said) -> Iterator[str]:
    # llama-model.cpp: GGML_ASSERT(rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED)
    value = said.value("rope.scaling.type")
    if value is not None and value.type == "string" and value.content not in _SCALINGS:
        known = ", ".join(sorted(_SCALINGS))
        yield f"{said.name('rope.scaling.type')} is {value.content!r}; known are {known}"


def _epsilons(said: _Said) -> Iterator[str]:
    # ggml-cpu/ops.cpp: GGML_ASSERT(eps >= 0.0f)
    for key, value in said.metadata.items():
        is_number = key.endswith("_epsilon") and value.type in {"f32", "f64"}
        if is_number and not (math.isfinite(value.content) and value.content >= 0):
            yield f"{key} is {value.content}; it must be a number of at least 0"


def _window(said: _Said) -> Iterator[str]:
    # llama-model.cpp: GGML_ASSERT(hparams.is_swa_any()) where there is a window
    window, pattern = said.number("attention.sliding_window"), "attention.sliding_window_pattern"
    if window is None or window <= 0:
        return
    if window > _MOST_WINDOW:
        yield f"{said.name('attention.sliding_window')} is {window}; {_MOST_WINDOW} is the most"
    value = said.value(pattern)
    layers = said.number("block_count")
    if value is None:
        return
    whole = value.content == 1 and value.type != "bool"
    if value.type == "array":
        whole = value.content is not None and not any(value.content[:layers])
    if whole:
        yield f"{said.name(pattern)} leaves no layer with the sliding window of {window} tokens"


def _rotations(said: _Said) -> Iterator[str]:
    # ggml-cpu/ops.cpp: GGML_ASSERT(n_dims <= ne0), n_dims % 2 == 0; it loops for ever with 0
    sections = said.value("rope.dimension_sections")
    for key, width in (
        ("rope.dimension_count", said.head_dim),
        ("rope.dimension_count_swa", said.number("attention.key_length_swa") or said.head_dim),
    ):
        dims, name = said.number(key), said.name(key)
        if dims is None:
            continue
        if dims % 2:
            yield f"{name} is {dims}, an odd number"
        if width is not None and dims > width:
            yield f"{name} is {dims}, more than the {width} of an attention head"
        if dims == 0 and (sections is not None or said.architecture in _ALWAYS_ROTATE):
            yield f"{name} is 0"


def _sections(said: _Said) -> Iterator[str]:
    # ggml-cpu/ops.cpp: GGML_ASSERT(sect_dims <= ne0),
    # sections[0] > 0 || sections[1] > 0 || sections[2] > 0
    sections, width = said.value("rope.dimension_sections"), said.head_dim
    if sections is None or not isinstance(sections.content, tuple):
        return
    numbers, name = sections.content, said.name("rope.dimension_sections")
    if not any(number > 0 for number in numbers[:3]) or min(numbers, default=0) < 0:
        yield f"{name} is {list(numbers)}: one of the first three must be above 0, and none below"
    if width is not None and sum(numbers) > width:
        yield f"{name} is {list(numbers)}, more than the {width} of an attention head together"


def _intervals(said: _Said) -> Iterator[str]:
    # src/models/qwen35.cpp and others: (i + 1) % full_attn_interval
    if said.number("full_attention_interval") == 0:
        yield f"{said.name('full_attention_interval')} is 0"


def _delta_net(said: _Said) -> Iterator[str]:
    # src/models/qwen35.cpp: tensors by state_size * time_step_rank, the graph by inner_size
    if said.architecture not in {"qwen35", "qwen35moe", "qwen3next"}:
        return
    inner = said.number("ssm.inner_size")
    state, heads = said.number("ssm.state_size"), said.number("ssm.time_step_rank")
    if inner is not None and state is not None and heads is not None and inner != state * heads:
        yield (
            f"{said.name('ssm.inner_size')} is {inner}; it must be state_size times "
            f"time_step_rank, {state * heads}"
        )


def _short_convolution(said: _Said) -> Iterator[str]:
    # src/models/lfm2.cpp: attention matrices by embedding_length, the graph by heads
    if said.architecture not in {"lfm2", "lfm2moe"}:
        return
    heads, width = said.number("attention.head_count"), said.number("embedding_length")
    head_dim = said.head_dim
    if heads is None or width is None or head_dim is None:
        return
    if heads * head_dim != width:
        yield (
            f"{said.name('attention.head_count')} is {heads}; with heads of {head_dim} they "
            f"make {heads * head_dim}, not the embedding_length of {width}"
        )


_RULES: Final[tuple[Callable[[_Said], Iterator[str]], ...]] = (
    _layers,
    _more_layers,
    _experts,
    _scaling,
    _epsilons,
    _window,
    _rotations,
    _sections,
    _intervals,
    _delta_net,
    _short_convolution,
)

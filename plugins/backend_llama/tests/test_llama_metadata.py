"""Metadata that would end the process is refused; what works, works."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erllama_backend_llama.gguf_file import GgufFile
from erllama_backend_llama.model_check import check_model
from erllama_core.errors import ModelLoadError
from gguf_edit import Entry, Gguf
from llama_user import Users
from tiny_gguf import ARCHS

Tiny = Callable[..., Path]

NAN = float("nan")
TOKENS = "tokenizer.ggml.tokens"
DEADLY: list[tuple[str, str, Entry]] = [
    ("llama", "llama.block_count", Entry("u32", 0)),
    ("llama", "llama.block_count", Entry("u32", 513)),
    ("llama", "llama.block_count", Entry("u32", 2**32 - 1)),
    ("llama", "llama.nextn_predict_layers", Entry("u32", 5)),
    ("llama", "llama.expert_count", Entry("u32", 2)),
    ("llama", "llama.expert_count", Entry("u32", 2000)),
    ("llama", "llama.expert_used_count", Entry("u32", 1)),
    ("llama", "llama.expert_used_count", Entry("array u32", [0, 1, 0, 0])),
    ("llama", "llama.expert_group_count", Entry("u32", 1)),
    ("llama", "llama.rope.scaling.type", Entry("string", "x")),
    ("llama", "llama.attention.layer_norm_rms_epsilon", Entry("f32", NAN)),
    ("mamba", "mamba.attention.layer_norm_rms_epsilon", Entry("f32", -1e-5)),
    ("llama", TOKENS, Entry("array string", ["x"] * 288)),
    ("gemma3", "gemma3.attention.sliding_window", Entry("u32", 2**31 - 1)),
    ("gemma3", "gemma3.attention.sliding_window_pattern", Entry("array bool", [False] * 4)),
    ("gemma3", "gemma3.attention.sliding_window_pattern", Entry("array bool", [])),
    ("gemma3", "gemma3.attention.sliding_window_pattern", Entry("u32", 1)),
    ("gemma3", "gemma3.rope.dimension_count", Entry("u32", 0)),
    ("gemma3", "gemma3.rope.dimension_count_swa", Entry("u32", 0)),
    ("gemma3", "gemma3.rope.dimension_count_swa", Entry("u32", 3)),
    ("gemma3", "gemma3.rope.dimension_count_swa", Entry("u32", 1000)),
    ("lfm2", "lfm2.rope.dimension_count", Entry("u32", 0)),
    ("lfm2", "lfm2.attention.head_count", Entry("u32", 1)),
    ("lfm2", "lfm2.attention.head_count", Entry("u32", 3)),
    ("qwen35", "qwen35.rope.dimension_count", Entry("u32", 0)),
    ("qwen35", "qwen35.rope.dimension_count", Entry("u32", 31)),
    ("qwen35", "qwen35.rope.dimension_count", Entry("u32", 100)),
    ("qwen35", "qwen35.rope.dimension_sections", Entry("array i32", [0, 0, 0, 0])),
    ("qwen35", "qwen35.rope.dimension_sections", Entry("array i32", [100, 5, 5, 0])),
    ("qwen35", "qwen35.ssm.inner_size", Entry("u32", 64)),
    ("qwen35", "qwen35.full_attention_interval", Entry("u32", 0)),
]
"""What killed the process, or never came back, when llama.cpp saw it."""


@pytest.fixture(scope="module")
def users() -> Iterator[Users]:
    with Users() as made:
        yield made


@pytest.mark.parametrize(("arch", "key", "entry"), DEADLY)
def test_what_ends_the_process_is_refused(
    tiny: Tiny, tmp_path: Path, arch: str, key: str, entry: Entry
) -> None:
    """The error names the file and the key, and llama.cpp never sees the file."""
    path = Gguf.read(tiny(arch)).write(tmp_path / "model.gguf", {key: entry})
    with pytest.raises(ModelLoadError, match="would end the process") as error:
        check_model(path)
    assert key.rpartition("_")[0] in str(error.value)
    assert str(path) in str(error.value)


def test_tensors_that_begin_out_of_step(tiny: Tiny, tmp_path: Path, users: Users) -> None:
    """A file that asks for a small alignment is used where its data lies well, else refused."""
    base = Gguf.read(tiny("llama"))
    ends = set()
    for length in range(0, 32, 2):
        changes = {
            "general.alignment": Entry("u32", 2),
            "general.name": Entry("string", "x" * length),
        }
        path = base.write(tmp_path / "model.gguf", changes, alignment=2)
        try:
            check_model(path)
        except ModelLoadError as error:
            assert "general.alignment" in str(error)  # noqa: PT017 - both ends are right
            ends.add("refused")
        else:
            ends.add(users.fate(path))
    assert ends == {"used", "refused"}


@pytest.mark.parametrize("arch", ARCHS)
def test_what_works_is_not_refused(tiny: Tiny, tmp_path: Path, users: Users, arch: str) -> None:
    """Files as they are made, and unusual values that make sense, are loaded and compute."""
    changes: dict[str, Entry | None] = {
        f"{arch}.context_length": Entry("u32", 1),
        "tokenizer.chat_template": None,
        "general.name": None,
    }
    if arch != "mamba":
        changes[f"{arch}.attention.layer_norm_rms_epsilon"] = Entry("f32", 0.0)
    if arch == "gemma3":
        changes["gemma3.attention.sliding_window_pattern"] = Entry("u32", 2)
        changes["gemma3.attention.sliding_window"] = Entry("u32", 1 << 20)
    path = Gguf.read(tiny(arch)).write(tmp_path / "model.gguf", changes)
    assert check_model(path)
    assert users.fate(path) == "used"


def test_empty_tokens_are_no_duplicates(tiny: Tiny, tmp_path: Path, users: Users) -> None:
    """llama.cpp names empty tokens itself, so that any number of them is harmless; what follows
    a NUL in a token it does not see.
    """
    base = Gguf.read(tiny("llama"))
    texts = list(base.metadata[TOKENS].value)

    def with_tokens(count: int, text: str) -> Path:
        changed = [*texts[: len(texts) - count], *[text] * count]
        entry = Entry("array string", changed)
        return base.write(tmp_path / "model.gguf", {TOKENS: entry})

    for text in ("", "\0", "\0x"):
        assert users.fate(with_tokens(3, text)) == "used"
    assert users.fate(with_tokens(1, "unseen\0x")) == "used"
    for text in ("same", "same\0x"):
        with pytest.raises(ModelLoadError, match="twice"):
            check_model(with_tokens(2, text))


def test_the_metadata_that_is_checked_is_what_is_there(tiny: Tiny, tmp_path: Path) -> None:
    """Values of every type are read as they were written."""
    entries = {
        "x.u8": Entry("u8", 200),
        "x.i8": Entry("i8", -7),
        "x.u16": Entry("u16", 60000),
        "x.i16": Entry("i16", -300),
        "x.u32": Entry("u32", 4_000_000_000),
        "x.i32": Entry("i32", -5),
        "x.f32": Entry("f32", 0.5),
        "x.bool": Entry("bool", True),
        "x.u64": Entry("u64", 2**63 + 1),
        "x.i64": Entry("i64", -(2**40)),
        "x.f64": Entry("f64", 1e300),
        "x.string": Entry("string", "a text"),
        "x.none": Entry("array u32", []),
        "x.some": Entry("array i32", [1, -2, 3]),
        "x.flags": Entry("array bool", [True, False]),
        "x.texts": Entry("array string", ["a", "bc"]),
        "x.many": Entry("array f32", [0.0] * 5000),
    }
    base = Gguf.read(tiny("llama"))
    path = base.write(tmp_path / "model.gguf", entries)
    with GgufFile(path) as file:
        found = file.metadata()
        assert file.texts("x.texts") == [b"a", b"bc"]
        assert file.texts("x.some") == file.texts("absent") == []
        assert len(file.texts(TOKENS)) == 288
        tensors = file.tensors()
    for key, entry in entries.items():
        if entry.kind == "array string" or key == "x.many":
            assert (found[key].type, found[key].length) == ("array", len(entry.value))
        elif entry.kind.startswith("array"):
            assert found[key].content == tuple(entry.value)
        else:
            assert (found[key].type, found[key].content) == (entry.kind, entry.value)
    assert len(tensors) == base.n_tensors
    assert tensors["blk.0.attn_k.weight"].shape == (64, 128, 1, 1)


# ------------------------------------------------------------------------- fuzz


def changed(base: Gguf, choice: random.Random) -> dict[str, Entry | None]:
    """One to three entries with other values, mostly of the same type."""
    changes: dict[str, Entry | None] = {}
    for key in choice.sample(sorted(base.metadata), choice.randint(1, 3)):
        changes[key] = choice.choice(list(_variants(base.metadata[key], choice)))
    return changes


def _variants(entry: Entry, choice: random.Random) -> Iterator[Entry | None]:
    kind, value = entry.kind, entry.value
    if kind == "u32":
        for number in (0, 1, 2, 3, 7, 63, 255, 512, 65535, 2**31 - 1, 2**31, 2**32 - 1):
            yield Entry(kind, number)
        for number in (value + 1, max(0, value - 1), value * 2, value // 2):
            yield Entry(kind, min(number, 2**32 - 1))
        yield Entry("array u32", [value] * choice.randrange(6))
    elif kind == "f32":
        for real in (0.0, -1.0, NAN, float("inf"), -float("inf"), 1e-45, 1e30, value * 2):
            yield Entry(kind, real)
    elif kind == "bool":
        yield Entry(kind, not value)
    elif kind == "string":
        yield from (Entry(kind, text) for text in ("", "x", "llama", "gpt2", "none"))
    elif value:
        yield Entry(kind, value[:-1])
        yield Entry(kind, [*value, value[0]])
        yield Entry(kind, choice.sample(value, len(value)))
        if kind in {"array i32", "array u32"}:
            place = choice.randrange(len(value))
            number = choice.choice((0, 1, 3, 100, 2**31 - 1))
            yield Entry(kind, [*value[:place], number, *value[place + 1 :]])
    yield Entry("string", "x")
    yield None


def survives(users: Users, model: Path, folder: Path, seeds: range) -> None:
    base = Gguf.read(model)
    for seed in seeds:
        changes = changed(base, random.Random(seed))
        end = users.fate(base.write(folder / "model.gguf", changes))
        assert end in {"used", "refused"}, f"seed {seed}: {end}: {changes}"


@pytest.mark.parametrize("arch", ARCHS)
def test_random_metadata(tiny: Tiny, tmp_path: Path, users: Users, arch: str) -> None:
    """Whatever a file says of itself, the process goes on."""
    survives(users, tiny(arch), tmp_path, range(12))


@pytest.mark.fuzz
@pytest.mark.parametrize("arch", ARCHS)
def test_much_random_metadata(tiny: Tiny, tmp_path: Path, users: Users, arch: str) -> None:
    """Whatever a file says of itself, the process goes on."""
    survives(users, tiny(arch), tmp_path, range(1000, 1600))


def test_a_killed_process_is_noticed(tiny: Tiny, tmp_path: Path, users: Users) -> None:
    """Without the check, such a file does end the process: the tests of it can fail."""
    arch, key, entry = DEADLY[0]
    path = Gguf.read(tiny(arch)).write(tmp_path / "model.gguf", {key: entry})
    assert users.fate(path) == "refused"
    with Users(unchecked=True) as others:
        assert others.fate(path) == "killed by signal 6"

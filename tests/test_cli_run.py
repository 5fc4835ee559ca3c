"""``erllama run``: as a program with pipes, and in a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner

from erllama_core.cli.app import app
from terminal import Terminal

STUB = """
[models.fake]
backend = "stub"
model_opts = { script = ["Hello there!", "Fine, thanks.", "<think>hm</think>Bye."] }
thinking_markers = { start = "<think>", end = "</think>" }
policy = { min_tokens = 8, cold_min_tokens = 8, boundary_align_tokens = 32 }

[models.other]
backend = "stub"
"""
SLOW = """
[models.slow]
backend = "stub"
context_opts = { n_ctx = 100000 }
model_opts = { decode_us = 2000.0 }
"""
COMMAND = [sys.executable, "-m", "erllama_core", "run"]


def environment() -> dict[str, str]:
    """The process's own, without what would override the configuration."""
    return {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("ERLLAMA_") and "__" in name)
    }


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "erllama.toml"
    path.write_text(STUB)
    return path


def run(
    config: Path, lines: Sequence[str] | bytes, *options: str, **environ: str
) -> subprocess.CompletedProcess[bytes]:
    data = lines if isinstance(lines, bytes) else "".join(f"{one}\n" for one in lines).encode()
    return subprocess.run(
        [*COMMAND, "-c", str(config), *options],
        input=data,
        capture_output=True,
        env={**environment(), **environ},
        timeout=60,
        check=False,
    )


def talk(config: Path, lines: Sequence[str], *options: str) -> subprocess.CompletedProcess[bytes]:
    """What :func:`run` does, in this process: for what one of its own adds nothing to."""
    text = "".join(f"{one}\n" for one in lines)
    try:
        done = CliRunner().invoke(app, ["run", "-c", str(config), *options], input=text)
    finally:
        structlog.reset_defaults()
    return subprocess.CompletedProcess([], done.exit_code, done.stdout_bytes, done.stderr_bytes)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.__exit__()


def open_terminal(terminals: list[Terminal], config: Path, *options: str) -> Terminal:
    terminal = Terminal([*COMMAND, "-c", str(config), *options], environment())
    terminals.append(terminal)
    return terminal


# ------------------------------------------------------------------------- pipes


def test_each_line_is_a_prompt(config: Path) -> None:
    """Replies come one after another, of one conversation, and nothing else is on either output."""
    done = run(config, ["hi", "", "how are you?", "and now?"])
    assert done.stdout.decode().splitlines() == ["Hello there!", "Fine, thanks.", "Bye."]
    assert (done.stderr, done.returncode) == (b"", 0)


def test_a_last_line_without_its_end(config: Path) -> None:
    """The last line counts, whether or not a newline ends it."""
    assert run(config, b"hi").stdout == b"Hello there!\n"


def test_no_input(config: Path) -> None:
    """An empty input is no mistake."""
    done = run(config, [])
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


def test_the_session_is_reused(config: Path) -> None:
    """A turn goes on in the cells of the one before, and /stats and /why tell."""
    done = talk(config, ["hi", "/why", "how are you?", "/why", "/stats"])
    out = done.stdout.decode()
    cold, warm = out.split("Fine, thanks.\n")
    assert "cold, 0 tokens reused" in cold
    assert "sticky, " in warm
    assert "last reply: " in warm
    assert "  sticky: " in warm
    assert "ended by stop" in warm
    assert "tier ram: " in warm
    assert "model fake: " in warm
    assert "model other: " in warm
    assert "pressure: not watched" in warm


def test_reset_begins_anew(config: Path) -> None:
    """After /reset the model hears the first turn again."""
    done = talk(config, ["hi", "/reset", "hi", "/why"])
    assert done.stdout.decode().splitlines()[:3] == [
        "Hello there!",
        "the conversation begins anew",
        "Hello there!",
    ]


def test_the_system_prompt(config: Path) -> None:
    """--system and /system put a turn before all others, /system alone takes it away."""
    done = talk(config, ["/why x", "/system", "/why x"], "--system", "Be brief.")
    with_it, without = done.stdout.decode().split("there is no system prompt\n")
    assert "system\\nB" in with_it
    assert "user\\nx" in without
    done = talk(config, ["/system Be brief.", "/why x"])
    assert "system\\nB" in done.stdout.decode()


def test_models(config: Path) -> None:
    """/models lists those of the file, /model goes on with another, --model begins with one."""
    done = talk(config, ["/models", "/model other", "/models", "/model"], "--model", "fake")
    before, after = done.stdout.decode().split("model other\n", 1)
    assert [line[:7] for line in before.splitlines()] == ["* fake:", "  other"]
    assert [line[:7] for line in after.splitlines()[:2]] == ["  fake:", "* other"]
    done = talk(config, ["/model"], "--model", "other")
    assert done.stdout == b"model other\n"


def test_options(config: Path) -> None:
    """--set and /set choose request options for what follows."""
    lines = ["/model other", "hi", "/set response_tokens=3", "hi", "/set temperature none", "/set"]
    done = talk(config, lines, "--set", "response_tokens=5", "--set", "temperature=1.5")
    out = done.stdout.decode().splitlines()
    assert (len(out[1]), len(out[3])) == (5, 3)
    assert "temperature = none" in out
    assert "top_k = 40" in out
    assert "stop_sequences = []" in out
    assert "response_tokens = 3" in out


def test_a_prompt_that_begins_with_a_slash(config: Path) -> None:
    """Two slashes are one, of a prompt."""
    done = talk(config, ["//help", "/why"])
    assert done.stdout.decode().startswith("Hello there!\n")


def test_help_tells_every_command(config: Path) -> None:
    """/help has a line for each."""
    out = talk(config, ["/help"]).stdout.decode()
    for command in ("help", "stats", "why", "model", "system", "set", "reset", "reload", "quit"):
        assert f"/{command} " in out


def test_leaving(config: Path) -> None:
    """/quit leaves at once; what follows is not read."""
    assert talk(config, ["/quit", "hi"]).stdout == b""


def test_a_line_that_is_refused(config: Path) -> None:
    """It is told on standard error, the next ones are served, and the exit code is 1."""
    refusals = [
        ("/stat", "unknown command /stat; did you mean /stats?"),
        ("/blah", "/help lists the commands"),
        ("/model faek", "unknown model 'faek'; did you mean 'fake'?"),
        ("/set temprature 1", "did you mean 'temperature'?"),
        ("/set top_p 7", "top_p=7: a value from 0 to 1 is needed"),
        ("/set seed x", "an integer is needed"),
        ("x" * 3000, "/reset forgets the conversation"),
    ]
    done = talk(config, [*(line for line, _ in refusals), "hi"])
    assert done.stdout == b"Hello there!\n"
    told = done.stderr.decode().splitlines()
    assert len(told) == len(refusals)
    for (_, words), line in zip(refusals, told, strict=True):
        assert words in line
    assert done.returncode == 1


def test_bytes_that_are_no_text(config: Path) -> None:
    """They become U+FFFD, in both directions."""
    done = run(config, b"\xff\xfe\n", PYTHONUTF8="1")
    assert (done.stdout, done.returncode) == (b"Hello there!\n", 0)


@pytest.mark.parametrize(
    ("text", "options", "code", "words"),
    [
        ("", (), 1, "models: there is none to talk to"),
        (STUB, ("--model", "fkae"), 1, "unknown model 'fkae'; did you mean 'fake'?"),
        (STUB + "[cache]\nmin_token = 1\n", (), 1, "cache.min_token: unknown key (did you mean"),
        ("[models.m]\nbackend = 'llama'\nmodel_path = '/no/x.gguf'\n", (), 1, "No such file"),
        ("[models.m]\nbackend = 'llma'\n", (), 1, "did you mean 'llama'?"),
        (STUB, ("--set", "temperature"), 2, "NAME=VALUE is needed"),
        (STUB, ("--set", "colour=1"), 2, "unknown option 'colour'"),
        (None, (), 1, "cannot be read: No such file"),
    ],
)
def test_a_service_that_cannot_start(
    tmp_path: Path, text: str | None, options: Sequence[str], code: int, words: str
) -> None:
    """Nothing is on standard output, the reason on standard error, and in the exit code."""
    file = tmp_path / "c.toml"
    if text is not None:
        file.write_text(text)
    try:
        done = CliRunner().invoke(app, ["run", "-c", str(file), *options], input="hi\n")
    finally:
        structlog.reset_defaults()
    assert (done.stdout, done.exit_code) == ("", code)
    assert words in done.stderr


def test_a_reader_that_goes_away(config: Path) -> None:
    """When nobody reads the replies any more, the program ends without a traceback."""
    with subprocess.Popen(
        [*COMMAND, "-c", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(b"hi\nhi\nhi\n", timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in errors


def test_replies_stream(tmp_path: Path) -> None:
    """What the model says is written as it says it."""
    config = tmp_path / "slow.toml"
    config.write_text(SLOW)
    with subprocess.Popen(
        [*COMMAND, "-c", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert len(process.stdout.read(3)) == 3  # of a reply that lasts for minutes
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == 128 + signal.SIGINT


def test_termination_saves(tmp_path: Path) -> None:
    """SIGTERM ends a reply that is running, saves what it has computed, and tells in the code."""
    config = tmp_path / "slow.toml"
    root = tmp_path / "kvc"
    tier = f'\n[[tiers]]\nname = "disk"\nkind = "disk"\nroot = "{root}"\n'
    config.write_text(SLOW + 'tier = "disk"\n' + tier)
    with subprocess.Popen(
        [*COMMAND, "-c", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        said = process.stdout.read(100)
        process.terminate()
        said += process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    listed = subprocess.run(
        [sys.executable, "-m", "erllama_core", "cache", "stats", "--root", str(root), "--json"],
        capture_output=True,
        env=environment(),
        check=True,
    )
    (stats,) = json.loads(listed.stdout)
    assert stats["by_kind"]["kv"]["size_bytes"] > 32 * len(said.strip())


def test_the_log_goes_to_standard_error(config: Path) -> None:
    """JSON elsewhere than on a terminal; with the level that the file, or the environment, says."""
    config.write_text(STUB + '[logging]\nlevel = "info"\n')
    done = run(config, ["hi"])
    events = [json.loads(line) for line in done.stderr.decode().splitlines()]
    (finished,) = (event for event in events if event["event"] == "request.finished")
    assert (finished["model"], finished["request"], finished["level"]) == ("fake", 1, "info")
    assert done.stdout == b"Hello there!\n"
    done = run(config, ["hi"], ERLLAMA_LOGGING__FORMAT="text")
    assert "request.finished" in done.stderr.decode()
    assert not done.stderr.startswith(b"{")
    assert run(config, ["hi"], ERLLAMA_LOGGING__LEVEL="error").stderr == b""


def test_a_log_that_nobody_reads(config: Path) -> None:
    """Replies come also when standard error is gone."""
    config.write_text(STUB + '[logging]\nlevel = "debug"\n')
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, "-c", str(config)],
            input=b"hi\nhow are you?\n",
            stdout=subprocess.PIPE,
            stderr=writing,
            env=environment(),
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.stdout, done.returncode) == (b"Hello there!\nFine, thanks.\n", 0)


# ------------------------------------------------------------------------ reload


def test_hanging_up_reloads(config: Path) -> None:
    """SIGHUP takes the file over, or says what is wrong with it; requests go on all the while."""
    with subprocess.Popen(
        [*COMMAND, "-c", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment(), "ERLLAMA_LOGGING__LEVEL": "error"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"Hello there!\n"
        config.write_text(STUB.replace("[models.other]", "[models.another]"))
        process.send_signal(signal.SIGHUP)
        told = process.stderr.readline()
        assert told == b"erllama: reloaded: loaded model another; unloaded model other\n"
        config.write_text(STUB + "[cache]\nmin_tokenz = 1\n")
        process.send_signal(signal.SIGHUP)
        refused = [process.stderr.readline().decode() for _ in range(2)]
        assert refused[0].startswith("erllama: not reloaded, nothing has changed: ")
        assert "did you mean 'min_tokens'?" in refused[1]
        out, _ = process.communicate(b"how are you?\n/models\n/reload\n", timeout=60)
    lines = out.decode().splitlines()
    assert lines[0] == "Fine, thanks."
    assert [line[:10] for line in lines[1:]] == ["  another:", "* fake: st"]
    assert process.returncode == 1  # as /reload was refused


def test_the_model_one_talks_to_may_go(config: Path) -> None:
    """Then a prompt is refused, and another model can be chosen."""
    done = run(config, ["hi"])
    with subprocess.Popen(
        [*COMMAND, "-c", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.readline() == done.stdout
        config.write_text('[models.other]\nbackend = "stub"\n')
        commands = b"/reload\nhi\n/model other\n/set response_tokens 4\nhi\n"
        out, errors = process.communicate(commands, timeout=60)
    assert out.decode().startswith("unloaded model fake\nmodel other\n")
    assert b"unknown model 'fake'" in errors


# ---------------------------------------------------------------------- terminal


def test_a_conversation_in_a_terminal(config: Path, terminals: list[Terminal]) -> None:
    """A prompt with the model's name, replies, what was reused; /quit leaves with code 0."""
    terminal = open_terminal(terminals, config)
    terminal.expect("talking to 'fake'; /help lists the commands")
    terminal.expect("fake> ")
    terminal.type("hi\n")
    terminal.expect("Hello there!\n[cold: 0 of 21 prompt tokens reused, first token ")
    terminal.expect("fake> ")
    terminal.type("how are you?\n")
    terminal.expect("Fine, thanks.\n[sticky: ")
    terminal.expect("fake> ")
    terminal.type("bye\n")
    terminal.expect("hm\nBye.\n")  # what it thinks is shown apart
    terminal.type("/model other\n")
    terminal.expect("other> ")
    terminal.type("/nonsense\n")
    terminal.expect("unknown command /nonsense")
    terminal.expect("other> ")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0


def test_ctrl_d_leaves(config: Path, terminals: list[Terminal]) -> None:
    """At the prompt the end of input is the end."""
    terminal = open_terminal(terminals, config)
    terminal.expect("fake> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_ends_a_reply_and_not_the_program(tmp_path: Path, terminals: list[Terminal]) -> None:
    """The reply so far is part of the conversation; at the prompt Ctrl-C drops the line."""
    config = tmp_path / "slow.toml"
    config.write_text(SLOW)
    terminal = open_terminal(terminals, config)
    terminal.expect("slow> ")
    terminal.type("tell me everything\n")
    terminal.expect_more(20)
    terminal.type("\x03")
    terminal.expect("[cancelled]\n")
    terminal.expect("slow> ")
    terminal.type("/why\n")
    terminal.expect("tokens reused")
    terminal.expect("slow> ")
    terminal.type("half a line\x03")
    terminal.expect("Ctrl-D or /quit leaves")
    terminal.expect("slow> ")
    terminal.type("/set response_tokens 4\n")
    terminal.expect("slow> ")
    terminal.type("again\n")
    terminal.expect("[sticky: ")  # it went on from what was said before it was cancelled
    terminal.expect("slow> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_a_terminal_that_is_terminated(config: Path, terminals: list[Terminal]) -> None:
    """SIGTERM at the prompt closes the service, and tells in the exit code."""
    terminal = open_terminal(terminals, config)
    terminal.expect("fake> ")
    terminal.send(signal.SIGTERM)
    assert terminal.exit_code() == 128 + signal.SIGTERM


def test_replies_cannot_steer_the_terminal(tmp_path: Path, terminals: list[Terminal]) -> None:
    """Control characters of a reply are shown, not sent; in a pipe they are what they are."""
    config = tmp_path / "c.toml"
    config.write_text(
        '[models.m]\nbackend = "stub"\nmodel_opts = { script = ["a\\u001b[2Jb\\u009b5n"] }\n'
    )
    assert run(config, ["hi"]).stdout == "a\x1b[2Jb\x9b5n\n".encode()
    terminal = open_terminal(terminals, config)
    terminal.expect("m> ")
    terminal.type("hi\n")
    terminal.expect("a\u241b[2Jb\ufffd5n\n")


# -------------------------------------------------------------------- real model


@pytest.mark.real_model
def test_a_real_model(tmp_path: Path, demo_model_path: Path, terminals: list[Terminal]) -> None:
    """The demo model answers in pipes and in a terminal, is cancelled, and goes on from disk."""
    config = tmp_path / "c.toml"
    config.write_text(
        f'[[tiers]]\nname = "disk"\nkind = "disk"\nroot = "{tmp_path / "kvc"}"\n'
        f'[models.smol]\nmodel_path = "{demo_model_path}"\ntier = ["ram", "disk"]\n'
        "policy = { min_tokens = 16, cold_min_tokens = 16 }\n"
        "context_opts = { n_threads = 1 }\n"  # two that wait for each other are slow beside others
    )
    question = "What is the capital of France?"
    done = run(config, [question, "/why"], "--set", "response_tokens=16")
    assert done.returncode == 0
    assert "cold, 0 tokens reused" in done.stdout.decode()
    done = run(config, [question, "/why"], "--set", "response_tokens=16")
    assert "exact, " in done.stdout.decode()
    terminal = open_terminal(terminals, config)
    terminal.expect("smol> ")
    terminal.type("Count from 1 to 500, one number after another.\n")
    terminal.expect_more(8)
    terminal.type("\x03")
    terminal.expect("[cancelled]\n")
    terminal.expect("smol> ")
    terminal.type("/set response_tokens 8\n")
    terminal.expect("smol> ")
    terminal.type("Thank you.\n")
    terminal.expect("[sticky: ")
    terminal.expect("smol> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0

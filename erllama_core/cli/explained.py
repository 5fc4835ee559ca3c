"""An explanation of what was reused, in lines for a person."""

from __future__ import annotations

from erllama_core.results import Explanation


def explanation_lines(explanation: Explanation) -> list[str]:
    """Why not more was reused, where the prompt left what is stored, and what was expected."""
    lines = [explanation.reason]
    if explanation.diverges_at is not None:
        lines.append(
            f"the prompt around token {explanation.diverges_at}: {explanation.prompt_text!r}"
        )
        if explanation.stored_text is not None:
            lines.append(f"the stored context goes on with: {explanation.stored_text!r}")
    if explanation.gate is not None:
        lines.append(
            f"expected: {explanation.gate.restore_s:.3g} s to restore, "
            f"{explanation.gate.compute_s:.3g} s to compute the same"
        )
    if explanation.saving is not None:
        lines.append(explanation.saving)
    return lines

"""Where a soft prompt can stand, as data: all that is known of a placement before PyTorch is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """One place for a soft prompt.

    Args:
        where: the words after "to stand", for people.
        code: `module:Class`, the `PromptedPLM` that computes with a prompt there.
    """

    where: str
    code: str


PLACEMENTS = {
    "prefix": Placement("in front of the input", "fast_prompt_tuning.prompt.front:Front"),
    "suffix": Placement(
        "after the input (encoder-decoder: in front of the target)", "fast_prompt_tuning.prompt.after_text:AfterText"
    ),
    "infix": Placement(
        "within the input, after the field that may be shortened and in front of what the template has behind it",
        "fast_prompt_tuning.prompt.after_text:WithinText",
    ),
}
"""Every placement by its name in recipes. The first is the default: the paper's, and the one that PEFT can load."""

FRONT = next(iter(PLACEMENTS))

"""Where a soft prompt can stand, as data: all that is known of a placement before PyTorch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, ModelError

Positions = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One place for a soft prompt.

    Args:
        name: as in recipes.
        where: the words after "to stand", for people.
        code: `module:Class`, the `PromptedPLM` that computes with a prompt there.
        encoder_decoder: what shares the positions of its stacks, out of `prompt`, `text` and `target`; empty: no prompt
            can stand here.
        keeps_texts: the text is run apart from the prompt, so that its states can be kept.
        needs_tail: the prompt stands where an input's `tail` begins.
    """

    name: str
    where: str
    code: str
    encoder_decoder: Positions
    keeps_texts: bool = True
    needs_tail: bool = False

    def positions(self, decoder: bool) -> Positions:
        """What shares the positions of a stack, out of `prompt`, `text` and `target`; one entry per stack.

        Raises:
            ModelError: no prompt can stand here in an encoder-decoder.
        """
        if decoder:
            return (("prompt", "text", "target"),)
        if not self.encoder_decoder:
            raise ModelError(
                f"placement={self.name!r} needs a decoder-only model: an encoder reads its text as a whole; use "
                "placement='suffix'"
            )
        return self.encoder_decoder


PLACEMENTS = {
    place.name: place
    for place in (
        Placement(
            name="prefix",
            where="in front of the input",
            code="fast_prompt_tuning.prompt.front:Front",
            encoder_decoder=(("prompt", "text"), ("target",)),
            keeps_texts=False,
        ),
        Placement(
            name="suffix",
            where="after the input (encoder-decoder: in front of the target)",
            code="fast_prompt_tuning.prompt.after_text:AfterText",
            encoder_decoder=(("text",), ("prompt", "target")),
        ),
        Placement(
            name="infix",
            where="within the input, after the field that may be shortened and in front of what the template has "
            "behind it",
            code="fast_prompt_tuning.prompt.after_text:WithinText",
            encoder_decoder=(),
            needs_tail=True,
        ),
    )
}
"""Every placement by its name in recipes. The first is the default: the paper's, and the one that PEFT can load."""

FRONT = next(iter(PLACEMENTS))


def placement_of(name: str) -> Placement:
    """The placement of a name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in PLACEMENTS:
        raise ConfigError(f"placement={name!r} is unknown; choose one of {', '.join(PLACEMENTS)}")
    return PLACEMENTS[name]

"""Ask a vLLM server with a run's prompt, which stands among the input's embeddings where the run had it.

vllm serve MODEL --enable-prompt-embeds
python examples/vllm_client.py runs/mine "Some new text"

The server needs no adapter and no code of ours. It reads the text anew for every request, wherever the prompt stands.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch

from fast_prompt_tuning.data.readers import render_rows
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, place_of
from fast_prompt_tuning.recipe import settings_of
from fast_prompt_tuning.run.session import Session, encode_for, input_ids_of, open_session


def embedded(session: Session, prompt: torch.Tensor, where: str, fields: dict[str, Any]) -> torch.Tensor:
    """The input's embeddings with the prompt `(P, H)` in its place: `(P + T, H)`, for a decoder-only model."""
    rows = encode_for(session, render_rows(session.task, [fields], decoder=True))
    return placed(session, prompt, where, input_ids_of(session, rows)[0], rows["n_tail"][0])


def placed(session: Session, prompt: torch.Tensor, where: str, ids: list[int], tail: int) -> torch.Tensor:
    """The same of token ids, the last `tail` of which stand behind a prompt within them."""
    before = {"prefix": 0, "suffix": len(ids), "infix": len(ids) - tail}[where]
    with torch.no_grad():
        text = session.plm.get_input_embeddings()(torch.tensor(ids, device=session.plm.device))
    return torch.cat([text[:before], prompt.to(text), text[before:]])


def request(model: str, embeddings: torch.Tensor, max_tokens: int) -> dict[str, Any]:
    """The JSON of a completion: a tensor as `torch.save` writes it, in base64."""
    buffer = io.BytesIO()
    torch.save(embeddings.cpu(), buffer)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"model": model, "prompt_embeds": encoded, "max_tokens": max_tokens, "temperature": 0, "stop": "\n"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", nargs="+", help="texts of the task's field that may be shortened")
    parser.add_argument("--url", default="http://localhost:8000/v1/completions")
    parser.add_argument("--model", help="as the server calls it; default as the run does")
    args = parser.parse_args()
    session = open_session(settings_of(args.run), ())
    prompt, where = load_prompt(args.run), place_of(args.run)
    for text in args.text:
        inputs = embedded(session, prompt, where, {session.task.truncate or "text": text})
        body = request(args.model or session.config.model.path, inputs, session.max_target_tokens)
        asked = urllib.request.Request(args.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            print(json.load(answer)["choices"][0]["text"].strip())


if __name__ == "__main__":
    main()

"""Answer with a run's prompt through llama.cpp, on the GGUF file of the run's model; the prompt stands where it did.

pip install llama-cpp-python
python examples/llama_cpp_client.py runs/mine MODEL.gguf "Some new text"

llama.cpp takes embeddings in place of tokens, so the file needs no change. The run's own model embeds the text.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp as cpp
import torch
from vllm_client import embedded

from fast_prompt_tuning.prompt.soft_prompt import load_prompt, place_of
from fast_prompt_tuning.recipe import settings_of
from fast_prompt_tuning.run.session import open_session


@cpp.llama_log_callback
def silent(*_: object) -> None:
    """llama.cpp tells of every node of its graph."""


class Model:
    """A GGUF model that reads embeddings and answers greedily."""

    def __init__(self, file: Path, positions: int = 2048):
        cpp.llama_log_set(silent, None)
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(str(file).encode(), cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"{file} cannot be read as GGUF")
        options = cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = positions
        self.context = cpp.llama_init_from_model(self.model, options)
        self.vocabulary = cpp.llama_model_get_vocab(self.model)
        self.size = cpp.llama_vocab_n_tokens(self.vocabulary)

    def answer(self, embeddings: torch.Tensor, most: int) -> list[int]:
        """At most so many tokens, the likeliest each, that follow embeddings `(T, H)`; up to an end of text."""
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        length, width = embeddings.shape
        batch = cpp.llama_batch_init(length, width, 1)
        rows = embeddings.float().contiguous()
        ctypes.memmove(batch.embd, rows.data_ptr(), rows.nbytes)
        batch.n_tokens = length
        for i in range(length):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, i == length - 1
        found: list[int] = []
        failed = cpp.llama_decode(self.context, batch)
        while not failed:
            logits = torch.frombuffer(
                (ctypes.c_float * self.size).from_address(
                    ctypes.addressof(cpp.llama_get_logits_ith(self.context, -1).contents)
                ),
                dtype=torch.float32,
            )
            token = int(logits.argmax())
            if cpp.llama_vocab_is_eog(self.vocabulary, token):
                break
            found.append(token)
            if len(found) == most:
                break
            failed = cpp.llama_decode(self.context, cpp.llama_batch_get_one((cpp.llama_token * 1)(token), 1))
        cpp.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama.cpp cannot read {length} embeddings of {width} numbers: code {failed}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path, help="GGUF file of the model that the run tuned")
    parser.add_argument("text", nargs="+", help="texts of the task's field that may be shortened")
    args = parser.parse_args()
    session, model = open_session(settings_of(args.run), ()), Model(args.model)
    prompt, where = load_prompt(args.run), place_of(args.run)
    for text in args.text:
        inputs = embedded(session, prompt, where, {session.task.truncate or "text": text})
        answer = session.tokenizer.decode(model.answer(inputs, session.max_target_tokens))
        print(answer.strip().split("\n")[0])


if __name__ == "__main__":
    main()

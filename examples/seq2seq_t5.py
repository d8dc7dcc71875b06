"""Fast Prompt Tuning of an encoder-decoder: `python examples/seq2seq_t5.py [--steps N]`, offline, in seconds.

As in the paper for short targets, only the encoder is cut. The T5 is tiny and has random weights.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config

from fast_prompt_tuning import PartialPLM, ProgressiveCallback, Schedule, activation_scores, soft_prompt_config


def encode(text: str) -> list[int]:
    """One token a byte, above T5's three special ones, and the end of sequence."""
    return [byte + 3 for byte in text.encode()] + [1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="runs/seq2seq_t5")
    options = parser.parse_args()

    torch.manual_seed(0)
    plm = AutoModelForSeq2SeqLM.from_config(
        T5Config(
            vocab_size=259,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=8,
            num_decoder_layers=8,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )
    pairs = [(f"hypothesis: {a} premise: {b}", "yes" if a == b else "no") for a in "abcd" for b in "abcd"]
    rows = [{"input_ids": encode(text), "labels": encode(target)} for text, target in pairs]

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        longest = max(len(row["labels"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in batch])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=8))
    partial = PartialPLM(model, neuron_scores=activation_scores(model, [collate(rows)]))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=options.steps, stacks=["encoder"])
    print(schedule)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=0.3,
            optim="adafactor",
            lr_scheduler_type="constant",
            logging_steps=max(1, options.steps // 4),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[ProgressiveCallback(partial, schedule)],
    )
    trainer.train()
    model.save_pretrained(f"{options.output}/prompt")
    answer = model.generate(**{k: v for k, v in collate(rows[:1]).items() if k != "labels"}, max_new_tokens=4)
    print(f"saved {options.output}/prompt; the full model generates {answer.shape[1] - 1} tokens")


if __name__ == "__main__":
    main()

"""Fast Prompt Tuning in a Trainer script: `python examples/trainer_three_lines.py [--model MODEL] [--steps N]`.

Without `--model` it builds a tiny Llama with random weights and reads bytes, so that it runs offline in seconds.
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

from fast_prompt_tuning import PartialPLM, ProgressiveCallback, Schedule, activation_scores, soft_prompt_config

ROWS = [(f"{word} is a", kind) for kind, words in {
    " fruit": ("apple", "pear", "plum", "cherry", "lemon", "mango"),
    " tool": ("hammer", "saw", "drill", "wrench", "chisel", "plane"),
}.items() for word in words]  # fmt: skip


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a decoder-only model: hub id or folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="runs/three_lines")
    options = parser.parse_args()

    if options.model:
        plm = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    else:
        plm, encode = tiny_llama(), lambda text: list(text.encode())
    pad = plm.config.pad_token_id or 0
    rows = [(encode(text), encode(target)) for text, target in ROWS]

    def collate(batch):
        """Pad on the right; only the target has labels."""
        width = max(len(text) + len(target) for text, target in batch)
        ids = torch.full((len(batch), width), pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (text, target) in enumerate(batch):
            whole = torch.tensor(text + target)
            ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
            labels[i, len(text) : len(whole)] = whole[len(text) :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    # The lines that make it Fast Prompt Tuning:
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=8))
    partial = PartialPLM(model, neuron_scores=activation_scores(model, [collate(rows)]))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=options.steps)
    print(schedule)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            logging_steps=max(1, options.steps // 4),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[ProgressiveCallback(partial, schedule)],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(f"{options.output}/prompt")
        base = tiny_llama() if not options.model else AutoModelForCausalLM.from_pretrained(options.model)
        PeftModel.from_pretrained(base, f"{options.output}/prompt")  # plain PEFT, no trace of us
        print(f"saved and loaded again: {options.output}/prompt")


if __name__ == "__main__":
    main()

"""The three lines in a script of TRL's: `SFTTrainer` with a stock prompt, as people fine-tune today."""

from __future__ import annotations

import datasets
import torch
from peft import get_peft_model
from toy import articles, toy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fast_prompt_tuning import PartialPLM, ProgressiveCallback, Schedule, activation_scores, soft_prompt_config

STEPS = 10


def test_an_sft_trainer_takes_the_callback(tmp_path):
    plm = AutoModelForCausalLM.from_pretrained(toy().llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy().llama)
    rows = [{"prompt": f"{row['text']} Topic:", "completion": f" {row['label']}"} for row in articles(40, seed=0)]
    ids = tokenizer([row["prompt"] + row["completion"] for row in rows[:8]], return_tensors="pt", padding=True)
    batch = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": ids["input_ids"]}
    before = {name: value.clone() for name, value in plm.state_dict().items()}

    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    partial = PartialPLM(model, neuron_scores=activation_scores(model, [batch]))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=STEPS)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[ProgressiveCallback(partial, schedule)],
    )
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(partial.stage.layers))
    trainer.train()
    assert ran == [schedule.stage_at(step).layers for step in range(STEPS)]
    assert len(set(ran)) > 2
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert len(losses) == STEPS
    assert min(losses[-3:]) < losses[0]
    after = plm.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

"""One of two processes that share the layers of a model by FSDP2: depth stages against the unsharded model, FFN cuts.

Prints one JSON line on the main process. Started with the environment that torchrun sets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from peft import get_peft_model
from settings import BY_NAME
from torch import distributed
from torch.distributed.fsdp import fully_shard

from fast_prompt_tuning import PartialPLM, soft_prompt_config
from fast_prompt_tuning.errors import ModelError
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.schedule.stages import Stage


def main() -> None:
    """Compare gradients at several depths."""
    distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    family = BY_NAME["llama"]
    batch, grads = family.batch(size=4), []
    for sharded in (True, False):
        plm = family.plm()
        torch.manual_seed(0)
        model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
        partial = PartialPLM(model, keep_neurons="first")
        if sharded:
            for layer in plm.model.layers:
                fully_shard(layer, mesh=mesh)
            try:
                partial.check(Stage(5, 12, stacks=("decoder",)))
                refused = ""
            except ModelError as error:
                refused = str(error)
        found = []
        for layers in (1, 3, 5, 2):
            model.zero_grad()
            with partial.at(Stage(layers, 24, stacks=("decoder",))):
                model(**batch).loss.backward()
            found.append(prompt_parameter(model).grad.clone())
        grads.append(found)
    if distributed.get_rank() == 0:
        equal = [torch.equal(a, b) for a, b in zip(*grads, strict=True)]
        print(json.dumps({"equal": equal, "refused": refused}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Scores of layers: what they are, that short cuts change nothing, and that partial PLMs chosen by them are nested."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from settings import BY_NAME, LAYERS, Settings

from fast_prompt_tuning.errors import ScheduleError, ScoreError
from fast_prompt_tuning.plm.objective import labelled_logits
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.plm.stacks import find_stacks, get_plm
from fast_prompt_tuning.prompt.suffix_model import SuffixPromptModel
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.scores.layers import LayerScores, block_influence, greedy_removal, text_labels
from fast_prompt_tuning.scores.neurons import NeuronScores, activation_scores

TO = 3


def batches(family: Settings) -> list[dict[str, torch.Tensor]]:
    return [family.batch(seed=1), family.batch(seed=2, size=2, length=5)]


def one_by_one(found: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The same examples without padding, one a batch."""
    rows = []
    for batch in found:
        for i, mask in enumerate(batch["attention_mask"].bool()):
            row = {k: batch[k][i, mask][None] for k in ("input_ids", "attention_mask")}
            labels = batch["labels"][i]
            rows.append({**row, "labels": (labels[mask] if len(labels) == len(mask) else labels[labels != -100])[None]})
    return rows


def definition(family: Settings, model) -> dict[str, list[float]]:
    """1 − cosine of a layer's input and output, averaged over every position of every unpadded example."""
    stacks = find_stacks(get_plm(model))
    found: dict[str, list[list[torch.Tensor]]] = {n: [[] for _ in s.layers] for n, s in stacks.items()}
    for example in one_by_one(batches(family)):
        hooks = []
        for name, stack in stacks.items():
            for i, layer in enumerate(stack.layers):

                def hook(_m, args, kwargs, output, at=(name, i)):
                    before = args[0] if args else kwargs["hidden_states"]
                    after = output[0] if isinstance(output, tuple) else output
                    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
                    found[at[0]][at[1]].append(1 - cosine.flatten())

                hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        with torch.no_grad():
            model(**example)
        for handle in hooks:
            handle.remove()
    return {name: [float(torch.cat(values).mean()) for values in layers] for name, layers in found.items()}


def test_block_influence_is_the_definition_whatever_the_batching(family):
    model = family.peft()
    wanted = definition(family, model)
    for given in (batches(family), one_by_one(batches(family))):
        found = block_influence(model, given, metadata={"data": "toy"})
        assert set(found.scores) == set(family.stacks)
        for name in family.stacks:
            assert found.scores[name].shape == (LAYERS,)
            torch.testing.assert_close(found.scores[name], torch.tensor(wanted[name]), rtol=1e-3, atol=1e-5)
        assert (found.metadata["examples"], found.metadata["kind"], found.metadata["data"]) == ("5", "influence", "toy")


def loss(model, given, text: bool) -> float:
    total = count = 0
    for batch in given:
        if text and not get_plm(model).config.is_encoder_decoder:
            batch = {**batch, "labels": text_labels(batch)}
        with torch.no_grad():
            logits, targets, _ = labelled_logits(model, batch)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count


@pytest.mark.parametrize("text", [True, False])
def test_greedy_removal_is_the_definition(family, text):
    """Each round, the layer whose removal leaves the lowest loss, found by running every candidate from the start."""
    model, given = family.peft(), batches(family)
    stacks = find_stacks(get_plm(model))
    found = greedy_removal(model, given, down_to=dict.fromkeys(stacks, TO), candidates=None, text_loss=text)
    partial = PartialPLM(model)
    kept = {name: list(range(LAYERS)) for name in stacks}
    for turn in range(LAYERS - TO):
        for name in stacks:  # stacks of one depth take turns
            losses = {}
            for layer in set(kept[name]) - set(stacks[name].spec.always_kept):
                left = {**kept, name: [i for i in kept[name] if i != layer]}
                with partial.keeping(left):
                    losses[layer] = loss(model, given, text)
            best = int((found.scores[name] == turn).nonzero())
            assert losses[best] == pytest.approx(min(losses.values()), rel=1e-5)
            kept[name].remove(best)
    by_score = PartialPLM(model, keep_layers="score", layer_scores=found)
    assert by_score.kept_layers(Stage(TO, 10, stacks=family.stacks)) == kept
    assert float(found.metadata["flops"]) > 0


def test_a_prompt_after_the_text_is_scored_without(family):
    if family.name in ("bert", "roberta"):
        pytest.skip("not causal")
    plm = family.plm()
    model, found, down_to = SuffixPromptModel(plm, 3), batches(family), dict.fromkeys(family.stacks, 2)
    pairs = [
        (activation_scores(model, found), activation_scores(plm, found)),
        (block_influence(model, found), block_influence(plm, found)),
        (greedy_removal(model, found, down_to=down_to), greedy_removal(plm, found, down_to=down_to)),
    ]
    for mine, bare in pairs:
        assert all(torch.equal(mine.scores[name], bare.scores[name]) for name in bare.scores)
    assert pairs[2][0].metadata["flops"] == pairs[2][1].metadata["flops"]


def test_sizes_are_nested(family):
    model, given = family.peft(), batches(family)
    for scores in (
        block_influence(model, given),
        greedy_removal(model, given, down_to=dict.fromkeys(family.stacks, TO), candidates=2),
    ):
        partial = PartialPLM(model, keep_layers="score", layer_scores=scores)
        sizes = [partial.kept_layers(family.stage(k)) for k in range(1, LAYERS + 1)]
        for name, stack in find_stacks(get_plm(model)).items():
            for small, large in pairwise(sizes):
                assert set(stack.spec.always_kept) <= set(small[name]) < set(large[name])


def test_only_the_stacks_that_are_asked_for_are_tried():
    model = BY_NAME["t5"].peft()
    found = greedy_removal(model, batches(BY_NAME["t5"]), down_to={"encoder": 2})
    assert sorted(found.scores["encoder"].tolist())[:3] == [0, 1, 2]
    assert all(0 <= v <= 2 for v in found.scores["decoder"].tolist())  # influences


def test_fewer_candidates_cost_less():
    family = BY_NAME["llama"]
    model, given = family.peft(), batches(family)
    costs = [
        float(greedy_removal(model, given, down_to={"decoder": TO}, candidates=c).metadata["flops"])
        for c in (1, 2, None)
    ]
    assert costs == sorted(set(costs))


def test_greedy_flops_are_those_that_run():
    """Counted by PyTorch's own counter on one candidate a round, eager attention."""
    from torch.utils.flop_counter import FlopCounterMode

    family = BY_NAME["llama"]
    plm = family.plm()
    plm.set_attn_implementation("eager")
    given = [family.batch(size=1)]
    with FlopCounterMode(display=False) as counter:
        found = greedy_removal(plm, given, down_to={"decoder": TO}, candidates=1)
    assert float(found.metadata["flops"]) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_model_is_left_as_it_was(family):
    model, given = family.peft(), batches(family)
    model.train()
    modes, own = {m: m.training for m in model.modules()}, {m: set(m.__dict__) for m in model.modules()}
    config = copy.deepcopy(get_plm(model).config.to_dict())
    to = dict.fromkeys(family.stacks, TO)
    block_influence(model, given)
    greedy_removal(model, given, down_to=to)
    with pytest.raises((IndexError, RuntimeError)):
        greedy_removal(model, [{**given[0], "input_ids": torch.full((1, 2), 10_000)}], down_to=to)
    assert {m: m.training for m in model.modules()} == modes
    assert {m: set(m.__dict__) for m in model.modules()} == own
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert get_plm(model).config.to_dict() == config


def test_save_and_load(tmp_path):
    family = BY_NAME["llama"]
    model, given = family.peft(), batches(family)
    scores = greedy_removal(model, given, down_to={"decoder": TO}, metadata={"seed": 3})
    path = tmp_path / "layers.safetensors"
    scores.save(path)
    loaded = LayerScores.load(path)
    assert torch.equal(loaded.scores["decoder"], scores.scores["decoder"])
    assert loaded.metadata == scores.metadata
    assert (loaded.metadata["kind"], loaded.metadata["seed"]) == ("greedy", "3")
    with pytest.raises(ScoreError, match="exists already"):
        scores.save(path)
    with pytest.raises(ScoreError, match=r"was not written by NeuronScores\.save"):
        NeuronScores.load(path)
    activation_scores(model, given).save(tmp_path / "neurons")
    with pytest.raises(ScoreError, match=r"was not written by LayerScores\.save"):
        LayerScores.load(tmp_path / "neurons")
    with pytest.raises(ScoreError, match=r"layer_scores are of the model .*: block_influence"):
        PartialPLM(family.plm(seed=1), keep_layers="score", layer_scores=loaded)


def test_refusals():
    family = BY_NAME["t5"]
    model, given = family.peft(), batches(family)
    for scoring in (block_influence, lambda m, b: greedy_removal(m, b, down_to={"encoder": 2})):
        with pytest.raises(ScoreError, match="calibration_batches is empty"):
            scoring(model, [])
    for wrong in ({"encoder": 0}, {"encoder": 6}, {"middle": 2}):
        with pytest.raises(ScoreError, match="does not fit this model"):
            greedy_removal(model, given, down_to=wrong)
    with pytest.raises(ScoreError, match="candidates=0 must be at least 1"):
        greedy_removal(model, given, down_to={"encoder": 2}, candidates=0)
    with pytest.raises(ScoreError, match="needs labels"):
        greedy_removal(model, [{k: given[0][k] for k in ("input_ids", "attention_mask")}], down_to={"encoder": 2})
    broken = BY_NAME["llama"].peft()
    broken.get_base_model().model.layers[1].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(ScoreError, match="not finite"):
        block_influence(broken, batches(BY_NAME["llama"]))
    partial = PartialPLM(model)
    for layers, said in (
        ({"middle": [0]}, "names? the stack 'middle'"),
        ({"encoder": []}, "must be ascending"),
        ({"encoder": [1, 0]}, "must be ascending"),
        ({"encoder": [0, 9]}, "of 0 to 4"),
        ({"encoder": [1, 2]}, r"with \[0\] among them"),
    ):
        with pytest.raises(ScheduleError, match=said), partial.keeping(layers):
            pass

"""Activation scores: what they are, and that batching, dtype and files do not change them."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from settings import BY_NAME, FFN, LAYERS, VOCAB, Settings
from transformers import BertForSequenceClassification

from fast_prompt_tuning.errors import ModelError, ScoreError
from fast_prompt_tuning.plm import fingerprint
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.plm.stacks import find_stacks, get_plm
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter, soft_prompt_config
from fast_prompt_tuning.schedule.stages import Schedule
from fast_prompt_tuning.scores import neurons as scoring
from fast_prompt_tuning.scores.neurons import KINDS, NeuronScores, activation_scores

LENGTHS = [7, 3, 5, 2, 6]
TARGETS = [4, 1, 3, 2, 4]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the models run in float64, the scores are kept in float32
GRADIENT = {"rtol": 1e-4, "atol": 1e-7}  # some norms compute in float32 whatever the model's dtype


def examples(family: Settings) -> list[dict[str, torch.Tensor]]:
    """Examples of mixed lengths, one a batch, without padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length, target in zip(LENGTHS, TARGETS, strict=True):
        ids = torch.randint(3, VOCAB, (1, length), generator=generator)
        labels = torch.randint(3, VOCAB, (1, target), generator=generator)
        if not family.encoder_decoder:
            labels = ids.clone()
            labels[:, : length // 2] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def precise(family: Settings):
    """The model in float64, so that one definition computed two ways agrees closely."""
    model = family.peft()
    # transformers' own Gemma 2 gives NaN at padding in float64: its mask overflows its float32 softmax.
    return model if family.name == "gemma2" else model.double()


def batched(parts: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """The examples in right-padded batches of `size`."""
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    batches = []
    for start in range(0, len(parts), size):
        rows = parts[start : start + size]
        batches.append(
            {
                key: torch.nn.utils.rnn.pad_sequence([r[key][0] for r in rows], batch_first=True, padding_value=value)
                for key, value in fill.items()
            }
        )
    return batches


def observed(model, batch, replace=None) -> tuple[torch.Tensor, dict[tuple[str, int], torch.Tensor]]:
    """Logits and FFN activations (after the non-linearity) of one run; `replace` puts others in their place."""
    seen = {}

    def hook(key):
        def pre(_module, args):
            seen[key] = args[0]
            return (replace[key],) if replace else None

        return pre

    with ExitStack() as hooks:
        for name, stack in find_stacks(get_plm(model)).items():
            for i, out in enumerate(stack.ffn_out):
                hooks.callback(out.register_forward_pre_hook(hook((name, i))).remove)
        return model(**batch).logits, seen


def summed_loss(family: Settings, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if not family.encoder_decoder:
        logits, labels = logits[:, logits.shape[1] - labels.shape[1] : -1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), reduction="sum")


def brute_force(family: Settings, model, kind: str, steps: int) -> dict[str, torch.Tensor]:
    """The definition, one unpadded example at a time."""
    rows: dict[tuple[str, int], list[torch.Tensor]] = {}
    for example in examples(family):
        with torch.no_grad():
            _, values = observed(model, example)
        if kind == "integrated_gradients":
            total = {k: torch.zeros_like(a) for k, a in values.items()}
            for step in range(steps):
                leaves = {k: ((step + 0.5) / steps * a).requires_grad_() for k, a in values.items()}
                logits, _ = observed(model, example, leaves)
                grads = torch.autograd.grad(summed_loss(family, logits, example["labels"]), list(leaves.values()))
                for key, grad in zip(leaves, grads, strict=True):
                    total[key] += grad / steps
            values = {k: a * total[k] for k, a in values.items()}
        for key, value in values.items():
            rows.setdefault(key, []).append(value.reshape(-1, FFN).abs())

    def score(of_examples: list[torch.Tensor]) -> torch.Tensor:
        if kind == "max":
            return torch.cat(of_examples).amax(0)
        return torch.stack([r.mean(0) for r in of_examples]).mean(0)  # a long example counts as much as a short one

    return {name: torch.stack([score(rows[name, i]) for i in range(LAYERS)]).float() for name in family.stacks}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_definition_whatever_the_batching(family, kind):
    model = precise(family)
    wanted = brute_force(family, model, kind, steps=2)
    tolerance = GRADIENT if kind == "integrated_gradients" else CLOSE
    parts = examples(family)
    for batches in (batched(parts, 2), batched(parts, len(parts))):
        found = activation_scores(model, batches, kind=kind, gradient_steps=2)
        assert set(found.scores) == set(family.stacks)
        for name in family.stacks:
            assert found.scores[name].dtype == torch.float32
            assert found.scores[name].shape == (LAYERS, FFN)
            torch.testing.assert_close(found.scores[name], wanted[name], **tolerance)
    assert found.metadata["examples"] == str(len(parts))
    rule = None if kind == "max" else "tokens of each example, then examples"
    assert found.metadata.get("averaged") == rule


def test_what_stands_at_padding_does_not_count(family):
    model, (batch,) = precise(family), batched(examples(family), len(LENGTHS))
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 17)}
    for kind in KINDS:
        one, two = (activation_scores(model, [b], kind=kind, gradient_steps=1).scores for b in (batch, other))
        for name in family.stacks:
            torch.testing.assert_close(one[name], two[name], **GRADIENT)


def test_the_soft_prompt_counts(family):
    model, parts = family.peft(), examples(family)
    stack = family.stacks[0]
    bare = activation_scores(model.get_base_model(), parts)
    one = activation_scores(model, parts)
    prompt_parameter(model).data.mul_(-3)
    two = activation_scores(model, parts)
    assert not torch.allclose(bare.scores[stack], one.scores[stack])
    assert not torch.allclose(one.scores[stack], two.scores[stack])
    extra = 3 * len(parts)  # P virtual tokens an example, in the prompted stack only
    assert int(one.metadata["tokens"]) - int(bare.metadata["tokens"]) == extra
    assert int(bare.metadata["tokens"]) == sum(LENGTHS) + (sum(TARGETS) if family.encoder_decoder else 0)


def test_a_batch_without_mask_is_all_real():
    family = BY_NAME["llama"]
    model, (part, *_) = family.peft(), examples(family)
    bare = {"input_ids": part["input_ids"]}
    torch.testing.assert_close(
        activation_scores(model, [bare]).scores["decoder"], activation_scores(model, [part]).scores["decoder"]
    )


def test_given_decoder_inputs_and_masks_are_used():
    family = BY_NAME["t5"]
    model, (batch,) = precise(family), batched(examples(family), len(LENGTHS))
    usual = activation_scores(model, [batch]).scores["decoder"]
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(labels=labels)
    batch["decoder_attention_mask"] = (labels != -100).long()
    torch.testing.assert_close(activation_scores(model, [batch]).scores["decoder"], usual, **CLOSE)


def test_integrated_gradients_are_complete():
    """Summed with their signs, they are the loss minus that with every FFN silent (Sundararajan et al. 2017)."""
    for name in ("gpt2", "bart"):
        family = BY_NAME[name]
        model, (batch,) = precise(family), batched(examples(family), len(LENGTHS))
        for parameter in get_plm(model).parameters():
            parameter.data.mul_(0.5)  # a smoother path needs fewer points
        stacks = find_stacks(get_plm(model))
        signed = scoring._integrated(model, batch, stacks, 64)
        with torch.no_grad():
            logits, values = observed(model, batch)
            silent, _ = observed(model, batch, {k: torch.zeros_like(v) for k, v in values.items()})
        change = summed_loss(family, logits, batch["labels"]) - summed_loss(family, silent, batch["labels"])
        assert abs(change) > 0.01
        total = sum(value.sum().double() for _, _, value in signed)
        torch.testing.assert_close(total, change, rtol=1e-3, atol=1e-4)


def test_an_example_without_a_target_counts_in_the_encoder_alone():
    family = BY_NAME["t5"]
    model, parts = precise(family), examples(family)
    none = {**parts[0], "labels": torch.full_like(parts[0]["labels"], -100)}
    with_it, without = (activation_scores(model, given).scores for given in ([*parts[1:], none], parts[1:]))
    torch.testing.assert_close(with_it["decoder"], without["decoder"], **CLOSE)
    torch.testing.assert_close(with_it["encoder"], activation_scores(model, parts).scores["encoder"], **CLOSE)


# -- streaming, and what is left behind -------------------------------------------------------------------------------


def test_a_generator_is_consumed_once_and_nothing_is_kept():
    family = BY_NAME["llama"]
    model, drawn, alive = family.peft(), [], []

    def stream():
        import weakref

        for part in examples(family):
            drawn.append(1)
            alive.append(weakref.ref(part["input_ids"]))
            yield {k: v.clone() for k, v in part.items()}

    streamed = activation_scores(model, stream())
    assert len(drawn) == len(LENGTHS)
    assert torch.equal(streamed.scores["decoder"], activation_scores(model, examples(family)).scores["decoder"])
    with pytest.raises(ScoreError, match="calibration_batches is empty"):
        activation_scores(model, iter(()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(family, kind):
    model, parts = family.peft(), examples(family)[:2]
    model.train()
    model.get_base_model().get_input_embeddings().eval()  # modes may differ: each module's own comes back
    modes = {m: m.training for m in model.modules()}
    own = {m: set(m.__dict__) for m in model.modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = {k: v.clone() for k, v in parts[0].items()}
    activation_scores(model, parts, kind=kind, gradient_steps=2)

    def failing():
        yield parts[0]
        raise RuntimeError("the data ran dry")

    with pytest.raises(RuntimeError, match="ran dry"):
        activation_scores(model, failing(), kind=kind, gradient_steps=2)
    with pytest.raises((IndexError, RuntimeError)):
        activation_scores(model, [{**parts[0], "input_ids": torch.tensor([[10_000]])}], kind=kind)
    assert {m: m.training for m in model.modules()} == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert {m: set(m.__dict__) for m in model.modules()} == own
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert parts[0].keys() == batch.keys()
    assert all(torch.equal(parts[0][k], batch[k]) for k in batch)


def test_dropout_is_off_while_scoring():
    family = BY_NAME["gpt2"]
    plm = family.plm()
    for module in plm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    plm.train()
    one, two = (activation_scores(plm, examples(family)).scores["decoder"] for _ in range(2))
    assert torch.equal(one, two)


def test_sequence_classification_is_scored_too():
    config = BY_NAME["bert"].config()
    config.is_decoder, config.num_labels = False, 3
    plm = BertForSequenceClassification(config)
    bare = fingerprint.of_model(plm)
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    batch = {**BY_NAME["bert"].batch(), "labels": torch.tensor([0, 1, 2])}
    scores = activation_scores(model, [batch])
    assert scores.scores["encoder"].shape == (LAYERS, FFN)
    assert scores.metadata["model_fingerprint"] == bare  # PEFT wraps the head and trains a copy of it
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    PartialPLM(model, neuron_scores=scores)
    with pytest.raises(ModelError, match="no LM head"):
        activation_scores(model, [batch], kind="integrated_gradients")


def test_scoring_works_inside_no_grad():
    family = BY_NAME["llama"]
    model, parts = family.peft(), examples(family)
    usual = activation_scores(model, parts, kind="integrated_gradients").scores["decoder"]
    with torch.no_grad():
        inside = activation_scores(model, parts, kind="integrated_gradients").scores["decoder"]
    assert torch.equal(usual, inside)


# -- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load(family, tmp_path):
    model = family.peft()
    scores = activation_scores(model, examples(family), kind="max", metadata={"data": "toy", "seed": 3})
    path = tmp_path / "deep" / "scores.safetensors"
    scores.save(path)
    loaded = NeuronScores.load(str(path))
    assert loaded.scores.keys() == scores.scores.keys()
    assert all(torch.equal(loaded.scores[k], v) for k, v in scores.scores.items())
    assert loaded.metadata == scores.metadata
    assert set(loaded.metadata) == {
        *("kind", "model", "model_fingerprint", "examples", "tokens", "version", "data", "seed")
    }
    assert (loaded.metadata["kind"], loaded.metadata["data"], loaded.metadata["seed"]) == ("max", "toy", "3")
    one, two = (PartialPLM(model, neuron_scores=s) for s in (scores, loaded))
    stack = family.stacks[0]
    assert all(torch.equal(one.kept_neurons(stack, i, 9), two.kept_neurons(stack, i, 9)) for i in range(LAYERS))
    before = path.read_bytes()
    with pytest.raises(ScoreError, match=r"/proc/nowhere/s\.safetensors.*cannot be written"):
        scores.save("/proc/nowhere/s.safetensors")
    with pytest.raises(ScoreError, match=r"scores\.safetensors' exists already; remove it or choose another name"):
        scores.save(path)
    assert path.read_bytes() == before


def test_scores_of_the_earlier_rule_are_read_and_told(tmp_path, caplog):
    family = BY_NAME["llama"]
    for kind, told in (("mean", 1), ("integrated_gradients", 1), ("max", 0)):
        path = tmp_path / f"{kind}.safetensors"
        scores = activation_scores(family.peft(), examples(family), kind=kind, gradient_steps=1)
        earlier = {k: v for k, v in scores.metadata.items() if k != "averaged"}
        NeuronScores(scores.scores, earlier).save(path)
        caplog.clear()
        assert torch.equal(NeuronScores.load(path).scores["decoder"], scores.scores["decoder"])
        assert len(caplog.messages) == told
    caplog.clear()
    scores.save(tmp_path / "now.safetensors")
    NeuronScores.load(tmp_path / "now.safetensors")
    assert not caplog.messages


def test_the_second_of_two_writers_is_refused_and_others_may_read(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    first, second = (NeuronScores({"decoder": torch.full((2, 3), x)}, {"model_fingerprint": "0"}) for x in (1.0, 2.0))
    real = scoring.save_file

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(scoring, "save_file", real)
        first.save(path)
        real(*args, **kwargs)

    monkeypatch.setattr(scoring, "save_file", meanwhile)
    before = os.umask(0o022)
    try:
        with pytest.raises(ScoreError, match=r"scores\.safetensors' exists already"):
            second.save(path)
    finally:
        os.umask(before)
    assert torch.equal(NeuronScores.load(path).scores["decoder"], first.scores["decoder"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_files_that_are_no_scores_are_refused(tmp_path):
    family = BY_NAME["llama"]
    path = tmp_path / "scores.safetensors"
    activation_scores(family.peft(), examples(family)).save(path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:20], whole[:3], b"", b"decoder,0.1,0.2\n" * 9):
        path.write_bytes(broken)
        with pytest.raises(ScoreError, match=r"scores\.safetensors' is not a readable score file"):
            NeuronScores.load(path)
    with pytest.raises(ScoreError, match="is not a readable score file"):
        NeuronScores.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ScoreError, match="is not a readable score file"):
        NeuronScores.load(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"decoder": torch.rand(LAYERS, FFN)}, foreign)
    with pytest.raises(ScoreError, match=r"was not written by NeuronScores\.save"):
        NeuronScores.load(foreign)
    save_file({"decoder": torch.rand(FFN)}, foreign, metadata={"model_fingerprint": "0"})
    with pytest.raises(ScoreError, match=r"was not written by NeuronScores\.save"):
        NeuronScores.load(foreign)


def test_scores_of_an_earlier_version_say_so():
    scores = NeuronScores({"decoder": torch.rand(LAYERS, FFN)}, {"model_fingerprint": "0123456789abcdef"})
    with pytest.raises(
        ScoreError, match=r"earlier version .* sample of the weights.*score this model: activation_scores"
    ):
        PartialPLM(BY_NAME["llama"].plm(), neuron_scores=scores)


def test_scores_of_another_model_are_refused(family, tmp_path):
    scores = activation_scores(family.peft(), examples(family))
    scores.save(tmp_path / "s")
    other = family.plm(seed=1)
    for those in (scores, NeuronScores.load(tmp_path / "s")):
        with pytest.raises(ScoreError, match=r"are of the model .* score this model: activation_scores"):
            PartialPLM(other, neuron_scores=those)
    PartialPLM(family.peft(prompt=5), neuron_scores=scores)  # the prompt is no part of the model


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    family = BY_NAME["llama"]
    model, parts = family.peft(), examples(family)
    with pytest.raises(ScoreError, match="kind='median' is unknown; choose one of mean, max, integrated_gradients"):
        activation_scores(model, parts, kind="median")
    with pytest.raises(ScoreError, match="gradient_steps=0 must be a whole number of at least 1"):
        activation_scores(model, parts, kind="integrated_gradients", gradient_steps=0)
    with pytest.raises(ScoreError, match="calibration_batches is empty"):
        activation_scores(model, [])
    with pytest.raises(ScoreError, match="needs labels"):
        activation_scores(model, [{"input_ids": parts[0]["input_ids"]}], kind="integrated_gradients")
    padding = {**parts[0], "attention_mask": torch.zeros_like(parts[0]["attention_mask"])}
    activation_scores(model, [padding])  # the prompt's positions are real still
    broken = family.peft()
    broken.get_base_model().model.layers[1].mlp.up_proj.weight.data[0] = float("nan")
    for kind in ("mean", "max"):
        with pytest.raises(ScoreError, match="activations of the decoder are not finite"):
            activation_scores(broken, parts, kind=kind)


def test_scores_and_schedule_go_together(family):
    model = family.peft()
    partial = PartialPLM(model, neuron_scores=activation_scores(model, examples(family)))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=10)
    for stage in schedule.stages:
        partial.resize(stage)
        with torch.no_grad():
            assert torch.isfinite(model(**family.batch()).loss)


@pytest.mark.parametrize(
    "values", [torch.ones(2, 3, dtype=torch.int64), torch.full((2, 3), float("nan")), torch.ones(0, 3), torch.ones(3)]
)
def test_scores_that_are_none_are_refused(tmp_path, values):
    save_file({"decoder": values}, tmp_path / "s.safetensors", metadata={"model_fingerprint": "0"})
    with pytest.raises(ScoreError):
        NeuronScores.load(tmp_path / "s.safetensors")

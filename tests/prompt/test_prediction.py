"""Predictions are exact: batched or single, cached or not, and equal to plain `transformers`."""

from __future__ import annotations

import math

import pytest
import torch
from prompted import generate, score_labels
from settings import BY_NAME, FAMILIES, HIDDEN, VOCAB, Settings
from toy import toy

from fast_prompt_tuning.errors import DataError
from fast_prompt_tuning.plm.loading import load_plm, load_tokenizer
from fast_prompt_tuning.prompt.front import prompted_inputs
from fast_prompt_tuning.prompt.places import place
from fast_prompt_tuning.prompt.prediction import Prediction, by_length, combine
from fast_prompt_tuning.prompt.prompted import Input
from fast_prompt_tuning.prompt.soft_prompt import export_prompt
from fast_prompt_tuning.prompt.text_cache import TextCache
from fast_prompt_tuning.prompt.together import score_together
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import input_ids_of, open_session, predict

GENERATING = [f for f in FAMILIES if f.name not in ("bert", "roberta")]
LABELS = {"a": [5], "b": [6, 9], "c": [7, 8, 11], "d": [12]}


class Numbers:
    """A tokenizer that writes ids as numbers."""

    pad_token_id, eos_token_id = 1, 2

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(int(i)) for i in row if int(i) not in (1, 2)) for row in rows]


@pytest.fixture(params=GENERATING, ids=lambda s: s.name)
def generating(request) -> Settings:
    return request.param


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 6, 12)]


def prompt_of(on: bool):
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4)) if on else None


def same(one, two):
    assert [p.text for p in one] == [p.text for p in two]
    assert [p.score for p in one] == pytest.approx([p.score for p in two], abs=1e-4)
    for a, b in zip(one, two, strict=True):
        if a.label_scores:
            assert dict(a.label_scores) == pytest.approx(dict(b.label_scores), abs=1e-4)


@pytest.mark.parametrize("prompted", [True, False], ids=["prompt", "bare"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_batched_equals_single_and_cached_equals_uncached(generating, inputs, prompted, beams):
    plm, prompt = generating.plm(), prompt_of(prompted)

    def answers(rows, **options):
        return generate(plm, Numbers(), prompt, rows, max_new_tokens=5, num_beams=beams, **options)

    batched = answers(inputs)
    assert len({round(p.score, 3) for p in batched}) > 1
    same(batched, [answers([ids])[0] for ids in inputs])
    same(batched, answers(inputs, batch_size=2))
    cached = plm.generate
    plm.generate = lambda **options: cached(**{**options, "use_cache": False})
    same(batched, answers(inputs))


@pytest.mark.parametrize("prompted", [True, False], ids=["prompt", "bare"])
def test_label_scores_batched_equal_single_and_a_sum_of_log_probabilities(generating, inputs, prompted):
    plm, prompt = generating.plm(), prompt_of(prompted)
    batched = score_labels(plm, prompt, inputs, LABELS)
    same(batched, [score_labels(plm, prompt, [ids], LABELS)[0] for ids in inputs])
    same(batched, score_labels(plm, prompt, inputs, LABELS, batch_size=4))
    one_token = {k: v for k, v in LABELS.items() if len(v) == 1}
    for found, short in zip(batched, score_labels(plm, prompt, inputs, one_token), strict=True):
        assert {k: found.label_scores[k] for k in one_token} == pytest.approx(dict(short.label_scores), abs=1e-4)
    normal = score_labels(plm, prompt, inputs, LABELS, length_normalize=True)
    for ids, found, per_token in zip(inputs, batched, normal, strict=True):
        expected = {word: brute_force(plm, prompt, ids, label) for word, label in LABELS.items()}
        assert dict(found.label_scores) == pytest.approx(expected, abs=1e-4)
        assert found.text == max(expected, key=expected.get)
        assert found.score == max(found.label_scores.values())
        means = {word: value / len(LABELS[word]) for word, value in expected.items()}
        assert dict(per_token.label_scores) == pytest.approx(means, abs=1e-4)
        assert per_token.text == max(means, key=means.get)


def brute_force(plm, prompt, ids, label, start=None):
    embed = plm.get_input_embeddings()
    front = [] if prompt is None else [prompt]
    with torch.no_grad():
        if plm.config.is_encoder_decoder:
            embeds = torch.cat([*front, embed(torch.tensor(ids))])[None]
            labels = torch.tensor([label])
            shifted = plm.prepare_decoder_input_ids_from_labels(labels=labels)
            if start is not None:  # mBART begins with a target's last token, in training alone
                shifted[0, 0] = start
            logits = plm(inputs_embeds=embeds, decoder_input_ids=shifted).logits[0]
        else:
            embeds = torch.cat([*front, embed(torch.tensor([*ids, *label]))])[None]
            logits = plm(inputs_embeds=embeds).logits[0, -len(label) - 1 : -1]
    return sum(float(row.log_softmax(-1)[i]) for row, i in zip(logits, label, strict=True))


def test_greedy_equals_plain_transformers_and_a_loop_of_our_own(generating, inputs):
    plm, prompt = generating.plm(), prompt_of(True)
    found = generate(plm, Numbers(), prompt, inputs, max_new_tokens=4)
    embed = plm.get_input_embeddings()
    for ids, prediction in zip(inputs, found, strict=True):
        embeds = torch.cat([prompt, embed(torch.tensor(ids))])[None]
        with torch.no_grad():
            out = plm.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, num_beams=1)
        new = out[:, 1:] if plm.config.is_encoder_decoder else out
        assert Numbers().batch_decode(new, True) == [prediction.text]
        tokens = [int(t) for t in prediction.text.split()]
        if len(tokens) == 4:  # no end of sequence: the score is the mean over just these tokens
            start = getattr(plm.config, "decoder_start_token_id", None)
            assert prediction.score == pytest.approx(brute_force(plm, prompt, ids, tokens, start) / 4, abs=1e-4)


def test_the_mode_and_the_options_that_were_come_back(inputs):
    plm = GENERATING[0].plm().train()
    options = plm.generation_config
    options.temperature = 0.3
    generate(plm, Numbers(), None, inputs, max_new_tokens=2)
    assert plm.training
    score_labels(plm.eval(), None, inputs, LABELS)
    assert not plm.training
    with pytest.raises(IndexError):
        generate(plm, Numbers(), None, [[VOCAB + 5]], max_new_tokens=2)
    assert not plm.training
    assert plm.generation_config is options
    assert all(p.grad is None for p in plm.parameters())


def test_prompt_in_front_of_the_text_and_padding_outside_both():
    plm = next(f for f in GENERATING if f.name == "llama").plm()
    prompt = prompt_of(True)
    rows = [[5, 6, 7], [8]]
    right, left = (prompted_inputs(plm, prompt, rows, left=side) for side in (False, True))
    assert right.mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert left.mask.tolist() == [[1] * 6, [0] * 2 + [1] * 4]
    assert torch.equal(right.embeds[1, :3], prompt)
    assert torch.equal(left.embeds[1, 2:5], prompt)
    assert torch.equal(left.embeds[1, 5], plm.get_input_embeddings().weight[8])


def test_order_of_like_lengths():
    assert by_length([[1], [1, 2, 3], [1, 2]]) == [1, 2, 0]


def test_long_work_says_how_far_it_is(inputs, monkeypatch, caplog):
    plm, prompt = GENERATING[0].plm(), prompt_of(True)
    caplog.set_level("INFO", "fast_prompt_tuning.progress")
    score_labels(plm, prompt, inputs[:5], LABELS, batch_size=2)
    assert not caplog.messages
    monkeypatch.setattr("fast_prompt_tuning.prompt.prediction.PROGRESS_SECONDS", 0.0)
    score_labels(plm, prompt, inputs[:5], LABELS, batch_size=2)
    assert [m.split(",")[0] for m in caplog.messages] == ["2 of 5 inputs done", "4 of 5 inputs done"]
    assert caplog.messages[-1].endswith(" s left")


class Lines(Numbers):
    """Every third token is a line break, every fifth has one after text."""

    def __len__(self):
        return VOCAB - 3  # some of the model's ids are no token

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(self.write(int(i)) for i in row if int(i) not in (1, 2)) for row in rows]

    def write(self, i):
        return "\n" if i % 3 == 0 else f" {i}\n" if i % 5 == 0 else f" {i}"


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_the_first_line_is_kept_and_rows_end_with_it(family, inputs, beams, placement, monkeypatch):
    plm, prompt = next(f for f in GENERATING if f.name == family).plm(), prompt_of(True)
    options = {"max_new_tokens": 9, "num_beams": beams, "placement": placement}
    whole = generate(plm, Lines(), prompt, inputs, **options)
    lengths = []
    original = type(plm).generate

    def watched(*args, **kwargs):
        out = original(*args, **kwargs)
        lengths.append(out.sequences.shape[1])
        return out

    monkeypatch.setattr(type(plm), "generate", watched)
    first = generate(plm, Lines(), prompt, inputs, stop_at_newline=True, batch_size=1, **options)
    assert [p.text for p in first] == [p.text.split("\n")[0].strip() for p in whole]
    if beams == 1 and family != "t5":  # whose answers are one token, again and again
        assert any("\n" in p.text for p in whole)
        assert min(lengths) < max(lengths)


def test_scores_of_lines_are_those_of_a_batch_of_one_without_an_end_of_sequence(inputs):
    class Endless(Lines):
        eos_token_id = None

    plm = next(f for f in GENERATING if f.name == "llama").plm()
    options = {"max_new_tokens": 9, "stop_at_newline": True}
    together = generate(plm, Endless(), prompt_of(True), inputs, **options)
    same(together, generate(plm, Endless(), prompt_of(True), inputs, batch_size=1, **options))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_generation_that_looks_a_step_ahead_is_scored_alike(family, inputs, monkeypatch):
    """As `generate` does on devices where asking whether all rows have ended is slow."""
    plm = next(f for f in GENERATING if f.name == family).plm()
    expected = generate(plm, Numbers(), None, inputs, max_new_tokens=5)
    original = type(plm).generate

    def ahead(self, *args, logits_processor, **kwargs):
        out = original(self, *args, logits_processor=logits_processor, **kwargs)
        logits_processor[0](out.sequences, torch.randn(len(out.sequences), VOCAB))
        return out

    monkeypatch.setattr(type(plm), "generate", ahead)
    same(generate(plm, Numbers(), None, inputs, max_new_tokens=5), expected)


def test_labels_are_needed(inputs):
    plm = GENERATING[0].plm()
    for labels in ({}, {"a": []}):
        with pytest.raises(DataError, match="at least one"):
            score_labels(plm, None, inputs, labels)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_greedy_through_the_exported_prompt_equals_ours(tmp_path, name):
    from safetensors import safe_open

    model = str(toy().model(name))
    config = load(toy().recipe(tmp_path / "run", model__path=model, data__task=str(toy().words), train__steps=5))
    run.train(config)
    assert export_prompt(tmp_path / "run" / "prompt", tmp_path / "prompt.safetensors") == (3, HIDDEN)
    with safe_open(tmp_path / "prompt.safetensors", "pt") as file:
        assert list(file.keys()) == ["prompt_embeds"]
        prompt = file.get_tensor("prompt_embeds")
    plm, tokenizer = load_plm(model, dtype="float32"), load_tokenizer(model)
    session = open_session(config, ("test",))
    rows = input_ids_of(session, session.encoded["test"])
    ours, _, _ = predict(session, session.prompted(prompt), session.encoded["test"])
    for ids, found in zip(rows, ours, strict=True):
        text = plm.get_input_embeddings()(torch.tensor(ids, device=plm.device))
        embeds = torch.cat([prompt.to(text), text])[None]
        out = plm.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
        assert tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip() == found.text


# -- several prompts at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated", "bart"])
def test_prompts_in_one_batch_answer_as_each_alone(name):
    family = BY_NAME[name]
    plm = family.plm()
    prompts = torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    inputs = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    labels = {"one": [20], "two": [21, 22]}
    repeated = [ids for ids in inputs for _ in prompts]
    together = score_labels(plm, prompts, repeated, labels, batch_size=4)
    for k, prompt in enumerate(prompts):
        alone = score_labels(plm, prompt, inputs, labels, batch_size=1)
        for i, answer in enumerate(alone):
            assert together[i * 3 + k].label_scores == pytest.approx(answer.label_scores, abs=1e-4)


def test_an_ensemble_agrees_by_probabilities_or_votes():
    sure = Prediction("a", -0.1, {"a": -0.1, "b": -5.0})
    doubtful = [Prediction("b", -0.69, {"a": -0.70, "b": -0.69}), Prediction("b", -0.6, {"a": -0.7, "b": -0.6})]
    assert combine([sure, *doubtful]).text == "a"
    assert combine([sure, *doubtful], "votes").text == "b"
    assert combine([sure, doubtful[0]], "votes").text == "a"  # a tie goes to the surer side
    both = combine([sure, *doubtful])
    assert sum(math.exp(v) for v in both.label_scores.values()) == pytest.approx(1)
    with pytest.raises(DataError, match="ensemble='odd'"):
        combine([sure], "odd")
    with pytest.raises(DataError, match="use votes for generated"):
        combine([Prediction("text", -1.0)])
    assert combine([Prediction("x", -1.0), Prediction("y", -2.0), Prediction("y", -3.0)], "votes").text == "y"


def test_a_model_whose_output_is_no_number_answers_nothing(caplog):
    plm = BY_NAME["llama"].plm()
    good = score_labels(plm, None, [[5, 6]], {"a": [7], "b": [8]})
    assert good[0].text in ("a", "b")
    with torch.no_grad():
        plm.get_output_embeddings().weight[:] = float("nan")
    (found,) = score_labels(plm, None, [[5, 6]], {"a": [7], "b": [8]})
    assert found.text == ""
    assert math.isnan(found.score)
    assert "1 of 1 inputs have no answer: the model's output is not a number" in caplog.text
    assert combine([found, *good]).text == ""


@pytest.mark.parametrize("placement", ["prefix", "suffix", "infix"])
def test_prompts_that_score_together_score_as_each_does_alone(placement):
    plm, kept = BY_NAME["llama"].plm(), None
    if placement != "prefix":
        kept = TextCache(plm)
    prompts = torch.randn(3, 4, plm.config.hidden_size)
    choices = [{"a": [5], "b": [6]}, {"c": [6], "d": [7], "e": [9]}, {"a": [8], "c": [5]}]
    texts = [[7, 8, 9, 5], [6, 5], [9, 9, 8]]
    asked = [place(plm, prompt, placement, kept) for prompt in prompts]
    inputs = [[Input([*text, *range(5, 6 + n)], 1 + n) for text in texts] for n in range(3)]
    found = score_together(asked, inputs, choices, batch_size=4)
    for each, rows, words, predictions in zip(asked, inputs, choices, found, strict=True):
        alone, _ = each.score(rows, words)
        assert [p.text for p in predictions] == [p.text for p in alone]
        for one, other in zip(predictions, alone, strict=True):
            assert one.label_scores == pytest.approx(other.label_scores, rel=1e-4)

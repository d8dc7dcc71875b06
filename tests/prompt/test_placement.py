"""Prompts after the text: cached and uncached computations of the same placement are one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from prompted import rows_of, score_labels
from safetensors import safe_open
from settings import BY_NAME, FAMILIES, FFN, HIDDEN, LAYERS, VOCAB, Settings
from torch.nn import functional as F
from toy import toy
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TextStreamer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from fast_prompt_tuning.cost.shapes import BatchShape
from fast_prompt_tuning.cost.work import PromptPass, TextPass
from fast_prompt_tuning.errors import ConfigError, ModelError
from fast_prompt_tuning.plm import families
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt import text_attention
from fast_prompt_tuning.prompt import text_states as text_states_module
from fast_prompt_tuning.prompt.after_text import WithinText
from fast_prompt_tuning.prompt.soft_prompt import export_prompt, place_of
from fast_prompt_tuning.prompt.suffix_model import SuffixPromptModel, load_soft_prompt, suffix_loss
from fast_prompt_tuning.prompt.text_cache import TextCache
from fast_prompt_tuning.prompt.text_states import text_states
from fast_prompt_tuning.schedule.stages import Stage

EXACT = {"atol": 1e-9, "rtol": 1e-9}
# Root-mean-square norms and rotary angles are float32 whatever the model's dtype.
SINGLE = {"atol": 1e-5, "rtol": 1e-3, "check_dtype": False}
SUFFIX = [s for s in FAMILIES if s.stacks != ("encoder",)]
PROMPT = 3
AFTER = [3, 2, 5, 4]  # of texts of 9, 6, 4 and 1 tokens, whose first token stays in front of the prompt
INFIX = [s for s in SUFFIX if not s.encoder_decoder]
SEQ2SEQ = [s for s in SUFFIX if s.encoder_decoder]


@pytest.fixture(params=SUFFIX, ids=lambda s: s.name)
def placed(request) -> Settings:
    return request.param


def ids_and_labels(family: Settings, side: str = "right") -> dict[str, torch.Tensor]:
    """Texts of 9, 6, 4 and 1 tokens and targets of 3, 1, 2 and 4 in one padded batch."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (9, 6, 4, 1)]
    targets = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (3, 1, 2, 4)]

    def pad(rows, value):
        width = max(map(len, rows))
        fill = [[value] * (width - len(r)) for r in rows]
        return torch.tensor([r + f if side == "right" else f + r for r, f in zip(rows, fill, strict=True)])

    if family.encoder_decoder:
        labels = torch.full((4, 4), -100)
        for row, target in enumerate(targets):
            labels[row, : len(target)] = torch.tensor(target)
        rows = texts
    else:
        rows = [a + b for a, b in zip(texts, targets, strict=True)]
        labels = pad([[-100] * len(a) + b for a, b in zip(texts, targets, strict=True)], -100)
    return {
        "input_ids": pad(rows, 1),
        "attention_mask": pad([[1] * len(r) for r in rows], 0),
        "labels": labels,
        "texts": texts,
        "targets": targets,
    }


def parted(texts: list[list[int]], after: list[int] | None) -> list[tuple[list[int], list[int]]]:
    """What of each text stands before the prompt and after it."""
    ends = [max(1, len(t) - n) for t, n in zip(texts, after or [0] * len(texts), strict=True)]
    return [(t[:i], t[i:]) for t, i in zip(texts, ends, strict=True)]


def uncached_loss(plm, prompt: torch.Tensor, batch, after: list[int] | None = None) -> torch.Tensor:
    """Mean cross-entropy, each row in one pass of the PLM alone: no cache, no padding, no second part."""
    embed = plm.get_input_embeddings()
    losses = []
    for (text, end), target in zip(parted(batch["texts"], after), batch["targets"], strict=True):
        labels = torch.tensor(target)
        if plm.config.is_encoder_decoder:
            start = plm.prepare_decoder_input_ids_from_labels(labels=labels[None])
            inputs = torch.cat([prompt, embed(start)[0]])[None]
            logits = plm(input_ids=torch.tensor([text]), decoder_inputs_embeds=inputs, use_cache=False).logits[0]
            logits = logits[len(prompt) :]
        else:
            inputs = torch.cat([embed(torch.tensor(text)), prompt, embed(torch.tensor([*end, *target]))])[None]
            logits = plm(inputs_embeds=inputs, use_cache=False).logits[0, -len(labels) - 1 : -1]
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses).mean()


def suffix_model(
    family: Settings, placement: str = "suffix", *, cross_attention: bool = False, **changes
) -> SuffixPromptModel:
    plm = family.plm(**changes).double()
    cache = TextCache(plm, cross_attention=cross_attention)
    model = SuffixPromptModel(plm, PROMPT, placement=placement, cache=cache).eval()
    model.soft_prompt.data = model.soft_prompt.data.double()
    return model


def tolerance(model: SuffixPromptModel) -> dict[str, float]:
    """Eager attention rounds its weights to float32, but not to a text that stands before the prompt."""
    rounded = model.config._attn_implementation == "eager" and not model.config.is_encoder_decoder
    return {"atol": 1e-6, "rtol": 1e-6} if rounded else EXACT


def tensors(batch):
    return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize(("attention", "side"), [("eager", "right"), ("eager", "left"), ("sdpa", "right")])
@pytest.mark.parametrize("placement", ["suffix", "infix"])
def test_loss_and_prompt_gradient_equal_the_uncached_ones(placed, attention, side, placement):
    if placement == "infix" and placed.encoder_decoder:
        with pytest.raises(ModelError, match="an encoder reads its text as a whole"):
            suffix_model(placed, placement)
        return
    model, batch = suffix_model(placed, placement), ids_and_labels(placed, side)
    after = AFTER if placement == "infix" else None
    batch["n_after"] = None if after is None else torch.tensor(after)
    try:
        model.plm.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{placed.name} has no {attention} attention")
    check_losses_at_every_size(model, placed, batch, after)


def texts_run(model: SuffixPromptModel, batch) -> tuple[TextPass, ...]:
    """The texts that a loss has to run."""
    return model.prompted.loss({**batch, "n_tail": batch.get("n_after")}).work.texts


def check_losses_at_every_size(model, family: Settings, batch, after: list[int] | None = None) -> None:
    partial, attention = PartialPLM(model, keep_neurons="first"), model.config._attn_implementation
    for layers, ffn in [(LAYERS, FFN), (3, 10), (LAYERS, FFN)]:
        partial.resize(family.stage(layers, ffn))
        wanted = uncached_loss(model.plm, model.soft_prompt, batch, after)
        (gradient,) = torch.autograd.grad(wanted, model.soft_prompt)
        exact = tolerance(model)
        for _ in range(2):  # the second time from the cache
            loss = suffix_loss(model, tensors(batch))
            (got,) = torch.autograd.grad(loss, model.soft_prompt)
            torch.testing.assert_close(loss, wanted, **exact)
            torch.testing.assert_close(got, gradient, **SINGLE)
            assert model.config._attn_implementation == attention
            assert gradient.abs().sum() > 1e-3
        assert not texts_run(model, tensors(batch))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SEQ2SEQ, ids=lambda s: s.name)
def test_kept_cross_attention_is_exact_and_computed_once(family, attention, monkeypatch):
    model, batch = suffix_model(family, cross_attention=True), ids_and_labels(family)
    model.plm.set_attn_implementation(attention)
    check_losses_at_every_size(model, family, batch)
    partial = PartialPLM(model, keep_neurons="first")
    for layers in (2, 3, LAYERS):  # the encoder as it is
        partial.resize(Stage({"decoder": layers}, {"decoder": FFN}, stacks=("decoder",)))
        torch.testing.assert_close(
            suffix_loss(model, tensors(batch)), uncached_loss(model.plm, model.soft_prompt, batch), **EXACT
        )
    partial.restore()
    model.train()
    wanted = suffix_loss(model, tensors(batch))  # at the full size, whose texts are all kept
    projections = [
        projection
        for name, module in model.plm.named_modules()
        if name.endswith((".EncDecAttention", ".encoder_attn"))
        for projection in (getattr(module, "k", None) or module.k_proj, getattr(module, "v", None) or module.v_proj)
    ]
    assert len(projections) == 2 * LAYERS
    for projection in projections:
        monkeypatch.setattr(projection, "forward", lambda *_: pytest.fail("computed again"))
    assert torch.equal(suffix_loss(model, tensors(batch)), wanted)
    assert not texts_run(model, tensors(batch))


def test_kept_cross_attention_drops_out_as_it_does_without():
    losses = []
    for cross in (False, True):
        model, batch = suffix_model(BY_NAME["t5"], cross_attention=cross), ids_and_labels(BY_NAME["t5"])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        still = suffix_loss(model, tensors(batch))  # fills the cache
        model.train()
        torch.manual_seed(7)
        losses.append(suffix_loss(model, tensors(batch)))
        assert abs(losses[-1] - still) > 1e-3
    torch.testing.assert_close(*losses, **EXACT)


def test_a_prompt_of_token_embeddings_is_those_tokens(placed):
    model, batch = suffix_model(placed), ids_and_labels(placed)
    words = [5, 17, 40]
    with torch.no_grad():
        model.soft_prompt.copy_(model.plm.get_input_embeddings()(torch.tensor(words)))
    got = suffix_loss(model, tensors(batch))
    losses = []
    for text, target in zip(batch["texts"], batch["targets"], strict=True):
        labels = torch.tensor([target])
        if placed.encoder_decoder:
            start = model.plm.prepare_decoder_input_ids_from_labels(labels=labels)
            ids = torch.cat([torch.tensor([words]), start], 1)
            logits = model.plm(input_ids=torch.tensor([text]), decoder_input_ids=ids).logits[0, PROMPT:]
        else:
            ids = torch.tensor([[*text, *words, *target]])
            logits = model.plm(input_ids=ids).logits[0, len(text) + PROMPT - 1 : -1]
        losses.append(F.cross_entropy(logits, labels[0], reduction="none"))
    torch.testing.assert_close(got, torch.cat(losses).mean(), **tolerance(model))


def test_evaluation_and_generation_agree_with_the_uncached_model(placed):
    """Label scores of one and of two tokens, greedy and beam answers: a batch of many as one text alone, uncached."""
    check_evaluation_and_generation(suffix_model(placed), placed)


@pytest.mark.parametrize("family", SEQ2SEQ, ids=lambda s: s.name)
def test_evaluation_and_generation_from_kept_cross_attention(family):
    check_evaluation_and_generation(suffix_model(family, cross_attention=True), family)


def check_evaluation_and_generation(model: SuffixPromptModel, placed: Settings) -> None:
    batch = ids_and_labels(placed)
    plm, prompt = model.plm, model.soft_prompt.detach()
    texts = batch["texts"]
    for labels in ({"a": [7], "b": [9], "c": [30]}, {"a": [7, 8], "b": [9, 4]}):
        found = score_labels(plm, prompt, texts, labels, batch_size=3, placement="suffix", cache=model.cache)
        for text, answer in zip(texts, found, strict=True):
            for word, ids in labels.items():
                alone = uncached_loss(plm, prompt, {"texts": [text], "targets": [ids]}) * len(ids)
                assert answer.label_scores[word] == pytest.approx(-alone.item(), rel=1e-5)
    several = torch.stack([prompt, prompt.flip(0)])
    mixed = score_labels(plm, several, [texts[0], texts[0]], labels, placement="suffix", cache=model.cache)
    flipped = score_labels(plm, prompt.flip(0), [texts[0]], labels, placement="suffix")
    assert mixed[0] == found[0]
    assert mixed[1].label_scores == pytest.approx(flipped[0].label_scores, rel=1e-9)

    model.float()  # in float64 the masks of Gemma 2 overflow its float32 softmax, with padding on the left
    prompt, new = model.soft_prompt.detach(), 5
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not placed.encoder_decoder:
        rows = [F.pad(torch.tensor(t), (ids.shape[1] - len(t), 0), value=1) for t in texts]
        ids = torch.stack(rows)
        mask = torch.stack([F.pad(torch.ones(len(t), dtype=torch.long), (ids.shape[1] - len(t), 0)) for t in texts])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    out = model.generate(ids, mask, **options)
    kept = 1 if placed.encoder_decoder else ids.shape[1]
    assert out.shape == (4, kept + new)
    if not placed.encoder_decoder:
        assert torch.equal(out[:, :kept], ids)
    for text, answer in zip(texts, out[:, kept:].tolist(), strict=True):
        assert answer == greedy_alone(plm, prompt, text, new)
    beams = model.generate(ids, mask, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, **options)
    assert beams.sequences.shape == (8, kept + new)
    single = model.generate(ids[:1], mask[:1], num_beams=3, num_return_sequences=2, **options)
    assert torch.equal(beams.sequences[:2], single)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_generate_takes_what_the_plms_own_takes(name):
    family = BY_NAME[name]
    model = suffix_model(family).float()
    plm, batch = model.plm, family.batch()
    plm.generation_config.eos_token_id = None
    with torch.no_grad():
        model.soft_prompt.mul_(20)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    if not family.encoder_decoder:
        inputs = {k: v.flip(1) for k, v in inputs.items()}  # padding on the left
    usual = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, use_cache=False), usual)
    plm.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), usual)
    plm.generation_config.cache_implementation = None
    for options in ({"max_length": usual.shape[1]}, {"max_length": usual.shape[1], "min_length": usual.shape[1]}):
        assert model.generate(**inputs, **options).shape == plm.generate(**inputs, **options).shape == usual.shape
    beams = GenerationConfig(num_beams=3, max_new_tokens=5)
    assert torch.equal(
        model.generate(**inputs, generation_config=beams), model.generate(**inputs, num_beams=3, max_new_tokens=5)
    )
    several = GenerationConfig(do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert model.generate(**inputs, generation_config=several).shape == (3 * len(usual), usual.shape[1])
    before = plm.generation_config.to_dict()
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(**inputs, no_such_option=1)
    assert plm.generation_config.to_dict() == before


@pytest.mark.parametrize("placement", ["suffix", "infix"])
def test_a_pipeline_answers_as_the_model_does(placement, capsys):
    """`transformers.pipeline`: one text, several of different lengths, beams, streamed."""
    plm = AutoModelForCausalLM.from_pretrained(toy().llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(toy().llama, padding_side="left")
    model = SuffixPromptModel(plm, 3, placement=placement)
    after = {"n_after": 1} if placement == "infix" else {}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert "SuffixPromptModel" in repr(pipe)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, **after}
    texts = ["the ball goal", "a bank market of profit"]
    for beams in (1, 3):
        written = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            found = model.generate(ids, num_beams=beams, max_new_tokens=5, do_sample=False, **after)
            written.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        answers = [pipe(text, num_beams=beams, **options)[0]["generated_text"] for text in texts]
        assert answers == written
        both = [row[0]["generated_text"] for row in pipe(texts, num_beams=beams, batch_size=2, **options)]
        assert both == written
        if beams == 1:
            streamed = written[0]
    capsys.readouterr()
    for skip in (False, True):
        pipe(texts[0], streamer=TextStreamer(tokenizer, skip_prompt=skip, skip_special_tokens=True), **options)
        shown = capsys.readouterr().out.strip()
        assert shown.split() == ([] if skip else texts[0].split()) + streamed.split()


@pytest.mark.parametrize("guessing", [{"assistant_model": "itself"}, {"prompt_lookup_num_tokens": 2}])
def test_assisted_generation_is_refused(guessing):
    model = suffix_model(BY_NAME["llama"])
    guessing = {name: model.plm if value == "itself" else value for name, value in guessing.items()}
    with pytest.raises(ConfigError, match=f"{next(iter(guessing))} guesses tokens from those of the text"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, **guessing)


def test_a_prompt_and_a_target_the_decoder_has_no_positions_for():
    model = SuffixPromptModel(BY_NAME["pegasus"].plm(), 20)
    ids = torch.randint(3, VOCAB, (2, 60))
    with pytest.raises(ModelError, match="a prompt of 20 tokens and a target of 60 need 80 positions"):
        model(input_ids=ids[:, :10], labels=ids)


def test_a_process_that_runs_a_text_for_others_keeps_it_once(monkeypatch, caplog):
    plm = BY_NAME["llama"].plm()
    cache = TextCache(plm)
    first = text_states(plm, [[5, 6, 7], [8, 9]], cache)
    monkeypatch.setattr(text_states_module, "any_process", lambda *_: True)  # another process lacks a text
    again = text_states(plm, [[5, 6, 7], [8, 9]], cache)
    assert (again.ran, len(cache)) == ((1, 3), 2)
    torch.testing.assert_close(again.states, first.states)
    assert not caplog.records  # the budget is not spent


def test_texts_run_under_autocast_are_other_texts():
    plm = BY_NAME["llama"].plm()
    cache = TextCache(plm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text_states(plm, [[5, 6, 7]], cache)
        assert text_states(plm, [[5, 6, 7]], cache).ran == (0, 0)
    found = text_states(plm, [[5, 6, 7]], cache)
    assert found.ran == (1, 3)
    assert torch.equal(found.states, text_states(plm, [[5, 6, 7]]).states)


@pytest.mark.parametrize("family", INFIX, ids=lambda s: s.name)
def test_a_prompt_within_the_text_scores_and_answers_as_the_uncached_model(family):
    """As above, each row with another number of tokens behind the prompt."""
    model, batch = suffix_model(family, "infix"), ids_and_labels(family)
    plm, prompt, texts = model.plm, model.soft_prompt.detach(), batch["texts"]
    kept = {"placement": "infix", "after": AFTER, "cache": model.cache}
    for labels in ({"a": [7], "b": [9], "c": [30]}, {"a": [7, 8], "b": [9, 4]}):
        found = score_labels(plm, prompt, texts, labels, batch_size=3, **kept)
        for text, after, answer in zip(texts, AFTER, found, strict=True):
            for word, ids in labels.items():
                alone = uncached_loss(plm, prompt, {"texts": [text], "targets": [ids]}, [after]) * len(ids)
                assert answer.label_scores[word] == pytest.approx(-alone.item(), rel=1e-5)
    _, work = WithinText(plm, prompt).score(rows_of(texts, AFTER), labels)
    (ran,) = work.texts  # only what stands before the prompt
    assert (ran.examples, ran.tokens) == (len(texts), max(len(first) for first, _ in parted(texts, AFTER)))

    model.float()  # as above
    prompt, new = model.soft_prompt.detach(), 5
    rows = [F.pad(torch.tensor(t), (9 - len(t), 0), value=1) for t in texts]
    masks = [F.pad(torch.ones(len(t), dtype=torch.long), (9 - len(t), 0)) for t in texts]
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    out = model.generate(torch.stack(rows), torch.stack(masks), n_after=torch.tensor(AFTER), **options)
    for text, after, answer in zip(texts, AFTER, out[:, 9:].tolist(), strict=True):
        assert answer == greedy_alone(plm, prompt, text, new, after)
    beams = model.generate(torch.stack(rows), torch.stack(masks), n_after=AFTER, num_beams=3, **options)
    assert torch.equal(beams[:1], model.generate(rows[0][None], n_after=AFTER[:1], num_beams=3, **options))


def test_texts_that_share_their_beginning_are_run_once():
    plm = BY_NAME["llama"].plm()
    model = SuffixPromptModel(plm, PROMPT, placement="infix", cache=TextCache(plm))
    ids = torch.tensor([[5, 6, 7, 8, 9, 20], [5, 6, 7, 10, 11, 20]])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 20
    batch = {"input_ids": ids, "labels": labels, "n_after": torch.tensor([2, 2])}
    assert suffix_loss(model, batch).isfinite()
    assert not texts_run(model, batch)
    model.cache = None
    work = model.prompted.loss({**batch, "n_tail": batch["n_after"]}).work
    assert work.texts == (TextPass(1, 3),)
    shape = BatchShape(batch=2, input_tokens=5, prompt_tokens=PROMPT, target_tokens=1, label_tokens=1)
    assert work.prompts == (PromptPass(shape.apart(tail=2), "step"),)
    for wrong, problem in ((model, "is missing"), (SuffixPromptModel(model.plm, PROMPT), "is given")):
        given = {k: v for k, v in batch.items() if k != "n_after" or problem == "is given"}
        with pytest.raises(ModelError, match=f"n_after {problem}"):
            suffix_loss(wrong, given)
    with pytest.raises(ModelError, match="n_after is missing"):
        model.generate(ids)
    with pytest.raises(ConfigError, match="placement='prefix' is unknown here; choose suffix or infix"):
        SuffixPromptModel(model.plm, placement="prefix")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_to_the_text_is_ours_where_it_can_be(attention, monkeypatch):
    calls = []
    ours = AttentionInterface._global_mapping[text_attention._APART]
    counted = lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, text_attention._APART, counted)
    model, batch = suffix_model(BY_NAME["llama"]), tensors(ids_and_labels(BY_NAME["llama"]))
    model.plm.set_attn_implementation(attention)
    loss = suffix_loss(model, batch)
    assert len(calls) == LAYERS
    monkeypatch.setattr(text_attention, "_FEW", 3)  # fewer than prompt and target are
    torch.testing.assert_close(suffix_loss(model, batch), loss, **tolerance(model))
    assert len(calls) == (2 * LAYERS if attention == "eager" else LAYERS)  # a fused kernel keeps no scores
    monkeypatch.setattr(type(model.plm), "_supports_attention_backend", False)
    torch.testing.assert_close(suffix_loss(model, batch), loss, **tolerance(model))
    assert len(calls) <= 2 * LAYERS


def test_an_architecture_without_attention_functions_is_exact_too(monkeypatch):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    monkeypatch.setattr(families, "REGISTRY", dict(families.REGISTRY))
    stack = families.StackSpec(
        layers="h",
        ffn_in=(("mlp.c_fc",),),
        ffn_out="mlp.c_proj",
        self_attention="attn",
        count_fields=("num_layers",),
        heads_field="num_heads",
    )
    families.register(families.Family(name="gpt_neo", stacks={"decoder": stack}))
    config = GPTNeoConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2, num_heads=4, intermediate_size=24,
                          attention_types=[[["global"], 2]], max_position_embeddings=64)  # fmt: skip
    plm = GPTNeoForCausalLM(config).double().eval()
    model = SuffixPromptModel(plm, PROMPT, cache=TextCache(plm)).double().eval()
    batch = ids_and_labels(BY_NAME["llama"])
    torch.testing.assert_close(
        suffix_loss(model, tensors(batch)), uncached_loss(plm, model.soft_prompt, batch), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_that_fit_by_themselves_fit_together(name):
    """The longest beginning and the longest end of two rows are more positions than the model has."""
    family = BY_NAME[name]
    model = SuffixPromptModel(family.plm(), PROMPT, placement="infix").eval()
    limit = model.config.max_position_embeddings
    texts, after, target = [[5] * (limit - 10), [6] * 22], [2, 20], [7, 8]
    rows = [t + target for t in texts]
    width = max(map(len, rows))
    ids = torch.tensor([r + [1] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    labels = torch.tensor([[-100] * len(t) + target + [-100] * (width - len(t) - 2) for t in texts])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "n_after": torch.tensor(after)}
    together = suffix_loss(model, batch)
    alone = [suffix_loss(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    score_labels(model.plm, model.soft_prompt, texts, {"a": [7, 8]}, placement="infix", after=after)
    ids, mask = torch.full((2, limit - 10), 1), torch.zeros(2, limit - 10, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, -len(text) :], mask[i, -len(text) :] = torch.tensor(text), 1
    assert model.generate(ids, mask, n_after=after, max_new_tokens=2).shape == (2, limit - 8)


@pytest.mark.parametrize("wrong", [[-1, 2, 1], [1, 2], [True, 1, 1], [0.5, 1, 1], [[1], [2], [1]]])
def test_counts_that_are_none_are_refused(wrong):
    model, batch = SuffixPromptModel(BY_NAME["llama"].plm(), PROMPT, placement="infix"), BY_NAME["llama"].batch()
    for counts in (wrong, torch.tensor(wrong)) if wrong[0] is not True else (wrong,):
        with pytest.raises(ModelError, match="must be a whole number of at least 0 for each of the 3 texts"):
            suffix_loss(model, {**batch, "n_after": counts})
        with pytest.raises(ModelError, match="must be a whole number"):
            model.generate(batch["input_ids"], n_after=counts)
    plm, prompt = model.plm, model.soft_prompt
    for options, message in (
        ({"placement": "behind"}, "placement='behind' is unknown; choose one of prefix, suffix, infix"),
    ):
        with pytest.raises(ConfigError, match=message):
            score_labels(plm, prompt, [[5, 6]], {"a": [7]}, **options)


def greedy_alone(plm, prompt: torch.Tensor, text: list[int], new: int, after: int = 0) -> list[int]:
    """The most probable next tokens, one full pass of the PLM for each."""
    ((text, end),) = [(text, [])] if plm.config.is_encoder_decoder else parted([text], [after])
    embed, answer = plm.get_input_embeddings(), []
    start = torch.tensor([plm.config.decoder_start_token_id]) if plm.config.is_encoder_decoder else torch.tensor(text)
    with torch.no_grad():
        for _ in range(new):
            said = embed(torch.tensor([*end, *answer], dtype=torch.long))
            if plm.config.is_encoder_decoder:
                inputs = torch.cat([prompt, embed(start), said])[None]
                logits = plm(input_ids=torch.tensor([text]), decoder_inputs_embeds=inputs, use_cache=False).logits
            else:
                logits = plm(inputs_embeds=torch.cat([embed(start), prompt, said])[None], use_cache=False).logits
            answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("placement", ["suffix", "infix"])
def test_training_needs_nothing_but_a_trainer(tmp_path, placement):
    """Two runs of a stock Trainer, one broken off and resumed, end with the same prompt; the PLM is untouched."""
    family = BY_NAME["llama"]
    rows = [family.batch(seed=seed, size=1) for seed in range(8)]
    more = {"n_after": 2} if placement == "infix" else {}
    rows = [{**{k: v[0] for k, v in row.items()}, **more} for row in rows]

    def trained(folder, steps, resume=False):
        plm = family.plm()
        model = SuffixPromptModel(plm, PROMPT, placement=placement, cache=TextCache(plm))
        before = {k: v.clone() for k, v in plm.state_dict().items()}
        arguments = TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            lr_scheduler_type="constant", learning_rate=0.05, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train(resume_from_checkpoint=resume)
        assert all(torch.equal(v, before[k]) for k, v in plm.state_dict().items())
        assert trainer.evaluate()["eval_loss"] > 0
        return model

    whole = trained(tmp_path / "a", 6)
    trained(tmp_path / "b", 4)
    resumed = trained(tmp_path / "b", 6, resume=True)
    assert torch.equal(whole.soft_prompt, resumed.soft_prompt)
    assert not torch.equal(whole.soft_prompt, SuffixPromptModel(family.plm(), PROMPT).soft_prompt)
    assert not texts_run(whole, default_data_collator(rows[:2]))
    assert set(whole.state_dict()) == {"soft_prompt"}
    assert (tmp_path / "a" / "checkpoint-6" / "model.safetensors").stat().st_size < 1000


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_saved_prompts_load_wherever_they_stand(name, tmp_path, caplog):
    family = BY_NAME[name]
    model, batch = SuffixPromptModel(family.plm(), PROMPT, seed=3).eval(), tensors(ids_and_labels(family))
    model.save_pretrained(tmp_path / "after")
    again = load_soft_prompt(family.plm(), tmp_path / "after")
    assert torch.equal(suffix_loss(again, batch), suffix_loss(model, batch))
    if name == "llama":
        within = SuffixPromptModel(family.plm(), PROMPT, placement="infix", seed=3).eval()
        within.save_pretrained(tmp_path / "within")
        assert place_of(tmp_path / "within") == "infix"
        counts = {"n_after": torch.tensor(AFTER)}
        loaded = load_soft_prompt(family.plm(), tmp_path / "within")
        assert torch.equal(suffix_loss(loaded, {**batch, **counts}), suffix_loss(within, {**batch, **counts}))
    inputs = {k: batch[k][:1] for k in ("input_ids", "attention_mask")}
    assert torch.equal(again.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))
    assert place_of(tmp_path / "after") == "suffix"
    assert export_prompt(tmp_path / "after", tmp_path / "export.safetensors") == (PROMPT, HIDDEN)
    with safe_open(tmp_path / "export.safetensors", "pt") as file:
        assert "after the input" in file.metadata()["place"]
        assert torch.equal(file.get_tensor("prompt_embeds"), model.soft_prompt)
    written = [*(tmp_path / "after").iterdir(), tmp_path / "export.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert {file.stat().st_mode for file in written} == {plain.stat().st_mode}  # as the umask says

    stock = family.peft()
    stock.save_pretrained(str(tmp_path / "before"))
    loaded = load_soft_prompt(family.plm(), tmp_path / "before")
    assert torch.equal(loaded(**batch).loss, stock(**batch).loss)
    assert place_of(tmp_path / "before") == "prefix"

    with pytest.raises(Exception, match=r"WITHIN THE TEXT: PEFT cannot place it; load it with .*load_soft_prompt"):
        PeftModel.from_pretrained(family.plm(), str(tmp_path / "after"))
    with pytest.raises(ConfigError, match="holds a PEFT adapter already"):
        model.save_pretrained(tmp_path / "before")
    caplog.clear()
    load_soft_prompt(family.plm(seed=5), tmp_path / "after")
    assert "whose weights are not this model's" in caplog.text
    other = BY_NAME["gpt2"].plm(n_embd=32, n_head=4)
    with pytest.raises(ConfigError, match="vectors of 16 numbers, this model's embeddings have 32"):
        load_soft_prompt(other, tmp_path / "after")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "placement": "suffix"}', "knows format 1"),
        ('{"format": 1, "placement": "prefix"}', "knows format 1"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_broken_records_are_refused(tmp_path, content, message):
    SuffixPromptModel(BY_NAME["llama"].plm(), PROMPT).save_pretrained(tmp_path)
    (tmp_path / "soft_prompt.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_soft_prompt(BY_NAME["llama"].plm(), tmp_path)


def test_a_folder_of_two_prompts_is_refused(tmp_path):
    SuffixPromptModel(BY_NAME["llama"].plm(), PROMPT).save_pretrained(tmp_path)
    BY_NAME["llama"].peft().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds two prompts"):
        load_soft_prompt(BY_NAME["llama"].plm(), tmp_path)
    with pytest.raises(ConfigError, match="holds two prompts"):
        export_prompt(tmp_path, tmp_path / "prompt.safetensors")


def test_what_cannot_work_is_refused_before_any_step():
    llama, bert = BY_NAME["llama"].plm(), BY_NAME["bert"].plm()
    batch = BY_NAME["llama"].batch()
    with pytest.raises(ModelError, match="BertLMHeadModel is not; use placement='prefix'"):
        SuffixPromptModel(bert)
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        SuffixPromptModel(llama, 0)
    with pytest.raises(ConfigError, match="leaves no room for text"):
        SuffixPromptModel(llama, 64)
    with pytest.raises(ModelError, match="another model's"):
        SuffixPromptModel(llama, cache=TextCache(BY_NAME["llama"].plm()))
    with pytest.raises(ModelError, match="another model's"):
        text_states(llama, [[3, 4]], TextCache(bert))
    model = SuffixPromptModel(llama, PROMPT)
    with pytest.raises(ModelError, match=r"'labels'.* is missing"):
        model(batch["input_ids"])
    with pytest.raises(ModelError, match="marks no position"):
        suffix_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ModelError, match="not a SuffixPromptModel"):
        suffix_loss(BY_NAME["llama"].peft(), batch)
    llama.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        suffix_loss(model.train(), batch)


def test_the_text_sees_no_dropout_and_modes_come_back():
    plm = BY_NAME["gpt2"].plm(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    plm.train()
    plm.transformer.h[1].eval()
    before = [m.training for m in plm.modules()]
    one, two = (text_states(plm, [[5, 6, 7]]).states for _ in range(2))
    assert torch.equal(one, two)
    assert [m.training for m in plm.modules()] == before


def test_the_cache_keeps_to_its_budget_and_forgets_stages():
    model = SuffixPromptModel(BY_NAME["llama"].plm(), PROMPT)
    plm, texts = model.plm, [[i, 5, 6, 7] for i in range(3, 9)]
    size = text_states(plm, texts[:1]).states.numel() * 4
    cache = TextCache(plm, budget_mib=2.5 * size / 2**20)
    text_states(plm, texts, cache)
    assert (len(cache), cache.bytes) == (2, 2 * size)
    assert text_states(plm, texts[:2], cache).ran == (0, 0)
    assert text_states(plm, texts[:3] + texts[2:3], cache).ran == (1, 4)
    roomy = TextCache(plm)
    model.cache = roomy
    batch = BY_NAME["llama"].batch()
    partial = PartialPLM(model, keep_neurons="first")
    with torch.no_grad():
        suffix_loss(model, batch)
    full = len(roomy)
    assert full == 3
    model.train()
    for stage in (BY_NAME["llama"].stage(2, 10), BY_NAME["llama"].stage(3, 10)):
        partial.resize(stage)
        suffix_loss(model, batch)
        assert len(texts_run(model, batch)) == 0
        assert len(roomy) == 2 * full  # the full model's, for evaluation, and this stage's
    with pytest.raises(ConfigError, match="budget_mib=-1"):
        TextCache(plm, budget_mib=-1)

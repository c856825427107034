"""The sampler against `generate`, against the model's own probabilities, and against itself."""

import itertools

import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from rto.batches import collate
from rto.models.actor import policy_logprobs
from rto.models.loading import eos_ids, load_tokenizer
from rto.rollout.samplers import attention
from rto.rollout.samplers import transformers as sampling
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.randomness import row_seeds, uniforms
from rto.rollout.samplers.transformers import TransformersSampler, draw

NO_EOS = (-1,)  # no token has this id: every row runs to its limit


def sampler(length=16, *, eos=NO_EOS, pad=0, rows=None, tokens=None, **config):
    config = SamplingConfig(max_completion_length=length, **config)
    return TransformersSampler(config=config, eos_ids=eos, pad_id=pad, max_rows=rows, max_cache_tokens=tokens)


def greedy(length=16, **kwargs):
    return sampler(length, temperature=0.0, **kwargs)


def completions(samples):
    return [y[m].tolist() for y, m in zip(samples.responses, samples.mask)]


def generated(model, prompts, length, eos=None, pad=0):
    """Greedy completions by transformers' own `generate`, one prompt at a time."""
    settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": pad, "eos_token_id": eos}
    out = []
    for x in prompts:
        ids = torch.tensor([x])
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        out.append(whole[0, len(x) :].tolist())
    return out


@pytest.fixture
def prompts(ragged):
    return lambda vocab, rows=8: ragged(vocab, rows=rows)[0]


def cut(completion, eos):
    """Up to and including the first EOS."""
    ends = [t for t, y in enumerate(completion) if y in eos]
    return completion[: ends[0] + 1] if ends else completion


def test_greedy_is_generate_on_every_architecture(architecture, prompts):
    """Ragged prompts in one left-padded batch, full and sliding-window attention, beyond the window."""
    x = prompts(architecture.config.vocab_size)
    expected = generated(architecture, x, 12, eos=-1)
    assert completions(greedy(12)(architecture, x, seed=0)) == expected


def test_greedy_is_generate_on_a_trained_model(stories):
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer = load_tokenizer(stories)
    texts = ["Once", "Tim and Sue went to the park. They saw a big", "The", "One day, a cat", "Lily was sad because"]
    x = tokenizer(texts).input_ids
    ends = eos_ids(model, tokenizer)
    samples = greedy(60, eos=ends, pad=tokenizer.pad_token_id)(model, x, seed=0)
    assert completions(samples) == generated(model, x, 60, eos=list(ends), pad=tokenizer.pad_token_id)


def test_the_published_story_is_reproduced(stories):
    """Karpathy's llama2.c gives this text for this model from BOS alone, in 200 steps."""
    published = (stories.parent / "stories260K_expected_greedy_200_tokens.txt").read_text().strip()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    ends = eos_ids(model, tokenizer)
    assert ends == (1, 2)
    samples = greedy(200, eos=ends)(model, [[tokenizer.bos_token_id]], seed=0)
    assert not samples.ended.any()
    text = tokenizer.decode(completions(samples)[0])
    assert text.strip().startswith(published)
    assert len(text.strip()) - len(published) < 8  # one token more at most


@pytest.fixture
def shrinks(monkeypatch):
    """How many rows stay, each time the decoder forgets some."""
    sizes = []
    keep = sampling._Decoder.keep

    def spy(self, rows):
        sizes.append(len(rows))
        keep(self, rows)

    monkeypatch.setattr(sampling._Decoder, "keep", spy)
    return sizes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "cohere2"], indirect=True)
@pytest.mark.parametrize("ends_at", [(0, 2, 5, 11), (3, 3, 3, 9), (19,)])
def test_rows_that_end_leave_the_others_alone(architecture, prompts, shrinks, ends_at):
    """Each row is its own endless completion, cut at the first EOS, while the batch shrinks around it."""
    x = prompts(architecture.config.vocab_size)
    endless = generated(architecture, x, 24, eos=-1)
    eos = tuple(sorted({endless[i][t] for i, t in enumerate(ends_at)}))
    expected = [cut(y, eos) for y in endless]
    samples = greedy(24, eos=eos)(architecture, x, seed=0)
    assert completions(samples) == expected
    assert samples.ended.tolist() == [y[-1] in eos for y in expected]
    if len({len(y) for y in expected}) > 2 and sampling.is_plain(architecture, 40):
        assert shrinks  # `generate` keeps all rows to the end


def test_the_batch_does_shrink(tiny_model, prompts, shrinks):
    """The test above would show nothing if rows never left."""
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    endless = completions(greedy(24)(model, x, seed=0))
    greedy(24, eos=tuple({y[1] for y in endless[:4]}))(model, x, seed=0)
    assert shrinks
    assert all(n < 8 for n in shrinks)


@pytest.mark.parametrize("limits", [{}, {"rows": 1}, {"rows": 3}, {"tokens": 1}, {"tokens": 60}], ids=str)
def test_rows_do_not_depend_on_their_company(tiny_model, prompts, limits):
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    together = completions(greedy(**limits)(model, x, seed=0))
    assert together == [completions(greedy()(model, [p], seed=0))[0] for p in x]


def test_pad_that_is_eos_does_not_hide_the_eos(tiny_model, prompts):
    """Also when the prompt holds that id itself."""
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    endless = completions(greedy(12)(model, x, seed=0))
    end = next(y[t] for y in endless for t in range(2, 9) if y[t] not in y[:t])
    x[1] = [end, *x[1], end]
    endless = completions(greedy(12)(model, x, seed=0))
    samples = greedy(12, eos=(end,), pad=end)(model, x, seed=0)
    expected = [cut(y, (end,)) for y in endless]
    assert completions(samples) == expected
    assert any(len(y) < 12 for y in expected)
    width = samples.prompt_mask.shape[1]
    assert [row[:width][m].tolist() for row, m in zip(samples.tokens, samples.prompt_mask)] == x


def test_eos_on_the_last_step_ends_and_a_cut_off_row_gets_none(tiny_model, prompts):
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    endless = completions(greedy(10)(model, x, seed=0))
    i, length, end = next((i, t + 1, y[t]) for i, y in enumerate(endless) for t in range(3, 10) if y[t] not in y[:t])
    samples = greedy(length, eos=(end,))(model, x, seed=0)
    assert samples.ended[i]
    assert samples.mask[i].sum() == length
    assert completions(samples)[i][-1] == end
    cut_off = [y for y, ended in zip(completions(samples), samples.ended) if not ended]
    assert cut_off
    assert all(len(y) == length and end not in y for y in cut_off)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.5}])
def test_nothing_follows_the_first_eos(tiny_model, prompts, settings):
    model = tiny_model()
    eos = tuple(range(0, model.config.vocab_size, 9))
    samples = sampler(20, eos=eos, **settings)(model, prompts(model.config.vocab_size) * 8, seed=0)
    lengths = samples.mask.sum(1)
    assert len(lengths.unique()) > 4
    for y, ended in zip(completions(samples), samples.ended.tolist()):
        assert not any(token in eos for token in y[:-1])
        assert ended == (y[-1] in eos)
        assert ended or len(y) == 20
    assert torch.equal(samples.mask, torch.arange(samples.mask.shape[1]) < lengths[:, None])


def test_same_seed_same_samples_and_no_other_random_state_is_touched(tiny_model, prompts):
    model = tiny_model().train()
    x = prompts(model.config.vocab_size)
    before = torch.random.get_rng_state()
    first, again, other = (sampler()(model, x, seed=s) for s in (3, 3, 4))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert completions(first) != completions(other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def chi_square(counts, probs):
    """Pearson's statistic; degrees of freedom are one less than the outcomes."""
    expected = probs.double() * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0])


@pytest.mark.parametrize(
    ("settings", "support"),
    [
        ({}, 6),
        ({"temperature": 0.5}, 6),
        ({"temperature": 3.0}, 6),
        ({"top_k": 3}, 3),
        ({"top_k": 100}, 6),
        ({"top_p": 0.5}, 2),  # probabilities .45 .27 .17 .06 .04 .02: .45 is not half
        ({"top_p": 0.4}, 1),
        ({"top_p": 0.8}, 3),
        ({"top_p": 0.8, "temperature": 0.5}, 2),  # .64 .24 …: top-p is of the tempered distribution
        ({"top_k": 4, "top_p": 0.6}, 2),
    ],
    ids=str,
)
def test_draws_follow_the_softmax_on_its_support(settings, support):
    n, order = 20_000, torch.tensor([3, 0, 5, 1, 4, 2])  # the support is by rank, whatever the column
    drawn, logp = draw(LOGITS[order].expand(n, 6), SamplingConfig(**settings), uniforms(row_seeds(0, n), 1))
    counts = torch.zeros(6).index_put((order[drawn],), torch.ones(n), accumulate=True)
    assert counts[support:].sum() == 0
    probs = (LOGITS[:support] / settings.get("temperature", 1.0)).softmax(-1)
    torch.testing.assert_close(logp, probs[order[drawn]].log())
    # 20.5 is the 99.9 % quantile of chi-square with five degrees of freedom
    assert chi_square(counts[:support], probs) < 20.5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_draws_from_what_the_trainer_scores(tiny_model, temperature):
    """Frequencies of all 6² completions of two tokens against exp Σ log π of `policy_logprobs`."""
    model = tiny_model(seed=5, vocab_size=6, initializer_range=0.15, pad_token_id=0)
    prompt, n = [1, 3, 2, 5], 6000
    every = [list(y) for y in itertools.product(range(6), repeat=2)]
    x = collate([prompt] * len(every), every, pad=0)
    with torch.no_grad():
        probs = policy_logprobs(model, x, temperature).sum(1).exp()
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert probs.min() * n > 2  # chi-square wants no empty cells
    assert probs.max() > 2 * probs.min()
    samples = sampler(2, temperature=temperature)(model, [prompt] * n, seed=0)
    counts = torch.bincount(samples.responses @ torch.tensor([6, 1]), minlength=36)
    assert chi_square(counts, probs) < 66.6  # the 99.9 % quantile with 35 degrees of freedom


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 5), (6, 7)], ids=["prefill", "first step", "third step"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_token_sees_what_exists_before_it_and_padding_sees_itself(tiny_model, implementation, start, stop):
    """No query sees nothing at all: some attention kernels answer that with NaN, which spreads through the values."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    exists = [[False, False, True, True], [True] * 4]
    decoder = sampling._Decoder(model, torch.tensor(exists), 8)
    decoder.visible[:, 4:stop] = True
    mask = decoder._mask(start, stop)
    seen = mask if implementation == "sdpa" else mask == 0
    assert implementation == "sdpa" or (mask[mask != 0] == torch.finfo(torch.float32).min).all()
    assert seen.shape[:3] == (2, 1, stop - start)
    assert stop <= seen.shape[3] <= 8  # a single token reads whole blocks of columns
    for b, row in enumerate(exists):
        row = [*row, *[True] * 4]
        for q in range(start, stop):
            expected = [k for k in range(stop) if (k <= q and row[k]) or k == q]
            assert seen[b, 0, q - start].nonzero().flatten().tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"], indirect=True)
def test_decoding_works_under_autocast(architecture):
    """Autocast gives keys in fp32 and values in bf16; the logits are those of fp32 up to rounding."""
    tokens = torch.randint(architecture.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = architecture(tokens).logits
    decoder = sampling._Decoder(architecture, torch.ones(3, 4, dtype=torch.bool), 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = [decoder.step(tokens[:, :4]), *(decoder.step(tokens[:, t : t + 1]) for t in range(4, 9))]
    logits = torch.stack(steps, dim=1)
    assert logits.dtype == torch.float32
    gap = (logits - expected[:, 3:]).abs().max() / expected.abs().max()
    assert gap < 0.03
    precisions = {layer.values.dtype for layer in decoder.cache.layers}
    assert precisions == {torch.bfloat16 if decoder.full else torch.float32}


@pytest.mark.parametrize("size", [3, sampling.BLOCK, sampling.BLOCK + 1, 5 * sampling.BLOCK - 7])
def test_inversion_is_the_search_of_the_whole_cumulative_sum(size):
    """Blocks change the work, not the draw; `uniform` runs over the row, its very ends included."""
    weights = torch.rand(64, size, generator=torch.Generator().manual_seed(0))
    weights[:, ::3] = 0
    weights[:, -1] = 0
    uniform = torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64)[:, None]
    cumulative = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
    assert torch.equal(sampling.invert(weights, uniform), expected)


@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_inversion_never_draws_a_weight_of_zero(uniform):
    """Not even where rounding puts the point at the end of the sum."""
    weights = torch.zeros(1, 700)
    weights[0, [300, 301, 400]] = torch.tensor([0.1, 1e-30, 0.3])
    drawn = sampling.invert(weights, torch.full((1, 1), uniform, dtype=torch.float64))
    assert drawn.item() == (300 if uniform == 0 else 400)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoder_logits_are_those_of_the_whole_sequence(tiny_model, ragged, implementation):
    """Prefill and every step, under either kind of mask, against unpadded rows without a cache."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    prompts, responses = ragged(model.config.vocab_size)
    steps = torch.tensor([(y * 4)[:4] for y in responses])
    batch = collate(prompts, [[]] * len(prompts), pad=0)
    width = batch.prompt_mask.shape[1]
    decoder = sampling._Decoder(model, batch.prompt_mask, width + 4)
    assert decoder.full
    tokens = batch.tokens[:, :width]
    for t in range(4):
        ours = decoder.step(tokens)
        for i, x in enumerate(prompts):
            ids = torch.tensor([[*x, *steps[i, :t].tolist()]])
            torch.testing.assert_close(ours[i], model(input_ids=ids).logits[0, -1], rtol=1e-4, atol=1e-4)
        tokens = steps[:, t : t + 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_completion_length": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"max_completion_length must be|sampling needs temperature"):
        SamplingConfig(**settings)


@pytest.fixture
def shapes(monkeypatch):
    """Rows and length of every cache that is made."""
    made = []
    original = sampling._Decoder.__init__

    def spy(self, model, prompt_mask, length):
        if length > prompt_mask.shape[1]:  # else it only reads prompts of like length
            made.append((len(prompt_mask), length))
        original(self, model, prompt_mask, length)

    monkeypatch.setattr(sampling._Decoder, "__init__", spy)
    return made


@pytest.mark.parametrize(("tokens", "batches"), [(1, 8), (60, 4), (100, 3), (None, 1)])
def test_rows_side_by_side_follow_the_tokens_of_the_cache(tiny_model, prompts, shapes, tokens, batches):
    """Prompts of 1, 2, 3, 4, 5, 6, 9 and 12 tokens and 16 to come: what a batch holds is rows times its widest."""
    model, draws = tiny_model(), sampler(tokens=tokens)
    draws.check(model)
    shapes.clear()
    draws(model, prompts(model.config.vocab_size), seed=0)
    assert len(shapes) == batches
    assert sum(rows for rows, _ in shapes) == 8
    assert all(rows == 1 or rows * length <= (tokens or 1e9) for rows, length in shapes)


def test_a_large_model_gets_few_rows_without_being_told():
    """Llama of 8B: 2 · 32 layers · 8 heads · 128 · 2 bytes are 128 KiB a token, so 8 GiB hold 32 rows of 2048."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sampling.cache_bytes(model) == 128 * 2**10
    budget = sampling.CACHE_BYTES // sampling.cache_bytes(model)
    cuts = list(sampling.side_by_side([1024] * 512, room=1024, padded=True, max_tokens=budget))
    assert [len(rows) for rows in cuts] == [32] * 16


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.8}], ids=str)
def test_generate_draws_what_our_own_cache_draws(tiny_model, prompts, settings, monkeypatch):
    """One drawing rule and one seed whatever decodes; no row ends, so that none leaves the batch either."""
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    state = torch.random.get_rng_state()
    ours = completions(sampler(**settings)(model, x, seed=5))
    monkeypatch.setattr(sampling, "WAYS", sampling.WAYS[1:])
    assert completions(sampler(**settings)(model, x, seed=5)) == ours
    assert torch.equal(torch.random.get_rng_state(), state)


def test_generate_leaves_out_what_the_model_asks_for(tiny_model, prompts, monkeypatch):
    """A penalty or a shorter length in the model's folder would draw from another distribution than the policy's."""
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    expected = completions(greedy()(model, x, seed=0))
    own = GenerationConfig(repetition_penalty=5.0, max_new_tokens=3, do_sample=True, eos_token_id=list(range(97)))
    model.generation_config = own
    monkeypatch.setattr(sampling, "WAYS", sampling.WAYS[1:])
    assert completions(greedy()(model, x, seed=0)) == expected
    assert model.generation_config is own


def test_the_check_falls_back_and_at_last_refuses(tiny_model, prompts, monkeypatch):
    """A cache that forgets a token is found; where nothing is right, one line says so before a token is drawn."""
    model = tiny_model().train()
    x = prompts(model.config.vocab_size)
    expected = completions(greedy()(model, x, seed=0))

    def forgetful(self, start, stop):
        mask = _mask(self, start, stop)
        mask[..., :3] &= stop <= 3
        return mask

    _mask = sampling._Decoder._mask
    monkeypatch.setattr(sampling._Decoder, "_mask", forgetful)
    draws = greedy()
    assert draws.check(model) == "generate"
    assert completions(draws(model, x, seed=0)) == expected
    monkeypatch.setattr(sampling, "WAYS", sampling.WAYS[:1])
    with pytest.raises(ValueError, match=r"^a model of type llama cannot be sampled right .* \(own cache: log-prob"):
        draws.check(model)
    assert model.training


def test_the_check_is_made_once_for_each_model(tiny_model, prompts, monkeypatch):
    calls = []
    fault = sampling.fault
    monkeypatch.setattr(sampling, "fault", lambda *args: calls.append(args) or fault(*args))
    draws, model = sampler(4), tiny_model()
    for _ in range(2):
        draws(model, prompts(model.config.vocab_size), seed=0)
    assert len(calls) == 1
    draws(tiny_model(seed=1), prompts(model.config.vocab_size), seed=0)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_long_and_short_prompts_are_read_apart(tiny_model, implementation, dtype, monkeypatch):
    """Prompts of 1 to 24 tokens in no order: the same logits and the same next steps as in one part."""
    model = tiny_model(attn_implementation=implementation).to(dtype)
    lengths = [3, 24, 1, 10, 24, 2, 9]
    exists = torch.arange(24) >= 24 - torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, 90, (7, 30), generator=torch.Generator().manual_seed(0))
    tokens[:, :24][~exists] = 0
    found = []
    for enough in (10**6, 4):
        monkeypatch.setattr(sampling, "ENOUGH", enough)
        decoder = sampling._Decoder(model, exists, 30)
        steps = [decoder.read(tokens[:, :24]), *(decoder.step(tokens[:, t : t + 1]) for t in range(24, 30))]
        found.append(torch.stack(steps, dim=1))
    assert [lengths[i] for part in sampling.alike(lengths) for i in part] == sorted(lengths)
    assert len(sampling.alike(lengths)) == 4
    gap = (found[0] - found[1]).abs().mean() / found[0].std()
    assert gap < (1e-5 if dtype == torch.float32 else 0.03)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mistral", "mixtral", "phi3", "starcoder2", "gemma2", "qwen2, windows", "bloom"])
def test_the_decoder_itself_minds_windows(kind):
    """Also for whoever takes it without the sampler around it: prompt and steps beyond a window of 8."""
    model = build(kind)
    tokens = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits
    decoder = sampling._Decoder(model, torch.ones(2, 20, dtype=torch.bool), 30)
    steps = [decoder.step(tokens[:, :20]), *(decoder.step(tokens[:, t : t + 1]) for t in range(20, 30))]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected[:, 19:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "bart"])
def test_the_decoder_refuses_what_would_be_wrong(kind):
    """A state that it does not know, positions that padding would move."""
    with pytest.raises(ValueError, match=f"type {kind} is decoded by `generate`"):
        sampling._Decoder(build(kind), torch.tensor([[False, True], [True, True]]), 8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_attention_by_products_is_attention(dtype, heads, groups):
    """Against float64 over the visible columns alone, with scores that bfloat16 would round by 1/16."""
    g = torch.Generator().manual_seed(0)
    query = 12 * torch.randn(3, heads, 1, 8, generator=g).to(dtype)
    key, value = torch.randn(3, groups, 40, 8, generator=g), torch.randn(3, groups, 40, 5, generator=g).to(dtype)
    key = key.to(dtype).float()
    mask = torch.rand(3, 1, 1, 40, generator=g) < 0.6
    theirs = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention.one_token(mask):
        ours = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
        found, _ = ours(torch.nn.Module(), query, key, value, mask, scaling=0.3, use_cache=True)
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    assert found.dtype == dtype
    for b, q in enumerate(query):
        for h in range(heads):
            k, v = (x[b, h * groups // heads][mask[b, 0, 0]].double() for x in (key, value))
            exact = (0.3 * k @ q[h, 0].double()).softmax(0) @ v
            within = 1e-5 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(found[b, 0, h].double(), exact, rtol=within, atol=within)


@torch.no_grad()
def test_attention_is_the_librarys_where_another_mask_or_setting_is_given():
    """Several tokens, another mask, caps: what we do not compute goes on to it, keys in the values' precision."""
    seen, module = [], torch.nn.Module()
    query, key, value = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4, dtype=torch.bfloat16)
    mask, functions = torch.ones(1, 1, 1, 8, dtype=torch.bool), attention.ALL_ATTENTION_FUNCTIONS
    functions["sdpa"] = lambda *args, **settings: seen.append((args[2].dtype, settings)) or (args[1], None)
    try:
        with attention.one_token(mask):
            functions["sdpa"](module, query, key, value, mask.clone(), scaling=1.0)
            functions["sdpa"](module, query, key, value, mask, softcap=3.0)
            functions["sdpa"](module, query, key, value, mask, dropout=0.1)
            functions["sdpa"](module, query.expand(1, 2, 3, 4), key, value, mask)
            functions["sdpa"](module, query, key, value, mask, output_attentions=False)
        assert [dtype for dtype, _ in seen] == [torch.bfloat16] * 4
    finally:
        del functions["sdpa"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_grows_by_blocks_and_rows_leave_it(tiny_model, dtype, monkeypatch):
    """Steps across two ends of a block, half the rows gone between them: the logits of the whole sequences."""
    used = []
    attended = attention.attended
    monkeypatch.setattr(attention, "attended", lambda *args: used.append(args[1].shape) or attended(*args))
    model = tiny_model().to(dtype)
    tokens = torch.randint(3, 90, (4, 80), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits.float()
    decoder = sampling._Decoder(model, torch.ones(4, 30, dtype=torch.bool), 80)
    rows, found = torch.arange(4), {29: decoder.read(tokens[:, :30])}
    for t in range(30, 80):
        if t == 50:
            rows = torch.tensor([0, 3])
            decoder.keep(rows)
        found[t] = decoder.step(tokens[rows, t : t + 1])
    for t, logits in found.items():
        gap = (logits - expected[rows if t >= 50 else slice(None), t]).abs().mean() / expected.std()
        assert gap < (1e-5 if dtype == torch.float32 else 0.03)
    if decoder.block:
        assert {(shape[0], shape[2]) for shape in used} == {(4, 32), (4, 64), (2, 64), (2, 80)}

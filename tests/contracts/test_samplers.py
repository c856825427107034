"""What every sampler promises: a seed a row, log-probabilities of what was drawn from, engines that follow."""

import copy
import functools
import http.server
import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from rto.batches import Samples
from rto.functional.importance import Correction, log_ratio
from rto.models.actor import policy_logprobs
from rto.rollout.samplers import randomness, transformers, vllm_server, weights
from rto.rollout.samplers.base import Sampler, SamplerError, SamplingConfig, as_sampler
from rto.rollout.samplers.engines import Drawn, EngineSampler
from rto.rollout.samplers.transformers import WAYS, TransformersSampler
from rto.rollout.samplers.vllm import ADAPTER, Colocated, Server

EOS = tuple(range(2, 97, 9))


@pytest.fixture
def prompts(ragged):
    return lambda vocab, rows=8: ragged(vocab, rows=rows)[0]


def ours(length=12, **settings):
    limits = {name: settings.pop(name) for name in ("max_rows",) if name in settings}
    config = SamplingConfig(max_completion_length=length, **settings)
    return TransformersSampler(config=config, eos_ids=EOS, pad_id=0, **limits)


def lora(model):
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return policy


# --- random numbers


def test_the_mix_is_splitmix64():
    """The first five numbers from the state 1234567, as its authors' C code gives them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = 1234567 + torch.arange(1, 6) * randomness._signed(randomness.INCREMENT)
    assert [int(z) % 2**64 for z in randomness._mixed(states)] == published


def test_uniforms_are_uniform_and_rows_and_steps_do_not_follow_each_other():
    u = randomness.uniforms(randomness.row_seeds(3, 500), 400)
    assert u.dtype == torch.float64
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 149  # the 99.9 % quantile of chi-square with 99 degrees of freedom
    white = (u - 0.5) * 12**0.5
    for other in (white.roll(1, 0), white.roll(1, 1), white.roll((1, 1), (0, 1))):
        assert abs((white * other).mean()) < 4 / u.numel() ** 0.5


def test_a_seed_is_one_stream_whatever_stands_beside_it():
    seeds = [7, 2**63 - 1, 0]
    alone = torch.cat([randomness.uniforms([seed], 9) for seed in seeds])
    assert torch.equal(randomness.uniforms(seeds, 9), alone)
    assert torch.equal(randomness.uniforms(seeds, 4), alone[:, :4])
    assert len(set(randomness.row_seeds(0, 1000) + randomness.row_seeds(1, 1000))) == 2000


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_drawn_does_not_depend_on_company(tiny_model, prompts, rows):
    model = tiny_model()
    x = prompts(model.config.vocab_size)
    together, apart = ours()(model, x, 5), ours(max_rows=rows)(model, x, 5)
    assert torch.equal(together.tokens, apart.tokens)
    torch.testing.assert_close(together.sampler_logp, apart.sampler_logp, equal_nan=True)


# --- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_importance_weights_of_our_own_sampler_are_one(tiny_model, prompts, way, temperature, monkeypatch):
    """In every way of decoding, rows that end early among them; what was not sampled has no number."""
    model = tiny_model()
    monkeypatch.setattr(transformers, "WAYS", (way,))
    sampler = ours(temperature=temperature)
    assert sampler.check(model) == way.name
    samples = sampler(model, prompts(model.config.vocab_size), 0)
    assert samples.sampler_logp[~samples.mask].isnan().all()
    assert {0, 1} == set(samples.stopped.tolist())
    assert torch.equal(samples.stopped == 1, samples.ended)
    with torch.no_grad():
        logp = policy_logprobs(model, samples, temperature)
    found = Correction()(log_ratio(logp, samples.sampler_logp, samples.mask))
    torch.testing.assert_close(found.weights, torch.ones_like(logp), rtol=0, atol=1e-4)
    assert not found.clipped.any()


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9, "temperature": 0.7}], ids=str
)
def test_log_probabilities_are_of_the_distribution_that_was_cut(tiny_model, prompts, settings):
    """Against the whole distribution, cut and summed up again by hand."""
    model = tiny_model()
    samples = ours(**settings)(model, prompts(model.config.vocab_size), 0)
    width = samples.prompt_mask.shape[1]
    for row, keep, mask, found in zip(samples.tokens, samples.prompt_mask, samples.mask, samples.sampler_logp):
        ids = torch.cat([row[:width][keep], row[width:][mask]])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, int(keep.sum()) - 1 : -1] / settings.get("temperature", 1.0)
        for t, token in enumerate(row[width:][mask]):
            ranked = logits[t].sort(descending=True)
            p = ranked.values[: settings.get("top_k", len(logits[t]))].softmax(-1)
            size = next(n for n in range(1, len(p) + 1) if p[:n].sum() >= settings.get("top_p", 1.0) - 1e-6)
            kept = dict(zip(ranked.indices[:size].tolist(), (p[:size] / p[:size].sum()).log().tolist()))
            assert found[t].item() == pytest.approx(kept[int(token)], abs=1e-4)


def test_the_most_likely_token_has_no_log_probability(tiny_model, prompts):
    model = tiny_model()
    samples = ours(temperature=0.0)(model, prompts(model.config.vocab_size), 0)
    assert samples.sampler_logp.isnan().all()


# --- a sampler of one's own


def test_a_function_is_a_sampler(tiny_model, prompts):
    model, asked = tiny_model(), []

    def function(policy, prompts, seed):
        asked.append((policy, len(prompts), seed))
        return ours()(policy, prompts, seed)

    sampler = as_sampler(function)
    sampler.sync(model, 3)
    assert isinstance(sampler.draw(prompts(model.config.vocab_size), [5] * 8), Samples)
    assert asked == [(model, 8, 5)]


def test_what_has_sync_and_draw_is_a_sampler_and_other_things_are_none():
    class Own:
        def sync(self, policy, version): ...
        def draw(self, prompts, seeds): ...

    own = Own()
    assert as_sampler(own) is own
    with pytest.raises(TypeError, match="a sampler has sync"):
        as_sampler(3)


# --- engines


class Fake:
    """An engine with weights of its own, in the wrong ways that engines have."""

    name = "the fake engine"

    def __init__(self, fault: str = "", model: nn.Module | None = None) -> None:
        self.fault, self.model, self.loads, self.rests = fault, copy.deepcopy(model), 0, 0

    def load(self, policy: nn.Module) -> None:
        self.loads += 1
        if self.fault != "stale":
            self.model = copy.deepcopy(policy)

    def complete(self, prompts, seeds, config, stop_ids):
        sampler = TransformersSampler(config=config, eos_ids=stop_ids, pad_id=0)
        sampler.sync(self.model, 0)
        samples = sampler.draw(prompts, seeds)
        logp = samples.sampler_logp
        if self.fault == "raw":
            logp = policy_logprobs(self.model, samples, 1.0).detach()
        rows = zip(samples.responses, samples.mask, logp, samples.stopped.tolist())
        drawn = [Drawn(y[keep].tolist(), p[keep].tolist(), stopped) for y, keep, p, stopped in rows]
        return [Drawn([], [], 0), *drawn[1:]] if self.fault == "empty" else drawn

    def rest(self) -> None:
        self.rests += 1


def on(engine, **settings):
    return EngineSampler(engine, SamplingConfig(max_completion_length=12, **settings), EOS, 0)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "lora"])
def test_an_engine_draws_from_the_policy_of_its_last_sync(tiny_model, prompts, wrap):
    policy = wrap(tiny_model())
    x, engine = prompts(policy.config.vocab_size), Fake()
    sampler = on(engine, temperature=0.8)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    sampler.sync(policy, 0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert engine.loads == 2  # moved weights, then these
    first = sampler.draw(x, list(range(8)))
    again = ours(temperature=0.8)
    again.sync(policy, 0)
    expected = again.draw(x, list(range(8)))
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(first.tensors()[name], tensor, equal_nan=True)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    unsynced = sampler.draw(x, list(range(8)))
    assert torch.equal(unsynced.tokens, first.tokens)
    sampler.sync(policy, 1)
    later = sampler.draw(x, list(range(8)))
    assert (unsynced.version, later.version) == (0, 1)
    assert not torch.equal(later.tokens, first.tokens)
    assert engine.loads == 3
    assert engine.rests == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stale", r"the fake engine is stale: .* nats from theirs"),
        ("raw", r"the fake engine gives log-probabilities .*--logprobs-mode processed_logprobs"),
        ("empty", r"the fake engine answered 0 tokens with 0 log-probabilities where 1 to"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "lora"])
def test_an_engine_that_does_not_follow_stops_the_run(tiny_model, wrap, fault, message):
    policy = wrap(tiny_model())
    before = {name: p.clone() for name, p in policy.named_parameters()}
    with pytest.raises(SamplerError, match=message):
        on(Fake(fault, policy), temperature=0.5).sync(policy, 0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "lora"])
def test_an_engine_is_checked_by_the_weights_that_are_there_under_autocast(tiny_model, wrap):
    """Which keeps narrow copies of weights: those of the moved weights are not to be read again."""
    policy = wrap(tiny_model())
    with torch.autocast("cpu", torch.bfloat16):
        on(Fake()).sync(policy, 0)
        with pytest.raises(SamplerError, match="stale"):
            on(Fake("stale", policy)).sync(policy, 0)


def test_a_new_adapter_that_changes_nothing_yet_shows_a_stale_engine(tiny_model):
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(SamplerError, match="stale"):
        on(Fake("stale", policy)).sync(policy, 0)


def test_engine_samples_of_temperature_zero_have_no_log_probabilities(tiny_model, prompts):
    model = tiny_model()
    sampler = on(Fake(), temperature=0.0)
    samples = sampler(model, prompts(model.config.vocab_size), 0)
    assert samples.sampler_logp.isnan().all()
    assert torch.equal(samples.tokens, ours(temperature=0.0)(model, prompts(model.config.vocab_size), 0).tokens)


# --- weights


def test_named_weights_are_those_of_the_merged_model(tiny_model):
    policy = lora(tiny_model())
    found = dict(weights.named_weights(policy))
    merged = dict(copy.deepcopy(policy).merge_and_unload().named_parameters())
    assert found.keys() == merged.keys()
    for name, expected in merged.items():
        torch.testing.assert_close(found[name], expected)
    assert dict(weights.named_weights(tiny_model())).keys() == merged.keys()
    base = dict(weights.named_weights(policy, merged=False))
    for name, expected in tiny_model().named_parameters():
        assert torch.equal(base[name], expected)


# --- vLLM in this process


class Recorder:
    """What vLLM's engine is asked to do, by name."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.asked.append((name, args[0] if args else kwargs.get("level")))


@pytest.mark.parametrize("sleep", [False, True])
def test_an_engine_sleeps_from_a_draw_to_the_next_weights(tiny_model, monkeypatch, sleep):
    """Weights are loaded into an engine that is awake, and caches of older weights are forgotten."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "")
    engine, asked = Colocated(sleep=sleep), Recorder()
    monkeypatch.setattr(engine, "_start", lambda policy: asked)
    for _ in range(2):
        engine.load(tiny_model())
        engine.rest()
    load = [("collective_rpc", "reload_weights"), ("reset_prefix_cache", None)]
    nap = [("sleep", 2)] if sleep else []
    assert asked.asked == [*load, *nap, *([("wake_up", None)] if sleep else []), *load, *nap]


# --- a server, over HTTP


def loaded(model, weights):
    model.load_state_dict(weights, strict=False)
    return model


class Replies(http.server.BaseHTTPRequestHandler):
    """vLLM's routes over the fake engine."""

    def log_message(self, *args): ...

    def reply(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self.reply({"data": [{"id": "served"}]})

    def do_POST(self):
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        state["asked"].append((self.path, body))
        if self.path == "/v1/load_lora_adapter":
            from peft import PeftModel

            state["model"] = PeftModel.from_pretrained(state["base"](), body["lora_path"]).eval()
        elif self.path == "/collective_rpc":
            weights = load_file(body["args"][0])
            state["base"] = lambda: loaded(state["other"](), weights)
            state["model"] = state["base"]()
        elif self.path == "/inference/v1/generate":
            how = body["sampling_params"]
            config = SamplingConfig(max_completion_length=how["max_tokens"], temperature=how["temperature"])
            engine = Fake()
            engine.model = state["model"]
            with state["lock"]:
                (one,) = engine.complete([body["token_ids"]], [how["seed"]], config, tuple(how["stop_token_ids"]))
            content = [{"token_id": y, "logprob": p} for y, p in zip(one.tokens, one.logp)]
            reason = "length" if one.stopped == 0 else "stop"
            choice = {"token_ids": one.tokens, "logprobs": {"content": content}, "finish_reason": reason}
            return self.reply({"choices": [choice]})
        elif state["refuses"]:
            return self.reply({"error": "no such route"}, 404)
        return self.reply("Success")


@pytest.fixture
def server(tiny_model):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    other = functools.partial(tiny_model, seed=7)  # what another run has left
    made.state = {
        "asked": [],
        "model": None,
        "base": other,
        "other": other,
        "lock": threading.Lock(),
        "refuses": False,
    }
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "lora"])
def test_a_server_gets_weights_and_gives_tokens(tiny_model, prompts, server, wrap, tmp_path):
    """Whole weights as a file, an adapter alone as a folder, never twice from one path; each prompt has its seed."""
    policy = wrap(tiny_model())
    engine = Server(f"http://127.0.0.1:{server.server_port}", folder=str(tmp_path))
    sampler = on(engine, temperature=0.8)
    sampler.sync(policy, 0)
    x = prompts(policy.config.vocab_size)
    samples = sampler.draw(x, list(range(8)))
    own = ours(temperature=0.8)
    own.sync(policy, 0)
    assert torch.equal(samples.tokens, own.draw(x, list(range(8))).tokens)
    adapted = weights.is_adapted(policy)
    asked = [body for path, body in server.state["asked"] if path == "/inference/v1/generate"][-8:]
    assert {body["model"] for body in asked} == {f"{ADAPTER}-2" if adapted else "served"}
    assert sorted(body["sampling_params"]["seed"] for body in asked) == list(range(8))
    routes = [path for path, _ in server.state["asked"] if "generate" not in path]
    if adapted:
        base, adapter = ["/collective_rpc", "/reset_prefix_cache"], "/v1/load_lora_adapter"
        assert routes == [*base, adapter, adapter, "/v1/unload_lora_adapter"]
    else:
        assert routes == ["/collective_rpc", "/reset_prefix_cache"] * 2
    sent = [body for path, body in server.state["asked"] if path in ("/v1/load_lora_adapter", "/collective_rpc")]
    assert len({body.get("lora_path") or body["args"][0] for body in sent}) == len(sent) == 2 + adapted
    assert len(list(tmp_path.glob("*/*"))) == adapted  # an adapter may be read again while it is in use


def test_a_server_that_is_gone_or_refuses_is_one_line(tiny_model, server):
    engine = Server(f"http://127.0.0.1:{server.server_port}")
    sampler = on(engine)
    sampler.sync(tiny_model(), 0)
    server.state["refuses"] = True
    with pytest.raises(SamplerError, match=r"answers 404 to /reset_prefix_cache: .*vllm_server MODEL`$"):
        sampler.sync(tiny_model(), 1)
    server.shutdown()
    server.server_close()
    with pytest.raises(SamplerError, match=r"does not answer .*: start it again, and resume the run") as found:
        sampler.draw([[5, 6]], [0])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_an_address_that_is_none_is_told(url):
    with pytest.raises(SamplerError, match="vllm_server_base_url must be like"):
        Server(url)


def test_the_servers_command_leaves_the_users_options_alone():
    line = vllm_server.command(["model", "--host=0.0.0.0", "--enable-lora", "--logprobs_mode", "raw_logprobs"])
    assert line[3:8] == ["serve", "model", "--host=0.0.0.0", "--enable-lora", "--logprobs_mode"]
    assert "--host" not in line
    assert "processed_logprobs" not in line
    assert line[line.index("--worker-extension-cls") + 1] == "rto.rollout.samplers.vllm_worker.Loads"


def test_the_base_class_asks_for_both_methods():
    with pytest.raises(TypeError, match="abstract"):
        Sampler()

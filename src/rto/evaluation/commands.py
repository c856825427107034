"""`rto evaluate generate | judge | compare`."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from rto.data.errors import DataError
from rto.errors import make_folder, make_room_for
from rto.evaluation.benchmarks.formats import BENCHMARKS, Benchmark, Match, benchmark_of, read_match, read_questions
from rto.evaluation.benchmarks.judgments import check_judged, write_judgments
from rto.evaluation.benchmarks.types import Question
from rto.evaluation.judging.endpoint import Cache, Endpoint, Patience, Prices
from rto.files import safe_name
from rto.flags import OneLine, add_split, add_trust
from rto.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges
from rto.terminal import Terminal, only_our_bars, say
from rto.values import nearest

USAGE = """usage: rto evaluate COMMAND [options]

  generate    a model's answers to a benchmark's prompts, in the benchmark's own format
  judge       compare two models' answers, by a chat model behind an endpoint or offline
  compare     the table of several runs, with intervals

rto evaluate COMMAND --help tells the options of a command."""


def main(args: Sequence[str]) -> int:
    """`rto evaluate`."""
    if not args or args[0] not in COMMANDS:
        wanted = bool(args) and args[0] in ("-h", "--help")
        if args and not wanted:
            raise ValueError(f"no such command: {args[0]}{nearest(args[0], COMMANDS)}")
        say(USAGE)
        return 0 if wanted else 2
    return COMMANDS[args[0]](list(args[1:]))


# --- generate


RANGES = {
    **dict.fromkeys(("retries", "seed", "price_prompt", "price_completion"), NOT_NEGATIVE),
    "timeout": POSITIVE,
    "concurrency": COUNT,
}
"""Of `rto evaluate judge`."""


def generate(args: list[str]) -> int:
    """`rto evaluate generate`."""
    flags = _generate_parser().parse_args(args)
    benchmark, questions = _prompts(flags.benchmark, flags.prompts)
    name = flags.name or Path(flags.model).name
    if safe_name(name) != name:
        raise DataError(f"--name {name!r} becomes part of a file's name: use letters, digits, dot, dash, underscore")
    if flags.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {flags.batch_size}")
    only_our_bars()
    from rto.models.loading import check_weights, find_config

    trust = {"trust_remote_code": flags.trust_remote_code}
    find_config("--model", flags.model, **trust)
    check_weights("--model", flags.model)
    make_folder(flags.output, "--output")
    import torch
    from transformers.utils import logging as hf_logging

    from rto.data.chat import split_special_tokens
    from rto.evaluation.benchmarks.answers import encode, weights_digest
    from rto.evaluation.benchmarks.answers import generate as draw
    from rto.models.loading import freeze, load_policy, load_tokenizer, max_positions
    from rto.rollout.samplers.base import SamplingConfig
    from rto.rollout.samplers.transformers import TransformersSampler

    hf_logging.disable_progress_bar()  # one for each weight file
    tokenizer = split_special_tokens(load_tokenizer(flags.model, **trust), flags.split_special_tokens)
    model = freeze(load_policy(flags.model, dtype=flags.dtype, **trust))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    context = max_positions(model) or 2**31
    limit = flags.max_new_tokens or min(benchmark.max_new_tokens, context // 2)
    config = SamplingConfig(
        max_completion_length=limit,
        temperature=benchmark.temperature if flags.temperature is None else flags.temperature,
        top_p=flags.top_p,
        top_k=flags.top_k,
    )
    sampler = TransformersSampler.of(model, tokenizer, config, max_rows=flags.batch_size)
    result = draw(
        model,
        tokenizer,
        encode(questions, tokenizer, max_length=context - limit, system=flags.system),
        benchmark,
        flags.output,
        name=name,
        sampler=sampler,
        settings={
            "model": str(flags.model),
            "weights": weights_digest(Path(flags.model)),
            "dtype": flags.dtype,
            "sampling": vars(config),
        },
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    say(
        f"{result.path}: {result.answers} answers, {result.new} of them new; {result.mean_tokens:.1f} tokens on "
        f"average, {result.answers - result.ended} cut at {limit}"
    )
    return 0


def _generate_parser() -> argparse.ArgumentParser:
    parser = OneLine(
        prog="rto evaluate generate",
        description="Answer a benchmark's prompts. A run that was killed goes on where it stopped.",
    )
    add = parser.add_argument
    add("--model", required=True, help="Folder or hub id.")
    add("--benchmark", required=True, help="alpaca_eval, arena_hard, or a file of prompts (JSON, JSON lines).")
    add("--output", type=Path, required=True, help="Output folder.")
    add("--prompts", type=Path, help="The benchmark's prompts as a local file; from the hub when not given.")
    add("--name", help="The model's name in the file; the folder's name when not given.")
    add("--system", help="A system message before every prompt.")
    add("--temperature", type=float, help="0.7 for alpaca_eval, 0 (greedy) for arena_hard when not given.")
    add("--top_p", type=float, default=1.0)
    add("--top_k", type=int, default=0)
    add("--max_new_tokens", type=int, help="2048 for alpaca_eval, 4096 for arena_hard, at most half the context.")
    add("--batch_size", type=int, default=32, help="Prompts side by side; answers depend on it, as on the seed.")
    add("--seed", type=int, default=0)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add_trust(parser)
    add_split(parser)
    return parser


def _prompts(benchmark: str, prompts: Path | None) -> tuple[Benchmark, list[Question]]:
    """The file format, and the questions."""
    if benchmark not in BENCHMARKS:
        path = Path(benchmark)
        if prompts is not None or not path.is_file():
            raise DataError(f"--benchmark {benchmark}: neither {' nor '.join(BENCHMARKS)} nor a file of prompts")
        return (kind := benchmark_of(path)), read_questions(path, kind)
    kind = BENCHMARKS[benchmark]
    return kind, read_questions(prompts or _download(*kind.hub), kind)


def _download(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # no network, no such file, no permission: the hub raises many kinds
        raise DataError(
            f"{repository}/{file} cannot be had from the hub ({error}): give a local file, --prompts"
        ) from error


# --- judge


def judge(args: list[str]) -> int:
    """`rto evaluate judge`."""
    flags = _judge_parser().parse_args(args)
    check_ranges(flags, **RANGES)
    match = read_match(flags.answers, flags.baseline, flags.questions)
    from rto.evaluation.judging.judges import hold, unread

    kind = match.benchmark.name
    folder = make_folder(flags.output or match.benchmark.folder(flags.answers), "--output")
    judging, endpoint = (_chat_judge if flags.judge is None else _offline_judge)(flags, match, folder)
    name = safe_name(flags.annotator or (flags.judge_model if kind == "arena_hard" and endpoint else judging.name))
    path = match.benchmark.judgments_file(folder, name, match.model)
    check_judged(path, match, judging.identity)
    try:
        contests = hold(judging, match.battles, seed=flags.seed)
    finally:
        if endpoint is not None:
            say(f"{flags.judge_model}: {endpoint.usage.report(endpoint.prices)}")
    judgments = match.benchmark.judgments(name, match.model, match.baseline, contests)
    write_judgments(path, judgments, judging.identity)
    games = sum(len(c.games) for c in contests)
    reasons = unread(contests)
    say(f"{path}: {games - reasons.total()} of {games} games read, {match.model} against {match.baseline}")
    if same := sum(battle.answer == battle.baseline for battle in match.battles):
        say(f"  {same} of {len(match.battles)} answers are the same on both sides: draws that say nothing")
    for reason, count in reasons.most_common():
        say(f"  {count} not read: {reason}")
    if any(reason.startswith("no answer") for reason in reasons):
        say("  run the same command again to ask for the missing answers; the others cost nothing")
    return 0


def _judge_parser() -> argparse.ArgumentParser:
    parser = OneLine(
        prog="rto evaluate judge",
        description="Compare two models' answers. AlpacaEval's files get its weighted protocol, Arena-Hard's the "
        "five-way one in two games.",
    )
    add = parser.add_argument
    add("--answers", type=Path, required=True, help="The model's answers: model_outputs.json or MODEL.jsonl.")
    add("--baseline", type=Path, required=True, help="The baseline's answers, in the same format.")
    add("--questions", type=Path, help="Arena-Hard's question.jsonl; beside model_answer/ when not given.")
    add("--output", type=Path, help="Output folder; that of the answers when not given.")
    add("--annotator", help="The judge's name in the files.")
    add("--seed", type=int, default=0, help="Of the order of the outputs (AlpacaEval); 0 gives the official order.")
    offline = parser.add_argument_group("offline judges")
    offline.add_argument(
        "--judge", help="A reward model's folder, a function (module:function), or gold (the embedded task's)."
    )
    add_trust(offline)
    add_split(offline)
    chat = parser.add_argument_group("a chat model behind an OpenAI-compatible endpoint")
    add = chat.add_argument
    add("--judge_model", help="Its name at the endpoint.")
    add("--base_url", default="https://api.openai.com/v1", help="Like http://localhost:8000/v1.")
    add("--key_env", help="Environment variable with the API key; OPENAI_API_KEY for OpenAI, else none.")
    add("--template", type=Path, help="An official template: AlpacaEval's .txt or Arena-Hard's .yaml.")
    add("--parameters", type=_json, default={}, help="JSON added to each request; a null takes one away.")
    add("--cache", type=Path, help="Answers by content; judge_cache.jsonl in the output folder when not given.")
    add("--concurrency", type=int, default=8, help="Requests under way at once.")
    add("--timeout", type=float, default=120.0, help="Seconds for one attempt.")
    add("--retries", type=int, default=6, help="Further attempts on errors, time-outs and rate limits.")
    add("--price_prompt", type=float, help="US dollars a million prompt tokens.")
    add("--price_completion", type=float, help="US dollars a million completion tokens.")
    return parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}), like '{{\"seed\": 0}}'") from error


def _chat_judge(flags: argparse.Namespace, match: Match, folder: Path) -> tuple[Any, Endpoint]:
    if flags.judge_model is None:
        raise ValueError("say who judges: --judge_model NAME (and --base_url), or --judge for an offline judge")
    if (flags.price_prompt is None) != (flags.price_completion is None):
        raise ValueError("--price_prompt and --price_completion go together")
    if not isinstance(flags.parameters, dict):
        raise ValueError("--parameters must be a JSON object, like '{\"seed\": 0}'")
    from rto.evaluation.judging.judges import PROTOCOLS, ChatJudge, read_template

    prices = None
    if flags.price_prompt is not None:
        prices = Prices(prompt=flags.price_prompt, completion=flags.price_completion)
    protocol: Any = PROTOCOLS[match.benchmark.name]()
    merged = {**protocol.parameters, **flags.parameters}
    parameters = {key: value for key, value in merged.items() if value is not None}
    template = protocol.template if flags.template is None else read_template(flags.template)
    endpoint = Endpoint(
        flags.base_url,
        flags.judge_model,
        key_variable=flags.key_env,
        cache=Cache(make_room_for(flags.cache or folder / "judge_cache.jsonl", "--cache")),
        patience=Patience(timeout=flags.timeout, retries=flags.retries),
        concurrency=flags.concurrency,
        prices=prices,
    )
    return ChatJudge(endpoint, type(protocol)(template=template, parameters=parameters)), endpoint


def _offline_judge(flags: argparse.Namespace, match: Match, folder: Path) -> tuple[Any, None]:
    if flags.judge_model is not None:
        raise ValueError("--judge and --judge_model are two judges: name one")
    only_our_bars()
    from rto.data.chat import split_special_tokens
    from rto.evaluation.judging.judges import ScoreJudge
    from rto.models.loading import check_weights, find_config
    from rto.recipe import is_function, resolve
    from rto.rollout.rewards import RewardFunc, RewardModel, reward_source

    name = "rto.demo.embedded:gold_reward" if flags.judge == "gold" else flags.judge
    source: RewardFunc = name
    if is_function(name):
        source = resolve(name, "--judge")
    else:
        find_config("--judge", name, trust_remote_code=flags.trust_remote_code)
        check_weights("--judge", name)
    scorer = reward_source(source, max_tokens=2**14, trust_remote_code=flags.trust_remote_code)
    if isinstance(scorer, RewardModel):
        split_special_tokens(scorer.tokenizer, flags.split_special_tokens)
    return ScoreJudge(scorer), None


# --- compare


def compare(args: list[str]) -> int:
    """`rto evaluate compare`."""
    flags = vars(_compare_parser().parse_args(args))
    sources, folder = flags.pop("sources"), flags.pop("output_dir")
    from rto.evaluation.table.measures import Settings
    from rto.evaluation.table.page import show, write
    from rto.evaluation.table.significance import compare as run
    from rto.evaluation.table.sources import read_sources

    settings = Settings(**flags)
    entries, notes = read_sources(sources)
    make_folder(folder, "--output_dir")
    comparison = run(entries, settings, notes)
    console = Terminal()
    show(comparison, console)
    paths = write(comparison, folder)
    console.print(Text(f"\nwith all pairs and the judges' position and length bias: {', '.join(map(str, paths))}"))
    return 0


def _compare_parser() -> argparse.ArgumentParser:
    parser = OneLine(
        prog="rto evaluate compare",
        description="The paper's table over runs and judgments, with 95 % intervals and paired tests.",
    )
    add = parser.add_argument
    sources = "a folder of `rto run`, AlpacaEval annotations, Arena-Hard judgments, or a folder that holds such files"
    add("sources", nargs="+", type=Path, metavar="RUN", help=sources)
    add("--output_dir", type=Path, default=Path("comparison"), help="for compare.md, .html and .json")
    add("--difficulty", type=Path, help="AlpacaEval's instruction_difficulty.csv, for its length control")
    add("--gamed", type=Path, help="AlpacaEval's df_gamed.csv, for its regularised length control")
    who = "who computes AE LC: the fit here, or the official package alpaca-eval"
    add("--length_control", choices=("fit", "alpaca_eval"), default="fit", help=who)
    add("--rounds", type=int, default=1000, help="of the bootstrap")
    add("--seed", type=int, default=0, help="of the bootstrap")
    return parser


COMMANDS: dict[str, Callable[[list[str]], int]] = {"generate": generate, "judge": judge, "compare": compare}

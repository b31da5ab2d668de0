"""Compares all algorithms on the embedded task, at equal budgets: `python -m rlhf_jax.bench.algorithms`.

For each seed one SFT model and one reward model are trained. Each algorithm trains that SFT model until so
many completions have gone through its update: a pair is two, and a rollout counts once for each pass over
it. Then every policy completes the same held-out prompts at temperature 1. Prints a table in Markdown, of the
algorithms that were asked for.

What is done is kept in --dir: the same command goes on there, with the run of the SFT and the reward model
where that was interrupted. An algorithm's run begins anew that was not finished or that failed, and any run
whose settings have changed, for which those of the SFT and the reward model count as well.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from rlhf_jax import strict_yaml
from rlhf_jax.algo_config import ALGORITHM_SECTIONS, AlgorithmConfig
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.command_line import read_tree
from rlhf_jax.config import MeshConfig
from rlhf_jax.config_file import ignored, resolve
from rlhf_jax.data.collate import Row, collate_rows
from rlhf_jax.data.synthetic import gold_reward, prompts
from rlhf_jax.experience import distinct_n
from rlhf_jax.files import replace_file, to_json
from rlhf_jax.models.forward import make_forward
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.roles import load_policy
from rlhf_jax.sampler import Completion, Sampler
from rlhf_jax.sharding import make_mesh, place_rows, traced_on
from rlhf_jax.stage import stage_model
from rlhf_jax.stored_policy import read_prompts

SHARED = "shared"  # the run of the SFT and the reward model
POLICIES = [
    name for name, of in ALGORITHMS.items() if "policy" in of.trains and name not in ("sft", "distill")
]
"""Those that learn from preferences or rewards."""
SAMPLES = 4  # completions of each held-out prompt
COLUMNS = (
    "algorithm", "seeds", "gold reward", "gain over SFT", "in standard errors", "KL", "tokens", "distinct-2",
    "processor s",
)  # fmt: skip


class Measured(NamedTuple):
    """What a policy's completions of the held-out prompts are like."""

    gold: list[float]
    """Gold reward of each prompt, mean over its completions."""
    kl: float
    """Nats of a completion: log-probability under the policy less that under the SFT model, mean."""
    length: float
    """Tokens of a completion, mean."""
    distinct_2: float
    """Share of different pairs of neighbouring tokens among all of them."""
    seconds: float | None = None
    """That the processors worked on the training."""


class Failed(Exception):
    """A training run ended with an error; the message is its last line."""


Results = Mapping[str, Mapping[int, Measured]]
"""By algorithm and seed."""


def main() -> None:
    """Trains and measures what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml", help="chain of SFT and reward model")
    parser.add_argument("--settings", default="configs/bench/algorithms.yaml", help="of each algorithm")
    parser.add_argument("--dir", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--algorithms", nargs="+", choices=POLICIES, default=POLICIES, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--completions", type=int, default=12800, help="that go through each update")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that subprocess.run ends its process too
    chain, options = read_tree(args.config), read_tree(args.settings)
    shared = shared_tree(chain)
    trees = {name: algorithm_tree(name, chain, options, args.completions) for name in args.algorithms}
    failed = {} if args.table else run_all(args.dir, args.seeds, shared, trees)
    results, others = read_results(args.dir, settings_of(shared, trees))
    print(render(results))
    if others:
        print(f"left out, made with other settings: {', '.join(others)}", file=sys.stderr)
    for (name, seed), error in failed.items():
        print(f"{name}, seed {seed} failed: {error}", file=sys.stderr)
    if failed:
        sys.exit(1)


def run_all(
    directory: Path, seeds: Sequence[int], shared: Mapping[str, Any], trees: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, int], str]:
    """Returns the errors of runs that failed, by algorithm and seed; trains and measures what is not there.

    Args:
        directory: of the runs and the results.
        seeds: of each algorithm.
        shared: of `shared_tree`.
        trees: of `algorithm_tree`, by algorithm.
    """
    stages = {stage["algorithm"]: stage["name"] for stage in shared["stages"]}
    settings = settings_of(shared, trees)
    failed = {}
    for seed in seeds:
        run = directory / SHARED / str(seed)
        sft, reward = run / stages["sft"], run / stages["reward_model"]
        try:
            _sft(directory, sft, seed, shared, settings["sft"])
        except Failed as error:
            failed["sft", seed] = str(error)
            continue
        for name, tree in trees.items():
            try:
                _algorithm(directory, sft, reward, seed, name, tree, settings[name])
            except Failed as error:
                failed[name, seed] = str(error)
                print(f"{name}, seed {seed} failed: {error}", file=sys.stderr, flush=True)
    return failed


def shared_tree(chain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the run of the SFT and the reward model, without what the seed decides."""
    names = ("sft", "reward_model")
    tree = {key: of for key, of in chain.items() if key in names or key not in ALGORITHM_SECTIONS}
    return tree | {"stages": [stage for stage in chain["stages"] if stage["algorithm"] in names]}


def settings_of(shared: Mapping[str, Any], trees: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns all that a result depends on beside its seed, of the SFT model and each algorithm's policy."""
    settings = {name: to_json({"shared": shared, "tree": tree}) for name, tree in trees.items()}
    return {"sft": to_json({"shared": shared})} | settings


def algorithm_tree(
    name: str, chain: Mapping[str, Any], settings: Mapping[str, Any], completions: int
) -> dict[str, Any]:
    """Returns the configuration of an algorithm's run, without what depends on the seed.

    Args:
        name: of the algorithm.
        chain: configuration of the SFT and the reward model, of which everything else is taken.
        settings: sections that all `online` or `offline` ones share, and keys of each one's stage.
        completions: that go through the update.

    Raises:
        ValueError: settings of an algorithm that is none, or completions that are no whole number of updates.
    """
    if unknown := settings["algorithms"].keys() - ALGORITHM_SECTIONS.keys():
        raise ValueError(f"settings of {', '.join(sorted(unknown))}: no such algorithm")
    is_online = issubclass(ALGORITHM_SECTIONS[name], OnlineConfig)
    own = settings["algorithms"].get(name, {})
    options = own.get(name, {})
    of_one = completions_per_update(ALGORITHM_SECTIONS[name](**options))
    updates, rest = divmod(completions, of_one)
    if rest or not updates:
        raise ValueError(
            f"{name}: {completions} completions are no whole number of updates: {of_one} go through one"
        )
    budget = {"num_iterations" if is_online else "num_steps": updates, "eval_every": updates}
    common = {key: of for key, of in chain.items() if key not in {"stages", *ALGORITHM_SECTIONS}}
    for section, of in settings["online" if is_online else "offline"].items():
        common[section] = {**common.get(section, {}), **of}
    return common | {"stages": [{"name": name, "algorithm": name} | own | {name: options | budget}]}


def completions_per_update(settings: AlgorithmConfig) -> int:
    """Returns how many completions go through one update, each pass over a rollout counting."""
    if isinstance(settings, OnlineConfig):
        return settings.rows_per_update * settings.num_epochs
    return settings.rows_per_update * (2 if settings.records == "preference" else 1)


def _sft(directory: Path, sft: Path, seed: int, tree: Mapping[str, Any], settings: str) -> None:
    """Trains and measures the SFT model of a seed, and trains the reward model, in one run."""
    path = _result_path(directory, "sft", seed)
    if is_done(path, settings):
        return
    path.unlink(missing_ok=True)  # what it tells of is about to be gone
    train(sft.parent, tree, seed)
    _write(path, settings, measure(sft, sft, seed))


def _algorithm(
    directory: Path, sft: Path, reward: Path, seed: int, name: str, tree: Mapping[str, Any], settings: str
) -> None:
    """Trains and measures an algorithm's policy."""
    path = _result_path(directory, name, seed)
    if is_done(path, settings):
        return
    run = directory / name / str(seed)
    shutil.rmtree(run, ignore_errors=True)  # so that the seconds are those of all of it
    start = {"from": str(sft)}
    if issubclass(ALGORITHM_SECTIONS[name], OnlineConfig):
        start["reward_from"] = str(reward)
    seconds = train(run, {**tree, "stages": [start | tree["stages"][0]]}, seed)
    _write(path, settings, measure(run / name, sft, seed)._replace(seconds=seconds))


def train(run: Path, tree: Mapping[str, Any], seed: int) -> float:
    """Returns the processor seconds of a run, which it trains.

    A run there of the same configuration goes on, one of another is begun anew. Common options that no stage
    reads are left out.

    Raises:
        Failed: it did not end well.
    """
    tree = {**tree, "run": {**tree.get("run", {}), "dir": str(run), "seed": seed}}
    for owner, section, option in ignored(resolve(tree)):
        if not owner:
            tree[section] = {key: value for key, value in tree[section].items() if key != option}
    config, log, text = run.with_suffix(".yaml"), run.with_suffix(".log"), strict_yaml.dump(tree)
    if not config.is_file() or config.read_text("utf-8") != text:
        shutil.rmtree(run, ignore_errors=True)
        replace_file(config, text)
    print(f"training {run}", file=sys.stderr, flush=True)
    before = _seconds_of_children()
    with log.open("w") as out:
        command = [sys.executable, "-m", "rlhf_jax.train", "--config", str(config)]
        done = subprocess.run(command, stdout=out, stderr=out, check=False)
    if done.returncode:
        lines = log.read_text(errors="replace").split("\n")
        raise Failed(
            next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {done.returncode}")
        )
    return _seconds_of_children() - before


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(policy: Path, sft: Path, seed: int) -> Measured:
    """Returns what a stage's policy makes of the held-out prompts.

    Args:
        policy: RUN/STAGE.
        sft: the same of the SFT model.
        seed: of the run, which decides the prompts' order.
    """
    sampler = Sampler.load(str(policy), max_new_tokens=48, slots=256)
    texts = [cast(str, record.prompt) for record in prompts(seed, "eval")]
    made = sampler(texts, group_size=SAMPLES)
    gold = np.array(gold_reward([cast(str, each.prompt) for each in made], [each.text for each in made]))
    kl = log_ratios(sampler, made, sft)
    jax.clear_caches()  # each policy's programs are its own
    tokens = [np.array(each.tokens) for each in made]
    return Measured(
        gold=gold.reshape(-1, SAMPLES).mean(1).tolist(),
        kl=float(kl.mean()),
        length=float(np.mean([len(ids) for ids in tokens])),
        distinct_2=distinct_n(tokens, 2),
    )


def log_ratios(sampler: Sampler, made: Sequence[Completion], sft: Path) -> np.ndarray:
    """Returns f32[N], log pi/sft of each completion, summed over its tokens: by one forward pass of each."""
    policy = sampler.policy
    ids = read_prompts(policy, [each.prompt for each in made]).ids
    rows = [Row([*prompt, *each.tokens], len(prompt)) for prompt, each in zip(ids, made, strict=True)]
    length, longest = max(len(row.ids) for row in rows), max(row.num_loss_tokens for row in rows)
    mesh = make_mesh(MeshConfig())
    model = stage_model(policy.stage, policy.architecture)
    forward = make_forward(model, longest)
    assert forward.role_logprobs is not None
    role_logprobs, pad = forward.role_logprobs, cast(int, policy.tokenizer.pad_token_id)

    def ratios(of_policy: Any, of_sft: Any, batch: Any) -> jax.Array:
        trees = {"policy": of_policy, "reference": of_sft}
        ours, theirs = role_logprobs(("policy", "reference"), trees, {}, batch)
        return (ours - theirs).sum(1)

    weights = [load_policy(path, model, mesh) for path in (policy.path, sft)]
    batch = place_rows(mesh, collate_rows(rows, length, pad, len(rows)))
    return np.asarray(jax.jit(traced_on(mesh, ratios))(*weights, batch))


def _result_path(directory: Path, name: str, seed: int) -> Path:
    return directory / "results" / f"{name}-{seed}.json"


def is_done(path: Path, settings: str) -> bool:
    """Returns whether a result is there that was made with these settings."""
    return path.is_file() and json.loads(path.read_text("utf-8"))["settings"] == settings


def _write(path: Path, settings: str, measured: Measured) -> None:
    replace_file(path, to_json({"settings": settings, **measured._asdict()}) + "\n")


def read_results(directory: Path, settings: Mapping[str, str]) -> tuple[Results, list[str]]:
    """Returns the results of a directory that were made with these settings, and the names of the others.

    Args:
        directory: of `run_all`.
        settings: by algorithm; of others nothing is read.
    """
    results: dict[str, dict[int, Measured]] = {}
    others = []
    for path in sorted((directory / "results").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        if name not in settings:
            continue
        if not is_done(path, settings[name]):
            others.append(path.stem)
            continue
        stored = json.loads(path.read_text("utf-8"))
        results.setdefault(name, {})[int(seed)] = Measured(**{key: stored[key] for key in Measured._fields})
    return results, others


class Gain(NamedTuple):
    """What an algorithm gains over the SFT models that it started from."""

    mean: float
    standard_error: float


def gain(policies: Mapping[int, Measured], sft: Mapping[int, Measured]) -> Gain:
    """Returns the gain in gold reward, mean over the seeds, and its standard error.

    Prompt by prompt the policy's reward less the SFT model's of the same seed. The standard error is the
    greater of two: what the prompts leave open, sqrt(sum of each seed's squared) / seeds, and what the seeds
    do, the deviation of their gains (ddof 1) / sqrt(seeds), which is not known of a single one.
    """
    pairs = [np.subtract(policies[seed].gold, sft[seed].gold) for seed in policies]
    means = [float(of.mean()) for of in pairs]
    of_prompts = math.sqrt(sum(of.var(ddof=1) / len(of) for of in pairs)) / len(pairs)
    of_seeds = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Gain(float(np.mean(means)), max(of_prompts, of_seeds))


def render(results: Results) -> str:
    """Returns the table: means over the seeds and their deviation, in the order of the registry."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for name in (name for name in ALGORITHMS if name in results):
        of = results[name]
        shared = {seed: measured for seed, measured in of.items() if seed in results.get("sft", {})}
        gold = [float(np.mean(measured.gold)) for measured in of.values()]
        gained, errors = "", ""
        if name != "sft" and shared:
            mean, standard_error = gain(shared, results["sft"])
            gained = f"{mean:+.2f}"
            errors = f"{mean / standard_error:.1f}" if standard_error else "-"
        seconds = [measured.seconds for measured in of.values() if measured.seconds is not None]
        lines.append(
            (
                f"`{name}`",
                str(len(of)),
                spread(gold, 2),
                gained,
                errors,
                spread([measured.kl for measured in of.values()], 2),
                spread([measured.length for measured in of.values()], 1),
                spread([measured.distinct_2 for measured in of.values()], 4),
                spread(seconds, 0) if seconds else "",
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean and, of several, their deviation (ddof 1)."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()

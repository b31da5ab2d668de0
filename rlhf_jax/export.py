"""A stage of a run becomes a Hugging Face directory: `python -m rlhf_jax.export --run DIR --out DIR`.

Weights, tokenizer with its chat template, generation config, and a model card with the run's figures. An
adapter is merged with the model that it is for, or with --adapter written alone, for PEFT. Exit codes: 0
written; 2 there is no such run, stage, role or adapter, or the directory is taken.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
from jax.sharding import Mesh

from rlhf_jax import strict_yaml
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.checkpoint import load_info, read_result
from rlhf_jax.config import Config, MeshConfig, StageConfig, TokenizerConfig
from rlhf_jax.config_file import resolve
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.distributed import process_id
from rlhf_jax.files import new_directory, replace_file, to_json
from rlhf_jax.model_card import lineage, model_card
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.hf import Dtype
from rlhf_jax.models.hub import is_hub, read_commits, split_name
from rlhf_jax.models.peft import write_adapter
from rlhf_jax.models.scorers import Role, save_scorer
from rlhf_jax.models.transformer import make_model
from rlhf_jax.options import did_you_mean
from rlhf_jax.origins import base_dir, checked_base, is_of_stage, stored_adapters, stored_architecture
from rlhf_jax.roles import load_adapter, load_policy, load_trained_scorer
from rlhf_jax.sharding import make_mesh


def main(argv: list[str] | None = None) -> int:
    """Writes what the flags name; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_jax.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", required=True, help="directory of a run", metavar="DIR")
    parser.add_argument("--stage", default="", help="of the run; by default the last that trained a policy")
    parser.add_argument(
        "--role",
        choices=["policy", "value", "reward"],
        default="",
        help="what of the stage: its policy or its reward model by default; ppo also has a value model",
    )
    parser.add_argument("--out", required=True, help="directory to write; must not exist", metavar="DIR")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of the weights")
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, for PEFT")
    parser.add_argument(
        "--base",
        default="",
        help="of the adapter: name or path of the model that it is for; by default what the stage began with",
        metavar="MODEL",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON on stdout")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is training goes on undisturbed
    run_dir, out = Path(args.run), Path(args.out)
    try:
        config = read_run_config(run_dir)
        stage = args.stage or last_policy(config) or config.stages[-1].name
        if out.exists():
            raise ValueError(f"--out {out}: exists already; choose another directory")
        if args.base and not args.adapter:
            raise ValueError(
                f"--base {args.base}: would be ignored without --adapter; leave it out, or add that"
            )
        mesh = make_mesh(MeshConfig(data=1), devices=jax.local_devices()[:1])
        if args.adapter:
            export_adapter(run_dir, config, stage, out, mesh, args.base, role=args.role, dtype=args.dtype)
        else:
            export_stage(run_dir, config, stage, out, mesh, role=args.role, dtype=args.dtype)
    except (ValueError, OSError) as error:
        print(f"rlhf_jax: {error}", file=sys.stderr)
        return 2
    print(f"{run_dir / stage} -> {out}", file=sys.stderr)
    if args.json:
        print(to_json({"run": str(run_dir), "stage": stage, "out": str(out)}))
    return 0


def read_run_config(run_dir: Path) -> Config:
    """Returns the configuration that a run was started with; the files that it names need not be there.

    Raises:
        ValueError: the directory is no run's, or its configuration is not one of this version.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not the directory of a run: it has no config.yaml")
    tree = strict_yaml.load(path.read_text(encoding="utf-8"), str(path))
    resolved = resolve(tree if isinstance(tree, dict) else {})
    if resolved.problems:
        raise ValueError(f"{path} is no configuration of this version: {'; '.join(resolved.problems[:3])}")
    return resolved.config


def last_policy(config: Config) -> str:
    """Returns the name of the last stage that trains a policy; empty where none does."""
    names = [stage.name for stage in config.stages if "policy" in ALGORITHMS[stage.algorithm].trains]
    return names[-1] if names else ""


def export_stage(
    run_dir: Path,
    config: Config,
    name: str,
    out: Path,
    mesh: Mesh,
    *,
    role: str = "",
    dtype: Dtype = "float32",
) -> None:
    """Writes a stage's model as a Hugging Face directory, which appears when it is whole.

    All processes call it; the first one writes.

    Args:
        run_dir: of the run.
        config: of the run.
        name: of the stage.
        out: to be made.
        mesh: where the parameters are put on their way.
        role: policy, or reward or value in transformers' layout of sequence classification; by default the
            first that the stage trains.
        dtype: of the weights.

    Raises:
        ValueError: no such stage or role, or it has no usable checkpoint.
    """
    found = _find(run_dir, config, name, role)
    architecture, tokenizer = found.architecture, found.tokenizer
    model = make_model(architecture)
    card = model_card(found.chain, found.role, found.results)
    ids = token_ids(tokenizer)
    stop = found.info["text"]["stop"]
    writes = process_id() == 0
    with new_directory(out) if writes else nullcontext(out) as unfinished:
        if found.role == "policy":
            policy = load_policy(found.directory, model, mesh)
            hf.save_policy(unfinished, architecture, policy, dtype=dtype, token_ids=ids)
            generation = ids | generation_config(found.chain[-1])
            if stop != ids["eos_token_id"]:  # conversations end with a token of the chat template
                generation["eos_token_id"] = [stop, ids["eos_token_id"]]
            if writes:
                replace_file(unfinished / "generation_config.json", to_json(generation, indent=2) + "\n")
        else:
            kind: Role = "value" if found.role == "value" else "reward"
            scorer, normalizer = load_trained_scorer(found.directory, kind, model, mesh)
            ids = own_pad(tokenizer, stop)
            save_scorer(unfinished, architecture, scorer, kind, normalizer, dtype=dtype, token_ids=ids)
        if writes:
            tokenizer.save_pretrained(str(unfinished))
            replace_file(unfinished / "README.md", card)


def export_adapter(
    run_dir: Path,
    config: Config,
    name: str,
    out: Path,
    mesh: Mesh,
    base: str = "",
    *,
    role: str = "",
    dtype: Dtype = "float32",
) -> None:
    """Writes a stage's adapter as a directory of PEFT's, which appears when it is whole.

    The model that it is for is not read, and need not be there. Other arguments, and errors, are those of
    `export_stage`; an adapter of a reward or value model has a score head with it.

    Args:
        base: name or path of the model that it is for; by default the one that the stage started from.

    Raises:
        ValueError: the stage has no adapters; they are for a stage and not for a model that PEFT could load;
            or what lies where that model was is another one now.
    """
    found = _find(run_dir, config, name, role)
    lora = stored_adapters(found.info)
    if lora is None:
        raise ValueError(
            f"--adapter: the stage {name} has none, for all its weights were trained (lora.rank 0); leave "
            "--adapter out"
        )
    start = found.chain[-1].start_from or found.chain[-1].model.path
    if not base and is_of_stage(found.info):
        raise ValueError(
            f"--adapter: it is for the model of the stage {start}, which PEFT cannot load; export that as "
            "well, and name the directory, or where it will be found, with --base"
        )
    there = base_dir(found.directory, found.info)
    if not base and there is not None and there.is_dir():
        checked_base(found.directory, found.info)
    base = base or start
    adapted, revision = split_name(base) if is_hub(base) else (base, "")
    revision = read_commits(run_dir).get(base, revision)
    model = make_model(found.architecture, lora=lora)
    weights, (mean, std) = load_adapter(found.directory, found.role, model, mesh)
    head = weights.get("score_head")
    if head is not None:
        own_pad(found.tokenizer, found.info["text"]["stop"])
        mean -= float(head["bias"])
    card = model_card(found.chain, found.role, found.results, base=base, normalizer=(mean, std))
    with new_directory(out) as unfinished:
        write_adapter(
            unfinished,
            found.architecture,
            lora,
            weights["adapter"],
            adapted,
            revision=revision,
            score_head=head,
            dtype=dtype,
        )
        found.tokenizer.save_pretrained(str(unfinished))
        replace_file(unfinished / "README.md", card)


class _Found(NamedTuple):
    """A role of a stage, and what is told of it."""

    directory: Path
    role: str
    architecture: Architecture
    info: dict[str, Any]
    tokenizer: Tokenizer
    chain: list[StageConfig]
    results: dict[str, dict[str, Any]]


def _find(run_dir: Path, config: Config, name: str, role: str) -> _Found:
    stages = {stage.name: stage for stage in config.stages}
    if name not in stages:
        hint = did_you_mean(name, stages) or f"; it has {', '.join(stages)}"
        raise ValueError(f"{run_dir} has no stage {name!r}{hint}")
    directory = run_dir / name
    role = role or ALGORITHMS[stages[name].algorithm].trains[0]
    chain = lineage(config, name)
    return _Found(
        directory,
        role,
        stored_architecture(directory, role),
        load_info(directory),
        load_tokenizer(TokenizerConfig(path=str(run_dir / "tokenizer"))),
        chain,
        {s.name: done[1] for s in chain if (done := read_result(run_dir / s.name)) is not None},
    )


def own_pad(tokenizer: Tokenizer, stop: int) -> dict[str, int]:
    """Returns the ids that a scorer's config.json names, its padding token one that ends no text.

    transformers reads a score at the last token that is not padding; ours is read at the end. So BOS or the
    unknown token pads where the end would. Where there is no other, as in GPT-2's tokenizer, none is named:
    transformers then takes texts one by one.

    Args:
        tokenizer: its padding token is changed in place.
        stop: the token that ends texts.
    """
    if tokenizer.pad_token_id == stop:
        ids = [id_ for id_ in (tokenizer.bos_token_id, tokenizer.unk_token_id) if id_ not in (None, stop)]
        tokenizer.pad_token_id = (*ids, stop)[0]
    ids = token_ids(tokenizer) | {"eos_token_id": stop}
    return {name: id_ for name, id_ in ids.items() if name != "pad_token_id" or id_ != stop}


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of the special tokens that a config.json names."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: id_ for name in names if (id_ := getattr(tokenizer, name)) is not None}


def generation_config(stage: StageConfig) -> dict[str, Any]:
    """Returns how a policy was sampled while it was trained; nothing where it was not."""
    if not stage.is_online:
        return {}
    rollout = stage.rollout
    return {
        "do_sample": True,
        "temperature": rollout.temperature,
        "top_k": rollout.top_k,  # said also where it is 0: the default of transformers is 50
        "top_p": rollout.top_p,
        **({"min_p": rollout.min_p} if rollout.min_p else {}),
        "max_new_tokens": rollout.max_new_tokens,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Plans: what a stage starts from has to fit it, and each problem is told, before a device is touched."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config
from rlhf_jax.checkpoint import write_result
from rlhf_jax.command_line import read_config
from rlhf_jax.config import DataConfig, TokenizerConfig
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.tokenize import Losses, text_difference, text_settings
from rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.mesh_checks import check_mesh
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.row_attention import flash_lack
from rlhf_jax.models.scorers import save_scorer
from rlhf_jax.models.transformer import make_model
from rlhf_jax.origins import Origins, stored_architecture
from rlhf_jax.plan import Plan, plan_stages
from rlhf_jax.plan_notes import losses, mixture, reward_notes
from rlhf_jax.run_tokenizer import prepare_tokenizer
from tests import tiny

MODEL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 48}
TOKENIZER = train_tokenizer(["the lamp is broken"] * 3, 260)
ARCHITECTURE = Architecture.from_config(config.ModelConfig(**MODEL, context_length=256), len(TOKENIZER))
WIDE = dataclasses.replace(ARCHITECTURE, mlp_size=64)
PPO = """
run: {dir: HERE/new}
stages: [{name: ppo, algorithm: ppo, from: FROM, reward_from: HERE/run/reward}]
data: {train: HERE/prompts.jsonl, eval: HERE/prompts.jsonl}
rewards: {}
"""


def write_stage(run, name, algorithm, architecture=ARCHITECTURE, tokenizer=TOKENIZER, **text):
    """Writes as much of a finished stage as a plan reads."""
    info = {
        "algorithm": algorithm,
        "architecture": architecture.to_dict(),
        "text": text_settings(tokenizer, DataConfig(), has_conversations=False) | text,
    }
    manifest = {"format": 1, "step": 1, "info": info, "leaves": {}, "files": {}}
    (run / name / "checkpoints" / "1").mkdir(parents=True)
    (run / name / "checkpoints" / "1" / "manifest.json").write_text(json.dumps(manifest))
    write_result(run / name, 1, {})
    tokenizer.save_pretrained(run / "tokenizer")


@pytest.fixture
def plans(tmp_path):
    """Returns a function that plans ppo from stages of another run; its texts replace parts of the file."""
    write_stage(tmp_path / "run", "sft", "sft")
    write_stage(tmp_path / "run", "reward", "reward_model")
    records = [{"prompt": "a lamp", "label": i} for i in range(4)] + [{"prompt": "a" * 200, "label": 0}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))

    def plans(start="HERE/run/sft", **changes) -> list[Plan]:
        text = PPO.replace("FROM", start)
        for old, new in changes.items():
            text = text.replace(f"{old}:", new)
        path = tmp_path / "ppo.yaml"
        path.write_text(text.replace("HERE", str(tmp_path)))
        return plan_stages(read_config(["--config", str(path)]), TOKENIZER)

    return plans


def test_a_kernel_that_the_devices_do_not_have_is_told_with_what_does_not_divide(plans):
    planned = plans(rewards="model: {attention: flash}\nrewards:")
    with pytest.raises(
        ValueError, match="model.attention is 'flash', but there is no kernel for a cpu; set it"
    ):
        check_mesh(planned, tiny.mesh())
    check_mesh(plans(), tiny.mesh())


def test_heads_that_the_kernel_does_not_take_are_told_before_devices_compute(plans, monkeypatch):
    of_gpu = partial(flash_lack, "gpu", jnp.dtype("bfloat16"))
    monkeypatch.setattr("rlhf_jax.mesh_checks.compute_capability", lambda: (8, 0))
    monkeypatch.setattr("rlhf_jax.mesh_checks.flash_lack", lambda *device, **model: of_gpu(**model))
    planned = plans(rewards="model: {attention: flash}\nrewards:")
    check_mesh(planned, tiny.mesh())
    odd = [plan._replace(architecture=dataclasses.replace(ARCHITECTURE, head_dim=136)) for plan in planned]
    with pytest.raises(
        ValueError, match="'flash', but cuDNN's kernel takes heads of up to 128 numbers, .* 136"
    ):
        check_mesh(odd, tiny.mesh())


def test_an_unfinished_stage_is_told(plans, tmp_path, caplog):
    """A policy of fewer steps may be wanted; scores that are not yet normalised are not."""
    (tmp_path / "run" / "sft" / "result.json").unlink()
    assert len(plans()) == 1
    assert "run/sft is not finished: it has no result.json; its newest checkpoint is used" in caplog.text
    (tmp_path / "run" / "reward" / "result.json").unlink()
    with pytest.raises(ValueError, match="run/reward is not finished.*scores are not yet normalised"):
        plans()


def test_a_reward_model_without_a_checkpoint_is_a_problem_among_others(plans, tmp_path):
    (tmp_path / "run" / "reward" / "checkpoints" / "1" / "manifest.json").unlink()
    with pytest.raises(ValueError) as raised:
        plans(rewards="rollout: {stop_tokens: [nowhere]}\nrewards:")
    first, *others = str(raised.value).splitlines()
    assert first.startswith("stage ppo: ") and "run/reward" in first
    assert any("nowhere" in line for line in others)


@pytest.fixture
def checkpoint(tmp_path):
    """Returns a Hugging Face directory with a tokenizer."""
    policy = make_model(ARCHITECTURE).init_policy(jax.random.key(0))
    hf.save_policy(tmp_path / "hf", ARCHITECTURE, policy, token_ids={"eos_token_id": 2})
    TOKENIZER.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_checkpoint_with_another_tokenizer(plans, checkpoint):
    """In a chain, the first stage's tokenizer is everyone's."""
    write_stage(checkpoint.parent / "run", "reward2", "reward_model")
    assert len(plans("HERE/hf")) == 1
    train_tokenizer(["quite another text"] * 3, 260).save_pretrained(checkpoint)
    assert train_tokenizer(["quite another text"] * 3, 260).get_vocab() != TOKENIZER.get_vocab()
    with pytest.raises(ValueError, match="hf was trained with another tokenizer: .* tokens have other ids"):
        plans("HERE/hf")
    assert len(plans("HERE/hf", rewards="tokenizer: {path: HERE/run/tokenizer}\nrewards:")) == 1


def test_weights_that_do_not_fit_are_told_before_anything_is_trained(plans, checkpoint):
    text = (checkpoint / "config.json").read_text()
    assert '"intermediate_size": 48' in text
    (checkpoint / "config.json").write_text(
        text.replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    with pytest.raises(
        ValueError, match=r"the tensors in .*hf are not those of its config.json[^$]*down_proj"
    ):
        plans("HERE/hf")


def test_mixture_tells_records_and_epochs_of_each_source(plans, tmp_path):
    mixed = "train: {'HERE/prompts.jsonl[:1]': 3, 'HERE/prompts.jsonl': 1}, eval:"
    (plan,) = plans(
        **{"train: HERE/prompts.jsonl, eval": mixed, "rewards": "ppo: {num_iterations: 5}\nrewards:"}
    )
    assert mixture(plan) == [  # of 5 * 64 prompts three quarters and one quarter; one of five is too long
        f"[ppo] data.train: {tmp_path}/prompts.jsonl[:1]: 1 records, 240 epochs",
        f"[ppo] data.train: {tmp_path}/prompts.jsonl: 4 records, 20 epochs",
    ]
    missing = "train: {'HERE/prompts.jsonl[9:]': 3, 'HERE/prompts.jsonl[8:]': 1}, eval:"
    with pytest.raises(ValueError) as caught:
        plans(**{"train: HERE/prompts.jsonl, eval": missing})
    assert [line.partition(" takes")[0] for line in str(caught.value).splitlines()] == [
        f"stage ppo: data.train: {tmp_path}/prompts.jsonl[{first}:]" for first in (9, 8)
    ]


def test_a_first_stage_that_starts_from_a_whole_run(plans, tmp_path):
    with pytest.raises(ValueError, match="whole run; name one of its stages: .*run/sft"):
        plans("HERE/run")
    config_file = tmp_path / "ppo.yaml"
    with pytest.raises(ValueError, match="stages.ppo.from: .*run is a whole run"):
        prepare_tokenizer(read_config(["--config", str(config_file)]))


def test_stages_of_another_run_that_fit(plans, tmp_path):
    (plan,) = plans()
    assert plan.architecture == ARCHITECTURE
    assert plan.origins == Origins(tmp_path / "run" / "sft", tmp_path / "run" / "reward")
    half = "data.{}: 1 of 5 records dropped (prompt longer than 128 tokens)"
    assert mixture(plan) == []
    assert losses(plan) == [f"[ppo] {half.format(split)}" for split in ("train", "eval")]


def test_what_is_left_out_of_each_source_is_told(plans, tmp_path):
    records = [{"prompt": "a lamp", "label": i} for i in range(600)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    (plan,) = plans(**{"eval: HERE/prompts.jsonl}\nrewards": "eval: HERE/many.jsonl}\nrewards:"})
    assert losses(plan)[1] == "[ppo] data.eval: 88 left out (beyond data.max_eval_records = 512)"
    left_out = {"not desirable": 3, "chosen equals rejected": 1}
    plan = plan._replace(train=dataclasses.replace(plan.train, left_out=left_out))
    assert losses(plan)[0].startswith(
        "[ppo] data.train: 3 left out (not desirable), 1 left out (chosen equals rejected), 1 of 5 records"
    )


@pytest.mark.parametrize(
    "stage, per",
    [
        ("algorithm: sft", 1),
        ("algorithm: reward_model, reward_model: {normalizer: none}", 2),
    ],
)
def test_both_splits_are_packed_into_rows_of_one_shape(tmp_path, stage, per):
    """Of max_length tokens, a pair twice that, whatever the longest row; every record is in one row."""
    for name, count in (("train", 40), ("eval", 12)):
        records = [
            {"prompt": "a lamp", "completion": "b" * i, "chosen": "b" * i, "rejected": "c"}
            for i in range(1, count + 1)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    text = """
run: {dir: HERE/run}
stages: [{name: one, STAGE}]
data: {train: HERE/train.jsonl, eval: HERE/eval.jsonl, packing: true, max_length: 64}
"""
    path = tmp_path / "packed.yaml"
    path.write_text(text.replace("HERE", str(tmp_path)).replace("STAGE", stage))
    (plan,) = plan_stages(read_config(["--config", str(path)]), TOKENIZER)
    for of, count in ((plan.train, 40), (plan.held_out, 12)):
        assert (of.length, len(of), of.num_dropped, of.num_cut) == (64 * per, count, 0, 0)
        assert of.num_units[0] < count
        batches = [batch for batch, _ in Loader(of, 4, seed=0).eval_batches()]
        assert {batch.tokens.shape for batch in batches} == {(4, 64 * per)}
        assert sum(int((batch.lengths > 0).sum()) for batch in batches) == per * count
        filled = int(sum(batch.lengths.sum() for batch in batches))
        assert filled == of.lengths.sum() <= of.num_units[0] * 64 * per


def test_how_full_packed_rows_are_is_told(plans):
    """Four prompts of the same tokens, two of which fit into a row: it has two tokens of padding."""
    (plan,) = plans()
    length = plan.train.longest_row
    packed = plan.train.packed(2 * length + 2)
    assert losses(plan._replace(train=packed))[0] == (
        f"[ppo] data.train: 1 of 5 records dropped (prompt longer than 128 tokens), 4 records packed into 2 "
        f"rows of {2 * length + 2} tokens, {length / (length + 1):.1%} filled (one record each: 100.0%)"
    )
    bucketed = dataclasses.replace(plan.train, shorter=(8, 16), length=24)
    assert losses(plan._replace(train=bucketed))[0].endswith("batches of 8, 16 or 24 tokens")


def test_more_than_half_dropped_is_a_warning_and_cut_rows_are_counted(plans):
    (plan,) = plans()
    many = dataclasses.replace(plan.train, num_dropped=5, losses=Losses(long_prompts=5), num_cut=3)
    many = dataclasses.replace(many, rows=plan.train.rows.joined(plan.train.rows))
    assert losses(plan._replace(train=many))[0] == (
        "[ppo] WARNING: more than half is lost: data.train: 5 of 9 records dropped (prompt longer than 128 "
        "tokens), 3 of 8 rows cut at 256 tokens"
    )


def test_every_loss_is_told(plans, tmp_path):
    write_stage(tmp_path / "left", "sft", "sft", prompt_truncation="left")
    write_stage(tmp_path / "left", "reward", "reward_model", prompt_truncation="left")
    left = {"HERE/run/reward}]\ndata": "HERE/left/reward}]\ndata:", "eval": "prompt_truncation: left, eval:"}
    (plan,) = plans("HERE/left/sft", **left)
    lost = Losses(long_rows=1, without_turns=2, uneven_starts=1, cut_prompts=3, unlearned_turns=4, apart=5)
    lines = losses(plan._replace(train=dataclasses.replace(plan.train, losses=lost)))
    assert lines[0] == (
        "[ppo] data.train: 1 of 5 records dropped (longer than 256 tokens), 2 of 5 records dropped "
        "(no assistant turn to learn), 1 of 5 records dropped (the template rewrites turns: their "
        "completions do not follow the same prompt), 4 assistant turns without loss (the template rewrites "
        "them), 3 of 5 prompts cut on the left at 128 tokens, 5 of 5 completions encoded apart"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ({"conversations": True}, "conversations True there and False here; use the same tokenizer and chat"),
        (
            {"stop": 7, "chat_template": "ab"},
            "stop 7 there and 2 here, chat_template 'ab' there and '' here;",
        ),
    ],
)
def test_a_stage_that_treats_text_otherwise_than_its_model_is_refused(plans, tmp_path, text, message):
    write_stage(tmp_path / "chat", "sft", "sft", **text)
    with pytest.raises(
        ValueError, match=f"chat/sft was trained on text that is treated otherwise: {message}"
    ):
        plans("HERE/chat/sft")


@pytest.mark.parametrize(
    "text, message",
    [
        ({"prompt_template": "Q: {prompt}"}, "prompt_template 'Q: {prompt}' there and '' here"),
        ({"prompt_truncation": "left"}, "prompt_truncation 'left' there and 'drop' here"),
        ({"truncation": "left"}, ""),  # ppo has no rows to cut
        ({"prompt_template": None}, ""),  # it had no prompts
    ],
)
def test_options_of_data_are_compared_where_both_stages_read_them(plans, tmp_path, text, message):
    write_stage(tmp_path / "other", "sft", "sft", **text)
    if not message:
        assert len(plans("HERE/other/sft")) == 1
        return
    with pytest.raises(ValueError) as raised:
        plans("HERE/other/sft")
    assert message in str(raised.value)


def test_text_settings_come_back_from_a_saved_tokenizer(tmp_path):
    """A resumed run loads what it trained: its text must not seem to be another."""
    TOKENIZER.save_pretrained(tmp_path)
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    again("a", padding="max_length", max_length=9, truncation=True)
    settings = [text_settings(of, DataConfig(), has_conversations=False) for of in (TOKENIZER, again)]
    assert settings[0] == settings[1] and text_difference(*settings) == ""
    other = text_settings(train_tokenizer(["x y"] * 3, 262), DataConfig(), has_conversations=False)
    assert text_difference(settings[0], other).startswith(
        f"tokenizer '{settings[0]['tokenizer']}' there and '"
    )


@pytest.mark.parametrize(
    "start, message",
    [
        ("HERE/run/reward", "run/reward is the result of reward_model, which trains no policy; name the "
         "directory of a stage that runs sft, ppo or the like"),
        ("HERE/run", "run is a whole run; name one of its stages: HERE/run/reward, HERE/run/sft"),
        ("HERE/other/sft", "other/sft was trained with another tokenizer: "),
        ("HERE/alone/sft", "alone/sft is of a run without a tokenizer: there is no HERE/alone/tokenizer"),
        ("HERE/foreign/sft", "are not those of a stage that this version can read"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit(plans, tmp_path, start, message):
    write_stage(tmp_path / "other", "sft", "sft", tokenizer=train_tokenizer(["another text"] * 3, 260))
    write_stage(tmp_path / "alone", "sft", "sft")
    (tmp_path / "alone" / "tokenizer").rename(tmp_path / "elsewhere")
    write_stage(tmp_path / "foreign", "sft", "of_tomorrow")
    with pytest.raises(ValueError) as raised:
        plans(start)
    assert message.replace("HERE", str(tmp_path)) in str(raised.value)
    assert str(raised.value).count("\n") == 0


def taught(plans, teacher, start="HERE/run/sft"):
    """Returns the plan of a distill stage with this teacher."""
    before = f"stages: [{{name: ppo, algorithm: ppo, from: {start}, reward_from: HERE/run/reward}}]\ndata"
    start_from = f"from: {start}, " if start else ""
    stage = f"stages: [{{name: distill, algorithm: distill, {start_from}teacher_from: {teacher}}}]\ndata:"
    (plan,) = plans(start, **{before: stage})
    return plan


def test_a_teacher_may_be_another_model(plans, tmp_path):
    write_stage(tmp_path / "large", "sft", "sft", WIDE)
    plan = taught(plans, "HERE/large/sft")
    assert (plan.architecture, plan.teacher) == (ARCHITECTURE, WIDE)
    assert plan.origins.teacher == tmp_path / "large" / "sft"
    assert plan.parts().keys() == {"policy"}
    check_mesh([plan], tiny.mesh())


def test_a_fresh_policy_has_its_teacher_s_vocabulary(plans, tmp_path):
    """Embeddings may be padded beyond the tokenizer."""
    padded = dataclasses.replace(WIDE, vocab_size=320)
    write_stage(tmp_path / "large", "sft", "sft", padded)
    plan = taught(plans, "HERE/large/sft", "")
    assert plan.teacher == padded
    assert (plan.architecture.vocab_size, plan.architecture.mlp_size) == (320, 192)
    assert taught(plans, "HERE/large/sft").architecture.vocab_size == 260


@pytest.mark.parametrize(
    "teacher, message",
    [
        (
            "HERE/small/sft",
            "teacher_from: the teacher's vocabulary has 250 tokens, the tokenizer 260; take a teacher that",
        ),
        ("HERE/other/sft", "other/sft was trained with another tokenizer: "),
        (
            "HERE/short/sft",
            "rows of up to 192 tokens do not fit the teacher's context of 100; lower data.max",
        ),
        ("HERE/chat/sft", "chat/sft was trained on text that is treated otherwise: conversations True there"),
        ("HERE/run/reward", "run/reward is the result of reward_model, which trains no policy; name the"),
    ],
)
def test_a_teacher_that_does_not_fit(plans, tmp_path, teacher, message):
    write_stage(tmp_path / "small", "sft", "sft", dataclasses.replace(WIDE, vocab_size=250))
    write_stage(tmp_path / "other", "sft", "sft", tokenizer=train_tokenizer(["another text"] * 3, 260))
    write_stage(tmp_path / "short", "sft", "sft", dataclasses.replace(WIDE, context_length=100))
    write_stage(tmp_path / "chat", "sft", "sft", conversations=True)
    with pytest.raises(ValueError) as raised:
        taught(plans, teacher)
    assert message in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_a_teacher_without_a_tokenizer_is_told(plans, checkpoint, caplog):
    taught(plans, str(checkpoint))
    assert "no tokenizer" not in caplog.text
    for path in checkpoint.glob("*token*"):
        path.unlink()
    taught(plans, str(checkpoint))
    assert f"teacher_from: {checkpoint} has no tokenizer; it is taken to be the run's" in caplog.text


def test_a_policy_is_no_reward_model(plans, tmp_path):
    with pytest.raises(ValueError, match="is the result of sft, which trains no reward; .* reward_model"):
        stored_architecture(tmp_path / "run" / "sft", "reward")
    with pytest.raises(ValueError, match="new is not a Hugging Face model directory: it has no config.json"):
        stored_architecture(tmp_path / "new", "reward")


OTHER = train_tokenizer(["quite another text"] * 3, 270)


@pytest.fixture
def scorer(tmp_path):
    """Returns a function that writes HERE/judge, a reward model in transformers' layout."""

    def scorer(architecture=ARCHITECTURE, tokenizer=TOKENIZER, role="reward", pad=0, **changes):
        params = make_model(architecture).score_shapes
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
        judge = tmp_path / "judge"
        save_scorer(judge, architecture, params, role, token_ids={"pad_token_id": pad})
        if tokenizer is not None:
            tokenizer.save_pretrained(judge)
        config = json.loads((judge / "config.json").read_text())
        if role == "reward":  # as others write it
            del config["score_role"], config["score_normalizer"]
        (judge / "config.json").write_text(json.dumps(config | changes))
        return judge

    return scorer


JUDGE = {"HERE/run/reward}]\ndata": "HERE/judge}]\ndata:"}


def test_a_reward_model_like_the_policy_is_one_of_the_roles(plans, scorer):
    judge = scorer()
    (plan,) = plans(**JUDGE)
    assert plan.external is None and plan.origins.reward == judge
    assert reward_notes(plan) == []


@pytest.mark.parametrize(
    "changes, reads_text",
    [
        ({"architecture": WIDE}, False),
        ({"pad": TOKENIZER.eos_token_id}, False),  # transformers scores the token before the EOS
        ({"tokenizer": OTHER, "architecture": dataclasses.replace(ARCHITECTURE, vocab_size=400)}, True),
    ],
)
def test_a_reward_model_unlike_the_policy_has_a_program_of_its_own(plans, scorer, changes, reads_text):
    """With the same tokenizer it is still given the policy's tokens, which are never decoded for nothing."""
    judge = scorer(**changes)
    (plan,) = plans(**JUDGE)
    assert plan.origins.reward is None and plan.external is not None
    path, architecture, reader, _ = plan.external
    assert (path, architecture) == (judge, changes.get("architecture", ARCHITECTURE))
    assert (reader.tokenizer is not None, reader.joins) == (reads_text, True)
    assert (reader.pad_id, reader.context_length) == (changes.get("pad", 0), 256)
    notes = [f"[ppo] the reward model {judge} reads text otherwise than the policy: it is given prompt and "
             "completion as text, in its own tokens"]  # fmt: skip
    assert reward_notes(plan) == (notes if reads_text else [])


def test_a_reward_stage_of_another_run_with_another_tokenizer(plans, tmp_path):
    wide = dataclasses.replace(ARCHITECTURE, vocab_size=len(OTHER))
    write_stage(tmp_path / "theirs", "reward", "reward_model", wide, OTHER)
    (plan,) = plans(**{"HERE/run/reward}]\ndata": "HERE/theirs/reward}]\ndata:"})
    assert plan.external is not None and plan.external.reader.tokenizer is not None
    assert not plan.external.reader.joins  # it learned from prompt and completion apart
    assert "theirs/reward reads text otherwise than the policy" in reward_notes(plan)[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": None}, "judge holds a reward model without a tokenizer (none of tokenizer.json"),
        ({"role": "value"}, "judge is a value model (score_role in its config.json), not a reward model"),
        ({"model_type": "deberta-v2"}, "model_type is 'deberta-v2'; supported: 'gemma', "),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "judge has no score head: architectures in its config.json",
        ),
        ({"id2label": {"0": "a", "1": "b"}}, "the model has 2 labels (num_labels, id2label)"),
        ({"intermediate_size": 40}, "judge are not those of its config.json"),
        ({"tokenizer": train_tokenizer(["a b c d" * 99], 262)}, "the tokenizer of HERE/judge has 26"),
    ],
)
def test_a_directory_that_is_no_reward_model(plans, scorer, tmp_path, changes, message):
    scorer(**changes)
    with pytest.raises(ValueError) as raised:
        plans(**JUDGE)
    assert str(raised.value).startswith("stage ppo: ")
    assert message.replace("HERE", str(tmp_path)) in str(raised.value)


def test_problems_of_both_splits_and_of_functions_come_together(plans, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError) as raised:
        plans(data="data: {train: HERE/bad.jsonl, eval: HERE/bad.jsonl} #")
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["stage ppo", "data.train"],
        ["stage ppo", "data.eval"],
    ]


def test_a_column_that_a_function_needs(plans, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plan_judges.py").write_text(
        "def label(prompts, completions, label): ...\ndef x(prompts, x): ...\n"
    )
    (plan,) = plans(rewards="rewards: {gold: 'plan_judges:label'} #")
    assert plan.gold is not None
    with pytest.raises(ValueError, match="plan_judges:x needs x, which the records do not have"):
        plans(rewards="rewards: {gold: 'plan_judges:x'} #")


CHAIN = """
run: {dir: HERE/new}
stages:
  - {name: sft, algorithm: sft, data: {train: HERE/demos.jsonl, eval: HERE/demos.jsonl}}
  - {name: rm, algorithm: reward_model, from: sft, data: {train: HERE/pairs.jsonl, eval: HERE/pairs.jsonl}}
  - {name: ppo, algorithm: ppo, from: sft, reward_from: rm, data: {train: HERE/TEXTS, eval: HERE/TEXTS}}
tokenizer: {path: HERE/tokenizer}
data: {OPTIONS}
"""


@pytest.mark.parametrize(
    "options, texts, message",
    [
        ("prompt_tokens: 1", "texts.jsonl", None),  # of ppo alone
        (
            "prompt_tokens: 1",
            "demos.jsonl",
            "stage ppo: data.prompt_tokens: 1 would be ignored: .* have prompts",
        ),
        (
            "detokenize: true",
            "demos.jsonl",
            "stage rm: data.detokenize: True would be ignored: .*'labelled'",
        ),
        (
            "prompts: HERE/texts.jsonl, prompt_tokens: 1",
            "texts.jsonl",
            "stage rm: data.prompts: .*texts.jsonl would",
        ),
        ("prompt_tokens: 1, columns: {text: text}", "texts.jsonl", None),
        ("columns: {prompt: prompt}", "demos.jsonl", None),
        ("prompt_tokens: 1, prompt_template: 'Q: {prompt}'", "texts.jsonl", None),  # not of ppo
    ],
)
def test_options_that_no_stage_reads_once_the_formats_are_known(tmp_path, options, texts, message):
    """A stage may have options that only others read: they share a section."""
    rows = {
        "demos": {"prompt": "a lamp", "completion": " b"},
        "pairs": {"prompt": "a lamp", "chosen": " b", "rejected": " c"},
        "texts": {"text": "a lamp is broken, and so on"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"label": True, "text": "a lamp is broken"}))
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chain.yaml").write_text(
        CHAIN.replace("OPTIONS", options).replace("TEXTS", texts).replace("HERE", str(tmp_path))
    )
    read = read_config(["--config", str(tmp_path / "chain.yaml")])
    if message is None:
        assert len(plan_stages(read, TOKENIZER)) == 3
    else:
        with pytest.raises(ValueError, match=message):
            plan_stages(read, TOKENIZER)

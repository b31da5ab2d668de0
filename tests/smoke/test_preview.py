"""What `python -m rlhf_jax.preview` shows of records whose tokens are single bytes, but for the pair zz."""

import json

import pytest

from rlhf_jax import preview

CONFIG = """
run: {{dir: {dir}/run}}
stages:
  - {{name: sft, algorithm: sft, data: {{train: {dir}/demos.jsonl, eval: {dir}/demos.jsonl, max_length: 9}}}}
  - name: reward
    algorithm: reward_model
    from: sft
    data: {{train: {dir}/pairs.jsonl, eval: {dir}/pairs.jsonl}}
  - name: ppo
    algorithm: ppo
    from: sft
    reward_from: reward
    data: {{train: {dir}/pairs.jsonl, eval: {dir}/pairs.jsonl}}
    rollout: {{max_new_tokens: 8}}
tokenizer: {{vocab_size: 260}}
"""
DEMOS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "zzé", "completion": "zzpqrst"}]
PAIRS = [{"prompt": "ab", "chosen": "<|eos|>", "rejected": "c"}]


@pytest.fixture
def config(tmp_path):
    """Returns the configuration file of a chain on a few records."""
    for name, records in (("demos", DEMOS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "config.yaml").write_text(CONFIG.format(dir=tmp_path))
    return str(tmp_path / "config.yaml")


def shown(capsys, config, *flags):
    assert preview.main(["--config", config, *flags]) == 0
    return capsys.readouterr().out


def test_rows_are_shown_token_by_token(config, capsys):
    found = json.loads(shown(capsys, config, "--json"))
    first, second = found["sft"]["rows"]
    assert first["tokens"] == ["<|bos|>", "a", "b", "c", "d", "<|eos|>"]
    assert first["parts"] == ["prompt"] * 3 + ["completion"] * 3
    assert (first["padding"], second["padding"]) == (3, 0)
    assert second["tokens"] == ["<|bos|>", "zz", "", "é", "zz", "p", "q", "r", "s"]  # cut: no EOS
    assert [row["row"] for row in found["reward"]["rows"]] == ["record 1, chosen", "record 1, rejected"]
    assert set(found["ppo"]["rows"][0]["parts"]) == {"prompt"}


def test_lengths_are_those_of_the_rows(config, capsys):
    sft = json.loads(shown(capsys, config, "--json", "--stage", "sft"))["sft"]
    assert (sft["records"], sft["dropped"], sft["cut"]) == (2, 0, 1)
    assert sft["lengths"]["prompt"] == {"min": 3, "median": 3.5, "p95": 3.95, "max": 4}
    assert sft["lengths"]["completion"] == {"min": 3, "median": 4, "p95": 4.9, "max": 5}
    assert sft["lengths"]["row"] == {"min": 6, "median": 7.5, "p95": 8.85, "max": 9}


def test_without_a_terminal_brackets_enclose_the_completion(config, capsys):
    text = shown(capsys, config, "--stage", "sft")
    assert "-- record 1: 6 tokens: 3 of prompt, 3 of completion, 3 of padding\n<|bos|>ab⟦cd<|eos|>⟧\n" in text
    assert "9 tokens: 4 of prompt, 5 of completion, 0 of padding; CUT\n<|bos|>zzé⟦zzpqrs⟧\n" in text


def test_letters_of_a_control_token_are_not_shown_as_one(config, capsys):
    chosen = json.loads(shown(capsys, config, "--json", "--stage", "reward"))["reward"]["rows"][0]
    assert chosen["tokens"] == ["<|bos|>", "a", "b", *"<|eos|>", "<|eos|>"]


def test_turns_of_the_user_between_answers_are_not_learned(tmp_path, capsys):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(messages))
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    (tmp_path / "config.yaml").write_text(
        f"""
run: {{dir: {tmp_path}/run}}
stages: [{{name: sft, algorithm: sft}}]
tokenizer: {{vocab_size: 260, chat_template: "{template}"}}
data: {{train: {tmp_path}/chats.jsonl, eval: {tmp_path}/chats.jsonl}}
"""
    )
    text = shown(capsys, str(tmp_path / "config.yaml"))
    assert "u:a<|eos|>a:⟦b<|eos|>⟧u:c<|eos|>a:⟦d<|eos|>⟧\n" in text
    assert ", 4 of completion, 6 of other turns" in text


def test_a_terminal_gets_colours(config, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(capsys, config, "--stage", "sft", "--records", "1")
    green, reverse = "\x1b[1;32m", "\x1b[1;7;32m"
    assert f"{green}c" in text and f"{reverse}<|eos|>" in text and "⟦" not in text


def test_an_unknown_stage_is_told_with_the_nearest(config, capsys):
    assert preview.main(["--config", config, "--stage", "sftt"]) == 2
    assert "there is no stage 'sftt'; did you mean 'sft'?" in capsys.readouterr().err

"""What `python -m rlhf_jax.preview` shows of records whose tokens are single bytes, but for the pair zz."""

import json

import pytest

from rlhf_jax import preview
from rlhf_jax.config import TokenizerConfig
from rlhf_jax.data.collate import Row
from rlhf_jax.data.tokenizer import load_tokenizer

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


def test_sources_of_a_mixture_are_shown_in_turn(config, capsys, tmp_path):
    mixed = f"{{{tmp_path}/demos.jsonl: 1, '{tmp_path}/demos.jsonl[:1]': 3}}"
    rows = json.loads(
        shown(
            capsys, config, "--json", "--stage", "sft", "--records", "9", f"--stages.sft.data.train={mixed}"
        )
    )["sft"]["rows"]
    titles = ["demos.jsonl, record 1", "demos.jsonl[:1], record 1", "demos.jsonl, record 2"]
    assert [row["row"].removeprefix(f"{tmp_path}/") for row in rows] == titles
    assert rows[0]["ids"] == rows[1]["ids"] != rows[2]["ids"]


def test_rows_that_records_share_have_no_padding_of_a_record(config, capsys):
    flags = ("--stage", "sft", "--stages.sft.data.packing=true")
    assert "-- record 1: 6 tokens: 3 of prompt, 3 of completion\n" in shown(capsys, config, *flags)
    assert "padding" not in json.loads(shown(capsys, config, "--json", *flags))["sft"]["rows"][0]


@pytest.mark.parametrize("count", ["-1", "two"])
def test_number_of_records(count, config, capsys):
    with pytest.raises(SystemExit, match="2"):
        preview.main(["--config", config, "--records", count])
    assert f"'{count}' is no number of records; allowed: 0, 1, 2, ..." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_texts_of_tokens_are_read_from_few_of_them(name, test_data, monkeypatch):
    """Each is what it adds to the text of all before it: blanks, characters of several tokens, markers."""
    tokenizer = load_tokenizer(
        TokenizerConfig(pad_token="</s>" if name == "mistral" else ""), str(test_data / "tokenizers" / name)
    )
    text = "It is  over there\n  é 漢字 🙂\u200d🙂 x" * 3
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*ids, tokenizer.eos_token_id, *ids, tokenizer.eos_token_id]
    plain, expected = "", []
    for end, id_ in enumerate(ids, start=1):
        longer = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        is_whole = not longer.endswith("\ufffd")
        expected.append(longer[len(plain) :] if is_whole and id_ != tokenizer.eos_token_id else "")
        plain = longer if is_whole else plain
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **options: (decoded.append(len(ids)), decode(ids, **options))[1]
    )
    tokens = preview.read_tokens(Row(ids, 3), tokenizer, is_prompt_alone=False)
    assert ["" if token.is_special else token.text for token in tokens] == expected
    assert len(ids) > 60 and max(decoded) <= 20


def test_a_terminal_gets_colours(config, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(capsys, config, "--stage", "sft", "--records", "1")
    green, reverse = "\x1b[1;32m", "\x1b[1;7;32m"
    assert f"{green}c" in text and f"{reverse}<|eos|>" in text and "⟦" not in text


def test_an_unknown_stage_is_told_with_the_nearest(config, capsys):
    assert preview.main(["--config", config, "--stage", "sftt"]) == 2
    assert "there is no stage 'sftt'; did you mean 'sft'?" in capsys.readouterr().err

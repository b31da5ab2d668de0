"""Records: formats told from columns, columns mapped, pairs made, prose restored."""

import re

import pytest

from rlhf_jax.config import DataConfig
from rlhf_jax.data.records import (
    Preference,
    PromptCompletion,
    PromptOnly,
    detokenize,
    implicit_prompt,
    read_records,
    reward_columns,
)
from rlhf_jax.data.sources import open_source


def read(record, kind, **options):
    return read_records([record], kind, DataConfig(**options), "data.train: a.jsonl")


@pytest.mark.parametrize(
    "record, kind, options, expected",
    [
        ({"text": "a"}, "prompt_completion", {}, PromptCompletion("", "a")),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", {}, PromptCompletion("p", "c")),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference", {}, Preference("p", "a", "b")),
        ({"chosen": "x y", "rejected": "x z"}, "preference", {}, Preference("x", " y", " z")),
        ({"prompt": "p", "n": 3}, "prompt_only", {}, PromptOnly("p", {"n": 3})),
        ({"prompt": "p", "completion": "c"}, "prompt_only", {}, PromptOnly("p", {"completion": "c"})),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            "prompt_only",
            {},
            PromptOnly("p", {"chosen": "a", "rejected": "b"}),
        ),
        (
            {"chosen": "x y", "rejected": "x z"},
            "prompt_only",
            {},
            PromptOnly("x", {"chosen": " y", "rejected": " z"}),
        ),
        ({"text": "a b"}, "prompt_only", {"prompt_tokens": 4}, PromptOnly("a b", {}, 4)),
        (
            {"question": "q", "answer": "a"},
            "prompt_completion",
            {"columns": {"prompt": "question", "completion": "answer"}},
            PromptCompletion("q", "a"),
        ),
        (
            {"question": "q", "answer": "a"},
            "prompt_only",
            {"columns": {"prompt": "question"}},
            PromptOnly("q", {"answer": "a"}),
        ),
        (
            {"text": "t", "prompt": "p", "completion": "c"},
            "prompt_completion",
            {"format": "text"},
            PromptCompletion("", "t", {"prompt": "p", "completion": "c"}),
        ),
        ({"text": "t", "label": 1}, "prompt_completion", {}, PromptCompletion("", "t", {"label": 1})),
    ],
)
def test_format_is_told_from_the_columns(record, kind, options, expected):
    assert read(record, kind, **options) == [expected]


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: you", "\n\nHuman: hi\n\nAssistant:"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        ),
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is", "The sky is blue", "The sky"),
        ("yes", "no", ""),
        ("same text", "same text", "same"),
        ("", "", ""),
    ],
)
def test_implicit_prompt_is_what_both_texts_begin_with(chosen, rejected, prompt):
    assert implicit_prompt(chosen, rejected) == prompt


@pytest.mark.parametrize(
    "record, kind, options, message",
    [
        (
            {"question": "q", "completion": "a"},
            "prompt_completion",
            {"columns": {"prompt": "qestion"}},
            "data.train: a.jsonl: no column 'qestion' (data.columns maps 'prompt' to it); columns present: "
            "question, completion; map other names with data.columns, such as {prompt: question}; "
            "did you mean 'question'?",
        ),
        (
            {"prompts": "q", "completion": "a"},
            "prompt_completion",
            {},
            "no column 'prompt' (this stage reads prompt_completion: columns text or prompt + completion); "
            "columns present: prompts, completion; map other names with data.columns, such as "
            "{prompt: question}; did you mean 'prompts'?",
        ),
        ({"chosen": "a"}, "preference", {}, "no column 'rejected' (this stage reads preference"),
        (
            {"prompt": "a"},
            "preference",
            {"format": "labelled"},
            "no column 'text' (data.format labelled needs it)",
        ),
        (
            {"text": "t"},
            "preference",
            {},
            "holds text records (columns text), but this stage reads preference",
        ),
        (
            {"text": "t"},
            "preference",
            {"format": "text"},
            "data.format: text cannot serve a stage that reads preference",
        ),
        ({"text": "t"}, "prompt_only", {}, "data.prompt_tokens is 0"),
        ({"text": None}, "prompt_completion", {}, "record 1: column 'text' is None (NoneType), must be text"),
        ({"text": 3}, "prompt_completion", {}, "record 1: column 'text' is 3 (int), must be text"),
        (
            {"prompt": [{"role": "user", "content": "a"}]},
            "prompt_only",
            {},
            "column 'prompt' holds chat messages",
        ),
        ({"messages": []}, "prompt_completion", {}, "holds chat messages (column 'messages')"),
        (
            {"text": "t"},
            "prompt_completion",
            {"columns": {"promt": "text"}},
            "data.columns: no usual column 'promt'; known: prompt, completion, chosen, rejected, text, "
            "label; did you mean 'prompt'?",
        ),
        ({"text": "t", "label": "1"}, "preference", {}, "record 1: label is '1', must be 0 or 1"),
        ({"text": "t", "label": 1}, "preference", {}, "1 texts have label 1 and 0 label 0; pairs need both"),
    ],
)
def test_what_cannot_be_read_is_one_line(record, kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(record, kind, **options)
    assert "\n" not in str(caught.value)


def test_record_that_lacks_a_column_is_named():
    records = [{"text": "a"}, {"txt": "b"}]
    with pytest.raises(ValueError, match="record 2 has no column 'text'; it has txt"):
        read_records(records, "prompt_completion", DataConfig(), "data.train: a.jsonl")


LABELLED = [{"text": f"good {i}", "label": 1} for i in range(5)] + [
    {"text": f"bad {i}", "label": 0} for i in range(3)
]


def test_labelled_texts_meet_in_pairs_each_used_once():
    def pairs(seed: int) -> list:
        return read_records(LABELLED, "preference", DataConfig(), "w", seed=seed)

    assert len(pairs(0)) == 3
    assert all(pair.chosen.startswith("good") and pair.rejected.startswith("bad") for pair in pairs(0))
    assert len({pair.chosen for pair in pairs(0)}) == len({pair.rejected for pair in pairs(0)}) == 3
    assert pairs(0) == pairs(0)
    assert any(pairs(0) != pairs(seed) for seed in range(1, 5))


def test_labelled_pairs_share_a_prompt():
    cfg = DataConfig(prompts="stories.jsonl", prompt_tokens=7)
    pairs = read_records(LABELLED, "preference", cfg, "w", prompts=[{"text": "one"}, {"text": "two"}])
    assert [(pair.prompt, pair.prompt_tokens) for pair in pairs] == [("one", 7), ("two", 7), ("one", 7)]
    with pytest.raises(ValueError, match=r"data.prompts: is set, but data.prompt_tokens is 0"):
        read_records(LABELLED, "preference", DataConfig(prompts="a.jsonl"), "w", prompts=[{"text": "one"}])
    with pytest.raises(ValueError, match=r"data.prompts: a.jsonl: no column 'text'"):
        cfg = DataConfig(prompts="a.jsonl", prompt_tokens=7)
        read_records(LABELLED, "preference", cfg, "w", prompts=[{"prompt": "one"}])


@pytest.mark.parametrize(
    "spaced, prose",
    [
        ("it 's good , is n't it ?", "It's good, isn't it?"),
        ("i wo n't -- i ca n't .", "I won't -- I can't."),
        ("a film -lrb- or two -rrb- .", "A film (or two)."),
        ("`` good '' , he says .", '"Good", he says.'),
        ('a " good " film', 'A "good" film'),
        ("his ` blundering ' style", "His 'blundering' style"),
        ("good . mr. lopez is bad ! why ?", "Good. Mr. lopez is bad! Why?"),
        ("funny ... and a $ 99 suit : 50 % off ;", "Funny... and a $99 suit: 50% off;"),
        ("they 've said we 'll see , i 'd say i 'm here", "They've said we'll see, I'd say I'm here"),
        ("2002 is over", "2002 is over"),
        ("", ""),
    ],
)
def test_detokenize_restores_prose(spaced, prose):
    assert detokenize(spaced) == prose


def test_detokenize_by_option():
    source = [{"text": "it 's good", "label": 1}, {"text": "it 's bad", "label": 0}]
    assert read_records(source, "preference", DataConfig(detokenize=True), "w") == [
        Preference("", "It's good", "It's bad")
    ]
    assert read_records(source, "preference", DataConfig(), "w") == [
        Preference("", "it 's good", "it 's bad")
    ]


def test_reward_columns_are_lists_with_none_for_what_is_missing():
    records = [PromptOnly("p", {"a": 1}), PromptOnly("q", {"a": 2, "b": 3})]
    assert reward_columns(records) == {"a": [1, 2], "b": [None, 3]}
    assert reward_columns([]) == {}


def test_real_dialogues_are_cut_at_the_last_reply(test_data):
    source = open_source(str(test_data / "hh_rlhf" / "test.jsonl.gz"))
    pairs = read_records(source, "preference", DataConfig(), "w")
    assert len(pairs) == 279
    for record, pair in zip(source, pairs, strict=True):
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (
            record["chosen"],
            record["rejected"],
        )
    assert sum("\n\nAssistant:" in pair.chosen + pair.rejected for pair in pairs) == 0


def test_real_labelled_sentences_become_pairs(test_data):
    source = open_source(str(test_data / "sentiment" / "sst2_dev.jsonl.gz"))
    pairs = read_records(source, "preference", DataConfig(detokenize=True), "w")
    assert len(pairs) == min(sum(r["label"] == label for r in source) for label in (0, 1))
    assert not any(re.search(r" [,.?]| n't|``|-lrb-", pair.chosen + pair.rejected) for pair in pairs)

"""Records: formats told from columns, columns mapped, pairs made, prose restored."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_jax.config import DataConfig
from rlhf_jax.data import formats
from rlhf_jax.data.formats import implicit_prompt
from rlhf_jax.data.prose import detokenize
from rlhf_jax.data.records import (
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Unpaired,
    completions,
    is_conversational,
    reward_columns,
)
from rlhf_jax.data.sources import open_source


def read_records(*args, **options):
    return formats.read_records(*args, **options).records


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
            "no column 'prompt' (this stage reads prompt_completion: columns text or messages or "
            "prompt + completion); columns present: prompts, completion; "
            "map other names with data.columns, such as {prompt: question}; did you mean 'prompts'?",
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
            {"text": "t"},
            "prompt_completion",
            {"columns": {"promt": "text"}},
            "data.columns: no usual column 'promt'; known: chosen, rejected, prompt, completions, "
            "completion, rating, label, text, messages, pairs, ranks, scores, margin, tools, "
            "chat_template_kwargs; "
            "did you mean 'prompt'?",
        ),
        ({"text": "t", "label": "1"}, "preference", {}, "record 1: label is '1', must be 0 or 1"),
        ({"text": "t", "label": 1}, "preference", {}, "1 texts have label 1 and 0 label 0; pairs need both"),
    ],
)
def test_what_cannot_be_read_is_one_line(record, kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(record, kind, **options)
    assert "\n" not in str(caught.value)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


HELLO, ANSWER, BETTER = [user("hello")], [assistant("hi")], [assistant("good day")]
TOOLS = [{"type": "function", "function": {"name": "clock"}}]


@pytest.mark.parametrize(
    "record, kind, options, expected",
    [
        ({"messages": HELLO + ANSWER}, "prompt_completion", {}, PromptCompletion([], HELLO + ANSWER)),
        (
            {"messages": HELLO + ANSWER + HELLO + BETTER},
            "prompt_only",
            {},
            PromptOnly(HELLO + ANSWER + HELLO, {"completion": BETTER}),
        ),
        ({"messages": HELLO}, "prompt_only", {}, PromptOnly(HELLO)),
        ({"prompt": HELLO, "completion": ANSWER}, "prompt_completion", {}, PromptCompletion(HELLO, ANSWER)),
        ({"prompt": HELLO, "n": 3}, "prompt_only", {}, PromptOnly(HELLO, {"n": 3})),
        (
            {"prompt": HELLO, "chosen": BETTER, "rejected": ANSWER},
            "preference",
            {},
            Preference(HELLO, BETTER, ANSWER),
        ),
        (
            {"chosen": HELLO + BETTER, "rejected": HELLO + ANSWER},
            "preference",
            {},
            Preference(HELLO, BETTER, ANSWER),
        ),
        (
            {"prompt": "hello", "chosen": HELLO + BETTER, "rejected": HELLO + ANSWER},
            "preference",
            {},
            Preference(HELLO, BETTER, ANSWER),
        ),
        (
            {"prompt": "hello", "chosen": HELLO + BETTER, "rejected": HELLO + ANSWER},
            "prompt_only",
            {},
            PromptOnly(HELLO, {"chosen": BETTER, "rejected": ANSWER}),
        ),
        (
            {"prompt": HELLO, "completion": ANSWER, "label": True},
            "unpaired",
            {},
            Unpaired(HELLO, ANSWER, True),
        ),
        ({"prompt": "p", "completion": "c", "label": False}, "unpaired", {}, Unpaired("p", "c", False)),
        (
            {"prompt": "p", "completion": "c", "label": True},
            "prompt_completion",
            {},
            PromptCompletion("p", "c"),
        ),
        (
            {"prompt": "p", "completion": "c", "label": False},
            "prompt_only",
            {},
            PromptOnly("p", {"completion": "c", "label": False}),
        ),
        (
            {"prompt": "p", "completion": "c", "label": "x"},
            "prompt_completion",
            {"format": "prompt_completion"},
            PromptCompletion("p", "c", {"label": "x"}),
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]},
            "ranking",
            {},
            Ranking("p", ("a", "b", "c"), ((1, 0), (1, 2)), (-2.0, -1.0, -2.0)),
        ),
        (
            {"prompt": HELLO, "completions": [ANSWER, BETTER], "scores": [0.5, 1]},
            "ranking",
            {},
            Ranking(HELLO, (ANSWER, BETTER), ((1, 0),), (0.5, 1.0)),
        ),
        (
            {"prompt": "p", "candidates": [{"text": "a", "score": 1.0}, {"text": "b", "score": 1.0}]},
            "ranking_with_ties",
            {"columns": {"completions": "candidates.text", "scores": "candidates.score"}},
            Ranking("p", ("a", "b"), (), (1.0, 1.0)),
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "pairs": [[2, 0]], "scores": [3, 2, 1]},
            "ranking",
            {},
            Ranking("p", ("a", "b", "c"), ((2, 0),), (3.0, 2.0, 1.0)),
        ),
        (
            {"prompt": HELLO, "tools": TOOLS, "chat_template_kwargs": {"think": False}},
            "prompt_only",
            {},
            PromptOnly(
                HELLO,
                {"tools": TOOLS, "chat_template_kwargs": {"think": False}},
                variables={"tools": TOOLS, "think": False},
            ),
        ),
        (
            {"prompt": HELLO, "completion": ANSWER, "functions": '[{"type": "function"}]'},
            "prompt_completion",
            {"columns": {"tools": "functions"}},
            PromptCompletion(
                HELLO,
                ANSWER,
                {"functions": '[{"type": "function"}]'},
                {"tools": [{"type": "function"}]},
            ),
        ),
        ({"prompt": "p", "tools": TOOLS}, "prompt_only", {}, PromptOnly("p", {"tools": TOOLS})),
    ],
)
def test_conversations_and_rankings_are_read(record, kind, options, expected):
    assert read(record, kind, **options) == [expected]


def test_record_is_conversational_where_its_prompt_is_messages():
    assert is_conversational(PromptOnly(HELLO)) and is_conversational(PromptCompletion([], HELLO + ANSWER))
    assert not is_conversational(PromptOnly("")) and not is_conversational(PromptCompletion("", "a"))


def test_null_fields_of_messages_are_left_out():
    message = {"role": "user", "content": "a", "tool_calls": None, "name": None}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    (record,) = read({"messages": [message, call]}, "prompt_completion")
    assert record.completion == [user("a"), {"role": "assistant", "tool_calls": [{"name": "clock"}]}]


@pytest.mark.parametrize(
    "chosen, rejected, num_shared",
    [
        (HELLO + ANSWER, HELLO + BETTER, 1),
        (HELLO + ANSWER + HELLO + ANSWER, HELLO + ANSWER + HELLO + BETTER, 3),
        (HELLO + ANSWER, HELLO + ANSWER, 1),  # the same answer twice is still an answer
        (HELLO + ANSWER + HELLO + ANSWER, HELLO + ANSWER, 1),
        (HELLO + ANSWER + [user("x")] + ANSWER, HELLO + ANSWER + [user("y")] + ANSWER, 1),
    ],
)
def test_implicit_prompt_of_conversations_ends_before_the_assistant(chosen, rejected, num_shared):
    (record,) = read({"chosen": chosen, "rejected": rejected}, "prompt_only")
    answers = {"chosen": chosen[num_shared:], "rejected": rejected[num_shared:]}
    assert record == PromptOnly(chosen[:num_shared], answers)


def test_rankings_serve_preference_as_their_pairs():
    source = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
        {"prompt": "q", "completions": ["d", "e"], "ranks": [1, 1]},
    ]
    pairs = read_records(source, "preference", DataConfig(), "w")
    assert pairs == [Preference("p", "a", "b"), Preference("p", "a", "c")]
    with pytest.raises(ValueError, match="no completion is better than another in any of 1 rankings"):
        read_records(source[1:], "preference", DataConfig(), "w")


def test_only_desirable_completions_are_demonstrations():
    source = [{"prompt": "p", "completion": str(i), "label": i % 2 == 1} for i in range(4)]
    found = read_records(source, "prompt_completion", DataConfig(), "w")
    assert found == [PromptCompletion("p", "1"), PromptCompletion("p", "3")]
    assert len(read_records(source, "prompt_only", DataConfig(), "w")) == 4
    with pytest.raises(ValueError, match="no completion is desirable"):
        read_records(source[:1], "prompt_completion", DataConfig(), "w")


RANKED = {"prompt": "p", "completions": ["a", "b"]}


@pytest.mark.parametrize(
    "record, kind, message",
    [
        ({"messages": []}, "prompt_completion", "column 'messages' is an empty conversation"),
        (
            {"messages": ["hello"]},
            "prompt_completion",
            "message 1 of column 'messages' is 'hello', must be an object",
        ),
        (
            {"messages": [user("a"), {"content": "b"}]},
            "prompt_completion",
            "message 2 of column 'messages' has no role; it has content; a message is {role, content}",
        ),
        (
            {"messages": [{"from": "human", "value": "b"}]},
            "prompt_completion",
            "message 1 of column 'messages' has no role; it has from, value",
        ),
        (
            {"prompt": [user(None)]},
            "prompt_only",
            "message 1 of column 'prompt' has no content; content must be text",
        ),
        (
            {"prompt": [user(3)]},
            "prompt_only",
            "message 1 of column 'prompt' has content 3; content must be text",
        ),
        (
            {"prompt": [user([{"type": "text", "text": "a"}])]},
            "prompt_only",
            "message 1 of column 'prompt' has a list of parts as content; only text is read: join the text",
        ),
        (
            {"messages": HELLO},
            "prompt_completion",
            "no message is the assistant's: there is nothing to learn",
        ),
        ({"messages": "hello"}, "prompt_completion", "column 'messages' is text; map it to 'text'"),
        ({"text": HELLO}, "prompt_completion", "column 'text' holds chat messages; map it to 'messages'"),
        ({"messages": ANSWER}, "prompt_only", "begins with its only assistant message: there is no prompt"),
        ({"prompt": HELLO + ANSWER}, "prompt_only", "column 'prompt' ends with an assistant message"),
        (
            {"prompt": HELLO, "completion": HELLO},
            "prompt_completion",
            "column 'completion' begins with a 'user' message; it must begin with the assistant's answer",
        ),
        (
            {"prompt": "hello", "completion": ANSWER},
            "prompt_completion",
            "column 'prompt' is text, but 'completion' holds messages; let them be alike",
        ),
        (
            {"chosen": HELLO + ANSWER, "rejected": "hi"},
            "preference",
            "column 'rejected' is text, but 'chosen' holds messages",
        ),
        (
            {"chosen": ANSWER, "rejected": BETTER},
            "preference",
            "chosen and rejected share no message before the assistant's: no prompt",
        ),
        (
            {"prompt": "other", "chosen": HELLO + ANSWER, "rejected": HELLO + BETTER},
            "preference",
            "column 'prompt' is text that is not in the messages before the answers",
        ),
        (
            {"prompt": "p", "completion": "c", "label": 1},
            "unpaired",
            "column 'label' is 1, must be true or false: whether the completion is desirable; if it means "
            "something else, set data.format: prompt_completion",
        ),
        (RANKED, "ranking", "no column 'ranks' (completions are ranked by a column ranks, scores or pairs)"),
        (RANKED | {"ranks": [1]}, "ranking", "column 'ranks' has 1 entries for 2 completions; give each one"),
        (RANKED | {"scores": 3}, "ranking", "column 'scores' has 3 (int) for 2 completions"),
        (
            RANKED | {"scores": [1, None]},
            "ranking",
            "column 'scores' has the entry None, must be a finite number",
        ),
        (RANKED | {"scores": [1, float("nan")]}, "ranking", "column 'scores' has the entry nan"),
        (
            RANKED | {"ranks": [0, 1]},
            "ranking",
            "column 'ranks' has the rank 0; ranks count from 1, the best",
        ),
        (
            RANKED | {"pairs": [[0, 2]]},
            "ranking",
            "column 'pairs' has the entry [0, 2], must be [better, worse]",
        ),
        (RANKED | {"pairs": [[1, 1]]}, "ranking", "column 'pairs' has the entry [1, 1]"),
        (RANKED | {"pairs": 7}, "ranking", "column 'pairs' has the entry 7"),
        (RANKED | {"completions": "a"}, "ranking", "must be a list of at least 2 completions, is 'a' (str)"),
        (
            RANKED | {"completions": ["a"]},
            "ranking",
            "must be a list of at least 2 completions, is a list of 1",
        ),
        (RANKED | {"completions": ["a", ANSWER], "ranks": [1, 2]}, "ranking", "'completions' holds messages"),
        ({"prompt": HELLO, "tools": "{"}, "prompt_only", "column 'tools' is no JSON: "),
        ({"prompt": HELLO, "tools": {"a": 1}}, "prompt_only", "must be a list of JSON schemas"),
        (
            {"prompt": HELLO, "chat_template_kwargs": [1]},
            "prompt_only",
            "must be an object of template variables",
        ),
    ],
)
def test_malformed_record_is_one_line(record, kind, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(record, kind)
    assert "\n" not in str(caught.value)


def test_path_into_a_column_that_is_not_there_is_named():
    columns = {"completions": "candidates.txt", "scores": "candidates.score"}
    record = {"prompt": "p", "candidates": [{"text": "a", "score": 1}]}
    with pytest.raises(
        ValueError, match=r"record 1 has no column 'candidates.txt'; it has prompt, candidates"
    ):
        read(record, "ranking", columns=columns)


@pytest.mark.parametrize(
    "kind, record",
    [
        ("prompt_completion", {"messages": HELLO + ANSWER}),
        ("prompt_completion", {"prompt": "p", "completion": "c"}),
        ("prompt_only", {"prompt": HELLO}),
        ("preference", {"prompt": HELLO, "chosen": BETTER, "rejected": ANSWER}),
        ("preference", {"chosen": "x y", "rejected": "x z"}),
        ("unpaired", {"prompt": HELLO, "completion": ANSWER, "label": True}),
        ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]}),
        ("ranking", {"prompt": HELLO, "completions": [ANSWER, BETTER], "pairs": [[1, 0]]}),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_formats_come_back_from_files(ending, kind, record, tmp_path):
    """Writes a record that lacks a column of its neighbour: Arrow then has null fields where it has none."""
    path, records = tmp_path / f"records.{ending}", [record, record | {"more": 1}]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        lines = "\n".join(json.dumps(of) for of in records).encode()
        path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    found = read_records(open_source(str(path)), kind, DataConfig(), "w")
    expected = read(record, kind)[0]
    assert [of._replace(columns={}) if hasattr(of, "columns") else of for of in found] == [expected] * 2


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


def test_real_rankings_give_their_judged_pairs(test_data):
    source = open_source(str(test_data / "wmt19_darr" / "lists_test.jsonl.gz"))
    cfg = DataConfig(columns={"completions": "candidates.text", "scores": "candidates.score"})
    rankings = read_records(source, "ranking", cfg, "w")
    assert len(rankings) == 306 and {len(completions(of)) for of in rankings} <= set(range(3, 12))
    pairs = read_records(source, "preference", cfg, "w")
    assert len(pairs) == sum(len(record["pairs"]) for record in source)
    better, worse = source[0]["pairs"][0]
    candidates = source[0]["candidates"]
    assert pairs[0] == Preference(source[0]["prompt"], candidates[better]["text"], candidates[worse]["text"])
    # Scores are (wins - losses) / (wins + losses): they tell the judged pairs apart.
    assert all(of.scores[i] > of.scores[j] for of in rankings for i, j in of.pairs)


def test_real_pairs_and_questions_need_nothing_but_config(test_data):
    pairs = open_source(str(test_data / "wmt19_darr" / "pairs_test.jsonl.gz"))
    assert read_records(pairs, "preference", DataConfig(), "w")[0] == Preference(*pairs[0].values())
    questions = open_source(str(test_data / "gsm8k" / "test.jsonl.gz"))
    cfg = DataConfig(columns={"prompt": "question", "completion": "answer"})
    for kind, record_type in (("prompt_completion", PromptCompletion), ("prompt_only", PromptOnly)):
        found = read_records(questions, kind, cfg, "w")
        assert len(found) == 1319 and {type(record) for record in found} == {record_type}


@pytest.mark.parametrize("kind", ["preference", "prompt_only"])
@pytest.mark.parametrize("as_messages", [False, True])
def test_prompt_that_only_a_later_record_has_is_not_lost(kind, as_messages):
    def content(*turns):
        if not as_messages:
            return turns[-1][1]
        return [{"role": role, "content": text} for role, text in turns]

    pair = {name: content(("user", "x"), ("assistant", f"x {name}")) for name in ("chosen", "rejected")}
    own = {name: content(("assistant", name)) for name in ("chosen", "rejected")}
    own["prompt"] = content(("user", "Q"))
    message = "w: record 2: column 'prompt' holds its prompt, but in record 1 the prompt is what chosen and"
    with pytest.raises(ValueError, match=message):
        read_records([pair, own], kind, DataConfig(), "w")
    with pytest.raises(ValueError, match="w: record 2 has no column 'prompt'; it has chosen, rejected"):
        read_records([own, pair], kind, DataConfig(), "w")
    # A table has the column in every record.
    alike = [pair | {"prompt": None}, pair | {"prompt": None}]
    with pytest.raises(ValueError, match="w: record 1: column 'prompt' is None"):
        read_records(alike, kind, DataConfig(), "w")


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "source, kind, num_records, left_out",
    [
        ([PAIR, PAIR | {"rejected": "a"}], "preference", 1, {"chosen equals rejected": 1}),
        ([PAIR, PAIR | {"rejected": "a"}], "prompt_only", 2, {}),
        (
            [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, False)],
            "prompt_completion",
            1,
            {"not desirable": 2},
        ),
        (
            [{"text": "a", "label": label} for label in (1, 0, 0, 0)],
            "preference",
            1,
            {"texts for which none of the other label is left": 2},
        ),
        (
            [
                {"prompt": "p", "completions": ["a", "b", "a"], "ranks": ranks}
                for ranks in ([1, 2, 3], [1] * 3)
            ],
            "preference",
            2,  # a before b, b before the other a
            {"rankings in which none is better": 1, "chosen equals rejected": 1},
        ),
    ],
)
def test_what_is_left_out_is_counted(source, kind, num_records, left_out):
    records, found = formats.read_records(source, kind, DataConfig(), "w")
    assert (len(records), found) == (num_records, left_out)


def test_pairs_that_are_all_equal_are_an_error():
    with pytest.raises(ValueError, match="w: chosen and rejected are equal in all of 2 pairs"):
        read_records([PAIR | {"rejected": "a"}] * 2, "preference", DataConfig(), "w")

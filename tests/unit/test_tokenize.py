"""Records in tokens: joined with their prompts, conversations by turns, truncation on either side, counts."""

import pytest

from rlhf_jax.config import DataConfig, TokenizerConfig
from rlhf_jax.data.collate import Row
from rlhf_jax.data.records import Preference, PromptCompletion, PromptOnly, Ranking, Unpaired, completions
from rlhf_jax.data.synthetic import synthetic_records
from rlhf_jax.data.tokenize import Losses, encode_records, stop_id
from rlhf_jax.data.tokenizer import encode_completions, encode_prompts, load_tokenizer, train_tokenizer

BOS, EOS = 1, 2
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else ';' }}{% endfor %}{{ 'a:' if add_generation_prompt }}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer of single bytes with a chat template."""
    tokenizer = train_tokenizer([], 260)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer, records, kind="prompt_completion", **options):
    return encode_records(records, kind, tokenizer, DataConfig(**options), where="data.train")


def shown(tokenizer, row: Row) -> tuple[str, list[str]]:
    """Returns the whole row, and what of it carries loss."""
    edges = [row.prompt_length, *(edge for span in row.excluded for edge in span), len(row.ids)]
    learned = [tokenizer.decode(row.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return tokenizer.decode(row.ids), learned


TALK = [user("q"), assistant("one"), user("r"), assistant("two")]


def test_each_turn_of_a_conversation_is_learned_and_what_stands_between_is_not(tokenizer):
    (row,) = encode(tokenizer, [PromptCompletion([], TALK)]).rows
    assert shown(tokenizer, row) == (
        "<|bos|>u:q;a:one<|eos|>u:r;a:two<|eos|>",
        ["one<|eos|>", "two<|eos|>"],
    )
    assert row.excluded == ((11, 17),)  # BOS and u:q;a: are 7 tokens, one<|eos|> 4, u:r;a: 6
    (after,) = encode(tokenizer, [PromptCompletion(TALK[:3], TALK[3:])]).rows
    assert (after.ids, after.excluded) == (row.ids, ())
    assert shown(tokenizer, after)[1] == ["two<|eos|>"]


def test_conversations_of_every_kind(tokenizer):
    prompt, a, b = TALK[:1], [assistant("good")], [assistant("bad")]
    pair = encode(tokenizer, [Preference(prompt, a, b)], "preference")
    assert [shown(tokenizer, row) for row in pair.rows] == [
        ("<|bos|>u:q;a:good<|eos|>", ["good<|eos|>"]),
        ("<|bos|>u:q;a:bad<|eos|>", ["bad<|eos|>"]),
    ]
    (asked,) = encode(tokenizer, [PromptOnly(prompt)], "prompt_only").rows
    assert tokenizer.decode(asked.ids) == "<|bos|>u:q;a:" and asked.prompt_length == len(asked.ids)
    ranking = encode(tokenizer, [Ranking(prompt, (a, b, a), ((0, 1),))], "ranking")
    assert [row.ids for row in ranking.rows] == [pair.rows[0].ids, pair.rows[1].ids, pair.rows[0].ids]
    unpaired = encode(tokenizer, [Unpaired(prompt, b, False, mismatched=a)], "unpaired")
    assert unpaired.rows[:] == [pair.rows[1], pair.rows[0]]


def test_completions_of_conversations_end_with_the_token_of_the_template(tokenizer):
    assert stop_id(tokenizer, has_conversations=True) == stop_id(tokenizer, has_conversations=False) == EOS
    chat = train_tokenizer([], 260)
    chat.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    chat.chat_template = TEMPLATE.replace("eos_token", "'<|end|>'")
    end = chat.convert_tokens_to_ids("<|end|>")
    assert (stop_id(chat, has_conversations=True), stop_id(chat, has_conversations=False)) == (end, EOS)
    (row,) = encode(chat, [PromptCompletion(TALK[:1], TALK[1:2])]).rows
    assert row.ids[-1] == end and EOS not in row.ids
    (plain,) = encode(chat, [PromptCompletion("q", "one")]).rows
    assert plain.ids[-1] == EOS and end not in plain.ids


def test_loss_on_all_of_a_conversation(tokenizer):
    encoded = encode_records(
        [PromptCompletion([], TALK)], "prompt_completion", tokenizer, DataConfig(), loss_on="all"
    )
    assert (encoded.rows[0].prompt_length, encoded.rows[0].excluded) == (1, ())
    assert encoded.longest_prompt == 7


@pytest.mark.parametrize(
    "truncation, whole, learned",
    [
        ("right", "<|bos|>u:q;a:one<|eos|>u:r;a:t", ["one<|eos|>", "t"]),
        ("left", "<|bos|>q;a:one<|eos|>u:r;a:two<|eos|>", ["one<|eos|>", "two<|eos|>"]),
    ],
)
def test_long_row_is_cut_on_either_side(truncation, whole, learned, tokenizer):
    length = 18 if truncation == "right" else 19
    encoded = encode(tokenizer, [PromptCompletion([], TALK)], max_length=length, truncation=truncation)
    assert shown(tokenizer, encoded.rows[0]) == (whole, learned)
    assert encoded.rows[0].was_cut and len(encoded.rows[0].ids) == length


@pytest.mark.parametrize(
    "max_length, whole, learned",
    [(8, "<|bos|>;a:two<|eos|>", ["two<|eos|>"]), (4, "<|bos|>wo<|eos|>", ["wo<|eos|>"])],
)
def test_left_cut_keeps_the_end_also_within_a_turn(max_length, whole, learned, tokenizer):
    cfg = {
        "max_length": max_length,
        "max_prompt_length": 7,
        "truncation": "left",
        "prompt_truncation": "left",
    }
    (row,) = encode(tokenizer, [PromptCompletion([], TALK)], **cfg).rows
    assert shown(tokenizer, row) == (whole, learned)


def test_long_rows_are_dropped_by_option_whole_pairs(tokenizer):
    pairs = [Preference("p", "short", "much too long"), Preference("p", "x", "y")]
    encoded = encode(tokenizer, pairs, "preference", max_length=8, truncation="drop")
    assert encoded.records == pairs[1:] and len(encoded.rows) == 2
    assert encoded.losses == Losses(long_rows=1)
    with pytest.raises(
        ValueError, match=r"all records have more than data.max_length = 8 tokens; raise it, or"
    ):
        encode(tokenizer, pairs[:1], "preference", max_length=8, truncation="drop")


@pytest.mark.parametrize("side, cut", [("left", "efgh"), ("right", "abcd")])
def test_long_prompt_is_cut_by_option(side, cut, tokenizer):
    options = {"max_prompt_length": 5, "prompt_truncation": side}
    encoded = encode(tokenizer, [PromptOnly("abcdefgh")], "prompt_only", **options)
    assert tokenizer.decode(encoded.rows[0].ids) == f"<|bos|>{cut}"
    assert encoded.records == [PromptOnly(cut)]  # as reward functions see it
    assert encoded.losses == Losses(cut_prompts=1)
    pair = encode(tokenizer, [Preference("abcdefgh", "x", "yz")], "preference", **options)
    assert [shown(tokenizer, row) for row in pair.rows] == [
        (f"<|bos|>{cut}x<|eos|>", ["x<|eos|>"]),
        (f"<|bos|>{cut}yz<|eos|>", ["yz<|eos|>"]),
    ]


def test_prompt_of_a_conversation_is_not_cut_on_the_right(tokenizer):
    with pytest.raises(ValueError, match=r"holds conversations and data.prompt_truncation is 'right'"):
        encode(tokenizer, [PromptOnly(TALK[:1])], "prompt_only", prompt_truncation="right")


@pytest.fixture(scope="module")
def rewriting():
    """Returns a tokenizer whose template writes all turns but the last one otherwise, as Qwen3's does."""
    rewriting = train_tokenizer([], 260)
    own = "(m.content if loop.last or m.role == 'user' else m.content | upper) }}"
    rewriting.chat_template = TEMPLATE.replace("m.content }}", own)
    return rewriting


@pytest.mark.parametrize(
    "options", [{"max_length": 32}, {"max_length": 100}, {"max_prompt_length": 20}, {"truncation": "left"}]
)
@pytest.mark.parametrize("prompt_truncation", ["drop", "left"])
def test_records_whose_completions_do_not_follow_the_same_prompt_are_dropped(
    options, prompt_truncation, rewriting
):
    """Of two answers the first one is not learned: what is learned would follow another prompt."""
    two = [assistant("bad"), user("x" * 60), assistant("no")]
    uneven = Preference([user("q")], [assistant("good")], two)
    even = Preference([user("q")], [assistant("good")], [assistant("bad")])
    turned = uneven._replace(chosen=two, rejected=[assistant("good")])
    options = {"prompt_truncation": prompt_truncation} | options
    encoded = encode(rewriting, [uneven, even, turned], "preference", **options)
    assert encoded.records == [even]
    assert [shown(rewriting, row)[1] for row in encoded.rows] == [["good<|eos|>"], ["bad<|eos|>"]]
    assert encoded.losses == Losses(uneven_starts=2, unlearned_turns=2)
    with pytest.raises(ValueError, match="the completions of 1 records do not follow the same prompt: the"):
        encode(rewriting, [uneven], "preference", **options)


def test_rows_without_a_turn_to_learn_are_dropped_and_counted(rewriting):
    """The template writes the first of two turns otherwise."""
    gone = PromptCompletion([], [*TALK, user("x")])
    encoded = encode(rewriting, [PromptCompletion([], TALK), gone])
    assert [shown(rewriting, row) for row in encoded.rows] == [
        ("<|bos|>u:q;a:ONE<|eos|>u:r;a:two<|eos|>", ["two<|eos|>"])
    ]
    assert encoded.losses == Losses(without_turns=1, unlearned_turns=3)
    message = "no turn of the assistant in 1 conversations stands in the text as it is sampled"
    with pytest.raises(ValueError, match=message):
        encode(rewriting, [gone])


def test_conversations_and_plain_text_do_not_mix(tokenizer):
    with pytest.raises(
        ValueError, match=r"data.train: record 1 is of plain text, record 2 of conversations; let"
    ):
        encode(tokenizer, [PromptOnly("a"), PromptOnly(TALK[:1])], "prompt_only")


def test_record_whose_template_refuses_it_is_named(tokenizer):
    strict = train_tokenizer([], 260)
    strict.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + TEMPLATE
    records = [PromptOnly(TALK[:1]), PromptOnly([{"role": "system", "content": "s"}, *TALK[:1]])]
    message = "data.train: record 2: the chat template refuses a conversation of system, user: no system"
    with pytest.raises(ValueError, match=f"^{message}$"):
        encode(strict, records, "prompt_only")


def test_completion_that_joins_its_prompt_is_encoded_alone_and_counted():
    tokenizer = train_tokenizer(["over there"] * 9, 300)
    (whole,) = encode_completions(tokenizer, [" there"])
    assert len(whole) == 1
    encoded = encode(tokenizer, [PromptCompletion("a th", "ere"), PromptCompletion("a", " there")])
    assert [list(row.ids) for row in encoded.rows] == [
        [*encode_prompts(tokenizer, ["a th"])[0], *encode_completions(tokenizer, ["ere"])[0], EOS],
        [*encode_prompts(tokenizer, ["a"])[0], *whole, EOS],
    ]
    assert encoded.losses == Losses(apart=1)


def test_tokenizer_that_puts_a_blank_before_text_puts_none_before_completions(test_data):
    """Llama 2's: encoded alone, "over" has a blank before it, and after a prompt that ends with one two."""
    tokenizer = load_tokenizer(TokenizerConfig(pad_token="</s>"), str(test_data / "tokenizers" / "mistral"))
    for prompt, completion in (("It is", " over there"), ("It is\n", "over there"), ("Q: a\nA:", " b")):
        encoded = encode(tokenizer, [PromptCompletion(prompt, completion)])
        (row,) = encoded.rows
        joined = tokenizer(prompt + completion)["input_ids"]
        assert list(row.ids) == [*joined, tokenizer.eos_token_id]
        assert list(row.ids[: row.prompt_length]) == encode_prompts(tokenizer, [prompt])[0]
        assert encoded.losses == Losses()


@pytest.mark.parametrize("kind", ["prompt_completion", "preference"])
def test_embedded_task_has_the_same_tokens_joined_and_apart(kind):
    records = synthetic_records(kind, "train", 0)[:500]
    texts = [text for record in records for text in (record.prompt, *completions(record))]
    tokenizer = train_tokenizer(texts, 512)
    encoded = encode(tokenizer, records, kind, max_length=512)
    apart = [
        [*prompt, *completion, EOS]
        for record in records
        for prompt in encode_prompts(tokenizer, [record.prompt])
        for completion in encode_completions(tokenizer, completions(record))
    ]
    assert [list(row.ids) for row in encoded.rows] == apart
    assert encoded.losses == Losses()

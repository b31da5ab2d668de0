"""`python -m rlhf_jax.sample` and its Python call, on a tiny model."""

import io
import json
import re
from functools import partial
from string import ascii_lowercase

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sample
from rlhf_jax import sampler as sampler_module
from rlhf_jax.best_of import Best, Scorer, find_reward
from rlhf_jax.config import RolloutConfig
from rlhf_jax.data.chat import chat_encoder
from rlhf_jax.data.collate import collate_prompts
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.scorers import Normalizer, save_scorer
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rollout.generate import generate, run_to_end
from rlhf_jax.rollout.sampling import read_sampling
from rlhf_jax.rollout.stops import StopStrings, StopWatch
from rlhf_jax.sample import Completion, Sampler, shown
from rlhf_jax.stored_policy import find_policy, read_options, read_prompts

C, CONTEXT = 12, 40
HERE = "tests.smoke.test_sample"
TEXTS = ["my toy broke", "the lamp is red", "a pen", "so many books on one desk"]
PROMPTS = [f"{TEXTS[i % 4]} {i}" for i in range(9)]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|eos|>{% endfor %}a:"
MODEL = make_model(
    Architecture(
        vocab_size=280,
        hidden_size=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        mlp_size=24,
        context_length=CONTEXT,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
)
POLICY = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, MODEL.init_policy(jax.random.key(0)))
TOKENIZER = train_tokenizer(TEXTS, 280)
IDS = {"eos": TOKENIZER.eos_token_id, "pad": TOKENIZER.pad_token_id}


@pytest.fixture(scope="module", autouse=True)
def one_device(one_device_mesh):
    """On one device, for which programs compile in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "make_mesh", lambda cfg: one_device_mesh)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Returns the directory of the model, as transformers could have written it."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    path.mkdir()
    ids = {f"{name}_token_id": id_ for name, id_ in IDS.items()}
    hf.save_policy(path, MODEL.architecture, POLICY, token_ids=ids)
    TOKENIZER.save_pretrained(str(path))
    return str(path)


@pytest.fixture(scope="module")
def sampler(directory):
    """Returns a sampler with four slots."""
    return Sampler.load(directory, max_new_tokens=C, slots=4, steps_per_call=2)


@pytest.fixture(scope="module")
def other(directory):
    """Returns a sampler with a slot for each prompt, which the host looks at less often."""
    return Sampler.load(directory, max_new_tokens=C, slots=16, steps_per_call=5)


@pytest.fixture(scope="module")
def uncut(sampler):
    """Returns completions of more prompts than there are slots."""
    return sampler(PROMPTS)


def vowels(completions, **others):
    return [sum(letter in "aeiou" for letter in text) for text in completions]


def lines(capsys, *flags):
    assert sample.main(list(flags)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def generated(texts):
    """What `generate` gives: (tokens, logprobs, ended) of each row's most likely completion."""
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    prompts = jax.tree.map(jnp.asarray, collate_prompts(ids, range(len(ids)), 24, IDS["pad"], len(ids)))
    sampling = read_sampling(RolloutConfig(), jnp.asarray([IDS["eos"]]))
    made = partial(generate, MODEL, max_new_tokens=C, pad_id=IDS["pad"], greedy=True)
    found = jax.device_get(jax.jit(made)(POLICY, prompts, jax.random.key(0), sampling))
    spans = zip(found.rows.prompt_lengths, found.rows.lengths, strict=True)
    return [
        (found.rows.tokens[row, start:end].tolist(), found.sampler_logprobs[row, start:end], found.ended[row])
        for row, (start, end) in enumerate(spans)
    ]


def test_greedy_completions_are_those_of_generate(directory, capsys):
    flags = [word for text in PROMPTS for word in ("--prompt", text)]
    limit = ("--rollout.max_new_tokens", str(C))
    found = lines(capsys, "--model", directory, *flags, *limit, "--greedy", "--json", "--logprobs")
    assert [line["prompt"] for line in found] == PROMPTS
    for line, (tokens, logprobs, ended) in zip(found, generated(PROMPTS), strict=True):
        assert (line["tokens"], line["num_tokens"], line["ended"]) == (tokens, len(tokens), ended)
        assert line["completion"] == TOKENIZER.decode(tokens, skip_special_tokens=True)
        np.testing.assert_allclose(line["logprobs"], logprobs, rtol=1e-5, atol=1e-5)
        assert line["mean_logprob"] == pytest.approx(np.mean(logprobs), abs=1e-5)


def test_a_group_is_several_draws_of_each_prompt(sampler, uncut):
    found = sampler(PROMPTS, group_size=2)
    assert [(of.prompt_index, of.sample_index) for of in found[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert [of.tokens for of in found[::2]] == [of.tokens for of in uncut]
    assert len({tuple(of.tokens) for of in found}) == 2 * len(PROMPTS)
    assert [of.tokens for of in sampler(PROMPTS, seed=6)] != [of.tokens for of in uncut]


def test_the_best_of_a_group_is_told(directory, sampler, tmp_path, capsys):
    """By a reward model, read at the last token, and a function of the text."""
    head = {"kernel": jnp.linspace(-1, 1, 16), "bias": jnp.float32(0.5)}
    params = {"trunk": POLICY["trunk"], "score_head": head}
    ids = {f"{name}_token_id": id_ for name, id_ in IDS.items()}
    save_scorer(
        tmp_path / "judge", MODEL.architecture, params, "reward", Normalizer(0.25, 2.0), token_ids=ids
    )
    TOKENIZER.save_pretrained(tmp_path / "judge")
    flags = ["--model", directory, "--rollout.max_new_tokens", str(C), "--rollout.slots", "4", "--json"]
    flags += ["--best_of", "4", "--reward_from", str(tmp_path / "judge"), "--rewards.function_weight", "0.5"]
    flags += ["--rewards.function", f"{HERE}:vowels", "--prompt", TEXTS[0], "--prompt", TEXTS[1]]
    assert sample.main(flags) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    drawn = sampler(TEXTS[:2], group_size=4)

    def score(of):
        tokens = TOKENIZER(of.prompt)["input_ids"] + of.tokens
        last = MODEL.hidden(params["trunk"], jnp.asarray([tokens]))[0, -1]
        return (float(last @ head["kernel"] + head["bias"]) - 0.25) / 2 + 0.5 * vowels([of.text])[0]

    for number, line in enumerate(found):
        scores = [score(of) for of in drawn[4 * number : 4 * number + 4]]
        best = drawn[4 * number + int(np.argmax(scores))]
        assert len(set(scores)) > 1
        assert (line["completion"], line["sample_index"]) == (best.text, best.sample_index)
        assert line["score"] == pytest.approx(max(scores), rel=1e-4)
        assert line["mean_score"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert "best of 4" in err and "at most 0.6363 nats per completion" in err


def test_a_function_is_given_the_text_with_the_stop_string_as_in_training(directory):
    policy = find_policy(directory, ["--rewards.function", f"{HERE}:vowels"], max_new_tokens=C)
    requests = read_prompts(policy, TEXTS[:1])
    tokens = [*TOKENIZER("books on", add_special_tokens=False)["input_ids"], IDS["eos"]]
    cut = Completion(TEXTS[0], "b", tokens, [-1.0] * len(tokens), True, 0, 0)  # at "oo"
    score = Scorer(policy, requests, find_reward(policy, requests), 2)
    assert score([cut, cut]).tolist() == [3, 3]


def test_the_score_of_the_best_is_in_its_title():
    of_one = Completion("a", "b", [1], [-1.0], True, 0, 2)
    title, _ = shown(Best(of_one, 1.25, 0.5), 4, in_colour=False)
    assert title.plain == "-- prompt 1, completion 3: 1 tokens, ended, mean logprob -1.00, score 1.25"
    title, _ = shown(of_one, 4, in_colour=False)
    assert title.plain.endswith("mean logprob -1.00")


@pytest.mark.parametrize("option", ["attention=xla", "frozen_dtype=bfloat16", "frozen_memory=host"])
def test_what_a_reward_model_reads_is_refused_without_one(option):
    flag = f"--model.{option}"
    name, _, value = option.partition("=")
    assert getattr(read_options("a", [flag], reward_from="b").model, name) == value
    with pytest.raises(ValueError, match=f"--model.{name}: is not read here"):
        read_options("a", [flag])


def test_stop_strings_cut_at_any_number_of_slots_and_steps(sampler, other, uncut):
    """Against the rule itself, told on completions that nothing cut."""
    letters = [letter for letter in ascii_lowercase for of in uncut if letter in of.text[1:-1]]
    strings = [letters[0], letters[-1]]
    found = sampler(PROMPTS, stop_strings=strings)
    assert [of[:3] for of in found] == [of[:3] for of in other(PROMPTS, stop_strings=strings)]
    num_cut = 0
    for whole, cut in zip(uncut, found, strict=True):
        watch = StopWatch(StopStrings(tuple(strings), TOKENIZER))
        (length,) = watch(np.asarray([whole.tokens]), np.asarray([len(whole.tokens)])).tolist()
        num_cut += length > 0
        assert cut.tokens == whole.tokens[: length or None]
        assert cut.logprobs == pytest.approx(whole.logprobs[: length or None], abs=1e-5)
        assert cut.ended == (whole.ended or length > 0)
        assert not any(string in cut.text for string in strings)
        assert whole.text.startswith(cut.text) and (length > 0 or cut.text == whole.text)
    assert 2 < num_cut < len(PROMPTS)


def test_rows_that_have_met_a_stop_string_take_no_more_steps(other, uncut, monkeypatch):
    steps = []

    def counted(*args):
        done = run_to_end(*args)
        steps.append(int(done.steps))
        return done

    monkeypatch.setattr("rlhf_jax.sampler.run_to_end", counted)
    beginnings = [TOKENIZER.decode(of.tokens[:5]) for of in uncut]
    letters = [next((x for x in text if x in ascii_lowercase), "") for text in beginnings]
    limits = [C if letter else 1 for letter in letters]
    other(PROMPTS, max_new_tokens=limits)
    other(PROMPTS, max_new_tokens=limits, stop_strings=sorted(filter(None, set(letters))))
    assert steps == [
        C - 1,
        4,
    ]  # the first look: after the refill, which draws the first token, and four steps


def test_stop_tokens_end_completions(sampler, uncut):
    word = next(token for token in uncut[0].tokens[1:-1] if token != uncut[0].tokens[0])
    cut = sampler(PROMPTS, stop_tokens=[word])[0]
    assert cut.ended and cut.tokens == uncut[0].tokens[: uncut[0].tokens.index(word) + 1]


def test_each_prompt_may_have_its_own_limit(directory, sampler, uncut, tmp_path, capsys):
    limits = [1, 5, 3, 12, 11, 10, 1, 2, 4]
    found = sampler(PROMPTS, max_new_tokens=limits)
    assert [of.tokens for of in found] == [of.tokens[:limit] for of, limit in zip(uncut, limits, strict=True)]
    records = [{"question": text, "max_new_tokens": n} for text, n in zip(PROMPTS, limits, strict=True)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    flags = ["--data", str(tmp_path / "prompts.jsonl"), "--data.columns.prompt", "question"]
    flags += [
        "--rollout.max_new_tokens",
        str(C),
        "--rollout.slots",
        "4",
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    assert lines(capsys, "--model", directory, *flags) == []
    written = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [line["completion"] for line in written] == [of.text for of in found]


def test_other_values_and_other_prompts_compile_nothing(sampler):
    options = {"top_k": 5, "top_p": 0.9, "min_p": 0.01}
    sampler(PROMPTS, temperature=0.7, **options)
    sampler(PROMPTS, stop_strings=list("aeiostn"))
    compiled = []
    listener = lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        sampler(PROMPTS[:5], temperature=1, top_k=2, top_p=0.5, min_p=0.3)
        sampler(["x", *PROMPTS[4:]], temperature=2.5, max_new_tokens=[1, 2, 3, 4, 5, 6], **options)
        sampler(PROMPTS[3:], stop_strings=["b", "c d", "a"], stop_tokens=[7, "<|bos|>"], seed=9)
        assert not compiled
        jax.jit(lambda x: x + 1)(np.zeros(917))
        assert compiled  # it would have been noticed
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_lines_of_stdin_are_prompts_and_are_shown(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("my toy broke\na pen\n"))
    assert sample.main(["--model", directory, "--rollout.max_new_tokens", str(C), "--greedy"]) == 0
    shown = capsys.readouterr()
    for number, text in enumerate(("my toy broke", "a pen"), start=1):
        assert re.search(rf"-- prompt {number}: \d+ tokens, .*, mean logprob -\d\.\d\d\n{text}⟦", shown.out)
    assert re.search(r"2 completions, \d+ tokens in", shown.err)


def test_conversations_are_what_training_makes_of_them(directory):
    flags = ["--tokenizer.chat_template", TEMPLATE]
    policy = find_policy(directory, flags, max_new_tokens=C)
    messages = [{"role": "user", "content": "a pen"}]
    requests = read_prompts(policy, [messages])
    encoder = chat_encoder(policy.tokenizer)
    assert requests.ids == [encoder.prompt(messages, {}, "here")]
    assert requests.stop == encoder.end_of_turn_id
    plain = read_prompts(policy, ["a pen"])
    assert plain.ids == [TOKENIZER("a pen")["input_ids"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "long " * 40], "1 of 1 prompts are too long.*28 are allowed.*context has 40"),
        (["--prompt", "a", "--rollout.max_new_tokens", "40"], "context has 40 tokens, prompts included"),
        (
            ["--prompt", "a", "--rollout.temperatur", "1"],
            "--rollout.temperatur: no such option; did you mean",
        ),
        (["--prompt", "a", "--temperature", "1"], "no such flag; did you mean --rollout.temperature"),
        (["--prompt", "a", "--rollout.temperature", "0"], "must be > 0, got 0"),
        (["--prompt", "a", "--ppo.gamma", "1"], "--ppo.gamma: is not read here"),
        (["--prompt", "a", "--data.format", "text"], "--data.format: is not read here"),
        (["--prompt", "a", "--model.unroll", "2"], "--model.unroll: is not read here"),
        (["--prompt", "a", "--rollout.stop_tokens", "[nix]"], "'nix' is not in the tokenizer's vocabulary"),
        (["--prompt", "a", "--rollout.stop_strings", "a"], "expected a list of strings, got 'a'"),
        (["--prompt", "a", "--greedy", "--rollout.top_k", "3"], "rollout.top_k: would be ignored"),
        (["--prompt", "a", "--group_size", "0"], "group_size: must be >= 1, got 0"),
        (["--prompt", "a", "--data", "synthetic"], "leave one of them out"),
        (["--prompt", "a", "--chat"], "has no chat template"),
        (["--prompt", "a", "--logprobs"], "--logprobs: would be ignored"),
        (["--prompt", "a", "--out", "{directory}"], "exists already"),
        (["--prompt", "a", "--model", "{directory}/none"], "not a Hugging Face model directory"),
        (["--data", "none.jsonl"], "no such file"),
        (["--data", "{directory}/../limits.jsonl"], "must be an integer from 1 to 12.*got 13"),
        ([], "stdin: has no lines"),
        (["--prompt", "a", "--best_of", "4"], "nothing tells which completion is the best; name a reward"),
        (["--prompt", "a", "--best_of", "1"], "--best_of: must be >= 2, got 1"),
        (["--prompt", "a", "--best_of", "2", "--group_size", "2"], "--group_size: would be ignored"),
        (["--prompt", "a", "--best_of", "2", "--greedy"], "--greedy: all completions of a prompt would be"),
        (["--prompt", "a", "--rewards.function", "a:b"], "--rewards: would be ignored without --best_of"),
        (["--prompt", "a", "--reward_from", "a"], "--reward_from: would be ignored without --best_of"),
        (["--prompt", "a", "--best_of", "2", "--rewards.function", "nix:nix"], "cannot import nix"),
        (["--prompt", "a", "--best_of", "2", "--reward_from", "{directory}/none"], "model/none"),
        (
            ["--prompt", "a", "--best_of=2", f"--rewards.function={HERE}:vowels", "--rewards.model_weight=2"],
            "--rewards.model_weight: would be ignored: stage 'sample' has no reward_from",
        ),
    ],
)
def test_what_is_wrong_is_told_before_a_device_is_touched(directory, flags, message, capsys, monkeypatch):
    with open(f"{directory}/../limits.jsonl", "w") as file:
        file.write('{"prompt": "a", "max_new_tokens": 13}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("rlhf_jax.sample.Sampler", None)
    flags = [flag.format(directory=directory) for flag in flags]
    flags = [*([] if "--model" in flags else ["--model", directory]), *flags]
    flags += [] if "--rollout.max_new_tokens" in flags else ["--rollout.max_new_tokens", str(C)]
    assert sample.main(flags) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_a_call_tells_what_is_wrong(sampler, directory):
    for options, message in (
        ({"temperatur": 1}, "temperatur: no such option of a call; did you mean 'temperature'"),
        ({"top_p": 2}, "top_p: must be"),
        ({"max_new_tokens": C + 1}, "must be an integer from 1 to 12"),
        ({"max_new_tokens": [1]}, "1 numbers for 9 prompts"),
        ({"greedy": True, "min_p": 0.5}, "rollout.min_p: would be ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(PROMPTS, **options)
    for prompts in ([], "a text and no list"):
        with pytest.raises(ValueError, match="give a list of at least one prompt"):
            sampler(prompts)
    with pytest.raises(ValueError, match="rollout.temprature: no such option; did you mean 'temperature'"):
        Sampler.load(directory, temprature=1.0)


@pytest.mark.slow
def test_real_text_of_a_real_model(test_data):
    sampler = Sampler.load(str(test_data / "tinystories656k"), max_new_tokens=64, stop_strings=["."])
    found = sampler(["Once upon a time"] * 8, temperature=0.6)
    assert all(-3 < of.mean_logprob < 0 for of in found)
    assert sum(of.ended for of in found) > 4  # sentences end
    words = " ".join(of.text for of in found).split()
    assert {"little", "girl", "boy", "named"} <= set(words)
    for of in found:
        assert "." not in of.text and (not of.ended or "." in sampler.policy.tokenizer.decode(of.tokens))

"""Models of the hub, fetched from a stand-in by the real library, in a process that is told where it is."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax import config
from rlhf_jax.models import hub
from tests import tiny
from tests.conftest import ROOT
from tests.stand_in_hub import StandIn

FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"1",
    "model-00002-of-00002.safetensors": b"2",
    "model.safetensors.index.json": b"{}",
    "consolidated.safetensors": b"the same once more",
    "pytorch_model.bin": b"pickle",
    "modeling_mine.py": b"code",
    "original/params.json": b"{}",
}
ASKED = """
import json, sys
from pathlib import Path
from rlhf_jax.models.hub import local_directory
for name, weights in json.loads(sys.argv[1]):
    try:
        at = local_directory(name, weights=weights)
        print(json.dumps([at.name, sorted(path.name for path in at.iterdir())]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def ask(names: list[tuple[str, bool]], environment: dict[str, str | None]) -> list:
    """Returns what local_directory says of each (name, weights): [commit, files], or the message."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", ASKED, json.dumps(names)],
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Returns what is said, by name: with the hub, then offline, then with a hub that does not answer."""
    home = tmp_path_factory.mktemp("home")
    with StandIn() as stand_in:
        old = stand_in.add("models", "tiny/moving", {"config.json": b"old", "model.safetensors": b"old"})
        new = stand_in.add("models", "tiny/moving", {"config.json": b"new", "model.safetensors": b"new"})
        stand_in.add("models", "tiny/whole", FILES)
        stand_in.add("models", "tiny/tokenizer", {"tokenizer.json": b"{}", "model.safetensors": b"big"})
        stand_in.add("models", "tiny/pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        stand_in.add("models", "tiny/gated", {"config.json": b"{}", "model.safetensors": b""}, gated=True)
        names = [
            ("hub:tiny/moving", True),
            (f"hub:tiny/moving@{old}", True),
            ("hub:tiny/whole", True),
            ("hub:tiny/tokenizer", False),
            ("hub:tiny/pickles", True),
            ("hub:tiny/gated", True),
            ("hub:tiny/nothing", True),
            ("hub:tiny/moving@v2", True),
        ]
        online = ask(names, stand_in.environment(home) | {"HF_TOKEN": "hf_secretsecretsecret"})
        cached = ["hub:tiny/moving", f"hub:tiny/moving@{old}", "hub:tiny/tokenizer", "hub:tiny/nothing"]
        offline = ask([(name, True) for name in cached], stand_in.environment(home, offline=True))
        silent = stand_in.environment(home)
        endpoint = silent["HF_ENDPOINT"]
    unreachable = ask([("hub:tiny/whole", True), ("hub:tiny/nothing", True)], silent)
    found: dict[str, object] = {"old": old, "new": new, "endpoint": endpoint, "home": str(home)}
    found |= {name: said for (name, _), said in zip(names, online, strict=True)}
    found |= {f"offline {name}": said for name, said in zip(cached, offline, strict=True)}
    return found | {"silent whole": unreachable[0], "silent nothing": unreachable[1]}


def test_a_branch_and_a_commit(answers):
    assert answers["hub:tiny/moving"] == [answers["new"], ["config.json", "model.safetensors"]]
    assert answers[f"hub:tiny/moving@{answers['old']}"][0] == answers["old"]


def test_only_what_is_read_is_downloaded(answers):
    """No pickles, no code, nothing of directories, no second copy of the weights."""
    assert answers["hub:tiny/whole"][1] == [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    assert answers["hub:tiny/tokenizer"][1] == ["tokenizer.json"]  # its weights were not wanted


@pytest.mark.parametrize(
    "name, message",
    [
        ("hub:tiny/pickles", "hub:tiny/pickles has no weights as safetensors; pickles such as"),
        (
            "hub:tiny/gated",
            "hub:tiny/gated cannot be downloaded: it is gated: ask for access at ENDPOINT/tiny/gated, then "
            "set HF_TOKEN in the environment to a token of yours",
        ),
        (
            "hub:tiny/nothing",
            "hub:tiny/nothing cannot be downloaded: there is no model tiny/nothing at ENDPOINT, or it is "
            "private: then set HF_TOKEN in the environment to a token that may read it",
        ),
        (
            "hub:tiny/moving@v2",
            "hub:tiny/moving@v2 cannot be downloaded: tiny/moving has no branch, tag or commit 'v2'",
        ),
        (
            "offline hub:tiny/nothing",
            "hub:tiny/nothing cannot be downloaded: HF_HUB_OFFLINE is set, and the cache HOME/hub does not "
            "have all of it",
        ),
        ("silent nothing", "hub:tiny/nothing cannot be downloaded: ENDPOINT does not answer ([Errno "),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_told_in_one_line(answers, name, message):
    said = answers[name]
    message = message.replace("ENDPOINT", answers["endpoint"]).replace("HOME", answers["home"])
    assert said.startswith(message) and "\n" not in said
    assert "secret" not in said


def test_without_the_hub_the_copy_is_used(answers):
    assert answers["offline hub:tiny/moving"] == answers["hub:tiny/moving"]
    assert answers[f"offline hub:tiny/moving@{answers['old']}"][0] == answers["old"]
    assert answers["silent whole"] == answers["hub:tiny/whole"]


def test_a_copy_without_the_weights_is_not_taken_for_whole(answers):
    assert (
        "the cache" in answers["offline hub:tiny/tokenizer"]
        and "all of it" in answers["offline hub:tiny/tokenizer"]
    )


def test_a_directory_is_itself():
    assert hub.local_directory("/models/mine") == Path("/models/mine")


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:a/b@", "hub:a b", "hub:a/b@x@y", "hub:a/b:train"])
def test_another_notation_is_refused(name):
    with pytest.raises(ValueError, match=r"must read hub:OWNER/NAME\[@REVISION\], such as hub:Eleuther"):
        hub.local_directory(name)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, str]]:
    """Returns the list of what is fetched from now on; nothing is, and hub:a/lost cannot be had."""
    asked = []

    def local_directory(name: str, *, weights: bool, commit: str) -> Path:
        asked.append((name, weights, commit))
        if name == "hub:a/lost":
            raise ValueError("it is lost")
        return Path(f"/cache/{name.partition('/')[2]}/{commit or 'new'}")

    monkeypatch.setattr(hub, "local_directory", local_directory)
    return asked


def chain(**of_ppo: str) -> config.Config:
    """Returns a chain whose first stage has a model and a tokenizer of the hub."""
    sft = tiny.stage("sft", model={"path": "hub:a/model"}, tokenizer={"path": "hub:a/tokenizer"})
    ppo = dataclasses.replace(sft, name="ppo", **of_ppo)
    return config.Config(run=sft.run, stages=(sft, ppo))


def test_names_of_a_configuration_become_directories(asked):
    """Each is fetched once, a tokenizer without weights, and by its commit what was fetched before."""
    before = chain(start_from="sft", reward_from="hub:a/judge@v1")
    fetched, commits = hub.fetch_models(before, {"hub:a/tokenizer": "then"})
    assert asked == [
        ("hub:a/model", True, ""),
        ("hub:a/judge@v1", True, ""),
        ("hub:a/tokenizer", False, "then"),
    ]
    assert commits == {"hub:a/model": "new", "hub:a/tokenizer": "then", "hub:a/judge@v1": "new"}
    sft, ppo = fetched.stages
    assert (sft.start_from, sft.reward_from) == ("", "")
    assert (ppo.start_from, ppo.reward_from) == ("sft", "/cache/judge@v1/new")
    for stage in fetched.stages:
        assert (stage.model.path, stage.tokenizer.path) == ("/cache/model/new", "/cache/tokenizer/then")
    assert before.stages[0].model.path == "hub:a/model"


def test_weights_are_fetched_of_a_model_that_is_the_tokenizers_too(asked):
    stage = tiny.stage("sft", model={"path": "hub:a/model"}, tokenizer={"path": "hub:a/model"})
    hub.fetch_models(config.Config(run=stage.run, stages=(stage,)), {})
    assert asked == [("hub:a/model", True, "")]


def test_all_models_that_cannot_be_had_are_told_at_once(asked):
    lost = chain(start_from="hub:a/lost")
    broken = dataclasses.replace(lost.stages[0], tokenizer=config.TokenizerConfig(path="hub:a/lost/x"))
    lost = dataclasses.replace(lost, stages=(broken, *lost.stages[1:]))
    with pytest.raises(ValueError, match="^stages.ppo.from: it is lost$"):
        hub.fetch_models(lost, {})


def test_a_branch_is_said_to_move():
    moving = hub.said_of("hub:a/b@main", "c" * 40)
    assert (
        moving == f"hub:a/b@main is commit {'c' * 40}, where a branch may move: pin it as hub:a/b@{'c' * 40}"
    )
    assert hub.said_of(f"hub:a/b@{'c' * 40}", "c" * 40) == f"hub:a/b@{'c' * 40} is commit {'c' * 40}"


def test_commits_of_a_run(tmp_path):
    assert hub.read_commits(tmp_path) == {}
    hub.write_commits(tmp_path, {})
    assert not list(tmp_path.iterdir())
    hub.write_commits(tmp_path, {"hub:a/b": "c"})
    assert hub.read_commits(tmp_path) == {"hub:a/b": "c"}
    (tmp_path / "hub.json").write_text("[")
    with pytest.raises(ValueError, match="hub.json cannot be read: .*; remove it to take the newest commits"):
        hub.read_commits(tmp_path)


def test_a_long_download_is_told(monkeypatch, capsys):
    monkeypatch.setattr(hub, "QUIET_SECONDS", 0.01)
    with hub._told_when_slow("downloading hub:a/b to /cache"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "downloading hub:a/b to /cache\n"
    monkeypatch.setattr(hub, "QUIET_SECONDS", 5)
    with hub._told_when_slow("downloading hub:a/b to /cache"):
        pass
    assert capsys.readouterr().err == ""

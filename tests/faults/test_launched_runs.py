"""What launch/tpu.sh does where slices, hosts, networks or settings are not what they were."""

import json
import os
import re
import signal
import sys

import pytest

from tests.fake_cloud import replace, script
from tests.launched import CREATE, DELETE, launches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="hosts of TPUs run Linux"),
]


@pytest.fixture
def make_launch(tmp_path):
    yield from launches(tmp_path)


def test_a_network_that_is_gone_for_a_while(make_launch):
    launch = make_launch(outages=3, create_errors=["UNAVAILABLE: The service is currently unavailable."])
    assert "once more" in launch("watch")
    assert len(launch.cloud.calls(*CREATE)) == 2
    launch.cloud.plot(outages=5)
    assert "the network is down" in launch("status", code=3)


def test_nodes_that_vanish_while_one_watches_are_lost(make_launch):
    launch = make_launch()
    launch.settings["TRAIN_FLAGS"] = "--steps 25"
    watching = launch.start("watch")
    launch.until(lambda: len(launch.steps()) >= 3)
    state = launch.cloud.state()
    state["queued"]["tiny"]["nodes"] = {}
    replace(launch.cloud.state_file, state)
    for host in ("tiny-w-0", "tiny-w-1"):
        launch.cloud.remove(host)
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "tiny GONE; goes on" in text, text


def test_fewer_slices_than_there_are(make_launch):
    launch = make_launch(waits=0)
    launch.settings["SLICES"] = "3"
    launch("create")
    launch.settings["SLICES"] = "2"
    assert "tiny-0 READY (v5p-16, 3 slices)" in launch("watch", code=3)
    assert len(launch.cloud.state()["queued"]["tiny"]["nodes"]) == 3


def test_more_hosts_than_the_settings_say_are_not_used(make_launch):
    launch = make_launch(workers=3)
    assert "3 of 2 hosts answered" in launch("up", code=5)
    assert not launch.run_dir.exists()


def test_a_run_directory_that_cannot_be_made(make_launch):
    launch = make_launch(workers=1)
    launch.settings["ACCELERATOR"] = "v5p-8"
    launch.run_dir.parent.touch()
    assert f"RUN_DIR: {launch.run_dir} cannot be made" in launch("up", code=5)


def test_what_has_been_waited_for_too_long_is_given_up(make_launch):
    launch = make_launch(waits=1000)
    launch.settings |= {"WAIT_SECONDS": "0", "TEARDOWN_WHEN_DONE": "yes"}
    launch("watch", code=4)
    assert not launch.cloud.state()["queued"]


def test_a_refusal_days_into_a_run_is_not_its_end(make_launch):
    launch = make_launch()
    launch.settings["TRAIN_FLAGS"] = "--steps 25"
    watching = launch.start("watch")
    launch.until(lambda: len(launch.steps()) >= 3)
    launch.cloud.plot(create_errors=["RESOURCE_EXHAUSTED: Quota limit has been exceeded."])
    launch.cloud.preempt("tiny", worker=1)
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "Google Cloud refused" in text, text
    assert launch.steps() == list(range(25))
    launch.settings |= {"TRAIN_FLAGS": "--steps 1000", "TEARDOWN_WHEN_DONE": "yes", "POLL_SECONDS": "0.02"}
    watching = launch.start("watch")
    launch.until(lambda: len(launch.steps()) >= 30)
    launch.cloud.plot(create_errors=["RESOURCE_EXHAUSTED: Quota limit has been exceeded."] * 10)
    launch.cloud.preempt("tiny", worker=1)
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 3 and "gives up" in text, text
    assert len(launch.cloud.plot()["create_errors"]) == 8


def test_preempted_again_and_again_without_a_checkpoint(make_launch):
    launch = make_launch()
    (launch.run_dir).mkdir(parents=True)
    launch.settings["TRAIN_FLAGS"] = "--steps 0 --exit 0"
    script(launch.directory / "venv" / "bin" / "python", "if [[ $1 == -c ]]; then exit; fi; /bin/sleep 60")
    launch.settings["TEARDOWN_WHEN_DONE"] = "yes"
    watching = launch.start("watch")
    for count in (1, 2, 3):
        launch.until(lambda count=count: len(launch.cloud.calls(*CREATE)) == count)
        launch.until(lambda: launch.cloud.processes("tiny-w-1"))
        launch.cloud.preempt("tiny", worker=1)
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 6, text
    assert "no new checkpoint after 2 restarts" in text
    assert not launch.cloud.state()["queued"]  # TEARDOWN_WHEN_DONE
    assert len(launch.cloud.calls(*CREATE)) == len(launch.cloud.calls(*DELETE)) == 3


def test_code_that_arrives_damaged_is_not_unpacked(make_launch):
    launch = make_launch()
    on_hosts = launch.directory / "cloud" / "bin"
    script(on_hosts / "tar", 'touch "$HOME/unpacks"; exec /usr/bin/tar "$@"')
    script(on_hosts / "sha256sum", '[[ $FAKE_HOST != *-w-1 ]] && exec /usr/bin/sha256sum "$@"')
    text = launch("up", code=5)
    assert "@host tiny-w-1 failed: code.tar.gz has another checksum" in text
    assert {path.parent.name for path in launch.cloud.hosts.glob("*/unpacks")} == {"tiny-w-0"}
    assert not launch.run_dir.exists()


def test_a_failing_run_is_restarted_until_that_brings_nothing(make_launch):
    """Crashes that come after new checkpoints do not count; three at one step do."""
    launch = make_launch(workers=1)
    launch.settings |= {"ACCELERATOR": "v5p-8", "TRAIN_FLAGS": "--steps 9"}
    launch.run_dir.mkdir(parents=True)
    (launch.run_dir / "crash_at").write_text("1\n2\n3\n4\n4\n4\n")
    text = launch("watch", code=1)
    assert "the run failed" in text
    assert launch.steps() == [0, 1, 2, 3]
    log = launch.log("tiny-w-0")
    assert log.count("starts training") == 6 and "no new checkpoint after 2 restarts" in log
    assert "failed code=1 restarts=5 progress=sft:3," in launch("status")
    assert "the run is done" in launch("watch")  # with what made it fail gone


def test_a_wrong_configuration_is_not_tried_again(make_launch):
    launch = make_launch(workers=1)
    launch.settings |= {"ACCELERATOR": "v5p-8", "TRAIN_FLAGS": "--exit 2"}
    launch("watch", code=1)
    assert launch.log("tiny-w-0").count("starts training") == 1


def test_other_code_does_not_replace_what_runs(make_launch):
    launch = make_launch()
    launch.settings |= {"TRAIN_FLAGS": "--steps 1000", "TEARDOWN_WHEN_DONE": "yes"}
    launch("up")
    (launch.repository / "configs" / "tiny.yaml").write_text("{}  # changed\n")
    assert "is not there: ship it" in launch("start", code=5)
    assert "another version of the code is running; stop it first" in launch("watch", code=5)
    assert launch.cloud.state()["queued"] and launch.log("tiny-w-1").count("starts training") == 1
    (launch.repository / "configs" / "tiny.yaml").write_text("{}\n")
    launch.settings["TRAIN_FLAGS"] = "--steps 1"
    launch("ship")
    assert "other settings are running; stop first" in launch("start", code=5)
    launch("stop")
    (launch.repository / "configs" / "tiny.yaml").write_text("{}  # changed\n")
    assert "tracked files that are not committed are shipped as they are" in launch("watch")
    assert not launch.cloud.state()["queued"]


def test_a_supervisor_that_is_gone_is_started_again(make_launch):
    """As after a reboot of the hosts, which keeps their disks."""
    launch = make_launch()
    launch.settings["TRAIN_FLAGS"] = "--steps 30"
    watching = launch.start("watch")
    launch.until(lambda: len(launch.steps()) >= 2)
    for host in ("tiny-w-0", "tiny-w-1"):
        for pid in launch.cloud.processes(host):
            os.kill(pid, signal.SIGKILL)
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "idle restarts=0" in text, text
    assert len(launch.cloud.calls(*CREATE)) == 1 and launch.steps() == list(range(30))


def test_two_slices_and_teardown(make_launch):
    launch = make_launch()
    launch.settings["SLICES"] = "2"
    launch("watch")
    (create,) = launch.cloud.calls(*CREATE)
    assert "--node-count=2" in create and "--node-prefix=tiny" in create
    assert {path.name for path in launch.cloud.hosts.iterdir()} == {
        f"tiny-{slice}-w-{worker}" for slice in (0, 1) for worker in (0, 1)
    }
    text = launch("teardown")
    assert "anything listed here may cost money" in text and text.count("Listed 0 items.") == 5
    assert not launch.cloud.state()["queued"]
    launch("teardown")  # nothing is there any more
    assert len(launch.cloud.calls(*DELETE)) == 1


def test_secrets_that_are_not_in_the_settings_any_more_are_not_used(make_launch):
    launch = make_launch(workers=1)
    secrets = launch.directory / "secrets.env"
    secrets.write_text("HF_TOKEN=of_the_file\n")
    secrets.chmod(0o600)
    launch.settings |= {"ACCELERATOR": "v5p-8", "SECRETS_FILE": secrets}
    launch("watch")
    del launch.settings["SECRETS_FILE"]
    launch("watch")
    assert re.findall("token (\\S+)", launch.log("tiny-w-0")) == ["of_the_file", "none"]
    assert "Terminated" not in launch.log("tiny-w-0")


def test_a_secret_manager_that_does_not_answer_once(make_launch):
    launch = make_launch(workers=1, errors=[[["secrets"], "UNAVAILABLE"]])
    (launch.directory / "cloud" / "bin" / "gcloud").symlink_to(launch.directory / "bin" / "gcloud")
    launch.settings |= {"ACCELERATOR": "v5p-8", "SECRET_MANAGER": "WANDB_API_KEY:wandb"}
    launch("watch")
    assert "done restarts=1" in launch("status")


def test_a_start_mounts_what_a_reboot_has_unmounted(make_launch):
    launch = make_launch(workers=1)
    on_hosts = launch.directory / "cloud" / "bin"
    script(on_hosts / "mountpoint", '[[ -e "$HOME/mounted" ]]')
    script(on_hosts / "gcsfuse", 'touch "$HOME/mounted"; echo "${@:3}" >>"$HOME/mounts"')
    script(on_hosts / "sudo", 'exec "$@"')
    launch.settings |= {
        "ACCELERATOR": "v5p-8",
        "SHARED_SOURCE": "gs://b",
        "SHARED_DIR": launch.run_dir.parent,
    }
    launch("watch")
    home = launch.cloud.hosts / "tiny-w-0"
    (home / "mounted").unlink()
    launch("start")
    assert (home / "mounts").read_text() == f"b {launch.run_dir.parent}\n" * 2


def test_settings_that_the_running_code_does_not_know_do_not_keep_it_from_being_stopped(make_launch):
    launch = make_launch(workers=1)
    launch.settings |= {"ACCELERATOR": "v5p-8", "TRAIN_FLAGS": "--steps 1000"}
    launch("up")
    with (launch.cloud.hosts / "tiny-w-0" / "rlhf_jax" / "tiny" / "settings.env").open("a") as settings:
        settings.write("SETTING_OF_TOMORROW=yes\n")
    assert "running restarts=0" in launch("status")
    assert "stopped code=143" in launch("stop")


def test_packages_are_installed_once(make_launch):
    launch = make_launch(workers=1)
    del launch.settings["VENV"]
    launch.settings["ACCELERATOR"] = "v5p-8"
    stub = launch.directory / "venv" / "bin" / "python"
    script(
        launch.directory / "cloud" / "bin" / "uv",
        f'echo "uv $*" >>"$HOME/uv"; for place; do :; done; [[ $1 != venv ]] || {{ mkdir -p "$place/bin" && '
        f'cp {stub} "$place/bin/python"; }}',
    )
    launch("watch")
    launch("install")
    made, installed = (launch.cloud.hosts / "tiny-w-0" / "uv").read_text().splitlines()
    assert re.match(r"uv venv --quiet --clear --python 3\.12 .*/rlhf_jax/venv-[0-9a-f]{12}$", made)
    assert installed.endswith("requirements.txt jax[tpu]")


def test_compute_engine(make_launch):
    launch = make_launch()
    launch.settings |= {"BACKEND": "gce", "TOPOLOGY": "2x2x2"}
    launch("watch")
    made = [call for call in launch.cloud.calls() if {"create", "resize"} & set(call)]
    assert [call[1] for call in made] == ["instance-templates", "resource-policies", *["instance-groups"] * 2]
    for index in (0, 1):
        expected = rf"id {index}\b"
        assert re.search(expected, launch.log(f"tiny-0-w-{index}"))
    assert any("RLHF_JAX_COORDINATOR=tiny-0-w-0:8482" in " ".join(call) for call in launch.cloud.calls("ssh"))
    launch("watch")
    assert len([call for call in launch.cloud.calls() if "create" in call]) == 3
    launch("teardown")
    state = launch.cloud.state()
    assert not (state["groups"] or state["templates"] or state["policies"])


def test_compute_engine_completes_what_was_begun_and_sees_what_was_lost(make_launch):
    launch = make_launch(errors=[[["managed", "resize"], "Quota exceeded"]])
    launch.settings |= {"BACKEND": "gce", "TOPOLOGY": "2x2x2", "SLICES": "2"}
    launch("create", code=3)
    assert launch.cloud.state()["groups"] == {"tiny-0": {}}
    launch("up")
    state = launch.cloud.state()
    assert {group: len(machines) for group, machines in state["groups"].items()} == {"tiny-0": 2, "tiny-1": 2}
    launch("stop")

    launch.settings["SLICES"] = "1"
    assert "tiny-1 (v5p-16 x 2)" in launch("up", code=3)
    assert launch.cloud.state() == state
    launch.settings["SLICES"] = "2"

    del state["groups"]["tiny-1"]["tiny-1-w-1"]  # preempted while nobody watched
    launch.cloud.state_file.write_text(json.dumps(state))
    assert "tiny-1 1 of 2 running" in launch("create")
    assert len(launch.cloud.calls("managed", "delete")) == 2

    launch.settings["SLICES"] = "1"
    launch("teardown")
    state = launch.cloud.state()
    assert not (state["groups"] or state["templates"] or state["policies"])


def test_compute_engine_does_not_use_the_template_of_other_settings(make_launch):
    launch = make_launch(errors=[[["managed", "create"], "Quota exceeded"]])
    launch.settings |= {"BACKEND": "gce", "TOPOLOGY": "2x2x2"}
    launch("create", code=3)
    launch.settings["MACHINE_TYPE"] = "another"
    launch("create")
    calls = launch.cloud.calls("instance-templates")
    assert [call[2] for call in calls] == ["delete", "create"] * 2
    assert "--machine-type=another" in calls[-1]


def test_a_request_that_fails_later_is_told_and_not_used_again(make_launch):
    launch = make_launch(fails="Quota exceeded for quota metric TPUs")
    assert "Quota exceeded for quota metric TPUs" in launch("up", code=3)
    launch.cloud.plot(fails=None)
    launch("up")
    assert [call[2:4] for call in launch.cloud.calls() if call[3] in ("create", "delete")] == [
        ["queued-resources", "create"],
        ["queued-resources", "delete"],
        ["queued-resources", "create"],
    ]

"""launch/tpu.sh against a gcloud that plays Google Cloud: calls, their order, exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launched import CREATE, DELETE, Launch, launches

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts of TPUs run Linux")
GOLDEN = Path(__file__).with_name("launch_golden")


@pytest.fixture
def make_launch(tmp_path):
    yield from launches(tmp_path)


@pytest.fixture(scope="module")
def launch_without_calls(tmp_path_factory):
    launch = Launch(tmp_path_factory.mktemp("quiet"))
    yield launch
    assert not launch.cloud.calls()


@pytest.fixture
def quiet_launch(launch_without_calls):
    """Returns one that calls no gcloud, so that several tests may share it; each finds its settings new."""
    before = dict(launch_without_calls.settings)
    yield launch_without_calls
    launch_without_calls.settings = before


def test_from_nothing_to_done(make_launch):
    """Created once, code verified, installed and started on each host; a second call finds all done."""
    launch = make_launch(waits=3)
    text = launch("watch")
    assert "8 chips of 95 GB on 2 host(s), spot" in text
    assert "the run is done" in text and "the slices stay, and cost money" in text
    assert len(launch.cloud.calls(*CREATE)) == 1 and not launch.cloud.calls(*DELETE)
    assert launch.steps() == [0, 1, 2]
    order = [
        " ".join(call[:4]) if call[1] == "tpus" else call
        for call in launch.cloud.calls()
        if "describe" not in call
    ]
    ssh, scp = "compute tpus queued-resources ssh", "compute tpus queued-resources scp"
    assert order[:8] == ["compute tpus queued-resources create", ssh, scp, scp, ssh, ssh, ssh, ssh]
    tracked = {path.name for path in (launch.cloud.hosts / "tiny-w-1/rlhf_jax/tiny").glob("code-*/*")}
    assert {"launch", "configs", "requirements.txt"} <= tracked and "untracked_secret" not in tracked

    again = launch("watch")
    assert "tiny is there: queued resource ACTIVE" in again and "the run is done" in again
    assert len(launch.cloud.calls(*CREATE)) == 1


def test_a_quota_error_ends_it_and_says_what_to_do(make_launch):
    launch = make_launch(
        create_errors=["RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProject' has been exceeded."]
    )
    text = launch("watch", code=3)
    assert "TPUV5PPerProject" in text and "ask for more in the console" in text
    assert len(launch.cloud.calls(*CREATE)) == 1 and not launch.cloud.calls("ssh")


def test_waiting_for_long_ends_with_a_code_of_its_own_and_goes_on_later(make_launch):
    launch = make_launch(waits=1000)
    launch.settings["WAIT_SECONDS"] = "1"
    assert "still so: queued resource WAITING_FOR_RESOURCES" in launch("up", code=4)
    assert "still so" in launch("wait", code=4)
    assert "not ready" in launch("ship", code=5)
    assert len(launch.cloud.calls(*CREATE)) == 1 and not launch.cloud.calls(*DELETE)


def test_what_another_made_meanwhile_is_used(make_launch):
    """It is not there when one looks, and there already when one creates."""
    launch = make_launch()
    launch("create")
    launch.cloud.plot(create_errors=["ALREADY_EXISTS: Resource 'tiny' already exists"])
    state = launch.cloud.state()
    launch.cloud.state_file.write_text('{"queued": {}, "groups": {}, "templates": [], "policies": []}')
    watching = launch.start("create")
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "that is so already" in text, text
    assert state["queued"] and not launch.cloud.calls(*DELETE)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"SLICES": "2"}, "tiny-0 GONE, tiny-1 GONE"),
        ({"ACCELERATOR": "v5p-8"}, "tiny READY (v5p-16, 1 slices)"),
    ],
)
def test_slices_that_are_not_those_of_the_settings_are_not_touched(make_launch, changes, told):
    launch = make_launch(waits=0)
    launch("create")
    settings = dict(launch.settings)
    launch.settings |= changes
    text = launch("watch", code=3)
    assert told in text and "'teardown' first" in text
    assert (
        launch.cloud.state()["queued"] and not launch.cloud.calls(*DELETE) and not launch.cloud.calls("ssh")
    )
    launch("teardown")
    assert settings["NAME"] not in launch.cloud.state()["queued"]


def test_costs_are_told_as_far_as_they_can_be(make_launch):
    launch = make_launch(
        errors=[
            [["queued-resources", "list"], "Cloud TPU API has not been used in project my-project before"],
            [["disks", "list"], "Required 'compute.disks.list' permission for 'projects/my-project'"],
        ]
    )
    text = launch("costs", code=3)
    assert "CANNOT BE LISTED, and may cost money: compute disks list" in text
    assert text.count("Listed 0 items.") == 3
    assert "Listed 0 items." in launch("costs")


def test_what_is_not_allowed_is_not_tried_again(make_launch):
    launch = make_launch(errors=[[["describe"], "Required 'tpu.queuedResources.get' permission for 'x'"]])
    assert "roles/tpu.admin" in launch("create", code=3)
    assert len(launch.cloud.calls()) == 1


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(make_launch):
    launch = make_launch()
    launch.settings["TRAIN_FLAGS"] = "--steps 25"
    watching = launch.start("watch")
    launch.until(lambda: len(launch.steps()) >= 3)
    launch.cloud.preempt("tiny", worker=1)
    launch.until(lambda: launch.cloud.calls(*DELETE))
    before = max(launch.steps())
    launch.until(lambda: len(launch.steps()) > before + 3)
    (launch.run_dir / "crash_at").write_text(f"{max(launch.steps()) + 4}\n")
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0, text
    assert "not running: queued resource ACTIVE, tiny PREEMPTED; goes on" in text
    verbs = [call[3] for call in launch.cloud.calls("queued-resources") if call[3] in ("create", "delete")]
    assert verbs == ["create", "delete", "create"]
    assert launch.steps() == list(range(25))
    logs = [path.read_text() for path in (launch.directory / "shared" / "run.logs").iterdir()]
    assert any("crashes at" in log and log.count("starts training") == 2 for log in logs)


def test_a_host_that_fails_ssh_is_tried_again_and_named(make_launch):
    launch = make_launch(unreachable={"tiny-w-1": 1})
    assert "1 of 2 hosts answered; once more" in launch("up")
    launch.cloud.plot(unreachable={"tiny-w-1": 1000})
    text = launch("up", code=5)
    assert "host 1 of slice 0 cannot be reached by ssh" in text and "host 0 of slice 0" not in text
    assert len(launch.cloud.calls(*CREATE)) == 1


def test_stop_saves_status_tells_and_start_goes_on(make_launch):
    launch = make_launch()
    launch.settings["TRAIN_FLAGS"] = "--steps 1000"
    launch("up")
    launch.until(lambda: len(launch.steps()) >= 2)
    assert len(re.findall(r"@host tiny-w-\d running restarts=0 progress=sft:\d+,", launch("status"))) == 2
    assert len(re.findall("@host tiny-w-. started before", "".join(launch("start")))) <= 2
    watching = launch.start("watch")
    launch.until(lambda: "running" in watching.stdout.readline())
    text = launch("stop")
    assert len(re.findall(r"@host tiny-w-\d stopped code=143 restarts=0", text)) == 2
    assert watching.wait(60) == 143
    for host in ("tiny-w-0", "tiny-w-1"):
        assert not launch.cloud.processes(host)
        assert launch.log(host).count("saved by a signal") == 1
        assert launch.log(host).count("starts training") == 1
    saved = max(launch.steps())
    assert "saved by a signal" in launch("logs", "--host", "1", "-n", "5")
    launch.settings["TRAIN_FLAGS"] = f"--steps {saved + 3}"
    launch("watch")
    assert max(launch.steps()) == saved + 2


def test_secrets_come_from_a_file_or_the_manager_and_are_on_no_command_line(make_launch):
    launch = make_launch(workers=1)
    secrets = launch.directory / "secrets.env"
    secrets.write_text("HF_TOKEN=hf_of_the_file\n")
    secrets.chmod(0o644)
    launch.settings |= {"ACCELERATOR": "v5p-8", "SECRETS_FILE": secrets, "ENV_CACHE": "/some/where"}
    launch.settings["SECRET_MANAGER"] = "WANDB_API_KEY:wandb"
    assert "others may read" in launch("watch", code=2)
    secrets.chmod(0o600)
    (launch.directory / "cloud" / "bin" / "gcloud").symlink_to(launch.directory / "bin" / "gcloud")
    # The launcher has variables of these names itself.
    launch.settings |= {"ENV_CODE": "/nowhere", "ENV_PROJECT": "another", "ENV_flags": "--exit 9"}
    launch("watch")
    assert "token hf_of_the_file wandb value-of-wandb cache /some/where" in launch.log("tiny-w-0")
    home = launch.cloud.hosts / "tiny-w-0" / "rlhf_jax" / "tiny"
    assert (home / "secrets.env").stat().st_mode & 0o077 == 0 and home.stat().st_mode & 0o077 == 0
    assert "hf_of_the_file" not in launch.cloud.calls_file.read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"NAME": "Tiny"}, "NAME: expected lower-case"),
        ({"SLICE": "2"}, "SLICE: there is no such setting"),
        ({"ACCELERATOR": "v5p-4x4x4"}, "ACCELERATOR: expected v4-N"),
        ({"ACCELERATOR": "v5p-12"}, "counts TensorCores, two to a chip: a multiple of 8"),
        ({"ACCELERATOR": "v6e-12"}, "counts chips: 1, 4, 8"),
        ({"ACCELERATOR": "tpu7x-2x2x1"}, "the Cloud TPU API does not offer tpu7x; set BACKEND=gce"),
        ({"TOPOLOGY": "4x4x4"}, "TOPOLOGY: expected sizes whose product is the 8 chips of v5p-16"),
        ({"BACKEND": "gce"}, "TOPOLOGY: needed"),
        ({"BACKEND": "gce", "TOPOLOGY": "2x2x2", "CAPACITY": "flex-start"}, "MAX_RUN_DURATION: needed"),
        ({"CAPACITY": "cheap"}, "CAPACITY: expected spot"),
        ({"RUN_DIR": "runs/here"}, "RUN_DIR: expected an absolute path"),
        (
            {"SHARED_SOURCE": "gs://b", "SHARED_DIR": "/mnt/shared"},
            "RUN_DIR: expected a path below SHARED_DIR",
        ),
        ({"ENV_HF_TOKEN": "hf_x"}, "a secret belongs in SECRETS_FILE"),
        ({"TRAIN_FLAGS": f"--hub.token hf_{'x' * 30}"}, "TRAIN_FLAGS: a token belongs in SECRETS_FILE"),
        ({"ENV_wandb_key": "0" * 40}, "ENV_wandb_key: a secret belongs in SECRETS_FILE"),
        ({"RUN_DIR": f"github_pat_{'x' * 40}"}, "RUN_DIR: expected an absolute path"),
        ({"RESERVATION": "mine"}, "RESERVATION: CAPACITY=spot has no use for it"),
        ({"TOPOLOGY": "2x2x2"}, "TOPOLOGY: BACKEND=tpu-vm has no use for it"),
        ({"TOPOLOGY": "08x1x1", "BACKEND": "gce"}, "TOPOLOGY: expected sizes"),
        ({"ACCELERATOR": "tpu7x-2x1x1", "BACKEND": "gce"}, "tpu7x-2x1x1 has 2 chips: a multiple of 4"),
        ({"WAIT_SECONDS": "010"}, "WAIT_SECONDS: expected a whole number"),
        ({"CONFIG": "configs/absent.yaml"}, "git does not track configs/absent.yaml"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_made(quiet_launch, changes, words):
    launch = quiet_launch
    launch.settings |= changes
    text = launch("watch", code=2)
    assert words in text and "github_pat_" not in text


@pytest.mark.parametrize(
    "words, told",
    [
        (["watch", "--dry-run"], "watch: expected no arguments after it"),
        (
            [f"--token=hf_{'x' * 30}", "watch"],
            "--token: expected --dry-run or --settings FILE before the verb",
        ),
        (["--settings", "/tmp", "watch"], "/tmp is no file that can be read"),
        (["--dry-run", "logs", "-n", "5", "--host", "1"], "expected --host N before the arguments of tail"),
        (["--dry-run", "logs", "--host", "01"], "--host: expected 0 to 1, got '01'"),
    ],
)
def test_a_wrong_command_line(quiet_launch, words, told):
    assert told in quiet_launch(*words, code=2)


def test_it_may_be_called_by_a_link_and_with_cdpath(quiet_launch, tmp_path):
    launch = quiet_launch
    (tmp_path / "tpu").symlink_to(launch.repository / "launch" / "tpu.sh")
    words = ["bash", str(tmp_path / "tpu"), *launch.command("--dry-run", "costs")[2:]]
    environment = launch.environment() | {"CDPATH": str(tmp_path)}
    subprocess.run(words, env=environment, check=True, cwd=tmp_path, capture_output=True)


def test_a_secrets_file_is_read_before_anything_is_made(quiet_launch, tmp_path):
    secrets = tmp_path / "secrets.env"
    secrets.write_text("export HF_TOKEN=hf_secret\n")
    secrets.chmod(0o600)
    quiet_launch.settings["SECRETS_FILE"] = secrets
    text = quiet_launch("watch", code=2)
    assert "secrets.env, line 1: expected NAME=value" in text and "hf_secret" not in text


def test_a_tree_that_git_cannot_snapshot(make_launch):
    launch = make_launch()
    (launch.repository / "new").write_text("new\n")
    launch.git("add", "-N", "new")
    assert "finish the merge, or git add" in launch("watch", code=2)
    assert not launch.cloud.calls()


CASES = {
    "v6e_spot": {"ACCELERATOR": "v6e-8", "SHARED_DIR": "/shared", "SHARED_SOURCE": "gs://bucket"},
    "v5e_two_slices": {"ACCELERATOR": "v5litepod-256", "SLICES": "2", "CAPACITY": "reserved",
                       "INTERNAL_IPS": "yes", "VALID_UNTIL": "6h"},
    "v5p_gce": {"ACCELERATOR": "v5p-16", "BACKEND": "gce", "TOPOLOGY": "2x2x2", "CAPACITY": "on-demand"},
    "tpu7x_gce_two_slices": {"ACCELERATOR": "tpu7x-2x2x1", "BACKEND": "gce", "SLICES": "2",
                             "IMAGE_FAMILY": "tpu7x", "CAPACITY": "flex-start", "MAX_RUN_DURATION": "7d"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_every_command_and_runs_none(quiet_launch, name):
    """What is printed is meant to have changed? Delete the golden file, run this, read the difference."""
    launch = quiet_launch
    launch.settings |= {"RUN_DIR": "/shared/run", "VENV": "", "ENV_CACHE": "/shared/cache"} | CASES[name]
    text = "".join(
        f"$ {verb}\n{launch('--dry-run', verb)}" for verb in ("watch", "status", "stop", "teardown")
    )
    text = re.sub(r"\b[0-9a-f]{40}\b", "TREE", text)
    text = re.sub(r"/\S*/launch\.\w{6}/", "SCRATCH/", text).replace(str(launch.directory), "HERE")
    text = re.sub(r"owner=[\w-]+", "owner=ME", text)
    path = GOLDEN / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        pytest.fail(f"{path.name} was missing, and is written now")
    assert text == path.read_text()


def test_kubernetes(quiet_launch):
    launch = quiet_launch
    launch.settings |= {
        "SLICES": "2", "TOPOLOGY": "2x2x2", "IMAGE": "registry/image:1", "CLUSTER": "mine",
        "GKE_SECRET": "keys", "GKE_CLAIM": "claim", "SHARED_DIR": launch.run_dir.parent, "ENV_CACHE": "it's",
        "TRAIN_FLAGS": "--ppo.kl_coef 0.1",
    }  # fmt: skip
    manifest = yaml.safe_load(launch("manifest"))
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 2, 2, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x2",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["args"] == [
        "--config", "configs/tiny.yaml", "--run.dir", str(launch.run_dir), "--ppo.kl_coef", "0.1"
    ]  # fmt: skip
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "CACHE", "value": "it's"}]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    launch.settings |= {"GKE_SECRET": "", "SHARED_SOURCE": "gs://bucket"}
    cluster, storage, workload = launch("xpk").splitlines()
    assert "--bucket=bucket" in storage and f"--mount-point={launch.run_dir.parent}" in storage
    assert "--num-slices=2" in cluster and "--spot" in cluster
    assert "--tpu-type=v5p-16" in workload and "--workload=tiny" in workload


def test_kubernetes_refuses_what_would_be_lost_or_shown(quiet_launch):
    launch = quiet_launch
    launch.settings |= {"TOPOLOGY": "2x2x2", "IMAGE": "registry/image:1", "CLUSTER": "mine"}
    assert "GKE_CLAIM: needed" in launch("manifest", code=2)
    launch.settings["GKE_CLAIM"] = "claim"
    assert "SHARED_DIR: where GKE_CLAIM is to be mounted" in launch("manifest", code=2)
    launch.settings["GKE_CLAIM"] = "none"
    assert "volumes" not in launch("manifest")
    launch.settings |= {"SECRET_MANAGER": "HF_TOKEN:hf", "GKE_SECRET": "keys"}
    assert "SECRET_MANAGER: Kubernetes has no use for it" in launch("manifest", code=2)
    assert "GKE_SECRET: XPK has no option for it" in launch("xpk", code=2)
    launch.settings |= {"SECRET_MANAGER": "", "GKE_SECRET": ""}
    assert "the disks of pods go with them" in launch("xpk")


def test_the_example_has_every_setting(tmp_path):
    example = (ROOT / "launch" / "example.env").read_text()
    names = re.search(r"^SETTINGS=\((.*?)\)", (ROOT / "launch" / "settings.sh").read_text(), re.S | re.M)
    assert names
    for name in names.group(1).split():
        assert re.search(rf"^(# )?{name}=", example, re.M), name

"""What a run says of its machine and its code, and what tells two codes apart."""

import re
from types import SimpleNamespace

import jax
import pytest

from rlhf_jax import agreement, machine
from rlhf_jax.chips import CHIPS, GIB, Peak, chip_of, peak_of
from rlhf_jax.config import MeshConfig
from rlhf_jax.sharding import make_mesh


def test_the_lines_of_a_run_on_cpu_devices():
    device, code = machine.machine_lines(make_mesh(MeshConfig(data=2, fsdp=4)))
    assert device == "machine: 1 host, 1 process, 8 x cpu, mesh data=2 fsdp=4"
    assert re.fullmatch(
        rf"code: rlhf_jax [0-9a-f]{{8}}, jax {jax.__version__}, jaxlib \S+, (libtpu \S+, )?Python 3\.\S+",
        code,
    )
    alone = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert machine.machine_lines(alone)[0].endswith("1 process, 1 x cpu, mesh of one device")


def test_the_lines_of_a_run_on_tpus(monkeypatch):
    """Of a chip that JAX sees as two devices both are told; memory is what the device says, or is known."""
    device = SimpleNamespace(platform="tpu", device_kind="TPU7x", memory_stats=lambda: None)
    monkeypatch.setattr(machine.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(machine, "exchanged", lambda host: ["a", "b", "b"])
    monkeypatch.setattr(machine, "num_processes", lambda: 3)
    mesh = SimpleNamespace(size=16, shape={"data": 1, "fsdp": 16})
    told = "machine: 2 hosts, 3 processes, 16 x TPU7x (8 chips) of 94.7 GiB, mesh fsdp=16"
    assert machine.machine_lines(mesh)[0] == told  # type: ignore[arg-type]
    device.memory_stats = lambda: {"bytes_limit": 90 * GIB}
    assert "of 90.0 GiB" in machine.machine_lines(mesh)[0]  # type: ignore[arg-type]
    device.device_kind = "TPU v99"
    told = "16 x TPU v99 of 90.0 GiB, mesh fsdp=16; its peak is not known: no MFU, no MBU"
    assert machine.machine_lines(mesh)[0].endswith(told)  # type: ignore[arg-type]


def test_any_file_of_the_program_changes_its_version(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "ops" / "b.py").write_text("y = 2\n")
    before, version = machine.code_sums(tmp_path), machine.code_version(tmp_path)
    assert before.keys() == {"a.py", "ops/b.py"}
    (tmp_path / "a.pyc").write_text("is not read")
    assert machine.code_version(tmp_path) == version
    (tmp_path / "ops" / "b.py").write_text("y = 3\n")
    after = machine.code_sums(tmp_path)
    assert after["a.py"] == before["a.py"] and after["ops/b.py"] != before["ops/b.py"]
    assert machine.code_version(tmp_path) != version
    assert {"train.py", "ops/kl.py", "machine.py"} <= machine.code_sums().keys()


def test_reward_functions_are_compared_by_their_files():
    found = machine.module_sums(["tests.recorded_rewards", "sys", "never.imported", "json"])
    assert found.keys() <= {"tests.recorded_rewards", "json"} and "json" in found


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_peaks_of_devices(chip):
    for kind in chip.kinds:
        assert chip_of(kind) is chip
        peak = peak_of(kind)
        assert peak is not None
        assert (peak.flops * chip.devices, peak.bytes * chip.devices) == (chip.bf16_flops, chip.hbm_rate)


def test_a_chip_by_all_the_names_that_jax_has_for_it():
    names = {"v4": ("TPU v4",), "v5e": ("TPU v5e", "TPU v5 lite"), "v5p": ("TPU v5", "TPU v5p")}
    names |= {"v6e": ("TPU v6e", "TPU v6 lite"), "tpu7x": ("TPU7x",)}
    for name, kinds in names.items():
        assert [chip_of(kind) for kind in kinds] == [CHIPS[name]] * len(kinds)


def test_peaks_of_other_devices():
    assert peak_of("NVIDIA H100 80GB HBM3") == Peak(989e12, 3350e9)
    assert peak_of("cpu") is None


def test_versions_that_differ_are_to_be_installed_and_not_copied(monkeypatch):
    monkeypatch.setattr(agreement, "num_processes", lambda: 2)
    monkeypatch.setattr(agreement, "exchanged", lambda found: [found, found | {"jax": "0.1"}])
    told = r"the versions are not the same on process 0 and on 1: jax \(0.2, 0.1\); install jax"
    with pytest.raises(ValueError, match=f"{told}$"):
        agreement.check_alike("the versions", lambda: {"jax": "0.2", "numpy": "2"}, "install jax")

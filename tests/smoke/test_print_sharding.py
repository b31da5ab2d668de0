"""`--print_sharding`: where every parameter of every stage lies, before anything is trained."""

from __future__ import annotations

import re

from tests.smoke.test_quickstart import SHORT


def test_the_table_of_every_stage_is_printed_and_nothing_is_written(run_train, tmp_path):
    config = tmp_path / "short.yaml"
    config.write_text(SHORT.replace("num_kv_heads: 1", "num_kv_heads: 2").format(dir=tmp_path / "run"))
    flags = ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.axes.mlp", "none", "--print_sharding"]
    flags += ["--stages.ppo.model.frozen_memory", "host", "--stages.ppo.model.frozen_dtype", "bfloat16"]
    done = run_train(["--config", config, *flags], env={"JAX_NUM_CPU_DEVICES": "8"})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()

    sft, reward, ppo = re.split(r"\n\n(?=\[)", done.stdout)
    found = {tuple(re.split(r"\s{2,}", line)) for line in sft.splitlines()}
    size = ("policy", "trunk/embed/embedding", "400 x 32", "float32", "vocab, embed", "tensor, fsdp")
    assert (*size, "50.0 KiB", "12.5 KiB") in found
    up = ("policy", "trunk/layers/mlp/up", "1 x 32 x 48", "float32", "layers, embed, mlp", "-, fsdp, -")
    assert (*up, "6.0 KiB", "3.0 KiB") in found

    # Adam's two moments and a few counters, as the parameters lie.
    (policy,) = (line for line in sft.splitlines() if line.startswith("policy: "))
    sizes = [float(number) for number in re.findall(r"([\d.]+) KiB", policy)]
    assert len(sizes) == 4
    assert abs(sizes[2] - 2 * sizes[0]) < 0.2
    assert abs(sizes[3] - 2 * sizes[1]) < 0.2

    assert [line.split(":")[0] for line in ppo.splitlines()[-4:]] == [
        "policy",
        "value",
        "reference",
        "reward",
    ]
    assert [line.count("optimiser") for line in ppo.splitlines()[-4:]] == [1, 1, 0, 0]
    # Frozen models that wait in the host's memory take none of a device.
    trained, frozen = (
        {tuple(re.split(r"\s{2,}", line)[-2:]) for line in ppo.splitlines() if line.startswith(f"{role} ")}
        for role in ("policy", "reference")
    )
    assert {device for _, device in frozen} == {"host"} and "host" not in {device for _, device in trained}
    (reference,) = (line for line in ppo.splitlines() if line.startswith("reference: "))
    assert reference.endswith(" of each device on the host")
    assert "in the host's memory of each" in ppo.splitlines()[0]
    assert "host" not in sft.splitlines()[0]
    assert reward.startswith("[reward] ")
    for stage in (sft, reward, ppo):  # as at the start of every run
        assert stage.splitlines()[0] in done.stderr
        assert "on each device (data=2, fsdp=2, tensor=2)" in stage.splitlines()[0]

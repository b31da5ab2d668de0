"""What of the stages' plans does not fit the mesh of devices, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models.heads import Ensemble
from rlhf_jax.models.row_attention import flash_lack
from rlhf_jax.models.transformer import make_model
from rlhf_jax.origins import adapters_of
from rlhf_jax.plan import Plan, attempt
from rlhf_jax.role_parts import part_shardings, role_shardings
from rlhf_jax.sharding import check_batch, compute_capability, stage_meshes


def check_mesh(plans: Sequence[Plan], every_device: Mesh) -> None:
    """Raises ValueError with all rows of batches and all parameters that do not divide over the mesh."""
    problems: list[str] = []
    for plan in plans:
        model = make_model(
            plan.architecture,
            lora=adapters_of(plan.stage, plan.architecture),
            ensemble=Ensemble(getattr(plan.stage.settings, "num_heads", 1)),
        )
        rows: list[str] = []
        meshes = attempt(problems, stage_meshes, plan.stage, every_device)
        if meshes is None:
            continue
        mesh, sampling = meshes
        for name, size in plan.row_counts().items():
            attempt(rows, check_batch, mesh, size, f"{plan.stage.algorithm}.{name}")
        if sampling is not mesh:
            name = f"{plan.stage.algorithm}.batch_size, sampled on rollout.devices,"
            attempt(problems, check_batch, sampling, plan.stage.settings.batch_size, name)
            for role, parts in plan.parts().items():
                if role in ("policy", "base"):
                    attempt(problems, part_shardings, model, sampling, parts)
        model_section = plan.stage.model
        for architecture in filter(None, (plan.architecture, plan.teacher)):
            lack = flash_lack(
                mesh.devices.flat[0].platform,
                jnp.dtype(model_section.dtype),
                head_dim=architecture.head_dim,
                softcap=architecture.attention_softcap,
                is_packed=plan.stage.data.packing
                or getattr(plan.stage.settings, "sequences_per_row", 1) > 1
                or (plan.ptx is not None and bool(plan.ptx.packings)),
                capability=compute_capability(),
            )
            if model_section.attention == "flash" and lack:
                problems.append(f"model.attention is 'flash', but {lack}; set it to auto")
        if slots := plan.stage.rollout.slots:
            group_size = getattr(plan.stage.settings, "group_size", 1)
            name = "rollout.slots" + f" / {plan.stage.algorithm}.group_size" * (group_size > 1)
            attempt(problems, check_batch, sampling, -(-slots // group_size), name)
            attempt(
                problems, check_batch, mesh, slots, "rollout.slots"
            )  # evaluations are where it is trained
        problems += rows[:1]  # what does not divide the first does not divide its parts
        if (per := plan.held_out.rows_per_unit) != plan.train.rows_per_unit:
            held_out = f"{plan.stage.algorithm}.batch_size of data.eval, whose longest ranking has {per},"
            attempt(problems, check_batch, mesh, per * plan.stage.settings.batch_size, held_out)
        for parts in plan.parts().values():
            attempt(problems, part_shardings, model, mesh, parts)
        if plan.external is not None:
            other = make_model(plan.external.architecture, ensemble=plan.external.ensemble)
            attempt(problems, role_shardings, other, mesh, "reward")
        if plan.teacher is not None:
            attempt(problems, role_shardings, make_model(plan.teacher), mesh, "policy")
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))

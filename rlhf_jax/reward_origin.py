"""Whether a stage's reward model is one of its roles, like the policy, or has a program of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

from rlhf_jax.config import StageConfig, TokenizerConfig
from rlhf_jax.data.chat import chat_encoder
from rlhf_jax.data.tokenize import stop_id
from rlhf_jax.data.tokenizer import Tokenizer, open_tokenizer, settle_template
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import SINGLE, Ensemble
from rlhf_jax.models.scorers import is_own_scorer, read_scorer
from rlhf_jax.origins import is_stage_dir, stored_architecture
from rlhf_jax.rewards.external import RewardReader, leading_bos
from rlhf_jax.run_tokenizer import tokenizer_dir


class External(NamedTuple):
    """A reward model that a stage does not hold among its roles, for it is not like the policy."""

    path: Path
    architecture: Architecture
    reader: RewardReader
    ensemble: Ensemble = SINGLE
    """Its heads, where the score is not that of one head or their mean."""


def external_reward(
    stage: StageConfig,
    path: Path | None,
    architecture: Architecture,
    tokenizer: Tokenizer,
    earlier: Mapping[str, Architecture],
    *,
    has_conversations: bool,
    num_heads: int = 1,
) -> External | None:
    """Returns the reward model that is no role of the stage; None where there is none, or it is one.

    It is one where it reads the policy's tokens with the policy's architecture and has one head, or several
    of which the mean is asked for: the value model can then start from it.

    Args:
        stage: whose reward_from it is.
        path: of the reward model.
        architecture: of the policy.
        tokenizer: of the policy.
        earlier: architectures of the run's earlier stages.
        has_conversations: whether the stage's prompts are.
        num_heads: of the reward model.
    Raises:
        ValueError: there is no such reward model, no tokenizer with it, or no chat template where it needs
            one.
    """
    if path is None:
        return None
    stop = stop_id(tokenizer, has_conversations=has_conversations)
    pad_id, own, is_foreign = None, None, False
    if stage.reward_from in earlier:
        of_reward = earlier[stage.reward_from]
    else:
        of_reward = stored_architecture(path, "reward")
        if not is_stage_dir(path):
            pad_id = read_scorer(path).pad_id
            is_foreign = not is_own_scorer(hf.read_config(path))
        own = open_tokenizer(str(tokenizer_dir(path)), f"stages.{stage.name}.reward_from")
        own = settle_template(own, TokenizerConfig(template_date=stage.tokenizer.template_date))
        if has_conversations:
            chat_encoder(own)  # raises where there is no template
        if _reads_alike(own, tokenizer, is_foreign=is_foreign, has_conversations=has_conversations):
            own = None
        elif len(own) > of_reward.vocab_size:
            raise ValueError(
                f"the tokenizer of {path} has {len(own)} tokens, but its model's vocabulary has "
                f"{of_reward.vocab_size}; the tokenizer is not that of the model"
            )
    ensemble = SINGLE
    if stage.rewards.ensemble != "mean":
        ensemble = Ensemble(num_heads, stage.rewards.ensemble, stage.rewards.ensemble_stds)
    if own is None and of_reward == architecture and pad_id != stop and ensemble == SINGLE:
        return None
    bos_id = cast("int | None", (own or tokenizer).bos_token_id)
    reader = RewardReader(own, is_foreign, bos_id, pad_id, of_reward.context_length)
    return External(path, of_reward, reader, ensemble)


def _reads_alike(own: Tokenizer, tokenizer: Tokenizer, *, is_foreign: bool, has_conversations: bool) -> bool:
    """Returns whether a reward model's tokenizer gives texts the ids that the policy's rows have."""
    if own.get_vocab() != tokenizer.get_vocab() or own.bos_token_id != tokenizer.bos_token_id:
        return False
    if has_conversations:
        is_whole = not is_foreign or not chat_encoder(own).after_turn
        return own.chat_template == tokenizer.chat_template and is_whole
    begins_alike = not is_foreign or bool(leading_bos(own)) == (tokenizer.bos_token_id is not None)
    return own.eos_token_id == tokenizer.eos_token_id and begins_alike

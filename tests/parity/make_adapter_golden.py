"""Makes golden/adapters.npz: logits of tiny random models with PEFT's adapters, for test_adapter.py.

With torch, transformers and PEFT installed, from the root of the repository:

    python -m tests.parity.make_adapter_golden golden             # writes the file
    python -m tests.parity.make_adapter_golden reload DIRECTORY   # loads what test_adapter.py exported there

For the second, run the tests with RLHF_JAX_KEEP_EXPORTS=DIRECTORY before. Weights of models and adapters are
drawn by name, so that the tests draw the same; the golden file has the names and shapes that transformers and
PEFT write, PEFT's adapter_config.json, and the logits. Seen with torch 2.13.0, transformers 5.24.0 and
PEFT 0.21.2.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.make_family_golden import VARIANTS, read, tokens, write_random
from tests.random_llama import random_tensors

GOLDEN = Path(__file__).parent / "golden" / "adapters.npz"
_QWEN2 = VARIANTS["qwen2_windows"]  # of three layers
_SCORER = VARIANTS["llama"] | {"num_labels": 1, "pad_token_id": 0}
# A model, and the options of PEFT's LoraConfig.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (VARIANTS["llama"], {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "llama_rslora": (
        VARIANTS["llama"],
        {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ),
    "llama_scorer": (
        _SCORER,
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], "task_type": "SEQ_CLS"},
    ),
    "qwen2": (_QWEN2, {"r": 4, "lora_alpha": 4, "target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"}),
    "qwen2_patterns": (
        _QWEN2,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 5, r"layers\.1\.mlp\.down_proj": 3},
            "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 7},
            "layers_to_transform": [1, 2],
        },
    ),
    "gpt2": (VARIANTS["gpt2"], {"r": 3, "lora_alpha": 2, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "gpt2_all": (
        VARIANTS["gpt2"],
        {"r": 2, "lora_alpha": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True},
    ),
    "gpt_neox": (VARIANTS["gpt_neox"], {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "phi3": (VARIANTS["phi3"], {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"}),
}


def rows() -> np.ndarray:
    """Returns i32[1, 16], the same for all models."""
    return tokens()[:1, :16]


def draw(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Returns weights of an adapter, drawn by their names, and smaller than those of a model."""
    return {name: values / 2 for name, values in random_tensors(shapes).items()}


def _auto_class(task: str | None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM


def _logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(rows()).long()).logits.numpy()


def _adapted(base: Path, adapter: Path) -> np.ndarray:
    """Returns the logits that PEFT gives a model with an adapter, which must be one of that model alone."""
    from peft import PeftModel

    task = json.loads((adapter / "adapter_config.json").read_text())["task_type"]
    model = _auto_class(task).from_pretrained(base, dtype="float32", attn_implementation="eager")
    without = _logits(model)
    model = PeftModel.from_pretrained(model, adapter).eval()
    stored = random_names(adapter)
    loaded = {
        name.replace(".default", "").replace(".modules_to_save", "") for name, _ in model.named_parameters()
    }
    assert stored <= loaded, stored - loaded
    lora = {name for name in loaded if ".lora_" in name}
    assert lora == {name for name in stored if ".lora_" in name}, lora ^ stored
    logits = _logits(model)
    assert np.abs(logits - without).max() > 0.05  # the adapter matters
    return logits


def random_names(adapter: Path) -> set[str]:
    """Returns the names of an adapter's tensors."""
    from safetensors.numpy import load_file

    return set(load_file(adapter / "adapter_model.safetensors"))


def make() -> None:
    """Writes the golden file."""
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import load_file, save_file

    golden = {}
    for name, (variant, options) in ADAPTERS.items():
        task = options.get("task_type", "CAUSAL_LM")
        with tempfile.TemporaryDirectory() as made:
            base, adapter = Path(made) / "base", Path(made) / "adapter"
            shapes = write_random(base, _auto_class(task), variant)
            peft = get_peft_model(read(base, _auto_class(task)), LoraConfig(**{"task_type": task} | options))
            peft.save_pretrained(adapter)
            path = adapter / "adapter_model.safetensors"
            of_adapter = {tensor: list(values.shape) for tensor, values in load_file(path).items()}
            save_file(draw(of_adapter), path, metadata={"format": "pt"})
            config = json.loads((adapter / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = "base"  # not where it was made
            golden |= {
                f"{name}/shapes": json.dumps(shapes),
                f"{name}/adapter_shapes": json.dumps(of_adapter),
                f"{name}/adapter_config": json.dumps(config),
                f"{name}/logits": _adapted(base, adapter),
            }
        print(name, len(of_adapter), f"{golden[f'{name}/logits'].std():.3f}")
    np.savez_compressed(GOLDEN, **golden)


def reload(exports: Path) -> None:
    """Prints how far the logits of our exports are from ours: of the adapter on its base, and merged."""
    worst = {"adapter": (0.0, ""), "merged": (0.0, "")}
    found = sorted(path.parent for path in exports.glob("*/logits.npy"))
    for path in found:
        ours = np.load(path / "logits.npy")
        task = json.loads((path / "adapter" / "adapter_config.json").read_text())["task_type"]
        theirs = {
            "adapter": _adapted(path / "base", path / "adapter"),
            "merged": _logits(read(path / "merged", _auto_class(task))),
        }
        for kind, logits in theirs.items():
            worst[kind] = max(worst[kind], (float(np.abs(logits - ours).max()), path.name))
    print(f"{len(found)} exports; largest differences from ours: {worst}")


if __name__ == "__main__":
    make() if sys.argv[1] == "golden" else reload(Path(sys.argv[2]))

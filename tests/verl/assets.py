"""A tiny random model with its tokenizer, and a data file: what a run of verl needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path) -> Path:
    """Qwen3, two layers, a byte-level tokenizer of 262 tokens; random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "model"


def make_data(path: Path, rows: int = 16) -> Path:
    records = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a} + {a}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * a)},
            "extra_info": {"index": a},
        }
        for a in range(rows)
    ]
    import pandas

    pandas.DataFrame(records).to_parquet(path)
    return path


def make_reward(path: Path) -> Path:
    """The share of digits, which a random model varies in."""
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))\n"
    )
    return path


def make_hollow_model(folder: Path) -> Path:
    """What passes for a model folder where no model is loaded: a configuration and the quickstart's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(QUICKSTART / name, folder / name)
    return folder


def run_file(folder: Path) -> dict[str, Any]:
    """The content of a file for `agentloop train` over the assets in `folder`."""
    return {
        "platform": "cpu",
        "agentloop": {"run_dir": str(folder / "run"), "loop": {"max_turns": 2}},
        "verl": {
            "algorithm": {"adv_estimator": "grpo"},
            "data": {
                "train_files": str(folder / "data.parquet"),
                "val_files": str(folder / "data.parquet"),
                "train_batch_size": 4,
                "max_prompt_length": 64,
                "max_response_length": 32,
            },
            "actor_rollout_ref": {
                "model": {"path": str(folder / "model")},
                "actor": {"ppo_mini_batch_size": 4, "ppo_micro_batch_size_per_gpu": 4, "optim": {"lr": 1e-3}},
                "rollout": {"n": 4, "log_prob_micro_batch_size_per_gpu": 4},
            },
            "reward": {"custom_reward_function": {"path": str(folder / "reward.py")}},
            "trainer": {
                "total_training_steps": 2,
                "val_before_train": False,
                "test_freq": -1,
                "save_freq": -1,
                "resume_mode": "disable",
                "default_local_dir": str(folder / "checkpoints"),
            },
        },
    }


def run_file_with_tool(folder: Path, tool: str, chat_template: str) -> dict[str, Any]:
    """Makes all assets in `folder`, with `tool` (the source of a class `Planted`) as the only tool; the content as above."""
    make_data(folder / "data.parquet")
    make_reward(folder / "reward.py")
    (make_model(folder / "model") / "chat_template.jinja").write_text(chat_template)
    (folder / "planted.py").write_text(tool)
    (folder / "tools.yaml").write_text("tools:\n  - class_name: planted.Planted\n    config: {type: native}\n")
    content = run_file(folder)
    content["agentloop"]["tools"] = str(folder / "tools.yaml")
    content["verl"]["data"]["max_prompt_length"] = 768
    return content

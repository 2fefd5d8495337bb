"""Hugging Face checkpoint directories in, merged models out.

    python load_hf_weights.py --model runs/latent --out exported

Every command names a model by a directory: a checkpoint as the hub has it, or a run of this
program. A run stands for the checkpoint that it started from, with its adapters merged.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import asdict, dataclass, fields
from pathlib import Path
import shutil

import torch

from lib.cli import parse, settings
from lib.errors import UserError
from lib.files import file_hash, read_json, read_tensors, reading, write_json, write_tensors
from lib.run import output_directory
from lib.tokenizer import Tokenizer
import lora
from model import Config, Model, rotary_frequencies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPIED = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
vocab.json merges.txt chat_template.jinja generation_config.json"""


@settings
class Settings:
    model: str  # checkpoint directory or run to export
    out: str  # new directory in Hugging Face's layout


@dataclass(frozen=True)
class Reasoning:
    """How a model reasons. Kept in each run's config.json and in an exported one ("latent_sft")."""

    thinking: str = "text"  # "text": writes its chain; "latent"; "none": answers at once
    top_k: int = 10  # tokens in a superposition, 0 for all
    compression: int = 1  # chain tokens per latent, r


def read_config(directory):
    """The model shape in directory/config.json. Raises UserError for what is not supported."""
    path = Path(directory) / "config.json"
    c = {k: value for k, value in read_json(path).items() if value is not None}
    with reading(path):
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # new and old name
        supported = {
            "model_type": ("llama", "qwen2", "qwen3"),
            "rope_type": ("default", "llama3"),
            "hidden_act": ("silu",),
            "use_sliding_window": (False,),
            "dtype": tuple(DTYPES),
        }
        found = {"rope_type": rope.get("type", "default"), "dtype": c.get("torch_dtype", "float32")}
        found |= c | rope
        for key, values in supported.items():
            if found.get(key, values[0]) not in values:
                raise ValueError(f"{key} = {found[key]!r} is not supported; {values} are")
        llama3 = found["rope_type"] == "llama3"
        shape = {f.name: found[f.name] for f in fields(Config) if f.name in found}
        heads = shape["num_attention_heads"]
        defaults = {"num_key_value_heads": heads, "head_dim": found["hidden_size"] // heads}
        config = Config(**defaults | shape | {"rope_scaling": rope if llama3 else {}})
        for f in fields(config):
            if f.type in (int, float) and not getattr(config, f.name) > 0:
                raise ValueError(f"{f.name} = {getattr(config, f.name)!r}")
        rotary_frequencies(config)  # needs all of its fields
    return config


def hf_name(name):
    """The hub's name of a parameter of Model."""
    return name if name.startswith("lm_head") else f"model.{name}"


def weight_files(directory):
    """The safetensors files of a checkpoint. Raises UserError if there are none."""
    if files := sorted(Path(directory).glob("model*.safetensors")):
        return files
    raise UserError(f"{directory}: holds no model*.safetensors")


def load_checkpoint(directory, device="cpu", dtype=torch.float32):
    """The model in a hub directory, frozen. UserError names a tensor that does not fit."""
    config = read_config(directory)
    weights = {}
    with torch.device("meta"):
        model = Model(config)
    expected = {hf_name(n): (n, p.shape) for n, p in model.named_parameters()}
    for path in weight_files(directory):
        for name, t in read_tensors(path, device)[0].items():
            n, shape = expected.pop(name, (None, None))
            if not n and name.endswith(("lm_head.weight", "rotary_emb.inv_freq")):
                continue  # a second copy, or derived
            if t.shape != shape or t.dtype not in DTYPES.values() or not t.isfinite().all():
                needed = f"finite numbers, {shape}" if shape else "a tensor of this model, once"
                raise UserError(f"{path}: {name} is {t.dtype} {t.shape}; needed: {needed}")
            weights[n] = t.to(dtype)
    if expected:
        raise UserError(f"{directory}: {min(expected)} is missing")
    model.load_state_dict(weights, assign=True)
    model.rope_frequencies = rotary_frequencies(config).to(device)
    return model.requires_grad_(False)


def resolve(path):
    """(checkpoint directory, adapter files to merge in order, Reasoning) of a checkpoint or run.

    A run's config.json names the model that it started from ("start") and its adapter ("adapter");
    a run that trained all weights has a checkpoint directory model/ instead.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    with reading(path / "config.json"):
        if "model_type" in config:
            return path, [], Reasoning(**config.get("latent_sft", {}))
        if "start" not in config:
            raise UserError(f"{path}: is neither a checkpoint nor a run that trains a model")
        if not (path / "finished.json").exists():
            raise UserError(f"{path}: this run is not finished; start its command again to go on")
        if (path / "model").exists():
            return resolve(path / "model")
        base, adapters, _ = resolve(config["start"])
        return base, [*adapters, path / config["adapter"]], Reasoning(**config["reasoning"])


def load_model(path, device="cpu", dtype=torch.float32):
    """The merged model of a checkpoint or run, its tokenizer, and how it reasons."""
    base, adapters, reasoning = resolve(path)
    model = load_checkpoint(base, device, dtype)
    for file in adapters:
        lora.load_adapter(file, model, "merged")
        lora.merge(model, "merged")
    tokenizer = Tokenizer(base)
    if tokenizer.vocab_size > len(model.head):
        raise UserError(f"{base}: the tokenizer has more ids than the model")
    return model, tokenizer, reasoning


def fingerprint(path, *more):
    """A hash of all that makes up a model: weights, adapters, and the files `more`.

    Of each file the last 256 MiB: any training changes them. All of 7B would take half a minute.
    """
    base, adapters, _ = resolve(path)
    return file_hash(*weight_files(base), *adapters, *more, last=2**28)


def save_checkpoint(model, source, out, reasoning):
    """Writes `model` into the hub directory `out`, in the dtype of the checkpoint `source`.

    Both are Paths. Config and tokenizer come from `source`. config.json comes last: without it
    `out` is no model.
    """
    config = read_json(source / "config.json")
    dtype = DTYPES[config.get("dtype") or config.get("torch_dtype") or "float32"]
    weights = {hf_name(n): p.to(dtype) for n, p in model.named_parameters()}
    write_tensors(out / "model.safetensors", weights)
    for name in COPIED.split():
        if (source / name).exists():
            shutil.copy(source / name, out)
        else:  # it may be of another model, whose export was stopped
            (out / name).unlink(missing_ok=True)
    write_json(out / "config.json", config | {"latent_sft": asdict(reasoning)})


def main():
    s = parse(Settings, __doc__)
    base, adapters, reasoning = resolve(s.model)
    with output_directory(s.out) as out:
        if (out / "config.json").exists():
            raise UserError(f"{out}: holds a model already; choose another --out")
        save_checkpoint(load_model(s.model)[0], base, out, reasoning)
    print(f"{out}: {base} with {len(adapters)} adapters merged, reasoning: {reasoning.thinking}")


if __name__ == "__main__":
    main()

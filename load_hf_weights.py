"""Hugging Face checkpoint directories in, merged models out.

    python load_hf_weights.py --model runs/phase2 --out exported

A *model* is named in every command by a directory: a checkpoint as the hub has it, or a run of this program, which
stands for the checkpoint it started from with its adapters merged.
"""

from dataclasses import fields
import json
import os
from pathlib import Path
import shutil

from safetensors import SafetensorError
import torch

import lora
from model import Config, Model, rotary_frequencies
from runs import UserError, file_hash, finished_run, is_free, parser, read_json, read_tensors, run_main, save_file, write_json
from tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
DTYPES = ("float32", "bfloat16", "float16")
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "chat_template.jinja", "generation_config.json")
# How a model reasons, kept under "latent_sft" in an exported config.json: "text" writes its chain (a plain checkpoint
# does), "none" goes straight to the answer, "latent" thinks in superpositions.
PLAIN = {"thinking": "text", "top_k": 10, "compression": 1}


def read_config(directory: str | Path) -> Config:
    """The model shape in `directory/config.json`, with old (rope_theta, rope_scaling) or new (rope_parameters) fields."""
    path = Path(directory) / "config.json"
    c = read_json(path)
    kind = c.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: the architecture {kind!r} is not supported; llama, qwen2 and qwen3 are")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters = {rope!r} is not supported")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{path}: the rope scaling {rope_type!r} is not supported; plain and llama3 are")
    unsupported = {"hidden_act": ("silu",), "use_sliding_window": (False,), "mlp_bias": (False,),
                   "attention_bias": (False, True) if kind == "qwen2" else (False,),
                   "torch_dtype": (None, *DTYPES), "dtype": (None, *DTYPES)}
    for key, allowed in unsupported.items():
        if c.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} = {c[key]!r} is not supported")
    try:
        config = Config(
            model_type=kind, vocab_size=c["vocab_size"], hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"], num_hidden_layers=c["num_hidden_layers"],
            num_attention_heads=c["num_attention_heads"],
            num_key_value_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], rms_norm_eps=c["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
            rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"} if rope_type == "llama3" else {},
            tie_word_embeddings=c.get("tie_word_embeddings", False))
        for f in fields(config):
            value = getattr(config, f.name)
            if f.type in (int, float) and not (isinstance(value, (int, f.type)) and value > 0):
                raise TypeError(f"{f.name} is {value!r}")
        rotary_frequencies(config)  # needs all of its fields
        return config
    except KeyError as e:
        raise UserError(f"{path}: {e} is missing; is this a whole checkpoint?") from None
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{path}: a value is of the wrong kind ({e})") from None


def hf_name(name: str) -> str:
    """The hub's name of one of Model's parameters."""
    return name if name.startswith("lm_head") else f"model.{name}"


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or model.safetensors."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    try:
        names = {str(n) for n in read_json(index)["weight_map"].values()} if index.exists() else {"model.safetensors"}
    except (KeyError, AttributeError):
        raise UserError(f"{index}: has no weight_map from tensors to files; fetch it again") from None
    files = [directory / n for n in sorted(names)]
    for f in files:
        if not f.is_file():
            raise UserError(f"{f}: no such file; the checkpoint is not complete (only safetensors are read)")
    return files


def load_checkpoint(directory: str | Path, device="cpu", dtype=torch.float32) -> Model:
    """The model in a hub directory. Raises UserError that names a missing, extra or misshapen tensor."""
    config = read_config(directory)
    with torch.device("meta"):
        model = Model(config)
    expected = {hf_name(n): p for n, p in model.named_parameters()}
    found = {}
    for path in weight_files(directory):
        for name, tensor in read_tensors(path, device)[0].items():
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                continue  # derived, or a second copy
            if name not in expected:
                raise UserError(f"{path}: the tensor {name} is extra; {config.model_type} has no such weight")
            if tensor.shape != expected[name].shape:
                shapes = f"{list(tensor.shape)} instead of {list(expected[name].shape)}"
                raise UserError(f"{path}: the tensor {name} is misshapen, {shapes}")
            found[name] = tensor.to(dtype)
    for name in expected:
        if name not in found:
            raise UserError(f"{directory}: the tensor {name} is missing from the checkpoint")
    model.load_state_dict({n: found[hf_name(n)] for n, _ in model.named_parameters()}, assign=True)
    model.rope_frequencies = rotary_frequencies(config).to(device)
    return model.requires_grad_(False)


def base_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a frozen base is kept: bf16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def resolve(path: str | Path) -> tuple[Path, list[Path], dict]:
    """(checkpoint directory, adapter files to merge in order, how it reasons) of a checkpoint or a run."""
    path = Path(path)
    config = read_json(path / "config.json")
    if "model_type" in config:
        return path, [], PLAIN | config.get("latent_sft", {})
    command = config.get("command")
    if command not in ("train_sft", "train_phase1", "train_phase2"):
        raise UserError(f"{path}: neither a checkpoint nor a run of this program (config.json has no model_type)")
    whole = command == "train_sft" or config.get("all_weights")
    saved = path / ("model" if whole else "decoder.safetensors" if command == "train_phase1" else "student.safetensors")
    if not saved.exists():
        raise UserError(f"{path}: this run has saved no weights yet; let it finish first")
    if whole:
        return resolve(saved)
    base, adapters, _ = resolve(config["model"] if command == "train_phase1" else config["phase1"])
    return base, adapters + [saved], {"thinking": "latent", "top_k": config["top_k"], "compression": config["compression"]}


def starting_point(path: str | Path) -> str:
    """The absolute path of a model to train from, so that later commands find it from anywhere: a checkpoint, or a run that is finished."""
    resolve(path)  # says so if it is neither
    config = read_json(Path(path) / "config.json")
    if "model_type" not in config:
        finished_run(path, config["command"])
    return str(Path(path).resolve())


def load_model(path: str | Path, device="cpu", dtype=torch.float32) -> tuple[Model, Tokenizer, dict]:
    """The merged model of a checkpoint or run, its tokenizer, and how it reasons (as PLAIN)."""
    base, adapters, reasons = resolve(path)
    model = load_checkpoint(base, device, dtype)
    for file in adapters:
        lora.load_adapter(file, model, "merged")
        lora.merge(model, "merged")
        lora.remove_adapter(model, "merged")
    tokenizer = Tokenizer(base, model.config.model_type)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{base}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}")
    return model, tokenizer, reasons


def fingerprint(path: str | Path, *more: str | Path) -> str:
    """Hash of everything that makes up a model: the checkpoint's weights, its adapters, and the files `more`."""
    base, adapters, _ = resolve(path)
    return file_hash(*weight_files(base), *adapters, *more)


def save_checkpoint(model: Model, source: str | Path, out: str | Path, reasons: dict, dtype=None) -> None:
    """Writes `model` as the hub directory `out`, in place of what is there, with config and tokenizer files from the checkpoint `source`.

    `out` is whole or, for a moment before it is replaced, not there. dtype None keeps the dtype of `source`.
    """
    out, source = Path(out), Path(source)
    config = read_json(source / "config.json")
    dtype = dtype or getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    for key in {"dtype", "torch_dtype"} & config.keys():
        config[key] = str(dtype).removeprefix("torch.")
    config["latent_sft"] = reasons
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        if ".adapters." in name:
            continue
        if size and size + p.numel() * dtype.itemsize > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][hf_name(name)] = p
        size += p.numel() * dtype.itemsize
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{which}.tmp") for which in ("new", "old"))
    try:
        temporary.mkdir(parents=True)
        for name, shard in zip(names, shards):
            save_file({k: p.detach().to(dtype).contiguous() for k, p in shard.items()}, temporary / name, {"format": "pt"})
        if len(shards) > 1:
            write_json(temporary / "model.safetensors.index.json",
                       {"metadata": {}, "weight_map": {k: n for n, shard in zip(names, shards) for k in shard}})
        for name in COPIED:
            if (source / name).exists():
                shutil.copy(source / name, temporary / name)
        (temporary / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
        if out.exists():
            out.rename(old)  # at once, which removing is not
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{out}: cannot be written ({e})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    p = parser(__doc__, seed=False, device=False)
    p.add_argument("--model", required=True, help="checkpoint directory or run to export, adapters merged")
    p.add_argument("--out", required=True, help="new directory, in Hugging Face's layout")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is written; default: as it was")
    args = p.parse_args()
    base, adapters, reasons = resolve(args.model)
    if not is_free(Path(args.out)):
        raise UserError(f"{args.out}: is there already and not empty; choose another --out")
    print(f"merging {len(adapters)} adapter(s) into {base}")
    model, _, _ = load_model(args.model)
    save_checkpoint(model, base, args.out, reasons, getattr(torch, args.dtype) if args.dtype else None)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, reasoning: {reasons['thinking']}")


if __name__ == "__main__":
    run_main(main)

"""The model and its weights against transformers; what a broken checkpoint says."""

from functools import partial
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from itertools import repeat

from attention import KVCache, PackedAttention
from experiments import demo
from conftest import VOCAB, hf_model
import load_hf_weights
from load_hf_weights import Reasoning, load_checkpoint, load_model, save_checkpoint
import masks
from lib import files
from lib.errors import UserError
import lora

KINDS = [(kind, tied) for kind in ("llama", "qwen2", "qwen3") for tied in (True, False)]


def labels_of(lengths) -> masks.Labels:
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    zero = torch.zeros_like(document)
    return masks.Labels(document, zero, zero, starts, max(lengths))


def hidden_states(model, ids, lengths, adapter=None):
    positions = torch.cat([torch.arange(n) for n in lengths])
    attend = repeat(PackedAttention(labels_of(lengths)))
    project = partial(lora.project, adapter=adapter)
    return model(model.embed_tokens(ids), positions, attend, project)


def logits_of(model, ids, lengths):
    return hidden_states(model, ids, lengths) @ model.head.T


@pytest.mark.parametrize("kind,tied", KINDS)
def test_logits(checkpoint, kind, tied):
    """Packed documents of unequal length, the longest beyond llama3 scaling's original context."""
    model, lengths = load_checkpoint(checkpoint(kind, tied)), [5, 1, 200]
    ids = torch.randint(VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    hf = AutoModelForCausalLM.from_pretrained(checkpoint(kind, tied))
    with torch.no_grad():
        expected = torch.cat([hf(x[None]).logits[0] for x in ids.split(lengths)])
        torch.testing.assert_close(logits_of(model, ids, lengths), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind,tied", KINDS)
@torch.no_grad()
def test_incremental_decoding(checkpoint, kind, tied):
    """Two sequences, of which one pauses, read token by token from a cache with a spare row."""
    model = load_checkpoint(checkpoint(kind, tied))
    hf = AutoModelForCausalLM.from_pretrained(checkpoint(kind, tied))
    sequences = [
        torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14)
    ]
    cache = KVCache(model.config, 3, 128, "cpu", torch.float32)
    read = [3, 6]
    prompt, positions = (
        torch.cat([s[:n] for s, n in zip(sequences, read)]),
        torch.cat([torch.arange(n) for n in read]),
    )
    h = model(
        model.embed_tokens(prompt),
        positions,
        cache.prefill(torch.tensor([2, 0]), labels_of(read), positions),
    )
    got = [list(x @ model.head.T) for x in h.split(read)]
    for step in range(12):
        active = torch.tensor([read[1] < 14, False, read[0] < 9 and step != 2])
        token = torch.tensor([sequences[1][min(read[1], 13)], 0, sequences[0][min(read[0], 8)]])
        h = model(model.embed_tokens(token), cache.lengths.clone(), cache.decode(active))
        for i, row in ((0, 2), (1, 0)):
            if active[row]:
                got[i].append(h[row] @ model.head.T)
                read[i] += 1
    for logits, s in zip(got, sequences):
        assert len(logits) == len(s)
        torch.testing.assert_close(torch.stack(logits), hf(s[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind,tied", KINDS)
@torch.no_grad()
def test_round_trip_through_export(checkpoint, tmp_path, kind, tied):
    source = checkpoint(kind, tied)
    model = load_checkpoint(source)
    save_checkpoint(model, source, tmp_path / "out", load_hf_weights.Reasoning("text", 3, 2))
    assert (
        len(
            {
                file.stat().st_mode
                for file in (tmp_path / "out").iterdir()
                if file.name in ("config.json", "model.safetensors")
            }
        )
        == 1
    )
    ids = torch.arange(30)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.config.tie_word_embeddings == tied
    torch.testing.assert_close(
        logits_of(model, ids, [30]), hf(ids[None]).logits[0], atol=1e-5, rtol=0
    )
    again, tokenizer, reasons = load_model(tmp_path / "out")
    assert torch.equal(logits_of(again, ids, [30]), logits_of(model, ids, [30]))
    assert (
        reasons.top_k == 3
        and (tmp_path / "out" / "tokenizer.json").read_bytes()
        == (source / "tokenizer.json").read_bytes()
    )


def test_old_and_new_rope_fields(checkpoint, tmp_path):
    """rope_theta with rope_scaling (and "type") reads the same as rope_parameters; transformers agrees."""
    new = json.loads((checkpoint() / "config.json").read_text())
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    scaling = dict(new["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling["rope_type"]
    old["rope_scaling"] = scaling
    (tmp_path / "config.json").write_text(json.dumps(old))
    frequencies = [
        load_hf_weights.rotary_frequencies(load_hf_weights.read_config(d))
        for d in (checkpoint(), tmp_path)
    ]
    assert torch.equal(*frequencies)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["factor"] == 8.0


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    shutil.copytree(checkpoint("qwen2", False), tmp_path / "broken")
    return tmp_path / "broken"


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    "change,words",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            ["model.layers.1.mlp.up_proj.weight", "missing"],
        ),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(1)}),
            ["model.layers.7.mlp.up_proj.weight", "needed: a tensor of this model"],
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            ["model.norm.weight", "[31]", "[32]"],
        ),
    ],
)
def test_wrong_tensors_are_named(broken, change, words):
    change_tensors(broken, change)
    with pytest.raises(UserError) as e:
        load_checkpoint(broken)
    assert all(word in str(e.value) for word in words)


def test_truncated_file(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        load_checkpoint(broken)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model_type": "mamba"}, "model_type = 'mamba' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_unsupported_configs_are_refused(broken, change, words):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        load_checkpoint(broken)


def test_what_a_missing_shard_holds_is_named(broken):
    """Shards are read without their index. What none of them holds is named."""
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model"):
        load_checkpoint(broken)
    names = sorted(tensors)
    parts = {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}
    save_file(parts[0], broken / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="is missing"):
        load_checkpoint(broken)
    save_file(parts[1], broken / "model-00002-of-00002.safetensors")
    found = load_checkpoint(broken).state_dict()
    for name in tensors:
        ours = found[name.removeprefix("model.")]
        assert torch.equal(ours, tensors[name].float())


def test_initialize_is_seeded_and_leaves_nothing_as_it_was():
    config = load_hf_weights.Config(VOCAB, 32, 48, 1, 4, 2, 8)
    stale = load_hf_weights.Model(config)
    for p in stale.parameters():
        p.data.fill_(torch.nan)
    demo.initialize(stale, torch.Generator().manual_seed(1), 0.02)
    assert all(p.isfinite().all() for p in stale.parameters()) and (stale.norm.weight == 1).all()
    a, b, c = (
        demo.initialize(load_hf_weights.Model(config), torch.Generator().manual_seed(s), 0.02)
        for s in (1, 1, 2)
    )
    assert torch.equal(a.embed_tokens.weight, b.embed_tokens.weight) and not torch.equal(
        a.embed_tokens.weight, c.embed_tokens.weight
    )
    assert hf_model("llama", True).config.num_hidden_layers == 2


@torch.no_grad()
def test_sharded_checkpoints_load(checkpoint, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2", False))
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.arange(30)
    torch.testing.assert_close(
        logits_of(load_checkpoint(tmp_path), ids, [30]), hf(ids[None]).logits[0], atol=1e-5, rtol=0
    )


def test_weights_that_are_no_numbers_are_refused(broken):
    """NaN, infinity, and dtypes that no model has. The tensor and the file are named."""
    name = "model.layers.0.mlp.up_proj.weight"
    shape = load_file(broken / "model.safetensors")[name].shape
    for value in (
        torch.full(shape, torch.nan),
        torch.full(shape, -torch.inf),
        torch.ones(shape, dtype=torch.int8),
        torch.ones(shape, dtype=torch.complex64),
        torch.ones(shape).to(torch.float8_e4m3fn),
    ):
        change_tensors(broken, lambda t: t.update({name: value}))
        with pytest.raises(
            UserError, match=f"model.safetensors: {name} is {value.dtype} .*needed: finite numbers"
        ):
            load_checkpoint(broken)


def test_export_keeps_the_dtype(checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint(), source)
    config = files.read_json(source / "config.json")
    files.write_json(source / "config.json", config | {"dtype": "bfloat16"})
    save_checkpoint(load_checkpoint(source), source, tmp_path / "out", Reasoning())
    assert {
        t.dtype for t in files.read_tensors(tmp_path / "out" / "model.safetensors")[0].values()
    } == {torch.bfloat16}

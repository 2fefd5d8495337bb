"""How the field trains Latent-SFT today: Transformers + PEFT, padded batches, dense masks.

For the benches. Examples, layouts, masks, positions, LoRA targets and losses are the product's;
only the machinery differs. Logits are taken at every position.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from data import pack_examples
from masks import LATENT, RULES, dense

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(
    directory, weights: dict[str, torch.Tensor], adapters: tuple[str, ...], rank: int, dtype, device
):
    """A PEFT model of the shape in directory/config.json, with one LoRA adapter per name."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    missing, extra = model.load_state_dict(weights, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}, (missing, extra)
    for i, name in enumerate(adapters):
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.1,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        if i == 0:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    return model.train()


def padded(layout: str, examples, r: int, device) -> dict[str, torch.Tensor]:
    """A right-padded batch: ids, positions, is_latent, labels [B, T], mask [B, 1, T, T]."""
    rows = [pack_examples(layout, [e], r) for e in examples]
    B, T = len(rows), max(len(row.ids) for row in rows)
    batch = {
        "ids": torch.zeros(B, T, dtype=torch.long),
        "positions": torch.zeros(B, T, dtype=torch.long),
        "is_latent": torch.zeros(B, T, dtype=torch.bool),
        "labels": torch.full((B, T), -100),
    }
    allowed = torch.eye(T, dtype=torch.bool).repeat(
        B, 1, 1
    )  # padding looks at itself, so that no row is empty
    for i, row in enumerate(rows):
        n = len(row.ids)
        batch["ids"][i, :n], batch["positions"][i, :n] = row.ids, row.position_ids
        batch["is_latent"][i, :n] = row.labels.kind == LATENT
        batch["labels"][i, row.target_index] = row.targets
        allowed[i, :n, :n] = dense(RULES[layout], row.labels)
    batch["mask"] = torch.zeros(B, 1, T, T).masked_fill(
        ~allowed[:, None], torch.finfo(torch.float32).min
    )
    return {k: v.to(device) for k, v in batch.items()}


def backbone(model):
    return model.base_model.model


def hidden_states(model, batch, embeds):
    mask = batch["mask"].to(embeds.dtype)
    return (
        backbone(model)
        .model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch["positions"],
            use_cache=False,
        )
        .last_hidden_state
    )


def phase1_loss(model, latent_query, batch, decoder_batch, k: int) -> torch.Tensor:
    """Joint phase 1 on padded batches of both layouts."""
    E = backbone(model).get_input_embeddings().weight
    model.set_adapter("encoder")
    embeds = torch.where(batch["is_latent"][..., None], latent_query.to(E.dtype), E[batch["ids"]])
    top, ids = (hidden_states(model, batch, embeds) @ E.T).float().topk(k, dim=-1)
    alpha = top.softmax(-1)[batch["is_latent"]]
    z = torch.einsum("nk,nkd->nd", alpha.to(E.dtype), E[ids[batch["is_latent"]]])
    model.set_adapter("decoder")
    batch = decoder_batch
    embeds = E[batch["ids"]].masked_scatter(batch["is_latent"][..., None], z)
    logits = backbone(model).lm_head(hidden_states(model, batch, embeds)).float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def phase2_loss(model, batch, examples) -> torch.Tensor:
    """Phase 2 on a padded batch: CE on the answer, KL at the position before each latent."""
    E = backbone(model).get_input_embeddings().weight
    device = E.device
    probs, ids = (torch.cat(x) for x in zip(*(e.alpha for e in examples)))
    probs, ids = probs.float().to(device), ids.long().to(device)
    z = torch.einsum("nk,nkd->nd", probs.to(E.dtype), E[ids])
    embeds = E[batch["ids"]].masked_scatter(batch["is_latent"][..., None], z)
    logits = backbone(model).lm_head(hidden_states(model, batch, embeds)).float()
    ce = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    log_q = logits.log_softmax(-1)[:, :-1][batch["is_latent"][:, 1:]].gather(-1, ids)
    kl = (torch.xlogy(probs, probs) - probs * log_q).sum(-1)
    sizes = torch.tensor([len(e.alpha[0]) for e in examples], device=device)
    weights = (1 / sizes).repeat_interleave(sizes)
    return ce + (weights * kl).sum() / len(examples)

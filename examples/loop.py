"""Ranks that change in your own loop: three calls. A tiny random BERT; seconds, no download."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import adaptive_lora as al

STEPS = 120
torch.manual_seed(0)
tokens = torch.randint(0, 32, (512, 8))
labels = (tokens[:, 1] >= 16).long()  # learnable: which half the second token is of

sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
base = BertForSequenceClassification(BertConfig(vocab_size=32, num_hidden_layers=2, **sizes))
method = al.methods.adalora(rank=4, every=10)  # from 1.5 x the parameters of rank 4 to those
model = al.attach(base, method, targets="all-linear")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
controller = al.RankController(model, optimizer, method, total_steps=STEPS)
before, losses = al.ranks(model), []
print(f"before: {al.lora_parameters(model):,} LoRA parameters")

for _ in range(STEPS):
    rows = torch.randint(0, len(tokens), (32,))
    loss = model(input_ids=tokens[rows], labels=labels[rows]).loss
    loss.backward()
    controller.observe()  # 1: the gradients are there
    optimizer.step()
    optimizer.zero_grad()
    controller.step()  # 2: ranks may change
    losses.append(loss.item())
controller.finish()  # 3: an error if nothing was ever decided

after = al.ranks(model)
for name, rank in after.items():
    print(f"{name:45} rank {before[name]} -> {rank}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print(f"after: {al.lora_parameters(model):,} LoRA parameters")

"""HaNoRec and BR-MRS from scratch in PyTorch.

To understand HaNoRec, read these files after docs/walkthrough.md, in this order:

    losses         SFT-1, DPO-1, DPO-2, HN-11, HN-12
    topk           HN-3, the Top-K similarity kernel
    hars           HN-1, HN-2, HN-4 .. HN-8: lambda, eta and beta'
    lora/layer     HN-9, HN-10: LoRA and its noise
    ../train_dpo   the loop

scoring (EV-1), metrics (EV-2 .. EV-4), readings (what else the document may mean) and topk_groups
(HN-3 on a GPU) stand beside them. The other folders: base (settings, files, processes), datasets,
lora (adapter files), mllm (the three model families), ranking and brmrs (BR-1 .. BR-6), run (what
stands around the loops), studies. docs/architecture.md has the plan.
"""

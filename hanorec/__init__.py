"""HaNoRec from scratch in PyTorch. Read the files in the order in which data flows:

    catalog, interactions   items, histories, frozen candidate sets            prompts, backbone   tokens, and the three MLLMs
    topk, hars              HN-1 .. HN-8: which pairs are hard, beta'           lora                HN-9, HN-10: adapters and their noise
    losses, scoring         SFT-1, DPO-1, DPO-2, HN-11, HN-12, EV-1            metrics             EV-2 .. EV-4
    tasks, items, training  what the loops of ../train_sft.py, ../train_dpo.py and ../evaluate.py call
"""

"""HaNoRec from scratch in PyTorch. Read the files in the order in which data flows:

    catalog, interactions, candidates   items, histories, and the ten items to choose from
    backbone, prompts, items            the three MLLMs, tokens, and what the MLLM knows of an item
    topk, hars                          HN-1 .. HN-8: which pairs are hard, and their beta'
    lora                                HN-9, HN-10: adapters and their noise
    losses, scoring, metrics            SFT-1, DPO-1, DPO-2, HN-11, HN-12; EV-1; EV-2 .. EV-4
    tasks, training                     what the loops of ../train_sft.py, ../train_dpo.py and ../evaluate.py call
"""

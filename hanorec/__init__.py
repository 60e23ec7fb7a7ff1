"""HaNoRec and BR-MRS from scratch in PyTorch. Read the files in the order in which data flows:

    catalog, interactions, candidates   items, histories, and the ten items to choose from
    backbone, prompts, items, features  the three MLLMs, tokens, and what the MLLM knows of an item
    topk, hars                          HN-1 .. HN-8: which pairs are hard, and their beta'
    lora                                HN-9, HN-10: adapters and their noise
    losses, scoring, metrics            SFT-1, DPO-1, DPO-2, HN-11, HN-12; EV-1; EV-2 .. EV-4
    tasks, checkpoint, training,        what the loops of ../train_sft.py and ../train_dpo.py call
    reference
    brmrs, brmrs_graph, brmrs_model,    BR-1 .. BR-6 and the loop of ../train_brmrs.py
    ranking_data, ranking
    rerank                              both together, in ../evaluate.py
"""

"""The systems that HaNoRec is compared with, a file an idea.

Scores that are inner products: `matrix` (BPR-MF, LightGCN), `sequential` (SASRec, and the losses of
sequences) with its `attention`, `encoders` (GRU4Rec, Caser, BERT4Rec), `cl4srec`. `config` has
their settings, `matrix_training` and `sequence_training` a loop each, `vector_run` what stands
around both, `vectors` what is asked of a trained one.

Language models: `llara`, with `config_llara`, `llara_files`, `llara_training`; `sprec`, with
`picking`, its scoring pass; `msrbench`; `mllm_msr`, with its two forms `msr_texts`, `msr_words`.

All rows of the comparison: `rows`. Its command: `python -m hanorec.baselines`.
"""

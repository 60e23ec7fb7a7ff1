"""The systems that HaNoRec is compared with.

Equations: `matrix.py` BPR-MF and LightGCN, `sequential.py` SASRec and the losses of sequences,
`attention.py` its blocks, `encoders.py` GRU4Rec, Caser and BERT4Rec, `cl4srec.py` CL4SRec. Their
scores are inner products. `config.py` has their settings, `matrix_training.py` and
`sequence_training.py` a loop each, `vector_run.py` what stands around these, `vectors.py` what is
asked of a trained one.
"""

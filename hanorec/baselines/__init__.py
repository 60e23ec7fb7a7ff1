"""The systems that HaNoRec is compared with.

Equations: `attention.py` the blocks of SASRec, `sequential.py` SASRec and the losses of sequences,
`encoders.py` GRU4Rec, Caser and BERT4Rec, `cl4srec.py` CL4SRec.
"""

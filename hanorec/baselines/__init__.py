"""The systems that HaNoRec is compared with.

Scores that are inner products: `matrix` (BPR-MF, LightGCN), `config` (every setting),
`matrix_training` and `sequence_training` (a loop each), `vector_run` (what stands around them),
`vectors` (states of held-out examples, and their scores).
"""

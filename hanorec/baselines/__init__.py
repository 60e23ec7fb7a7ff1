"""The systems that HaNoRec is compared with.

Equations of those whose scores are inner products: `hanorec.baselines.matrix`, and of those that
read a user's items in their order: `hanorec.baselines.attention`, `hanorec.baselines.sequential`,
`hanorec.baselines.encoders`, `hanorec.baselines.cl4srec`. Of both kinds: their settings,
`hanorec.baselines.config`; a loop each, `hanorec.baselines.matrix_training` and
`hanorec.baselines.sequence_training`; what stands around it, `hanorec.baselines.vector_run`; what a
trained one is asked for, `hanorec.baselines.vectors`.
"""

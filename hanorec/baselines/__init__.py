"""The systems that HaNoRec is compared with.

Equations of those that read a user's items in their order: `hanorec.baselines.attention`,
`hanorec.baselines.sequential`, `hanorec.baselines.encoders`, `hanorec.baselines.cl4srec`.
"""

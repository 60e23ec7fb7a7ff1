"""The systems that HaNoRec is compared with.

SPRec: sprec.py, and picking.py, its scoring pass. MLLM-MSR: mllm_msr.py, and the two forms of its
summaries, msr_texts.py (generated) and msr_words.py (extractive).
"""

"""The systems that HaNoRec is compared with. SPRec: sprec.py, and picking.py, its scoring pass."""
